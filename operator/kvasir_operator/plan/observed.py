"""The API server's view of an InferenceService's objects, as types. Pure: dictionaries in, values out."""

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from kvasir_operator.api import SET_KIND
from kvasir_operator.render.names import (
    INDEX_LABEL,
    KV_LABEL,
    LEADER_INDEX,
    REVISION_LABEL,
    ROLE_LABEL,
    SERVICE_LABEL,
    SET_LABEL,
    Object,
    Role,
)

# States of a waiting container that time alone does not mend.
STUCK = {
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
}
# A pod waits for a claim that is made in a moment, or never: time may mend it.
CLAIM_MISSING = "WaitingForResourceClaim"
MESSAGE_LENGTH = 300
SCHEDULER_LENGTH = 600
# What makes pods of what is rendered: the last two by way of StatefulSets.
CONTROLLERS = frozenset({"ReplicaSet", "Job", "StatefulSet", "LeaderWorkerSet"})


class Reference(msgspec.Struct, frozen=True, order=True):
    """A reference to an object of the namespace."""

    api_version: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Workload(msgspec.Struct, frozen=True):
    """What runs one revision of a role: a Deployment, or all of its sets of one group each, whose name is then what
    their names have in common. It counts pods, or groups; those on their way out are none of them.

    `grouped`: it is such sets. `pods`: how many there are, ready or not. `current`: its controller has seen the
    newest spec. `failure`: why it cannot create pods (quota, admission).
    """

    name: str
    role: Role
    revision: str
    wanted: int
    ready: int
    updated: int
    current: bool
    failure: str = ""
    kv: str = ""
    pods: int = 0
    grouped: bool = False

    @property
    def complete(self) -> bool:
        """Whether all wanted pods exist, are ready and have the newest template."""
        return self.current and self.ready >= self.wanted and self.updated >= self.wanted

    @property
    def empty(self) -> bool:
        """Whether no pod is wanted and none exists."""
        return self.current and not self.wanted and not self.pods


class PodProblem(msgspec.Struct, frozen=True, order=True):
    """Why a pod is not ready: a CamelCase reason and a message."""

    pod: str
    reason: str
    message: str


class PodState(msgspec.Struct, frozen=True):
    """A pod of a role, and what keeps it from being ready. `started`: seconds from creation to readiness.

    `group`: the set whose group it is in, empty where it is a whole worker. Only the leader of a group is asked
    anything: a `follower` has no more to say than that it is ready.
    """

    name: str
    role: Role
    revision: str
    ready: bool
    trouble: PodProblem | None = None
    ip: str = ""
    started: float | None = None
    group: str = ""
    follower: bool = False


class WorkerSet(msgspec.Struct, frozen=True):
    """A set: one worker of so many pods (`size`), which is ready when all of them are."""

    name: str
    role: Role
    revision: str
    kv: str
    size: int
    number: int
    ready: bool = False
    begun: bool = False


class Observed(msgspec.Struct, frozen=True):
    """Everything there is of an InferenceService. `objects`: what it owns (pods are owned by their Deployments).

    Pods that are `leaving` have been deleted, and finish what they have. `removing`: sets that are to be deleted,
    which was decided before; they count for nothing. `taken`: names that a new set cannot have, as one of that name
    is there, or pods of it still are.
    """

    objects: dict[Reference, Object] = {}
    pods: tuple[PodState, ...] = ()
    leaving: tuple[PodState, ...] = ()
    removing: dict[Reference, Object] = {}
    taken: frozenset[str] = frozenset()

    def workloads(self, role: Role) -> list[Workload]:
        """What runs the pods of a role, by name: its Deployments, then its sets, those of a revision together."""
        found = [deployment_state(o) for r, o in sorted(self.objects.items()) if r.kind == "Deployment"]
        by_name: dict[str, list[WorkerSet]] = {}
        for each in self.sets(role):
            by_name.setdefault(each.name.rpartition("-")[0], []).append(each)
        groups = [_workload(name, members) for name, members in sorted(by_name.items())]
        return [*(state for state in found if state.role == role), *groups]

    def sets(self, role: Role) -> list[WorkerSet]:
        """The sets of a role."""
        found = [self._set(o) for r, o in sorted(self.objects.items()) if r.kind == SET_KIND]
        return [each for each in found if each.role == role]

    def ready(self, workload: Workload) -> int:
        """How many of a workload are ready: by the pods themselves, as a Deployment's own count comes later."""
        own = [p for p in self.pods if (p.role, p.revision, p.group) == (workload.role, workload.revision, "")]
        return min(sum(p.ready for p in own) if own else workload.ready, workload.wanted)

    def _set(self, item: Object) -> WorkerSet:
        metadata = item["metadata"]
        name, size = metadata["name"], item["spec"]["leaderWorkerTemplate"].get("size", 1)
        role, revision = place_of(item)
        own = [p for p in self.pods if p.group == name]
        return WorkerSet(
            name=name,
            role=role,
            revision=revision,
            kv=_kv(item["spec"]["leaderWorkerTemplate"].get("workerTemplate", {})),
            size=size,
            number=int(ending) if (ending := name.rpartition("-")[2]).isdecimal() else -1,
            ready=sum(p.ready for p in own) >= size,
            begun=bool(own),
        )


def observe(objects: Iterable[Object], pods: Iterable[Object], removing: Collection[str] = ()) -> Observed:
    """The state of what was listed. Objects that are on their way out count for nothing, and neither do the sets
    that are named as `removing`."""
    present: list[PodState] = []
    leaving: list[PodState] = []
    for pod in pods:
        (leaving if "deletionTimestamp" in pod["metadata"] else present).append(pod_state(pod))
    there = {reference(o): o for o in objects}
    alive = {r: o for r, o in there.items() if "deletionTimestamp" not in o["metadata"]}
    going = {r: o for r, o in alive.items() if r.kind == SET_KIND and r.name in removing}
    return Observed(
        objects={r: o for r, o in alive.items() if r not in going},
        pods=tuple(present),
        leaving=tuple(leaving),
        removing=going,
        taken=frozenset({r.name for r in there if r.kind == SET_KIND} | {p.group for p in (*present, *leaving)}),
    )


def reference(item: Mapping[str, Any]) -> Reference:
    """The reference to this object."""
    return Reference(item["apiVersion"], item["kind"], item["metadata"]["name"])


def workload_name(target: Reference) -> str:
    """The name of the workload that an object is, or that a set belongs to."""
    return target.name.rpartition("-")[0] if target.kind == SET_KIND else target.name


def place_of(item: Mapping[str, Any]) -> tuple[Role, str]:
    """The role and revision that a Deployment or set runs, the revision empty where the name has none (a router's).

    By its name, which nobody can change. A label can be changed: no role would own the object then, and the plan
    would delete it or make it again.
    """
    service: str = item["metadata"]["labels"][SERVICE_LABEL]
    role, _, revision = workload_name(reference(item)).removeprefix(f"{service}-").partition("-")
    return role, revision  # type: ignore[return-value]


def _kv(template: Mapping[str, Any]) -> str:
    """The KV fingerprint on the pods of a template."""
    found: str = template.get("metadata", {}).get("labels", {}).get(KV_LABEL, "")
    return found


def _workload(name: str, sets: list[WorkerSet]) -> Workload:
    """The counts of a revision's sets."""
    first, ready = sets[0], sum(each.ready for each in sets)
    return Workload(
        name=name,
        role=first.role,
        revision=first.revision,
        wanted=len(sets),
        ready=ready,
        updated=ready,
        current=True,
        kv=first.kv,
        pods=sum(each.begun for each in sets),
        grouped=True,
    )


def deployment_state(item: Mapping[str, Any]) -> Workload:
    """The counts of a Deployment."""
    metadata, status = item["metadata"], item.get("status", {})
    failures = [c for c in status.get("conditions", []) if c["type"] == "ReplicaFailure" and c["status"] == "True"]
    role, revision = place_of(item)
    return Workload(
        name=metadata["name"],
        role=role,
        revision=revision,
        wanted=item["spec"].get("replicas", 1),
        ready=status.get("readyReplicas", 0),
        updated=status.get("updatedReplicas", 0),
        current=status.get("observedGeneration", 0) >= metadata.get("generation", 1),
        failure=_short(failures[0].get("message", "")) if failures else "",
        kv=_kv(item["spec"]["template"]),
        pods=status.get("replicas", 0),
    )


def pod_state(item: Mapping[str, Any]) -> PodState:
    """The state of a pod that carries a role's labels."""
    metadata, status = item["metadata"], item.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    ready = conditions.get("Ready", {}).get("status") == "True"
    return PodState(
        name=metadata["name"],
        role=metadata["labels"].get(ROLE_LABEL, ""),
        revision=metadata["labels"].get(REVISION_LABEL, ""),
        ready=ready,
        trouble=None if ready else _trouble(item, conditions),
        ip=status.get("podIP", "") if is_made_for(metadata) else "",
        started=_between(metadata, conditions["Ready"]) if ready else None,
        group=metadata["labels"].get(SET_LABEL, ""),
        follower=metadata["labels"].get(INDEX_LABEL, LEADER_INDEX) != LEADER_INDEX,
    )


def controller_of(item: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The owner reference of what controls an object."""
    owners: list[Mapping[str, Any]] = item["metadata"].get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), None)


def is_made_for(metadata: Mapping[str, Any]) -> bool:
    """Whether a pod's controller has the name of a workload of the service and role that its labels say.

    Anybody can set a label: such a pod is counted, but the operator sends it no request. Whether the controller is
    that workload, `reconcile/pod_owners.py` asks.
    """
    labels = metadata.get("labels", {})
    made = f"{labels.get(SERVICE_LABEL, '')}-{labels.get(ROLE_LABEL, '')}"
    owners = [owner for owner in metadata.get("ownerReferences", []) if owner.get("controller")]
    return any(
        owner.get("kind") in CONTROLLERS and f"{owner.get('name', '')}-".startswith(f"{made}-") for owner in owners
    )


def _between(metadata: Mapping[str, Any], became: Mapping[str, Any]) -> float | None:
    """Seconds from an object's creation to a condition's last transition."""
    begin, end = metadata.get("creationTimestamp"), became.get("lastTransitionTime")
    if not begin or not end:
        return None
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def _claim_missing(item: Mapping[str, Any]) -> str:
    """Of which claims a pod that no node has taken waits; empty where there are none.

    A scheduler that has not tried such a pod says nothing of it, and the template's absence is an Event only.
    """
    spec, status = item.get("spec", {}), item.get("status", {})
    if spec.get("nodeName"):
        return ""
    made = {each["name"] for each in status.get("resourceClaimStatuses", []) if each.get("resourceClaimName")}
    found = []
    for claim in spec.get("resourceClaims", []):
        if template := claim.get("resourceClaimTemplateName"):
            if claim["name"] not in made:
                found.append(
                    f"no ResourceClaim is made of ResourceClaimTemplate {template}; is it in the namespace?"
                )
        elif named := claim.get("resourceClaimName"):
            found.append(f"ResourceClaim {named} is not there yet, or not free")
    return "; ".join(found)


def _trouble(item: Mapping[str, Any], conditions: Mapping[str, Any]) -> PodProblem | None:
    name, status = item["metadata"]["name"], item.get("status", {})
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") != "True" and (missing := _claim_missing(item)):
        detail = f" ({_short(scheduled['message'])})" if scheduled.get("message") else ""
        return PodProblem(name, CLAIM_MISSING, f"{missing}{detail}")
    if scheduled.get("status") == "False":
        return PodProblem(name, scheduled.get("reason", "Unschedulable"), _begin(scheduled.get("message", "")))
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in containers:
        state, last = container.get("state", {}), container.get("lastState", {}).get("terminated")
        if waiting := state.get("waiting"):
            if waiting.get("reason") in STUCK:
                why = (last or {}).get("message") or waiting.get("message", "")
                return PodProblem(name, waiting["reason"], _short(why))
        elif terminated := state.get("terminated"):
            if terminated.get("exitCode"):
                return PodProblem(name, terminated.get("reason") or "Error", _exit(terminated))
        elif last and last.get("exitCode") and not container.get("ready"):
            return PodProblem(name, "Restarted", _exit(last))
    if status.get("phase") == "Failed":
        return PodProblem(name, status.get("reason") or "Failed", _short(status.get("message", "")))
    return None


def _exit(terminated: Mapping[str, Any]) -> str:
    return _short(terminated.get("message") or f"exited with status {terminated['exitCode']}")


def _begin(text: str) -> str:
    """The beginning of a message on one line: a scheduler counts the nodes there and says what each lacks."""
    line = " ".join(text.split())
    return line if len(line) <= SCHEDULER_LENGTH else line[: SCHEDULER_LENGTH - 3] + "..."


def _short(text: str) -> str:
    """The end of a message on one line: a program says there what went wrong."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_LENGTH else "..." + line[3 - MESSAGE_LENGTH :]
