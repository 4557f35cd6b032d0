"""How the LeaderWorkerSet of a worker asks for all its pods to be placed at once, or none.

- Kueue takes the queue from a label of the set, and makes a workload of each group (kueue, docs/tasks/run).
- KAI takes pods by their scheduler's name and the queue from their label; its pod-grouper makes a PodGroup of a
  set's size (KAI-Scheduler, pkg/podgrouper).
- Volcano takes pods by their scheduler's name. LeaderWorkerSet makes the PodGroup of each group and names it at the
  pods, where its configuration has `gangSchedulingManagement`; the queue is the set's annotation (lws,
  pkg/schedulerprovider).
"""

from kvasir_operator.api import InferenceService
from kvasir_operator.api.validation_gang import KAI_QUEUE
from kvasir_operator.render.names import Object

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
VOLCANO_QUEUE = "scheduling.volcano.sh/queue-name"
SCHEDULERS = {"KAI": "kai-scheduler", "Volcano": "volcano"}


def place_pods(service: InferenceService, template: Object) -> None:
    """Give a group's pod template its scheduler."""
    gang = service.spec.scheduling.gang
    if gang is None or gang.provider not in SCHEDULERS:
        return
    template["spec"]["schedulerName"] = SCHEDULERS[gang.provider]
    if gang.provider == "KAI":
        template["metadata"]["labels"][KAI_QUEUE] = gang.queue


def place_set(service: InferenceService, metadata: Object) -> None:
    """Give a set's metadata its queue."""
    gang = service.spec.scheduling.gang
    if gang is None:
        return
    if gang.provider == "Volcano":
        metadata.setdefault("annotations", {})[VOLCANO_QUEUE] = gang.queue
    else:
        metadata["labels"][KUEUE_QUEUE if gang.provider == "Kueue" else KAI_QUEUE] = gang.queue


def queued(service: InferenceService) -> Object:
    """What else a group's revision covers besides its templates: another queue makes another revision."""
    gang = service.spec.scheduling.gang
    return {"gang": [gang.provider, gang.queue]} if gang else {}
