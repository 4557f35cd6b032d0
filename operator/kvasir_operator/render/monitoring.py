"""How metrics are found: annotations on every pod, and a PodMonitor where the Prometheus operator is installed.

The annotations are there in either case, since what is installed in a cluster must not decide a pod's revision.
"""

from kvasir_operator.api import InferenceService
from kvasir_operator.render.names import (
    REVISION_LABEL,
    ROLE_LABEL,
    SERVICE_LABEL,
    Object,
    labels,
    metadata,
    router_name,
)
from kvasir_operator.render.pod import PORT

SCRAPE_ANNOTATIONS = {
    "prometheus.io/scrape": "true",
    "prometheus.io/port": str(PORT),
    "prometheus.io/path": "/metrics",
}
# Kinds that nobody misses where they are not served.
OPTIONAL_KINDS = frozenset({"PodMonitor"})


def pod_monitor(service: InferenceService) -> Object:
    """The PodMonitor of all pods that serve."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(service, router_name(service), labels(service, "router")),
        "spec": {
            "selector": {
                "matchLabels": {SERVICE_LABEL: service.name},
                "matchExpressions": [
                    {"key": ROLE_LABEL, "operator": "In", "values": ["prefill", "decode", "router"]}
                ],
            },
            "podTargetLabels": [SERVICE_LABEL, ROLE_LABEL, REVISION_LABEL],
            "podMetricsEndpoints": [{"port": "http", "path": "/metrics"}],
        },
    }
