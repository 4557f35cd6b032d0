"""PURE: the sizes of roles that the operator scales itself, and what its status remembers of them.

All that a decision depends on beside the load is in the status, so an operator that starts anew goes on where
another ended: the last size of each role with its reason, and what each needed within the window. A status must
not change with every measurement: what a role needs has no time until it needs less, and what the bounds keep in
any case is not remembered.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvasir_operator.api import WORKER_ROLES, InferenceService, WorkerRole
from kvasir_operator.api.scaling import AutoScaling
from kvasir_operator.plan.observed import Observed
from kvasir_operator.scaling.planner import Bounds, Decision, Need, RolePool, Signals, Targets, decide

# How often the load is looked at.
PERIOD_SECONDS = 15.0


def _about(text: str) -> Meta:
    return Meta(extra_json_schema={"description": text})


class Needed(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """`replicas` workers were needed until `until`."""

    replicas: Annotated[int, _about("Number of workers.")]
    until: Annotated[str, _about("The time until which they were needed; absent while they are.")] = ""


class RoleScaling(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The last decision about a role."""

    replicas: Annotated[int, _about("How many workers the role should have.")]
    reason: Annotated[str, _about("Why.")]
    since: Annotated[str, _about("Since when.")]
    needed: Annotated[list[Needed], _about("What keeps the role from going down: more was needed lately.")] = []


class ScalingStatus(msgspec.Struct, frozen=True, rename="camel"):
    """The planner's decisions."""

    mode: Annotated[
        Literal["Auto", "Shadow"], _about("Auto: it is done. Shadow: it would be done in the mode Auto.")
    ]
    prefill: RoleScaling
    decode: RoleScaling

    def role(self, role: WorkerRole) -> RoleScaling:
        """The last decision about `role`."""
        return self.prefill if role == "prefill" else self.decode


def remembered(status: Mapping[str, Any]) -> ScalingStatus | None:
    """The scaling in a status; `None` where there is none, or it cannot be read."""
    try:
        found = msgspec.convert(status.get("scaling"), ScalingStatus)
        for role in WORKER_ROLES:
            for each in found.role(role).needed:
                _need(each)
    except ValueError:  # also msgspec's
        return None
    return found


def rescaled(
    service: InferenceService,
    observed: Observed,
    before: ScalingStatus | None,
    signals: Signals | None,
    now: datetime,
) -> ScalingStatus | None:
    """The decision now, after the one `before`; `None` where the operator decides nothing."""
    scaling = service.spec.scaling
    if scaling.auto is None or scaling.mode not in ("Auto", "Shadow"):
        return None
    mode: Literal["Auto", "Shadow"] = "Auto" if scaling.mode == "Auto" else "Shadow"
    if before is not None and before.mode != mode:
        before = None  # the one does not carry out what the other did
    bounds = {role: role_bounds(service, scaling.auto, role) for role in WORKER_ROLES}
    targets = _targets(scaling.auto)
    pools = {role: _pool(service, observed, before, role) for role in WORKER_ROLES}
    decided = decide(now.timestamp(), pools, bounds, targets, signals)
    roles = {
        role: _role_scaling(decided[role], pools[role], bounds[role], before.role(role) if before else None, now)
        for role in WORKER_ROLES
    }
    return ScalingStatus(mode, roles["prefill"], roles["decode"])


def resized(service: InferenceService, scaling: ScalingStatus | None) -> InferenceService:
    """`service` with the sizes that were decided, in mode Auto."""
    if scaling is None or scaling.mode != "Auto":
        return service
    roles = {
        role: msgspec.structs.replace(service.spec.workers(role), replicas=scaling.role(role).replicas)
        for role in WORKER_ROLES
    }
    return msgspec.structs.replace(service, spec=msgspec.structs.replace(service.spec, **roles))


def role_bounds(service: InferenceService, auto: AutoScaling, role: WorkerRole) -> Bounds:
    """The planner's bounds of a role."""
    limits, workers = (auto.prefill if role == "prefill" else auto.decode), service.spec.workers(role)
    gpus = workers.tensor_parallel if workers.device == "cuda" else 0
    return Bounds(limits.min_replicas, limits.max_replicas, gpus)


def seconds_to_next_measurement(service: InferenceService, signals: Signals | None) -> float:
    """After how many seconds the load is measured again: sooner where both roles may go to zero then."""
    zero = service.spec.scaling.holds
    if zero is None or signals is None or not signals.idle or signals.idle_seconds >= zero.idle_seconds:
        return PERIOD_SECONDS
    return min(PERIOD_SECONDS, zero.idle_seconds - signals.idle_seconds + 0.1)


def _targets(auto: AutoScaling) -> Targets:
    return Targets(
        ttft=auto.ttft_milliseconds / 1000,
        itl=auto.itl_milliseconds / 1000,
        window=float(auto.stabilization_window_seconds),
        gpus=auto.max_gpus,
        idle=float(auto.scale_to_zero.idle_seconds) if auto.scale_to_zero else None,
    )


def _pool(
    service: InferenceService, observed: Observed, before: ScalingStatus | None, role: WorkerRole
) -> RolePool:
    """The present state of a role. At first it has the workers that exist, or as many as the spec says."""
    workloads = observed.workloads(role)
    ready = sum(observed.ready(each) for each in workloads)
    replicas = service.spec.workers(role).replicas
    if service.spec.scaling.mode == "Auto":
        if before is not None:
            replicas = before.role(role).replicas
        elif workloads:
            replicas = sum(each.wanted for each in workloads)
    needs = None
    if before is not None:
        needs = tuple(map(_need, before.role(role).needed))
    return RolePool(replicas, ready, needs)


def _role_scaling(
    decision: Decision, pool: RolePool, bounds: Bounds, before: RoleScaling | None, now: datetime
) -> RoleScaling:
    needed = [
        Needed(need.replicas, stamp(math.ceil(need.until)) if need.until is not None else "")
        for need in decision.needs
        if need.replicas > bounds.least
    ]
    if before is not None and before.replicas == decision.replicas:
        # The reason is that of the last change: it does not change with every measurement.
        return RoleScaling(decision.replicas, before.reason, before.since, needed)
    reason = decision.reason if before or decision.replicas != pool.replicas else "as it was found"
    return RoleScaling(decision.replicas, reason, stamp(now.timestamp()), needed)


def stamp(seconds: float) -> str:
    """A time in the form of the API."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _need(needed: Needed) -> Need:
    """A need from its form in the status. Raises ValueError for a time that cannot be read."""
    if not needed.until:
        return Need(needed.replicas)
    until = datetime.strptime(needed.until, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return Need(needed.replicas, until.timestamp())
