"""PURE: evaluates what is observed of a service, one function a condition. `derive.py` says what each means."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvasir_engine.status_reports import RouterStatus
from kvasir_operator.api import InferenceService
from kvasir_operator.plan.observed import CLAIM_MISSING, MESSAGE_LENGTH, Observed, PodProblem, reference
from kvasir_operator.plan.preload import Loading
from kvasir_operator.plan.wanted import wanted as wanted_of
from kvasir_operator.render.names import Object, Role
from kvasir_operator.render.network import WAYS_IN

ROLES: tuple[Role, ...] = ("prefill", "decode", "router")
CONDITIONS: dict[Role, str] = {"prefill": "PrefillReady", "decode": "DecodeReady", "router": "RouterReady"}
VERIFIED = "KVTransferVerified"


class ConditionState(msgspec.Struct, frozen=True):
    """A condition's next state: `true` is `None` for Unknown. `trouble`: time alone does not resolve it."""

    type: str
    true: bool | None
    reason: str
    message: str
    trouble: bool = False


class LeavingPod(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A worker's pod that is being deleted, and what it still has to finish; `None` where it does not say."""

    pod: str
    requests: int | None = None
    leases: int | None = None

    def __str__(self) -> str:
        if self.requests is None or self.leases is None:
            return f"pod {self.pod} leaves"
        return (
            f"pod {self.pod} leaves when {_count(self.requests, 'request')} and {_count(self.leases, 'lease')} end"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def model_cached(state: Loading | None, refused: str) -> list[ConditionState]:
    """ModelCached, by the Job that loads the model; empty where there is no such Job."""
    if refused:
        return [ConditionState("ModelCached", False, "ApplyFailed", refused, trouble=True)]
    if state is None:
        return []
    return [
        ConditionState(
            "ModelCached", state.done, state.reason, state.message, not state.done and state.reason != "Loading"
        )
    ]


def role_ready(
    role: Role, desired: Sequence[Object], observed: Observed, refused: str
) -> tuple[int, int, ConditionState]:
    """How many pods of a role are wanted, how many of them are ready, and the role's condition.

    `refused`: why the API server refused its objects; empty where it took them.
    """
    wants = wanted_of(desired, role)
    name, wanted, revision = wants.name, wants.replicas, wants.revision
    states = observed.workloads(role)
    state = next((s for s in states if s.name == name), None)
    ready = min(state.ready, wanted) if state else 0
    # There is no set where there is no worker.
    done = state.complete and state.wanted == wanted if state else wants.grouped and not wanted
    count = f"{ready} of {wanted} ready"

    def result(true: bool, reason: str, message: str, trouble: bool = False) -> tuple[int, int, ConditionState]:
        return wanted, ready, ConditionState(CONDITIONS[role], true, reason, message, trouble)

    if refused:
        return result(False, "ApplyFailed", f"{count}; {refused}", trouble=True)
    if done:
        return result(True, "AllReady", count) if wanted else result(True, "ScaledToZero", "no replicas are wanted")
    if state and state.failure:
        return result(False, "FailedCreate", f"{count}; {state.failure}", trouble=True)
    if trouble := _trouble(role, revision, observed):
        lasting = trouble.reason != CLAIM_MISSING
        return result(False, trouble.reason, f"{count}; {_pod_message(trouble)}", trouble=lasting)
    serving = [f"{s.ready} of revision {s.revision}" for s in states if s.name != name and s.ready]
    if serving:
        return result(False, "RollingOut", f"{count} of revision {revision}; {' and '.join(serving)} still serve")
    if state and ready == wanted:
        message = f"{count}, {min(state.updated, wanted)} of them of revision {revision}"
        return result(False, "RollingOut", message)
    return result(False, "Starting", count)


def _trouble(role: Role, revision: str, observed: Observed) -> PodProblem | None:
    """The first trouble among the pods of the wanted revision, by pod name.

    A group is made anew when one of its pods fails, so its trouble is with pods that leave while their set stays.
    """
    staying = {each.name for each in observed.sets(role)}
    failed = (p for p in observed.leaving if p.group in staying)
    found = [p.trouble for p in (*observed.pods, *failed) if (p.role, p.revision) == (role, revision) and p.trouble]
    return min(found, default=None)


def _pod_message(trouble: PodProblem) -> str:
    return f"pod {trouble.pod}: {trouble.reason}" + (f": {trouble.message}" if trouble.message else "")


def transfer_verified(routers: Sequence[RouterStatus], previous: Mapping[str, Any]) -> ConditionState:
    """Whether the routers' canaries have seen KV move.

    Where no router answers, the last state holds: one lost packet does not make a condition False.
    """
    pairs = [router.pairs for router in routers]
    failures = [failure for each in pairs for failure in each.failures]
    verified, pending = sum(each.verified for each in pairs), sum(each.pending for each in pairs)
    unpaired = [why for each in pairs for why in each.unpaired]
    if failures:
        return ConditionState(VERIFIED, False, "CanaryFailed", f"no KV moves from {failures[0]}", trouble=True)
    if verified:
        return ConditionState(VERIFIED, True, "CanaryPassed", "a canary was decoded from KV that prefill had sent")
    if pending:
        return ConditionState(VERIFIED, None, "Verifying", "a canary is on its way from prefill to decode")
    if unpaired:
        return ConditionState(VERIFIED, False, "NoPair", f"no workers can pair: {unpaired[0]}", trouble=True)
    before = next((c for c in previous.get("conditions", []) if c["type"] == VERIFIED), None)
    if before and before["status"] == "True" and not routers:
        return ConditionState(VERIFIED, True, before["reason"], before["message"])
    return ConditionState(VERIFIED, None, "NoReport", "no router has reported a pair of workers yet")


def progressing(planned: str, rolling: bool, leaving: Sequence[LeavingPod]) -> ConditionState:
    """Whether workers are being created or deleted. `planned`: what the plan waits for, empty when it is done."""
    waits = "; ".join(filter(None, [planned, *map(str, leaving)]))
    if planned:
        return ConditionState("Progressing", True, "RollingOut" if rolling else "Scaling", f"waits: {waits}")
    if leaving:
        return ConditionState("Progressing", True, "Draining", f"waits: {waits}")
    return ConditionState(
        "Progressing", False, "Complete", "all workers that are wanted are ready, and no other is left"
    )


def degraded(
    conditions: Sequence[ConditionState], generation: int, previous: Mapping[str, Any], sizes: "Sizes | None" = None
) -> ConditionState:
    """Whether something is wrong that time alone does not resolve, or was right before with the same spec."""
    for each in conditions:
        if each.trouble:
            return ConditionState("Degraded", True, each.reason, f"{each.type}: {each.message}")
    before = {c["type"]: c for c in previous.get("conditions", [])}
    lost = before.get("Degraded", {}).get("reason") == LOST
    had_all = before.get("Ready", {}).get("status") == "True" or lost
    if had_all and previous.get("observedGeneration") == generation:
        for role, condition in CONDITIONS.items():
            found = next((v for v in conditions if v.type == condition), None)
            if found and not found.true and (lost or _fewer(role, previous, sizes or {})):
                return ConditionState("Degraded", True, LOST, f"{found.type}: {found.message}, where all were")
    return ConditionState("Degraded", False, "AsExpected", "nothing is wrong")


def _fewer(role: Role, previous: Mapping[str, Any], sizes: "Sizes") -> bool:
    """Whether fewer pods are ready than before, beyond those that the spec has added since."""
    if role not in sizes:
        return True
    wanted, ready = sizes[role]
    before: int = previous.get(role, {}).get("ready", wanted)
    return ready < min(wanted, before)


def metrics_reachable(service: InferenceService, metrics_namespace: str) -> list[ConditionState]:
    """Whether NetworkPolicies let the metrics' collector in; empty where there is no NetworkPolicy."""
    if service.spec.network_policy == "None":
        return []
    if not metrics_namespace:
        message = (
            "NetworkPolicies let nobody collect the workers' metrics: no namespace of Prometheus is configured "
            "(--metrics-namespace, in the chart monitoring.namespace)"
        )
        return [ConditionState("MetricsReachable", False, "NoNamespace", message)]
    message = f"NetworkPolicies let in namespace {metrics_namespace}"
    return [ConditionState("MetricsReachable", True, "NamespaceAllowed", message)]


def certificates_ready(signer: str, expires: str, what: str = "authority ") -> ConditionState:
    """CertificatesReady is True: the pods have certificates, by which they authenticate each other."""
    message = f"pods have certificates of {what}{signer}, valid until {expires}"
    return ConditionState("CertificatesReady", True, "Issued", message)


def no_certificates(reason: str, message: str) -> ConditionState:
    """CertificatesReady is False: none can be issued. Running pods keep theirs; new pods do not start."""
    return ConditionState("CertificatesReady", False, reason, message, trouble=True)


def certificates_of(issuer: str, wanted: Sequence[Object], observed: Observed, served: bool) -> ConditionState:
    """CertificatesReady, by cert-manager's status of the Certificates `wanted`, which `issuer` is to sign."""
    if not served:
        message = (
            f"{issuer} is to sign pods' certificates, and the cluster does not serve cert-manager.io/v1 Certificate"
        )
        return no_certificates("CertManagerMissing", message)
    ends = []
    for each in wanted:
        status = observed.objects.get(reference(each), {}).get("status", {})
        ready: Mapping[str, Any] = next((c for c in status.get("conditions", ()) if c.get("type") == "Ready"), {})
        if ready.get("status") != "True":
            name, why = (
                each["metadata"]["name"],
                ready.get("message") or "cert-manager has not reported anything yet",
            )
            return no_certificates("NotIssued", f"Certificate {name} of {issuer}: {why}"[:MESSAGE_LENGTH])
        ends.append(str(status.get("notAfter", "")))
    return certificates_ready(issuer, min(ends, default=""), "")


def transfer_encrypted(service: InferenceService, kept_off: bool = False) -> list[ConditionState]:
    """Whether KV and control connections between workers are encrypted on the network.

    `kept_off`: encryption is off because of the release that the service keeps, not because of its spec.
    """
    transfer, kind = service.spec.transfer, "TransferEncrypted"
    if transfer.encryption == "Off" and kept_off:
        message = (
            "the service keeps a release from before certificates: who reaches the workers' ports can read and "
            "write their KV. spec.engine.imagePolicy: FollowOperator rolls it to the newest"
        )
        return [ConditionState(kind, False, "KeptRelease", message)]
    if transfer.encryption == "Off":
        message = "spec.transfer.encryption is Off: who reaches the workers' ports can read and write their KV"
        return [ConditionState(kind, False, "Off", message)]
    if transfer.fabric == "shm":
        return [
            ConditionState(kind, True, "SharedMemory", "KV stays on its node; control connections are mutual TLS")
        ]
    if transfer.fabric == "rdma" or (transfer.fabric == "auto" and transfer.rdma_resource):
        message = (
            "control connections are mutual TLS; KV is not encrypted on the RDMA fabric, which is trusted with it"
        )
        return [ConditionState(kind, False, "TrustedFabric", message)]
    message = (
        "control connections are mutual TLS; KV is not encrypted on its way over TCP, and NIXL's own port believes "
        "whoever reaches it"
    )
    return [ConditionState(kind, False, "PlainTCP", message)]


def exposed(
    service: InferenceService, rendered: Sequence[Object], servable: Sequence[Object]
) -> list[ConditionState]:
    """Whether clients outside the cluster can reach the service; empty where the spec wants no such way."""
    ways = [each for each in rendered if each["kind"] in WAYS_IN]
    if not ways:
        return []
    there = {each["kind"] for each in servable}
    missing = [f"{each['apiVersion']} {each['kind']}" for each in ways if each["kind"] not in there]
    if missing:
        what = " and ".join(missing)
        message = f"this cluster does not serve {what}: the endpoint is inside the cluster only"
        return [ConditionState("Exposed", False, "APINotServed", message, trouble=True)]
    made = " and ".join(f"{each['kind']} {each['metadata']['name']}" for each in ways)
    return [ConditionState("Exposed", True, "Created", f"{made} {'is' if len(ways) == 1 else 'are'} there")]


def kstatus(ready: ConditionState, progressing: ConditionState, degraded: ConditionState) -> list[ConditionState]:
    """Stalled and Reconciling, by which tools such as Argo and Flux judge any resource (sigs.k8s.io/cli-utils,
    kstatus).

    Each is present only while it is True: an absent one means False.
    """
    if degraded.true and not ready.true:
        return [ConditionState("Stalled", True, degraded.reason, degraded.message)]
    if not ready.true or progressing.true:
        what = ready if not ready.true else progressing
        return [ConditionState("Reconciling", True, what.reason, what.message)]
    return []


LOST = "PodsLost"

# Of each role, how many are wanted and how many of them are ready.
Sizes = Mapping[Role, tuple[int, int]]


class Elastic(msgspec.Struct, frozen=True):
    """A service that the operator scales itself: the fewest workers of each role, and whether routers hold requests
    while there are none."""

    least: Mapping[Role, int]
    holds: bool

    def serves(self, role: Role, reason: str, ready: int) -> bool:
        """Whether requests are served although a role is not complete."""
        if reason == "Starting" and self.holds and role != "router":
            return True
        return role in self.least and reason in ("Starting", "Unschedulable") and ready >= max(1, self.least[role])


def elastic(service: InferenceService) -> Elastic | None:
    """The bounds within which the operator scales a service; `None` where it does not."""
    scaling = service.spec.scaling
    if scaling.mode != "Auto" or scaling.auto is None:
        return None
    least: dict[Role, int] = {
        "prefill": scaling.auto.prefill.min_replicas,
        "decode": scaling.auto.decode.min_replicas,
    }
    return Elastic(least, scaling.holds is not None)


def ready(conditions: Sequence[ConditionState], sizes: Sizes, elastic: Elastic | None = None) -> ConditionState:
    """Whether requests are served, by all conditions that count for it."""
    roles = {condition: role for role, condition in CONDITIONS.items()}
    for each in conditions:
        if each.true:
            continue
        if elastic and each.type in roles:
            role = roles[each.type]
            if elastic.serves(role, each.reason, sizes[role][1]):
                continue
        if elastic and elastic.holds and each.type == VERIFIED and each.true is None:
            continue  # a pair has only just started
        return ConditionState("Ready", False, each.reason, f"{each.type}: {each.message}")
    if elastic and elastic.holds and sizes["router"][0] and not sizes["decode"][1]:
        reason = "Starting" if sizes["decode"][0] else "ScaledToZero"
        return ConditionState(
            "Ready", True, reason, "no worker runs; routers hold requests until a pair has started"
        )
    for role in ("decode", "router"):
        if sizes[role][0] == 0:
            return ConditionState(
                "Ready", False, "ScaledToZero", f"no {role} replicas are wanted, so nothing is served"
            )
    return ConditionState("Ready", True, "AllReady", "requests are served")
