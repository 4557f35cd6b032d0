"""PURE: the states of a pod's containers as a Kubernetes pod status."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from kvasir_operator.pods.podspec import Container, Pod


def now() -> datetime:
    """The present time in whole seconds, as Kubernetes writes it."""
    return datetime.now(UTC).replace(microsecond=0)


def timestamp(time: datetime) -> str:
    """RFC 3339, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Waiting:
    """The container does not run yet, or waits for its restart."""

    reason: str
    message: str = ""


@dataclass(frozen=True)
class Running:
    """The container runs since `started_at`; `pid` is its process on this machine."""

    started_at: datetime
    pid: int | None = None


@dataclass(frozen=True)
class Terminated:
    """The container has ended. `exit_code` is 128 + N for signal N."""

    exit_code: int
    reason: str
    message: str
    started_at: datetime
    finished_at: datetime


State = Waiting | Running | Terminated


class ContainerView(Protocol):
    """The state of a container at one moment."""

    spec: Container
    state: State
    last: Terminated | None
    restarts: int
    ready: bool
    started: bool


@dataclass(frozen=True)
class PodCondition:
    """A pod condition, and when its status last changed."""

    type: str
    status: bool
    since: datetime
    reason: str = ""
    message: str = ""


def phase(containers: Sequence[ContainerView]) -> str:
    """The pod's phase. A container that waits for its restart counts as running, as in Kubernetes."""
    if all(isinstance(c.state, Terminated) for c in containers):
        failed = any(isinstance(c.state, Terminated) and c.state.exit_code for c in containers)
        return "Failed" if failed else "Succeeded"
    if any(isinstance(c.state, Waiting) and c.last is None for c in containers):
        return "Pending"
    return "Running"


def conditions(
    containers: Sequence[ContainerView], before: Mapping[str, PodCondition], time: datetime
) -> dict[str, PodCondition]:
    """Initialized, ContainersReady and Ready. Those that did not change keep their transition times."""
    current = phase(containers)
    unready = [c.spec.name for c in containers if not c.ready]
    reason = message = ""
    if unready:
        done = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}
        reason = done.get(current, "ContainersNotReady")
        message = "" if current in done else f"containers with unready status: [{' '.join(unready)}]"
    found = {
        "Initialized": (True, "", ""),
        "ContainersReady": (not unready, reason, message),
        "Ready": (not unready, reason, message),
    }
    result: dict[str, PodCondition] = {}
    for kind, (status, why, text) in found.items():
        old = before.get(kind)
        since = old.since if old is not None and old.status == status else time
        result[kind] = PodCondition(kind, status, since, why, text)
    return result


def _state(state: State) -> dict[str, Any]:
    match state:
        case Waiting():
            return {"waiting": {"reason": state.reason, **({"message": state.message} if state.message else {})}}
        case Running():
            return {"running": {"startedAt": timestamp(state.started_at)}}
        case Terminated():
            ended: dict[str, Any] = {
                "exitCode": state.exit_code,
                "reason": state.reason,
                "startedAt": timestamp(state.started_at),
                "finishedAt": timestamp(state.finished_at),
            }
            return {"terminated": {**ended, **({"message": state.message} if state.message else {})}}


def _container(view: ContainerView) -> dict[str, Any]:
    return {
        "name": view.spec.name,
        "image": view.spec.image,
        "imageID": view.spec.image,
        "ready": view.ready,
        "started": view.started,
        "restartCount": view.restarts,
        "state": _state(view.state),
        "lastState": _state(view.last) if view.last is not None else {},
    }


def build(
    pod: Pod,
    containers: Sequence[ContainerView],
    known: Mapping[str, PodCondition],
    ip: str,
    host_ip: str,
    started: datetime,
) -> dict[str, Any]:
    """The whole `.status` that a kubelet writes, so without the scheduler's condition `PodScheduled`."""
    return {
        "phase": phase(containers),
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "hostIP": host_ip,
        "startTime": timestamp(started),
        "conditions": [
            {
                "type": c.type,
                "status": "True" if c.status else "False",
                "lastTransitionTime": timestamp(c.since),
                **({"reason": c.reason} if c.reason else {}),
                **({"message": c.message} if c.message else {}),
            }
            for c in known.values()
        ],
        "containerStatuses": [_container(c) for c in containers],
    }
