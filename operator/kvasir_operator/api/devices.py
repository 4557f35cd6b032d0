"""The devices that a worker's container asks for: whole GPUs, unless the spec names others."""

import re
from collections.abc import Mapping
from typing import Any

from kvasir_operator.api.kinds import CONTAINER
from kvasir_operator.api.workers import PodOverlay, Workers

Object = dict[str, Any]
GPU = "nvidia.com/gpu"
# Parts of GPUs as NVIDIA's device plugin calls them: MIG devices, and GPUs that are shared by time.
SLICE = r"nvidia\.com/(mig-.+|gpu\..+)"


def requested(workers: PodOverlay) -> Object:
    """What the spec asks for the container, by `resources` and template: requests, limits, claims."""
    from_template = _of_template(workers.template)
    used = from_template.get("claims")
    return {
        "requests": {**workers.resources.requests, **_mapping(from_template.get("requests"))},
        "limits": {**workers.resources.limits, **_mapping(from_template.get("limits"))},
        "claims": [*claims(workers), *(used if isinstance(used, list) else ())],
    }


def claims(workers: PodOverlay) -> list[Object]:
    """The claims that the container uses by the spec's own fields."""
    if workers.resources.claims:
        return [
            {"name": claim.name, **({"request": claim.request} if claim.request else {})}
            for claim in workers.resources.claims
        ]
    return [{"name": claim.name} for claim in workers.resource_claims]


def pod_claims(workers: PodOverlay) -> list[Object]:
    """The claims of the pod."""
    found = []
    for claim in workers.resource_claims:
        named: Object = {"name": claim.name}
        if claim.resource_claim_name:
            named["resourceClaimName"] = claim.resource_claim_name
        if claim.resource_claim_template_name:
            named["resourceClaimTemplateName"] = claim.resource_claim_template_name
        found.append(named)
    return found


def whole_gpus(workers: Workers) -> bool:
    """Whether a worker asks for GPUs as Kvasir counts them: neither slices of GPUs nor claims take their place."""
    if workers.device != "cuda":
        return False
    resources = requested(workers)
    names = {*resources["requests"], *resources["limits"]}
    return not resources["claims"] and not any(re.fullmatch(SLICE, name) for name in names)


def selects_gpu_nodes(workers: Workers) -> bool:
    """Whether Kvasir selects the nodes by GPU product: a slice or a claim selects its device itself."""
    resources = requested(workers)
    return whole_gpus(workers) or GPU in {**resources["requests"], **resources["limits"]}


def _of_template(template: Mapping[str, Any]) -> Mapping[str, Any]:
    """The resources of the worker's container in a template, which may be anything."""
    containers = _mapping(template.get("spec")).get("containers")
    for container in containers if isinstance(containers, list) else ():
        if isinstance(container, Mapping) and container.get("name") == CONTAINER:
            return _mapping(container.get("resources"))
    return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
