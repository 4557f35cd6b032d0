"""What a schema cannot say about gang scheduling. Pure."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kvasir_operator.api.structural_schema import Invalid, join

if TYPE_CHECKING:
    from kvasir_operator.api import Spec

KAI_QUEUE = "kai.scheduler/queue"
_PATH = "spec.scheduling.gang"


def gang_problems(spec: "Spec") -> Iterator[Invalid]:
    """A gang without workers over several nodes, and template fields that it sets itself."""
    gang = spec.scheduling.gang
    if gang is None:
        return
    roles = (("prefill", spec.prefill), ("decode", spec.decode))
    grouped = [(role, workers) for role, workers in roles if workers.nodes > 1]
    if not grouped:
        yield Invalid(_PATH, "means nothing where no role has nodes above 1: a worker is one pod")
    for role, workers in grouped if gang.provider != "Kueue" else ():
        path = f"spec.{role}.template"
        pod, metadata = workers.template.get("spec"), workers.template.get("metadata")
        if isinstance(pod, Mapping) and "schedulerName" in pod:
            yield Invalid(f"{path}.spec.schedulerName", f"is set by {_PATH}.provider: leave it out here")
        labels = metadata.get("labels") if isinstance(metadata, Mapping) else None
        if isinstance(labels, Mapping) and KAI_QUEUE in labels:
            yield Invalid(join(f"{path}.metadata.labels", KAI_QUEUE), f"is set by {_PATH}.queue: leave it out here")
