"""The operator's own Prometheus metrics."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvasir_operator.api import WORKER_ROLES
from kvasir_operator.scaling.planner import Signals
from kvasir_operator.scaling.roles import ScalingStatus

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30)
_SERVICE = ["namespace", "inferenceservice"]


class OperatorMetrics:
    """`result`: done, or retried when a reconcile left something for later."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.reconciles = Counter("kvasir_operator_reconciles", "Reconciles.", ["result"], registry=registry)
        self.seconds = Histogram(
            "kvasir_operator_reconcile_seconds", "Time of a reconcile.", buckets=_SECONDS, registry=registry
        )
        self.leader = Gauge("kvasir_operator_leader", "1 while this replica works.", registry=registry)
        self.services = Gauge(
            "kvasir_operator_inferenceservices", "InferenceServices this replica knows of.", registry=registry
        )
        self.scaling = ScalingMetrics()
        registry.register(self.scaling)
        self.capacity = CapacityMetrics()
        registry.register(self.capacity)


class CapacityMetrics(Collector):
    """The paired capacity of each service at its last reconcile, and its bound."""

    def __init__(self) -> None:
        self._services: dict[tuple[str, str], tuple[float, float]] = {}

    def show(self, key: tuple[str, str], found: tuple[float, float] | None) -> None:
        """Set the capacity and the bound of a service; `None` removes them."""
        if found is None:
            self._services.pop(key, None)
        else:
            self._services[key] = found

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See prometheus_client."""
        names = ("kvasir_operator_paired_capacity_ratio", "kvasir_operator_paired_capacity_bound_ratio")
        texts = ("Pairs of workers that are ready, of those that are wanted.", "Below this no rollout brings it.")
        for index, (name, text) in enumerate(zip(names, texts, strict=True)):
            family = GaugeMetricFamily(name, text, labels=_SERVICE)
            for key, found in list(self._services.items()):
                family.add_metric(list(key), found[index])
            yield family


class ScalingMetrics(Collector):
    """The scaling planner's last decisions, and what they are based on."""

    def __init__(self) -> None:
        self._services: dict[tuple[str, str], tuple[ScalingStatus, Signals | None]] = {}

    def show(self, key: tuple[str, str], scaling: ScalingStatus | None, signals: Signals | None) -> None:
        """Set the decision about a service; no decision removes it."""
        if scaling is None:
            self._services.pop(key, None)
        else:
            self._services[key] = scaling, signals

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See prometheus_client."""
        desired = GaugeMetricFamily(
            "kvasir_operator_scaling_desired_replicas",
            "What the scaling planner decided; mode Shadow: what it would have.",
            labels=[*_SERVICE, "role", "mode"],
        )
        load = GaugeMetricFamily(
            "kvasir_operator_scaling_load",
            "What the scaling planner went by. A signal that was not measured is absent.",
            labels=[*_SERVICE, "signal"],
        )
        for key, (scaling, signals) in list(self._services.items()):
            for role in WORKER_ROLES:
                desired.add_metric([*key, role, scaling.mode], scaling.role(role).replicas)
            for name in signals.__struct_fields__ if signals else ():
                if (value := getattr(signals, name)) is not None:
                    load.add_metric([*key, name], value)
        yield desired
        yield load
