"""Which nodes the pods of a service prefer: a role's pods apart, prefill and decode together."""

from kvasir_operator.api import InferenceService
from kvasir_operator.render.names import SET_LABEL, Object, Role, selector, workers_of

HOST = "kubernetes.io/hostname"
_MOST_WEIGHT = 100
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


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
        affinity[_PREFERRED] = [{"weight": _MOST_WEIGHT, "podAffinityTerm": term}]


def gather(service: InferenceService, set_name: str, spec: Object) -> None:
    """Prefer the block of the worker's own pods to that of other workers: its ranks talk at every layer.

    Not LeaderWorkerSet's exclusive topology: that gives each group a block of its own, and would part prefill from
    decode. And a preference only: a leader that took a block's last place would wait for followers for ever.
    """
    if key := service.spec.placement.topology_key:
        affinity = spec["affinity"]["podAffinity"]
        own = {"labelSelector": {"matchLabels": {SET_LABEL: set_name}}, "topologyKey": key}
        others = [{**each, "weight": _MOST_WEIGHT // 2} for each in affinity[_PREFERRED]]
        affinity[_PREFERRED] = [{"weight": _MOST_WEIGHT, "podAffinityTerm": own}, *others]
