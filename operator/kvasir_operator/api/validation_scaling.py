"""What a schema cannot say about scaling. Pure."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvasir_operator.api.structural_schema import Invalid

if TYPE_CHECKING:
    from kvasir_operator.api import Spec
    from kvasir_operator.api.scaling import AutoScaling

_PATH = "spec.scaling.auto"


def scaling_problems(spec: "Spec") -> Iterator[Invalid]:
    """Bounds that contradict each other, and fields that the mode does not use."""
    mode, auto = spec.scaling.mode, spec.scaling.auto
    if mode in ("Fixed", "External"):
        if auto is not None:
            yield Invalid(_PATH, f"means nothing with mode {mode}; use Auto or Shadow")
        return
    if auto is None:
        yield Invalid(_PATH, f"is required with mode {mode}: at least prefill.maxReplicas and decode.maxReplicas")
        return
    if spec.router.replicas == 0:
        yield Invalid("spec.router.replicas", f"may not be 0 with scaling mode {mode}: routers tell of the load")
    yield from _bounds(auto)
    yield from _budget(spec, auto)
    zero = auto.scale_to_zero
    if zero and zero.idle_seconds < auto.stabilization_window_seconds:
        yield Invalid(
            f"{_PATH}.scaleToZero.idleSeconds",
            f"{zero.idle_seconds} is less than stabilizationWindowSeconds, {auto.stabilization_window_seconds}",
        )


def _bounds(auto: "AutoScaling") -> Iterator[Invalid]:
    for role, bounds in (("prefill", auto.prefill), ("decode", auto.decode)):
        path = f"{_PATH}.{role}"
        if bounds.max_replicas == 0 and role == "decode":
            yield Invalid(f"{path}.maxReplicas", "must be at least 1: without decode nothing is served")
        elif bounds.min_replicas > bounds.max_replicas:
            yield Invalid(
                f"{path}.minReplicas", f"{bounds.min_replicas} is more than maxReplicas, {bounds.max_replicas}"
            )
        elif bounds.min_replicas == 0 < bounds.max_replicas:
            yield Invalid(
                f"{path}.minReplicas", "must be at least 1; both roles go to zero together with scaleToZero"
            )


def _budget(spec: "Spec", auto: "AutoScaling") -> Iterator[Invalid]:
    if not auto.max_gpus:
        return
    least, gpus = 0, False
    for workers, bounds in ((spec.prefill, auto.prefill), (spec.decode, auto.decode)):
        if workers.device == "cuda":
            gpus = True
            least += workers.tensor_parallel * bounds.min_replicas
    if not gpus:
        yield Invalid(f"{_PATH}.maxGpus", "means nothing where no role has device cuda")
    elif least > auto.max_gpus:
        yield Invalid(f"{_PATH}.maxGpus", f"{auto.max_gpus} do not suffice for minReplicas, which take {least}")
