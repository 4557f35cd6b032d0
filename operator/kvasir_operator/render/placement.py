"""Which nodes the pods of a service prefer: a role's pods apart, prefill and decode together."""

from kvasir_operator.render.names import Object, Role, selector, workers_of
from kvasir_operator.spec import InferenceService

HOST = "kubernetes.io/hostname"
_MOST_WEIGHT = 100


def spread(service: InferenceService, role: Role, spec: Object) -> None:
    """Prefer nodes that run no pod of this role yet, so that a node's loss costs fewer of them."""
    spec["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": HOST,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector(service, role)},
        }
    ]


def pair(service: InferenceService, spec: Object) -> None:
    """Prefer the block that has the service's workers already: KV travels between any two of them."""
    if key := service.spec.placement.topology_key:
        term = {"labelSelector": workers_of(service), "topologyKey": key}
        affinity = spec.setdefault("affinity", {}).setdefault("podAffinity", {})
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": _MOST_WEIGHT, "podAffinityTerm": term}
        ]
