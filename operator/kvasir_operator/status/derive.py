"""The status of an InferenceService, computed from what is observed and from nothing else. Pure.

All conditions are set by the operator's reconcile, which is their only writer.

| condition          | True when                                                   | absent when       | for Ready |
| ------------------ | ---------------------------------------------------------- | ----------------- | --------- |
| Accepted           | the spec is valid and fits the model                        | never             | counts    |
| ModelCached        | the Job that loads the model into its claim is complete     | no claim caches   | counts    |
| PrefillReady       | every prefill worker of this spec's revision is ready       | Accepted is False | counts    |
| DecodeReady        | every decode worker of this spec's revision is ready        | Accepted is False | counts    |
| RouterReady        | every router of this spec is ready, that is, has workers    | Accepted is False | counts    |
| KVTransferVerified | a router's canary was decoded from KV that moved            | a role has 0, (1) | counts    |
| Progressing        | workers come or go: RollingOut, Scaling, Draining           | Accepted is False | no        |
| FabricDegraded     | a link gives a tenth of what its fabric should              | none was measured | no, (2)   |
| Degraded           | what is wrong is not mended by time alone, or was right     | Accepted is False | no        |
| Paused             | its annotation says so: no object is changed                | it does not       | no        |
| Exposed            | the way in that the spec wants is served                    | type is Service   | no        |
| MetricsReachable   | NetworkPolicies let the configured monitoring in            | there are none    | no        |
| CertificatesReady  | its pods' certificates are issued                           | encryption is Off | no        |
| TransferEncrypted  | nobody on the network reads KV or control connections       | Accepted is False | no        |
| Stalled            | not Ready, and time alone does not mend it (kstatus)        | it is not so      | no        |
| Reconciling        | not Ready yet, or workers come or go (kstatus)              | it is not so      | no        |
| Ready              | all that counts, and neither decode nor router has 0 wanted | never             | is it     |

(1) or Accepted is False. (2) but its message is told with that of Ready.

Where the operator scales roles itself (mode Auto), Ready does not fall while workers come beyond the fewest, nor,
where routers hold requests, while there are none: what counts is that requests are served.

Ready speaks of the spec at `observedGeneration`: during a rollout it is False with reason RollingOut while the old
revision still serves, and the message says with how many workers. Reasons of the role conditions: AllReady,
ScaledToZero, RollingOut, Starting, ApplyFailed (the API server did not take an object), FailedCreate (nor its
Deployment's pods: quota, admission), WaitingForResourceClaim, or what is wrong with a pod: Unschedulable,
ImagePullBackOff, CrashLoopBackOff and so on, with the pod's name and its own message. Of KVTransferVerified:
CanaryPassed, CanaryFailed, NoPair (fingerprints that do not fit, by field), and Unknown with Verifying or NoReport;
a router that does not answer takes nothing back. Of Degraded and Ready: Refused, where the API server lets nothing
be read. Degraded takes over the reason of what is wrong, or says PodsLost where all were ready before.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvasir_engine.status_reports import RouterStatus
from kvasir_operator.api.structural_schema import Invalid
from kvasir_operator.certificates import IssuedCertificates
from kvasir_operator.plan.observed import Observed, Reference
from kvasir_operator.plan.preload import PRELOAD, Loading
from kvasir_operator.plan.release import ServiceRelease
from kvasir_operator.plan.wanted import role_of
from kvasir_operator.render.names import PAUSED, Object
from kvasir_operator.scaling.roles import ScalingStatus
from kvasir_operator.status import evaluate
from kvasir_operator.status.evaluate import ROLES, ConditionState, Elastic, LeavingPod
from kvasir_operator.status.explain import explain
from kvasir_operator.status.links import DEGRADED, MeasuredLink, fabric_degraded, shown_rates


class Condition(msgspec.Struct, frozen=True, rename="camel"):
    """One condition, in the form of metav1.Condition."""

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
    operator: Annotated[
        str,
        Meta(
            extra_json_schema={"description": "Whose this is: the namespace of an operator and its Lease's name."}
        ),
    ] = ""
    conditions: list[Condition] = []
    explain: Annotated[
        str, Meta(extra_json_schema={"description": "Why it is not ready, in one sentence; absent when it is."})
    ] = ""
    model: Annotated[str, Meta(extra_json_schema={"description": "Name by which clients ask for the model."})] = ""
    url: Annotated[str, Meta(extra_json_schema={"description": "The OpenAI API is under /v1 of it."})] = ""
    prefill: RoleStatus | None = None
    decode: RoleStatus | None = None
    router: RoleStatus | None = None
    leaving: Annotated[
        list[LeavingPod],
        Meta(extra_json_schema={"description": "Workers on their way out, and what they still have to finish."}),
    ] = []
    removing: Annotated[
        list[str],
        Meta(
            extra_json_schema={
                "description": "LeaderWorkerSets that are to go. It is said before, so that nobody chooses others."
            }
        ),
    ] = []
    release: Annotated[
        ServiceRelease | None,
        Meta(extra_json_schema={"description": "With which image and defaults its pods are made (imagePolicy)."}),
    ] = None
    scaling: Annotated[
        ScalingStatus | None,
        Meta(extra_json_schema={"description": "What the planner decided, in the modes Auto and Shadow."}),
    ] = None
    certificates: Annotated[
        IssuedCertificates | None,
        Meta(extra_json_schema={"description": "What its pods' certificates are, and of whom."}),
    ] = None


def rejected(
    problems: list[Invalid],
    generation: int,
    previous: Mapping[str, Any],
    now: datetime,
    certificates: IssuedCertificates | None = None,
) -> Status:
    """The status of a service whose spec is refused. It has no conditions of roles: nothing is done for them.

    `certificates`: of the pods that run, which go on.
    """
    message = "; ".join(map(str, problems))
    refusal = ConditionState("Accepted", False, "Invalid", message, trouble=True)
    stalled = ConditionState("Stalled", True, "NotAccepted", message)
    ready = ConditionState("Ready", False, "NotAccepted", message)
    return Status(
        observed_generation=generation,
        conditions=_conditions([refusal, stalled, ready], generation, previous, now),
        explain=explain([refusal], ready),
        certificates=certificates,
    )


def refused_by_api_server(reason: str, generation: int, previous: Mapping[str, Any], now: datetime) -> Status:
    """The status of a valid service whose objects the API server does not let the operator read.

    The conditions stay as they were, but for Ready of an older spec, which may not hold for this one.
    """
    message = f"the API server refuses what the operator needs: {reason}"
    trouble = ConditionState("Degraded", True, "Refused", message, trouble=True)
    judged = [ConditionState("Accepted", True, "Valid", "spec is valid"), trouble]
    kept = {c["type"]: c for c in previous.get("conditions", [])}
    if "Ready" not in kept or previous.get("observedGeneration") != generation:
        judged.append(ConditionState("Ready", False, "Refused", message))
    made = _conditions(judged, generation, previous, now)
    names = {each.type for each in made}
    rest = [msgspec.convert(c, Condition) for name, c in kept.items() if name not in names]
    before = msgspec.convert(previous, Status)
    return msgspec.structs.replace(
        before, observed_generation=generation, conditions=[*made, *rest], explain=explain([trouble], judged[-1])
    )


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
    routers: Sequence[RouterStatus] | None = None,
    planned: str = "",
    leaving: Sequence[LeavingPod] = (),
    removing: Sequence[str] = (),
    scaling: ScalingStatus | None = None,
    elastic: Elastic | None = None,
    informational: Sequence[ConditionState] = (),
    certificates: IssuedCertificates | None = None,
    links: Sequence[MeasuredLink] | None = (),
) -> Status:
    """The status of a service whose spec asks for `desired`.

    `failures`: what the API server said against objects it did not take. `previous`: the status so far, for
    transition times. `routers`: what the ready ones said; `None` where nobody asks them, and nothing is said of
    canaries. `planned`: what the plan for the workers waits for. `leaving`: workers on their way out. `removing`:
    sets that are yet to be deleted. `scaling`: what was decided about sizes. `elastic`: how the sizes change by
    themselves, if they do. `informational`: conditions that do not count for Ready, of what is around the pods.
    `certificates`: what was issued. `links`: of prefill workers; `None` where none of them answers.
    """
    known = [*desired, *observed.objects.values(), *observed.removing.values()]
    refused: dict[str, str] = {}
    for target, why in failures.items():
        role = role_of(target, known)
        refused[role] = f"{refused[role]}; {target}: {why}" if role in refused else f"{target}: {why}"
    roles = {role: evaluate.role_ready(role, desired, observed, refused.get(role, "")) for role in ROLES}
    counting = [
        ConditionState("Accepted", True, "Valid", "spec is valid"),
        *evaluate.model_cached(cached, refused.get(PRELOAD, "")),
        *(condition for _, _, condition in roles.values()),
    ]
    if routers is not None and roles["prefill"][0] and roles["decode"][0]:
        verified = evaluate.transfer_verified(routers, previous)
        counting.append(msgspec.structs.replace(verified, message=shown_rates(links, verified, previous)))
        informational = [*informational, *fabric_degraded(links, previous)]
    sizes = {role: (wanted, count) for role, (wanted, count, _) in roles.items()}
    ready = evaluate.ready(counting, sizes, elastic)
    if slow := next((each for each in informational if each.type == DEGRADED and each.true), None):
        ready = msgspec.structs.replace(ready, message=f"{ready.message}; {DEGRADED}: {slow.message}")
    moving = evaluate.progressing(planned, any(v.reason == "RollingOut" for v in counting), leaving)
    wrong = evaluate.degraded([*counting, *informational], generation, previous, sizes)
    others = [
        *informational,
        moving,
        wrong,
        *evaluate.kstatus(ready, moving, wrong),
        *(
            [ConditionState("Paused", True, "Annotated", f"nothing is changed while {PAUSED} is true")]
            if paused
            else []
        ),
    ]
    of = {role: RoleStatus(wanted, count, f"{count}/{wanted}") for role, (wanted, count, _) in roles.items()}
    return Status(
        observed_generation=generation,
        conditions=_conditions([*counting, *others, ready], generation, previous, now),
        explain=explain(counting, ready),
        model=model,
        url=url,
        leaving=list(leaving),
        removing=list(removing),
        scaling=scaling,
        prefill=of["prefill"],
        decode=of["decode"],
        router=of["router"],
        certificates=certificates,
    )


def _conditions(
    states: list[ConditionState], generation: int, previous: Mapping[str, Any], now: datetime
) -> list[Condition]:
    before = {condition["type"]: condition for condition in previous.get("conditions", [])}
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    result = []
    for state in states:
        status: Literal["True", "False", "Unknown"] = (
            "Unknown" if state.true is None else "True" if state.true else "False"
        )
        old = before.get(state.type, {})
        since = old.get("lastTransitionTime", stamp) if old.get("status") == status else stamp
        # Never empty: where a text was, server-side apply of Kubernetes 1.20 makes null of "", and refuses that.
        message = state.message or state.reason
        result.append(Condition(state.type, status, state.reason, message, generation, since))
    return result


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two statuses are equal. API servers merge conditions by type, so their order does not count."""
    first, second = (
        {**status, "conditions": {condition["type"]: condition for condition in status.get("conditions", [])}}
        for status in (one, other)
    )
    return first == second
