"""The status of an InferenceService, computed from what is observed and from nothing else. Pure.

All conditions are set by the operator's reconcile, which is their only writer.

| condition    | True when                                                    | absent when       | for Ready |
| ------------ | ------------------------------------------------------------ | ----------------- | --------- |
| Accepted     | the spec is valid and fits the model                         | never             | counts    |
| ModelCached  | the Job that loads the model into its claim is complete       | no claim caches   | counts    |
| PrefillReady | every prefill worker of this spec's revision is ready        | Accepted is False | counts    |
| DecodeReady  | every decode worker of this spec's revision is ready         | Accepted is False | counts    |
| RouterReady  | every router of this spec is ready, that is, has workers     | Accepted is False | counts    |
| Paused       | its annotation says so: no object is changed                  | it does not       | no        |
| Ready        | all of the above, and neither decode nor router has 0 wanted | never             | is it     |

Ready speaks of the spec at `observedGeneration`: during a rollout it is False with reason RollingOut while the old
revision still serves, and the message says with how many workers. Reasons of the role conditions: AllReady,
ScaledToZero, RollingOut, Starting, ApplyFailed (the API server did not take an object), FailedCreate (nor its
Deployment's pods: quota, admission), or what is wrong with a pod: Unschedulable, ImagePullBackOff, CrashLoopBackOff
and so on, with the pod's name and its own message.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvasir_operator.observed import Observed, Reference, Trouble, reference
from kvasir_operator.plan.preload import PRELOAD, Loading
from kvasir_operator.render.names import PAUSED, REVISION_LABEL, ROLE_LABEL, Object, Role
from kvasir_operator.schema import Invalid

ROLES: tuple[Role, ...] = ("prefill", "decode", "router")
CONDITIONS: dict[Role, str] = {"prefill": "PrefillReady", "decode": "DecodeReady", "router": "RouterReady"}


class Condition(msgspec.Struct, frozen=True, rename="camel"):
    """One observation, in the form of metav1.Condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    observed_generation: int
    last_transition_time: str


class RoleStatus(msgspec.Struct, frozen=True, rename="camel"):
    """The pods of one role."""

    replicas: Annotated[int, Meta(extra_json_schema={"description": "How many the spec wants."})]
    ready: Annotated[int, Meta(extra_json_schema={"description": "How many are ready at the spec's revision."})]
    summary: Annotated[str, Meta(extra_json_schema={"description": "ready/replicas."})]


class Status(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What is there."""

    observed_generation: int = 0
    conditions: list[Condition] = []
    model: Annotated[str, Meta(extra_json_schema={"description": "Name by which clients ask for the model."})] = ""
    url: Annotated[str, Meta(extra_json_schema={"description": "The OpenAI API is under /v1 of it."})] = ""
    prefill: RoleStatus | None = None
    decode: RoleStatus | None = None
    router: RoleStatus | None = None


class _Verdict(msgspec.Struct, frozen=True):
    type: str
    true: bool
    reason: str
    message: str


def rejected(problems: list[Invalid], generation: int, previous: Mapping[str, Any], now: datetime) -> Status:
    """The status of a service that cannot work. Nothing is said about its roles: nothing is done for them."""
    message = "; ".join(map(str, problems))
    verdicts = [
        _Verdict("Accepted", False, "Invalid", message),
        _Verdict("Ready", False, "NotAccepted", message),
    ]
    return Status(observed_generation=generation, conditions=_conditions(verdicts, generation, previous, now))


def accepted(
    desired: list[Object],
    observed: Observed,
    failures: Mapping[Reference, str],
    *,
    model: str,
    url: str,
    generation: int,
    previous: Mapping[str, Any],
    now: datetime,
    cached: Loading | None = None,
    paused: bool = False,
) -> Status:
    """The status of a service whose spec asks for `desired`.

    `failures`: what the API server said against objects it did not take. `previous`: the status so far, for
    transition times.
    """
    refused = {o["metadata"]["labels"][ROLE_LABEL]: why for o in desired if (why := failures.get(reference(o)))}
    roles = {role: _role(role, desired, observed, refused.get(role, "")) for role in ROLES}
    verdicts = [
        _Verdict("Accepted", True, "Valid", "spec is valid"),
        *_cached(cached, refused.get(PRELOAD, "")),
        *(verdict for _, verdict in roles.values()),
        *([_Verdict("Paused", True, "Annotated", f"nothing is changed while {PAUSED} is true")] if paused else []),
    ]
    verdicts.append(_ready(verdicts, {role: status.replicas for role, (status, _) in roles.items()}))
    return Status(
        observed_generation=generation,
        conditions=_conditions(verdicts, generation, previous, now),
        model=model,
        url=url,
        prefill=roles["prefill"][0],
        decode=roles["decode"][0],
        router=roles["router"][0],
    )


def _cached(state: Loading | None, refused: str) -> list[_Verdict]:
    if refused:
        return [_Verdict("ModelCached", False, "ApplyFailed", refused)]
    return [_Verdict("ModelCached", state.done, state.reason, state.message)] if state else []


def _role(role: Role, desired: list[Object], observed: Observed, refused: str) -> tuple[RoleStatus, _Verdict]:
    item = next(o for o in desired if o["kind"] == "Deployment" and o["metadata"]["labels"][ROLE_LABEL] == role)
    name, wanted = item["metadata"]["name"], int(item["spec"]["replicas"])
    revision = item["spec"]["template"]["metadata"]["labels"][REVISION_LABEL]
    states = observed.deployments(role)
    state = next((s for s in states if s.name == name), None)
    ready = min(state.ready, wanted) if state else 0
    status = RoleStatus(replicas=wanted, ready=ready, summary=f"{ready}/{wanted}")
    done = state is not None and state.complete and state.wanted == wanted
    condition, count = CONDITIONS[role], f"{ready} of {wanted} ready"
    if refused:
        return status, _Verdict(condition, False, "ApplyFailed", f"{count}; {refused}")
    if done and wanted == 0:
        return status, _Verdict(condition, True, "ScaledToZero", "no replicas are wanted")
    if done:
        return status, _Verdict(condition, True, "AllReady", count)
    if state and state.failure:
        return status, _Verdict(condition, False, "FailedCreate", f"{count}; {state.failure}")
    if trouble := _trouble(role, revision, observed):
        return status, _Verdict(condition, False, trouble.reason, f"{count}; {_told(trouble)}")
    serving = [f"{s.ready} of revision {s.revision}" for s in states if s.name != name and s.ready]
    if serving:
        message = f"{count} of revision {revision}; {' and '.join(serving)} still serve"
        return status, _Verdict(condition, False, "RollingOut", message)
    if state and ready == wanted:
        message = f"{count}, {min(state.updated, wanted)} of them of revision {revision}"
        return status, _Verdict(condition, False, "RollingOut", message)
    return status, _Verdict(condition, False, "Starting", count)


def _trouble(role: Role, revision: str, observed: Observed) -> Trouble | None:
    """The first trouble among the pods of the wanted revision, by pod name."""
    found = [p.trouble for p in observed.pods if p.role == role and p.revision == revision and p.trouble]
    return min(found, default=None)


def _told(trouble: Trouble) -> str:
    return f"pod {trouble.pod}: {trouble.reason}" + (f": {trouble.message}" if trouble.message else "")


def _ready(verdicts: list[_Verdict], replicas: dict[Role, int]) -> _Verdict:
    for verdict in verdicts:
        if not verdict.true:
            return _Verdict("Ready", False, verdict.reason, f"{verdict.type}: {verdict.message}")
    for role in ("decode", "router"):
        if replicas[role] == 0:
            return _Verdict("Ready", False, "ScaledToZero", f"no {role} replicas are wanted, so nothing is served")
    return _Verdict("Ready", True, "AllReady", "requests are served")


def _conditions(
    verdicts: list[_Verdict], generation: int, previous: Mapping[str, Any], now: datetime
) -> list[Condition]:
    before = {condition["type"]: condition for condition in previous.get("conditions", [])}
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    result = []
    for verdict in verdicts:
        status: Literal["True", "False"] = "True" if verdict.true else "False"
        old = before.get(verdict.type, {})
        since = old.get("lastTransitionTime", stamp) if old.get("status") == status else stamp
        result.append(Condition(verdict.type, status, verdict.reason, verdict.message, generation, since))
    return result


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two statuses say the same. API servers merge conditions by type, in an order of their own."""
    first, second = (
        {**status, "conditions": {condition["type"]: condition for condition in status.get("conditions", [])}}
        for status in (one, other)
    )
    return first == second


def transitions(previous: Mapping[str, Any], current: Status) -> list[Condition]:
    """The conditions whose status is another than in `previous`; a first False says nothing new but of Accepted."""
    before = {condition["type"]: condition["status"] for condition in previous.get("conditions", [])}
    return [
        condition
        for condition in current.conditions
        if before.get(condition.type, "False" if condition.type != "Accepted" else "") != condition.status
    ]
