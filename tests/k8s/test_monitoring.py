"""Dashboard and alerts: every series and label that they ask for is one that a replica shows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.metric_families import FAMILIES, LABELS

FOLDER = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
OF_RAY = {"ray_serve_deployment_queued_queries": ("application", "deployment")}
"""Series of Ray Serve's own; that they exist, tests/deployments/test_serving.py looks up."""
SERIES = {
    f"ray_nsa_{name}": (*LABELS, *family.labels, *(("le",) if name.endswith("_bucket") else ()))
    for family in FAMILIES.values()
    for name in family.series
} | OF_RAY


def expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


def labels_of(expression: str) -> set[str]:
    matched = re.findall(r"[{,]\s*(\w+)\s*=?[=~!]", expression)
    grouped = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
    return {*matched, *(name.strip() for names in grouped for name in names.split(","))}


@pytest.mark.parametrize(("place", "expression"), list(expressions()))
def test_every_series_and_label_exists(place: str, expression: str) -> None:
    names = set(re.findall(r"\bray_\w+", expression))
    assert names, f"{place} asks for nothing"
    assert names <= set(SERIES), f"{place}: there is no {names - set(SERIES)}"
    known = {label for name in names for label in SERIES[name]}
    assert labels_of(expression) <= known, f"{place}: {labels_of(expression) - known}"
    depth = 0
    for letter in re.sub(r'"[^"]*"', "", expression):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0, f"{place}: brackets do not match"


def test_the_look_at_labels_sees_them() -> None:
    found = labels_of('sum by (le, x) (rate(ray_nsa_a{model_name=~"m", y!="z"}[5m]))')
    assert found == {"le", "x", "model_name", "y"}


def test_alerts_say_what_is_wrong_with_labels_that_are_left() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert used <= labels_of(rule["expr"]), f"{rule['alert']}: {used}"


def test_panels_do_not_lie_on_each_other() -> None:
    places: list[dict[str, Any]] = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (place["x"] + x, place["y"] + y)
        for place in places
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
