"""The dashboard asks for metrics that are exported, by labels that they have."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

import kvasir_engine
from kvasir_engine.api.metrics import ApiMetrics
from kvasir_engine.core.metrics import EngineCollector
from kvasir_operator.metrics import OperatorMetrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "charts/kvasir/dashboards/kvasir.json").read_text())
ROUTER = Path(kvasir_engine.__file__).parent / "router"
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "summary": ("_sum", "_count"),
    "histogram": ("_bucket", "_sum", "_count"),
}


def series(families: Iterator[Metric]) -> set[str]:
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def router_series() -> set[str]:
    """The metrics that the router's code names: its classes need a pool of workers to be made."""
    found = set()
    for path in ROUTER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                kind = node.func.id.removesuffix("MetricFamily").lower()
                name = node.args[0]
                if kind in SUFFIXES and isinstance(name, ast.Constant):
                    found |= {f"{name.value}{suffix}" for suffix in SUFFIXES[kind]}
    return found


def exported() -> set[str]:
    api, operator = CollectorRegistry(), CollectorRegistry()
    ApiMetrics(api)
    OperatorMetrics(operator)
    engine = EngineCollector(MagicMock())
    return series(api.collect()) | series(operator.collect()) | series(iter(engine.collect())) | router_series()


def expressions() -> list[str]:
    targets: list[dict[str, Any]] = [t for panel in DASHBOARD["panels"] for t in panel.get("targets", [])]
    variables = [v.get("query", "") for v in DASHBOARD["templating"]["list"]]
    return [t["expr"] for t in targets] + [query for query in variables if "label_values" in query]


def test_every_metric_of_the_dashboard_is_exported() -> None:
    asked = {name for text in expressions() for name in re.findall(r"\bkvasir_\w+", text)}
    assert len(asked) > 20
    assert asked <= exported()


def test_brackets_close_and_labels_are_those_of_the_pods_and_the_metrics() -> None:
    for text in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert text.count(opening) == text.count(closing), text
    grouped = {
        label.strip()
        for text in expressions()
        for by in re.findall(r"by \(([^)]*)\)", text)
        for label in by.split(",")
    }
    assert grouped == {
        "code",
        "le",
        "serving_kvasir_dev_role",
        "role",
        "state",
        "owner",
        "reason",
        "result",
        "source",
    }


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
