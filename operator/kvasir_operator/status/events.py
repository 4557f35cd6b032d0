"""PURE: the Events of a status: one for each transition, and no other. `kubectl describe` shows them in order."""

from collections.abc import Mapping
from typing import Any

import msgspec

from kvasir_operator.api import WORKER_ROLES
from kvasir_operator.scaling.roles import ScalingStatus
from kvasir_operator.status.derive import Condition, Status

# A False for one of these reasons is part of the way, and no warning.
CALM = {
    "RollingOut",
    "Starting",
    "Loading",
    "Verifying",
    "NoReport",
    "ScaledToZero",
    "Scaling",
    "WaitingForResourceClaim",
}
# Conditions that are good when they are False, and what their end is called.
_ENDS = {"Degraded": "Recovered", "FabricDegraded": "FabricRecovered", "Progressing": "Complete"}
# What others tell already, or nobody waits for.
_QUIET = {"Stalled", "Reconciling", "MetricsReachable", "Exposed", "TransferEncrypted"}


class StatusEvent(msgspec.Struct, frozen=True):
    """An Event to post. `occasion` distinguishes it from others of the same reason."""

    warning: bool
    reason: str
    message: str
    since: str
    occasion: str


def status_events(previous: Mapping[str, Any], current: Status) -> list[StatusEvent]:
    """The Events of the conditions that differ from those in `previous`."""
    return [_status_event(condition) for condition in transitions(previous, current)]


def rescalings(before: ScalingStatus | None, current: ScalingStatus) -> list[StatusEvent]:
    """An Event for each role whose size the operator changes; a decision in mode Shadow is no Event."""
    if before is None or current.mode != "Auto" or before.mode != "Auto":
        return []
    found = []
    for role in WORKER_ROLES:
        old, new = before.role(role), current.role(role)
        if old.replicas != new.replicas:
            reason = "ScaledUp" if new.replicas > old.replicas else "ScaledDown"
            message = f"{role} from {old.replicas} to {new.replicas}: {new.reason}"
            found.append(StatusEvent(False, reason, message, new.since, f"{role} {new.replicas} {new.since}"))
    return found


def transitions(previous: Mapping[str, Any], current: Status) -> list[Condition]:
    """The conditions whose status is another than in `previous`; only of Accepted a first False says something new.

    What is unknown is not told: something is about to be known.
    """
    before = {condition["type"]: condition["status"] for condition in previous.get("conditions", [])}
    return [
        condition
        for condition in current.conditions
        if condition.status != "Unknown"
        and condition.type not in _QUIET
        and condition.status != _known(before.get(condition.type, "Unknown"), condition.type)
    ]


def _known(status: str, kind: str) -> str:
    return status if status != "Unknown" else ("" if kind == "Accepted" else "False")


def _status_event(condition: Condition) -> StatusEvent:
    kind, true = condition.type, condition.status == "True"
    message = f"{condition.reason}: {condition.message}"
    if kind in _ENDS:
        wrong = kind != "Progressing"
        reason = (kind if wrong else condition.reason) if true else _ENDS[kind]
        warning, message = wrong and true, message if wrong else condition.message
    else:
        reason, warning = kind if true else f"Not{kind}", not true and condition.reason not in CALM
    since = condition.last_transition_time
    return StatusEvent(warning, reason, message, since, f"{kind} {condition.status} {since}")
