"""Chooses the attention backend of a pool."""

from kvasir_engine.attention import flashinfer_backend
from kvasir_engine.attention.base import AttentionBackend, AttentionSpec
from kvasir_engine.attention.cpu_backend import CpuBackend, usable
from kvasir_engine.attention.invariant_backend import InvariantBackend
from kvasir_engine.attention.torch_backend import TorchBackend
from kvasir_engine.config import BackendName
from kvasir_engine.errors import ModelError
from kvasir_engine.kv.pool import KVPool


def refuse_missing(name: BackendName) -> None:
    """Raise ModelError when this machine lacks what the backend needs; call it before anything is loaded."""
    why = flashinfer_backend.missing() if name == "flashinfer" else None
    if why is not None:
        raise ModelError(f"no attention backend flashinfer: {why}")


def choose_backend(
    name: BackendName, pool: KVPool, spec: AttentionSpec, deterministic: bool = False
) -> AttentionBackend:
    """The backend of this name for `pool`; `torch` uses this package's kernels on CPUs that have them.

    `auto` is FlashInfer where it is available, else torch. `deterministic`: see ModelRunner. Raises ModelError.
    """
    why = flashinfer_backend.missing() or flashinfer_backend.unsupported(pool, spec)
    if name == "flashinfer" and why is not None:
        raise ModelError(f"no attention backend flashinfer: {why}")
    if deterministic and not usable(pool, spec):
        shape = pool.shape
        raise ModelError(
            f"deterministic mode: no kernel attends over heads of {shape.head_dim} and pages of {shape.page_size}"
        )
    if deterministic:
        return InvariantBackend(pool, spec)
    if name != "torch" and why is None:
        return flashinfer_backend.FlashInferBackend(pool, spec)
    return CpuBackend(pool, spec) if usable(pool, spec) else TorchBackend(pool, spec)
