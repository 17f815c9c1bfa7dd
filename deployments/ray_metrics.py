"""A replica's metrics through Ray's exporter, on each node's metrics port, as `ray_nsa_NAME`."""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from deployments.metric_families import FAMILIES, LABELS, Family


class RaySink:
    """Metrics of a Ray process. A counter is shown from its first increment on."""

    def __init__(self) -> None:
        self._metrics = {name: _metric(family) for name, family in FAMILIES.items()}

    def record(self, family: Family, value: float, labels: Mapping[str, str]) -> None:
        metric, tags = self._metrics[family.name], dict(labels)
        if isinstance(metric, Gauge):
            metric.set(value, tags=tags)
        elif isinstance(metric, Histogram):
            metric.observe(value, tags=tags)
        elif value > 0:
            metric.inc(value, tags=tags)


def _metric(family: Family) -> Gauge | Counter | Histogram:
    name, keys = f"nsa_{family.name}", (*LABELS, *family.labels)
    if family.kind == "gauge":
        return Gauge(name, family.about, tag_keys=keys)
    if family.kind == "counter":
        return Counter(name, family.about, tag_keys=keys)
    return Histogram(name, family.about, boundaries=list(family.buckets), tag_keys=keys)
