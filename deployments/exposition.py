"""Prometheus' text format of several replicas as one."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged_exposition(expositions: Iterable[str]) -> str:
    """One exposition of those of several replicas; each family appears once."""
    families: dict[str, Any] = {}
    for text in expositions:
        for family in text_string_to_metric_families(text):
            # When a series began is of no use once replicas come and go.
            if family.name.endswith("_created"):
                continue
            known = families.setdefault(family.name, family)
            if known is not family:
                known.samples.extend(family.samples)
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry).decode()
