"""Rules of the CRD in CEL, for API servers that know them (1.25 on): a bad spec is refused when it is applied.

They say a part of what `validation.py` says, which the operator checks in any case; a test holds the two together.
Pure.
"""

from typing import Any

from kvasir_operator.api.structural_schema import Schema

Path = tuple[str, ...]

_GPU = "nvidia.com/gpu"


def _unset(field: str) -> str:
    return f"(!has(self.{field}) || self.{field} == '')"


def _set(field: str) -> str:
    return f"(has(self.{field}) && self.{field} != '')"


def _asks_no_gpu(kind: str) -> str:
    absent = f"!has(self.resources) || !has(self.resources.{kind})"
    return f"self.device != 'cpu' || {absent} || !('{_GPU}' in self.resources.{kind})"


_BOUNDS = ("self.minReplicas <= self.maxReplicas", "minReplicas is more than maxReplicas")
_AWAKE = (
    "self.minReplicas > 0 || self.maxReplicas == 0",
    "minReplicas must be at least 1; both roles go to zero together with scaleToZero",
)

_NO_EAGER_GRAPHS = (
    "!has(self.enforceEager) || !self.enforceEager || !has(self.cudaGraphMaxBs) || self.cudaGraphMaxBs == 0",
    "cudaGraphMaxBs: with enforceEager there are no CUDA graphs",
)
_NO_PREFILL_GRAPHS = (
    "!has(self.cudaGraphMaxBs) || self.cudaGraphMaxBs == 0",
    "cudaGraphMaxBs: a prefill worker's steps are no CUDA graphs",
)

_WORKERS = (
    (
        "!has(self.engine) || !has(self.engine.quantization) || self.engine.quantization == 'none' || "
        "self.tensorParallel == 1",
        "engine.quantization: it takes one rank, so tensorParallel 1",
    ),
    (
        "self.tensorParallel % self.nodes == 0",
        "nodes: tensorParallel must be a multiple of it",
    ),
    (
        "self.device != 'cuda' || self.tensorParallel <= 8 * self.nodes",
        "tensorParallel: a node has 8 GPUs; divide the worker among more nodes",
    ),
    (_asks_no_gpu("requests"), "resources.requests: a role with device cpu asks for no GPU"),
    (_asks_no_gpu("limits"), "resources.limits: a role with device cpu asks for no GPU"),
)

RULES: dict[Path, tuple[tuple[str, str], ...]] = {
    ("model",): (
        (f"{_unset('revision')} || self.uri.startsWith('hf://')", "revision: only hf:// models have revisions"),
        (
            f"{_unset('tokenSecretName')} || self.uri.startsWith('hf://')",
            "tokenSecretName: only hf:// models need a token",
        ),
        (
            "!(self.uri.startsWith('pvc://') || self.uri.startsWith('file://')) || "
            f"({_unset('cache.claimName')} && {_unset('cache.hostPath')})",
            "cache: nothing is downloaded from pvc:// and file://",
        ),
    ),
    ("model", "cache"): (
        (f"{_unset('claimName')} || {_unset('hostPath')}", "has both claimName and hostPath; one of them is used"),
    ),
    ("engine",): (_NO_EAGER_GRAPHS,),
    ("prefill",): _WORKERS,
    ("decode",): _WORKERS,
    ("prefill", "engine"): (_NO_EAGER_GRAPHS, _NO_PREFILL_GRAPHS),
    ("decode", "engine"): (_NO_EAGER_GRAPHS,),
    ("router", "expose"): (
        (
            f"self.type != 'Service' || ({_unset('host')} && {_unset('className')} && {_unset('tlsSecretName')})",
            "host, className and tlsSecretName mean nothing with type Service; use Ingress or HTTPRoute",
        ),
        (
            f"self.type != 'Ingress' || {_unset('className')} || !self.className.contains('/')",
            "className: the name of an IngressClass has no slash",
        ),
        (
            f"self.type != 'HTTPRoute' || {_set('className')}",
            "className: an HTTPRoute needs its Gateway here, as name or namespace/name",
        ),
        (
            f"!(self.type in ['HTTPRoute', 'InferencePool']) || {_unset('tlsSecretName')}",
            "tlsSecretName: an HTTPRoute's certificate belongs to its Gateway",
        ),
        (
            f"self.type != 'InferencePool' || {_unset('host')} || {_set('className')}",
            "host: belongs to an HTTPRoute, for which className names the Gateway",
        ),
        (
            "self.type != 'InferencePool' || has(self.endpointPicker)",
            "endpointPicker: an InferencePool needs the Service of its endpoint picker",
        ),
        (
            "self.type == 'InferencePool' || !has(self.endpointPicker)",
            "endpointPicker: means nothing without type InferencePool",
        ),
    ),
    ("scaling",): (
        (
            "self.mode in ['Auto', 'Shadow'] || !has(self.auto)",
            "auto means nothing with mode Fixed or External; use Auto or Shadow",
        ),
        (
            "!(self.mode in ['Auto', 'Shadow']) || has(self.auto)",
            "auto is required with mode Auto or Shadow: at least prefill.maxReplicas and decode.maxReplicas",
        ),
    ),
    ("scaling", "auto"): (
        (
            "!has(self.scaleToZero) || self.scaleToZero.idleSeconds >= self.stabilizationWindowSeconds",
            "scaleToZero.idleSeconds is less than stabilizationWindowSeconds",
        ),
    ),
    ("scaling", "auto", "prefill"): (_BOUNDS, _AWAKE),
    ("scaling", "auto", "decode"): (
        _BOUNDS,
        _AWAKE,
        ("self.maxReplicas > 0", "maxReplicas must be at least 1: without decode nothing is served"),
    ),
    ("transfer",): (
        (
            f"self.fabric != 'rdma' || {_set('rdmaResource')}",
            "rdmaResource: fabric rdma needs the extended resource that gives a pod its RDMA device",
        ),
        (
            f"!(self.fabric in ['tcp', 'shm']) || {_unset('rdmaResource')}",
            "rdmaResource: means nothing with fabric tcp or shm",
        ),
    ),
}


def add_rules(spec: Schema) -> None:
    """Put the rules into the schema of a spec, each at the object of which it speaks."""
    for path, rules in RULES.items():
        schema: dict[str, Any] = spec
        for name in path:
            schema = schema["properties"][name]
        schema["x-kubernetes-validations"] = [{"rule": rule, "message": message} for rule, message in rules]
