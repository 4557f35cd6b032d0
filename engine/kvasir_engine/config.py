"""Every setting of the engine, once: `EngineConfig`. Flags, variables and the KV's fingerprint are made from it.

A new setting is a field here. `Setting` says what else there is to know of it. The operator reads the fields too,
so this module imports nothing heavy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from kvasir_engine.errors import ModelError, UserError
from kvasir_engine.nodes import Nodes, nodes_of
from kvasir_engine.protocol import Encryption, Role
from kvasir_engine.quantity import amount
from kvasir_engine.transport_policy import ENCRYPTED_FABRICS

BackendName = Literal["auto", "torch", "flashinfer"]
Fabric = Literal["auto", "rdma", "tcp", "shm"]
Overlap = Literal["auto", "on", "off"]
Switch = Literal["on", "off"]
Quantization = Literal["none", "int8"]
"""Of weights: int8 has a scale for each output."""
VerifyCachedPages = Literal["auto", "all", "sampled", "off"]
Reader = Literal["worker", "leader", "node"]
"""Who reads a setting: all nodes of a worker, which must agree; its leader alone; each node its own."""

LARGEST_GRAPH = 1024
"""Sequences of the largest batch that is captured unless another is asked for: kernels of larger ones take longer
than their launches."""

PREFIX = "KVASIR_"
_MODEL = "hf://org/name[@rev], file:///path or package://name"
_NODE_RANK = (
    "which of them this is; 0 leads. The others load the model themselves, have to be told the same as "
    "the leader, and leave to it what concerns requests: lengths, limits, queues, overlap, names"
)
_TRUE = ("1", "true", "t", "yes", "y", "on")
_FALSE = ("0", "false", "f", "no", "n", "off")


@dataclass(frozen=True)
class Setting:
    """What a field of `EngineConfig` says of itself beyond its type and default.

    `changes_kv`: KV of workers that differ here is not exchangeable. `worker_only`: `kvasir serve` lacks the flag.
    `negative`: a switch has --no-FLAG too. `quantity`: the flag takes a Kubernetes quantity, the field is in bytes.
    """

    help: str = ""
    minimum: int | None = None
    maximum: int | None = None
    changes_kv: bool = False
    reader: Reader = "worker"
    worker_only: bool = False
    negative: bool = True
    quantity: bool = False


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker is told: valid once it is there. It is sent whole to every rank and node.

    Raises UserError, or ModelError for what no model makes right.
    """

    model: Annotated[str, Setting(_MODEL, changes_kv=True)]
    role: Annotated[Role, Setting("prefill, decode or both", worker_only=True)] = "both"
    revision: Annotated[str, Setting("of a hub model", changes_kv=True)] = ""
    served_model_name: Annotated[str, Setting("the name in the API", reader="leader")] = ""
    max_length: Annotated[
        int, Setting("most tokens of a sequence, 0: the model's own", minimum=0, reader="leader")
    ] = 0
    host: Annotated[str, Setting(reader="node")] = "0.0.0.0"
    port: Annotated[int, Setting("0: a free one", minimum=0, maximum=65535, reader="node")] = 8000
    dtype: Annotated[str, Setting("auto, bfloat16, float16 or float32", changes_kv=True)] = "auto"
    device: Annotated[str, Setting("auto, cpu or cuda")] = "auto"
    attention_backend: Annotated[BackendName, Setting("auto, torch or flashinfer (NVIDIA GPUs)")] = "auto"
    overlap: Annotated[
        Overlap,
        Setting("prepare a step while the one before runs: auto (on GPUs), on or off", reader="leader"),
    ] = "auto"
    jump_forward: Annotated[
        Switch,
        Setting("append what a grammar forces without a step a token: on or off", reader="leader"),
    ] = "on"
    enforce_eager: Annotated[bool, Setting("on GPUs: decode without CUDA graphs", negative=False)] = False
    cuda_graph_max_bs: Annotated[
        int,
        Setting(
            "sequences of the largest decode batch that is a CUDA graph, 0: max-running, up to 1024", minimum=0
        ),
    ] = 0
    tensor_parallel: Annotated[int, Setting("processes, or GPUs", minimum=1)] = 1
    page_size: Annotated[int, Setting("tokens a page", minimum=1, maximum=256, changes_kv=True)] = 16
    kv_cache_memory: Annotated[
        int,
        Setting(
            "memory of the KV pool, all ranks, such as 512Mi; 0: from what is free",
            minimum=0,
            quantity=True,
        ),
    ] = 0
    gpu_sharers: Annotated[
        int,
        Setting("workers that divide a GPU's memory among them, this one included", minimum=1, worker_only=True),
    ] = 1
    max_running: Annotated[int, Setting("most sequences in a batch", minimum=1, reader="leader")] = 64
    prefill_chunk: Annotated[int, Setting("most prompt tokens a step", minimum=1, reader="leader")] = 512
    fabric: Annotated[Fabric, Setting("auto, rdma, tcp or shm", worker_only=True)] = "auto"
    kv_digests: Annotated[
        bool, Setting("check each page that moved before use", changes_kv=True, worker_only=True)
    ] = True
    verify_cached_pages: Annotated[
        VerifyCachedPages,
        Setting(
            "compare cached pages with what was stored before they are used again: all, sampled (one of 8), off; "
            "auto: all on CPUs, where other workers can write to the pool",
            reader="leader",
        ),
    ] = "auto"
    check_pages: Annotated[
        bool, Setting("debugging: check at each step that every page has one owner", reader="leader")
    ] = False
    deterministic: Annotated[
        bool, Setting("the same bits for a request in any batch, on CPUs in bfloat16; slower")
    ] = False
    quantization: Annotated[
        Quantization,
        Setting("none, or int8: of the layers' weights, a scale an output, on CPUs", changes_kv=True),
    ] = "none"
    max_waiting: Annotated[
        int, Setting("most requests that wait, 0: any; more get 503", minimum=0, reader="leader")
    ] = 1024
    queue_seconds: Annotated[
        float, Setting("longest wait for a first step, 0: any; then 503", minimum=0, reader="leader")
    ] = 0.0
    drain_seconds: Annotated[float, Setting("to finish what runs", minimum=0, reader="node")] = 600.0
    nnodes: Annotated[
        int, Setting("machines that the ranks are divided among, evenly", minimum=1, worker_only=True)
    ] = 1
    node_rank: Annotated[int, Setting(_NODE_RANK, reader="node", worker_only=True)] = 0
    tls_dir: Annotated[
        str,
        Setting(
            "folder of ca.crt, tls.crt and tls.key: routers and other nodes have to show a certificate of the same "
            "InferenceService; looked at again when it changes",
            reader="node",
            worker_only=True,
        ),
    ] = ""
    worker_port: Annotated[
        int,
        Setting(
            "with tls-dir: where routers come to; 0: a free one",
            minimum=0,
            maximum=65535,
            reader="leader",
            worker_only=True,
        ),
    ] = 8443
    encryption: Annotated[
        Encryption,
        Setting(
            "auto: TLS between processes where there is a tls-dir, KV as the fabric has it; required: and no KV by "
            "a transport that leaves the machine, as none encrypts; off",
            worker_only=True,
        ),
    ] = "auto"
    dist_init_addr: Annotated[
        str,
        Setting("HOST:PORT at which the leader listens for the other nodes", reader="node", worker_only=True),
    ] = ""

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            field.check(getattr(self, name))
        nodes_of(self.nnodes, self.node_rank, self.dist_init_addr, self.tensor_parallel)
        if self.gpu_sharers > 1 and self.tensor_parallel > 1:
            raise ModelError(f"gpu-sharers {self.gpu_sharers}: a worker that shares a GPU has one rank")
        if self.quantization != "none" and self.tensor_parallel > 1:
            raise ModelError(f"{self.quantization} quantization: it takes one rank, not {self.tensor_parallel}")
        self._check_graphs()
        self._check_encryption()

    def _check_encryption(self) -> None:
        if self.tls_dir and self.encryption == "off":
            raise UserError(f"encryption off and tls-dir {self.tls_dir}: there is TLS or there is none")
        if self.tls_dir and self.port and self.worker_port == self.port:
            raise UserError(f"worker-port {self.worker_port} is port too: with tls-dir they are two")
        if self.encryption != "required":
            return
        if not self.tls_dir:
            raise UserError("encryption required: it needs --tls-dir")
        if self.fabric not in ENCRYPTED_FABRICS:
            raise UserError(
                f"encryption required and fabric {self.fabric}: NIXL over {self.fabric} is not encrypted; "
                "shm stays within a machine"
            )
        if self.nnodes > 1:
            raise UserError(
                f"encryption required and nnodes {self.nnodes}: what goes between machines is not encrypted"
            )

    def _check_graphs(self) -> None:
        largest = self.cuda_graph_max_bs
        if largest and self.enforce_eager:
            raise ModelError(
                f"cuda-graph-max-bs {largest} and enforce-eager: there are CUDA graphs or there are none"
            )
        if largest > self.max_running and not self.node_rank:  # the leader alone is told max-running
            raise ModelError(f"cuda-graph-max-bs {largest} is more than max-running {self.max_running}")
        if largest and self.role == "prefill":
            raise ModelError(f"cuda-graph-max-bs {largest}: a prefill worker's steps are no CUDA graphs")

    @property
    def nodes(self) -> Nodes | None:
        """The nodes of the worker, and which this is; None for one."""
        return nodes_of(self.nnodes, self.node_rank, self.dist_init_addr, self.tensor_parallel)

    @property
    def largest_graph(self) -> int:
        """Sequences of the largest batch that is to be a CUDA graph on a GPU; 0 for none."""
        if self.enforce_eager or self.role == "prefill":
            return 0
        return self.cuda_graph_max_bs or min(self.max_running, LARGEST_GRAPH)

    def mismatch(self, node: "EngineConfig") -> str | None:
        """The first setting in which a node departs from this, its leader's, where they must agree."""
        for name, field in FIELDS.items():
            ours, theirs = getattr(self, name), getattr(node, name)
            if field.setting.reader == "worker" and ours != theirs:
                return f"{name} is {ours!r} at the leader and {theirs!r} at the node"
        return None


@dataclass(frozen=True)
class Field:
    """A setting as the command line, the environment and the manifest know it."""

    name: str
    type: Any
    default: Any
    """`msgspec.NODEFAULT` where it has to be said."""
    setting: Setting

    @property
    def flag(self) -> str:
        """The flag, without its dashes."""
        return self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The variable of the environment."""
        return PREFIX + self.name.upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """All values of a setting that is one of several; empty for others."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def check(self, value: Any) -> None:
        """Raise UserError for a value out of range."""
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name.replace('_', ' ')} {value!r} is none of {', '.join(self.choices)}")
        low, high = self.setting.minimum, self.setting.maximum
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self.flag} {value!r} is not a number of seconds")
        if (low is not None and value < low) or (high is not None and value > high):
            raise UserError(
                f"{self.flag} {value!r} is " + (f"less than {low}" if value < low else f"more than {high}")
            )

    def canonical(self, text: str) -> str:
        """One spelling for all texts that the command line reads alike; what it cannot read stays."""
        if self.type is bool:
            word = text.strip().lower()
            return "true" if word in _TRUE else "false" if word in _FALSE else text
        try:
            return str(int(text)) if self.type is int and not self.setting.quantity else text
        except ValueError:
            return text

    @property
    def default_text(self) -> str:
        """The default as text that `canonical` gives; empty for what has to be said."""
        if self.default is msgspec.NODEFAULT:
            return ""
        return str(self.default).lower() if self.type is bool else str(self.default)


def _fields() -> dict[str, Field]:
    hints = get_type_hints(EngineConfig, include_extras=True)
    found = {}
    for each in msgspec.structs.fields(EngineConfig):
        kind, setting = get_args(hints[each.name])
        found[each.name] = Field(each.name, kind, each.default, setting)
    return found


FIELDS: Mapping[str, Field] = _fields()
KV_FIELDS: Mapping[str, Field] = {name: field for name, field in FIELDS.items() if field.setting.changes_kv}
"""Those by which the KV of two workers is not exchangeable."""


def bytes_of(quantity: str) -> int:
    """A Kubernetes quantity in bytes. Raises UserError."""
    value = amount(quantity)
    if value is None or quantity[-1] in "num" or value >= 2**60:
        raise UserError(f"{quantity!r} is no amount of memory; write for example 512Mi or 4Gi")
    return int(value)


def config_of(said: Mapping[str, Any]) -> EngineConfig:
    """The configuration that flags and variables say, quantities as text. Raises UserError."""
    quantities = {name: bytes_of(said[name]) for name, field in FIELDS.items() if field.setting.quantity}
    return EngineConfig(**{**said, **quantities})
