"""The operator's own Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30)


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
