"""What containers ask for, and may take at most, where the spec says nothing.

Limits of memory are far above what is needed: they end what leaks, before a node ends whatever else runs there. A
node ends first what has more on its disk than it asked for, so the model is asked for where it is kept in the pod.
"""

from collections.abc import Mapping

from kvasir_engine.quantity import amount
from kvasir_operator.api import InferenceService, Workers
from kvasir_operator.render.names import Object
from kvasir_operator.render.options import Options
from kvasir_operator.render.storage import downloads

ROUTER_REQUESTS = {"cpu": "1", "memory": "1Gi"}
ROUTER_MEMORY_LIMIT = "8Gi"
PRELOAD_REQUESTS = {"cpu": "1", "memory": "2Gi"}
PRELOAD_MEMORY_LIMIT = "64Gi"
WORKER_MEMORY_LIMIT_PER_RANK_GI = 64
# Of the scratch volume, the log, and what numba and Triton compile.
SCRATCH_MI = 2048
_GI, _MI = 2**30, 2**20
Amounts = Mapping[str, int | str]
_LIMITED = 2  # the defaults (`Options.defaults`) since which there are these


def router_resources(options: Options) -> Object:
    """The resources of the router's container."""
    return _with(options, ROUTER_REQUESTS, {"memory": ROUTER_MEMORY_LIMIT}, SCRATCH_MI)


def preload_resources(options: Options) -> Object:
    """The resources of the container that loads a model into a claim."""
    return _with(options, PRELOAD_REQUESTS, {"memory": PRELOAD_MEMORY_LIMIT}, SCRATCH_MI)


def worker_resources(
    service: InferenceService, workers: Workers, options: Options, requests: Amounts, limits: Amounts
) -> Object:
    """The resources of a worker's container, whose own `requests` and `limits` are of CPUs, memory and devices."""
    return _with(
        options, requests, {"memory": _most_memory(service, workers), **limits}, SCRATCH_MI + _model_mi(service)
    )


def _with(options: Options, requests: Amounts, limits: Amounts, disk: int) -> Object:
    if options.defaults < _LIMITED:
        limits = {name: value for name, value in limits.items() if name != "memory"}
        return {"requests": dict(requests), "limits": limits}
    return {"requests": {**requests, "ephemeral-storage": f"{disk}Mi"}, "limits": dict(limits)}


def _most_memory(service: InferenceService, workers: Workers) -> str:
    """A share for each rank; on CPUs also the weights, twice as they are loaded, and the KV pool."""
    most = WORKER_MEMORY_LIMIT_PER_RANK_GI * workers.ranks_per_pod
    if workers.device == "cpu":
        pool = workers.engine.kv_cache_memory or service.spec.engine.kv_cache_memory or 0
        most += int((2 * (amount(service.spec.model.size) or 0) + (amount(pool) or 0)) / _GI)
    return f"{most}Gi"


def _model_mi(service: InferenceService) -> int:
    """What a pod keeps of the model on its node's disk: 0 where the model has a volume of its own."""
    cache = service.spec.model.cache
    if not downloads(service) or cache.claim_name or cache.host_path:
        return 0
    return -int(-(amount(service.spec.model.size) or 0) // _MI)
