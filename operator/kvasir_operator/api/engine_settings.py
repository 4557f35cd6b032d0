"""The engine's settings as the spec has them: for all workers, and for those of one role.

Type, range and default of each are those of `EngineConfig`, of which a test holds these to be.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from kvasir_engine.config import FIELDS, BackendName, Overlap, Quantization, Switch, VerifyCachedPages
from kvasir_operator.api.fields import Part, Quantity, about, text, words

_MOST = 2**31 - 1

NOT_IN_SPEC = frozenset({"check_pages", "gpu_sharers"})
"""Settings of the engine that the spec neither derives nor names: for debugging, and for machines that run no
Kubernetes. `extraArgs` takes them."""


def _meta(name: str, description: str) -> Meta:
    """A setting's description, with the range and default that `EngineConfig` has."""
    field = FIELDS[name]
    default = f"{field.default:g}" if isinstance(field.default, float) else field.default_text
    description = f"{description} Default: {default}."
    if field.choices or field.type is bool or field.setting.quantity:
        return about(description)
    least, most = field.setting.minimum, field.setting.maximum
    return Meta(ge=least, le=_MOST if most is None else most, extra_json_schema={"description": description})


class EngineSettings(Part, frozen=True):
    """What workers are told. What is not set is the engine's own default."""

    kv_cache_memory: (
        Annotated[Quantity, _meta("kv_cache_memory", "A worker's KV pool, as 4Gi; 0: what is free.")] | None
    ) = None
    page_size: Annotated[int, _meta("page_size", "Tokens a page of the KV pool.")] | None = None
    max_running: Annotated[int, _meta("max_running", "Most sequences in a batch.")] | None = None
    prefill_chunk: Annotated[int, _meta("prefill_chunk", "Most prompt tokens a step.")] | None = None
    max_waiting: (
        Annotated[int, _meta("max_waiting", "Most requests that wait at a worker, 0: any; more get status 503.")]
        | None
    ) = None
    queue_seconds: (
        Annotated[int, _meta("queue_seconds", "Longest wait for a first step, 0: any; then status 503.")] | None
    ) = None
    quantization: (
        Annotated[Quantization, _meta("quantization", "Of the layers' weights; int8: on CPUs, one rank.")] | None
    ) = None
    deterministic: (
        Annotated[bool, _meta("deterministic", "The same bits in any batch, on CPUs in bfloat16.")] | None
    ) = None
    kv_digests: Annotated[bool, _meta("kv_digests", "Check each page that moved before use.")] | None = None
    verify_cached_pages: (
        Annotated[
            VerifyCachedPages,
            _meta(
                "verify_cached_pages",
                'On CPUs, compare cached pages with what was stored before use. In YAML quote "off".',
            ),
        ]
        | None
    ) = None
    attention_backend: (
        Annotated[BackendName, _meta("attention_backend", "How attention is computed; flashinfer: on NVIDIA GPUs.")]
        | None
    ) = None
    overlap: (
        Annotated[
            Overlap,
            _meta("overlap", 'Prepare a step while the one before runs; auto: on GPUs. YAML wants "on" in quotes.'),
        ]
        | None
    ) = None
    jump_forward: (
        Annotated[
            Switch,
            _meta("jump_forward", 'Append forced text of a grammar without a step a token. In YAML quote "on".'),
        ]
        | None
    ) = None
    enforce_eager: Annotated[bool, _meta("enforce_eager", "On GPUs, decode without CUDA graphs.")] | None = None
    cuda_graph_max_bs: (
        Annotated[
            int,
            _meta(
                "cuda_graph_max_bs",
                "Of decode: sequences of the largest batch that is a CUDA graph, 0: maxRunning, up to 1024.",
            ),
        ]
        | None
    ) = None
    extra_args: Annotated[
        list[Annotated[str, text("A flag of `kvasir worker`, or the value of the flag before it.", length=1024)]],
        words("Further flags of workers, for what no field says. A role's come after the service's.", 64),
    ] = []


SETTINGS = tuple(field.name for field in msgspec.structs.fields(EngineSettings) if field.name != "extra_args")
"""Those that are a field each, by their names in `EngineConfig`."""
