"""What the status says of canaries, of pods that leave and of what went wrong; the sentence, and the Events."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from isvc_cases import FakeCluster, FakePods, deployments, document, service, settled

from kvasir_engine.status_reports import LinkReport, PairReport, RouterStatus, WorkerStatus
from kvasir_operator.plan.observed import observe
from kvasir_operator.reconcile.reconciler import FAILED_SECONDS, SOON_SECONDS, Reconciler
from kvasir_operator.render import Object, Options, render
from kvasir_operator.status import derive
from kvasir_operator.status.derive import Status
from kvasir_operator.status.evaluate import LeavingPod
from kvasir_operator.status.events import status_events
from kvasir_operator.status.links import MeasuredLink

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DESIRED = render(service(decode={"replicas": 2}), Options())
VERIFIED = PairReport(verified=2)


def computed(
    ready: dict[str, int] | None = None,
    pods: list[Object] | None = None,
    pairs: PairReport | None = VERIFIED,
    previous: Status | None = None,
    desired: list[Object] = DESIRED,
    **more: Any,
) -> Status:
    """The status with so many pods ready a role, all where nothing is said, and one router's report."""
    live = [settled(o, (ready or {}).get(role)) for role, o in deployments(desired).items()]
    return derive.accepted(
        desired,
        observe(live, pods or []),
        {},
        model="m",
        url="http://u",
        generation=4,
        previous=msgspec.to_builtins(previous) if previous else {},
        now=NOW,
        routers=[RouterStatus(False, 0, "", pairs)] if pairs else [],
        **more,
    )


def condition(found: Status, kind: str) -> derive.Condition:
    return next(c for c in found.conditions if c.type == kind)


def judged(found: Status, kind: str) -> tuple[str, str]:
    return condition(found, kind).status, condition(found, kind).reason


@pytest.mark.parametrize(
    ("pairs", "verified", "ready"),
    [
        (VERIFIED, ("True", "CanaryPassed"), ("True", "AllReady")),
        (PairReport(verified=1, pending=3), ("True", "CanaryPassed"), ("True", "AllReady")),
        (PairReport(pending=2), ("Unknown", "Verifying"), ("False", "Verifying")),
        (PairReport(), ("Unknown", "NoReport"), ("False", "NoReport")),
        (None, ("Unknown", "NoReport"), ("False", "NoReport")),
        (
            PairReport(verified=1, failed=1, failures=("p0 to d1: page 3 came wrong",)),
            ("False", "CanaryFailed"),
            ("False", "CanaryFailed"),
        ),
        (PairReport(unpaired=("p0 and d1: dtype: 'a', 'b'",)), ("False", "NoPair"), ("False", "NoPair")),
        (PairReport(verified=1, unpaired=("p0 and d1: dtype",)), ("True", "CanaryPassed"), ("True", "AllReady")),
    ],
)
def test_a_service_is_ready_once_kv_was_seen_to_move(
    pairs: PairReport | None, verified: tuple[str, str], ready: tuple[str, str]
) -> None:
    found = computed(pairs=pairs)
    assert judged(found, "KVTransferVerified") == verified
    assert judged(found, "Ready") == ready
    assert bool(found.explain) == (ready[0] == "False")
    assert judged(found, "Degraded")[0] == ("True" if verified[0] == "False" else "False")


def test_a_router_that_does_not_answer_takes_nothing_back() -> None:
    before = computed()
    assert judged(computed(pairs=None, previous=before), "KVTransferVerified") == ("True", "CanaryPassed")
    unknown = computed(pairs=PairReport(pending=1), previous=before)
    assert judged(unknown, "KVTransferVerified") == ("Unknown", "Verifying"), "one that answers does"


@pytest.mark.parametrize("spec", [{"prefill": {"replicas": 0}}, {"decode": {"replicas": 0}}])
def test_where_no_kv_is_to_move_nothing_is_said_of_it(spec: dict[str, Any]) -> None:
    found = computed(desired=render(service(**spec), Options()), pairs=None)
    assert "KVTransferVerified" not in {c.type for c in found.conditions}


def test_a_rollout_and_then_a_drain_say_what_they_wait_for() -> None:
    leaving = [LeavingPod("llama-decode-x", requests=1, leases=2), LeavingPod("llama-decode-y")]
    found = computed({"decode": 1}, planned="decode abc has 1 of 2 ready (paired capacity 50%)", leaving=leaving)
    assert judged(found, "Progressing")[0] == "True"
    assert condition(found, "Progressing").message == (
        "waits: decode abc has 1 of 2 ready (paired capacity 50%); "
        "pod llama-decode-x leaves when 1 request and 2 leases end; pod llama-decode-y leaves"
    )
    found = computed(leaving=leaving[:1])
    assert judged(found, "Progressing") == ("True", "Draining")
    assert judged(found, "Ready") == ("True", "AllReady"), "what leaves is not missed"
    told_nothing = msgspec.to_builtins(computed(leaving=leaving[1:]))
    assert told_nothing["leaving"] == [{"pod": "llama-decode-y"}], "null would be refused by the API server"
    assert msgspec.to_builtins(found)["leaving"] == [{"pod": "llama-decode-x", "requests": 1, "leases": 2}]


def test_what_was_ready_and_is_not_any_more_is_degraded_until_it_is_again() -> None:
    starting = computed({"decode": 1})
    assert judged(starting, "Degraded")[0] == "False", "it was never ready"
    lost = computed({"decode": 1}, previous=computed())
    assert judged(lost, "Degraded") == ("True", "PodsLost")
    assert judged(computed({"decode": 1}, previous=lost), "Degraded") == ("True", "PodsLost")
    assert judged(computed(previous=lost), "Degraded") == ("False", "AsExpected")


def test_a_new_spec_that_is_not_there_yet_is_no_degradation() -> None:
    before = msgspec.structs.replace(computed(), observed_generation=3)
    assert judged(computed({"decode": 1}, previous=before), "Degraded")[0] == "False"


def pod(role: str, state: dict[str, Any]) -> Object:
    labels = deployments(DESIRED)[role]["spec"]["template"]["metadata"]["labels"]
    owner = {"kind": "ReplicaSet", "name": f"llama-{role}-abc", "controller": True}
    return {"metadata": {"name": f"llama-{role}-x", "labels": labels, "ownerReferences": [owner]}, "status": state}


def waiting(reason: str, message: str = "", last: str = "") -> dict[str, Any]:
    ended = {"lastState": {"terminated": {"exitCode": 2, "message": last}}} if last else {}
    return {"containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}, **ended}]}


@pytest.mark.parametrize(
    ("role", "state", "sentence"),
    [
        (
            "decode",
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}
                ]
            },
            "decode has 1 of 2 ready: no node takes pod llama-decode-x: 0/3.",
        ),
        (
            "decode",
            waiting("ImagePullBackOff", "no such image"),
            "decode has 1 of 2 ready: the image cannot be pulled, pod llama-decode-x: no such image.",
        ),
        (
            "prefill",
            waiting("CrashLoopBackOff", last="kvasir: error: no memory for the pool"),
            "prefill has 0 of 1 ready: its container ended (CrashLoopBackOff), "
            "pod llama-prefill-x: kvasir: error: no memory for the pool.",
        ),
        (
            "router",
            waiting("CreateContainerConfigError", "volume 'api-keys': secret 'llm-keys' not found"),
            "router has 0 of 1 ready: something that its container needs is missing, "
            "pod llama-router-x: volume 'api-keys': secret 'llm-keys' not found.",
        ),
        ("decode", {}, "decode has 1 of 2 ready; they are starting."),
    ],
)
def test_one_sentence_says_why_it_is_not_ready(role: str, state: dict[str, Any], sentence: str) -> None:
    found = computed({role: 1 if role == "decode" else 0}, [pod(role, state)])
    assert found.explain == sentence


def test_the_sentence_is_about_what_is_wrong_rather_than_about_what_waits_for_it() -> None:
    found = computed({"prefill": 0, "decode": 0}, [pod("decode", waiting("ImagePullBackOff", "no such image"))])
    assert found.explain.startswith("decode has 0 of 2 ready: the image cannot be pulled")
    assert judged(found, "Degraded") == ("True", "ImagePullBackOff")


def test_the_sentence_on_canaries() -> None:
    assert computed(pairs=PairReport(pending=1)).explain == "A canary is on its way from prefill to decode."
    failed = PairReport(failed=1, failures=("p0 to d0: page 3 came wrong",))
    assert computed(pairs=failed).explain == "No KV moves from p0 to d0: page 3 came wrong."


def new_events(previous: Status | None, current: Status) -> list[tuple[bool, str]]:
    before = msgspec.to_builtins(previous) if previous else {}
    return [(each.warning, each.reason) for each in status_events(before, current)]


def test_events_tell_a_story_from_the_first_pod_to_the_last_rollout() -> None:
    nothing = computed({"prefill": 0, "decode": 0, "router": 0}, pairs=None, planned="prefill has 0 of 1 ready")
    assert new_events(None, nothing) == [(False, "Accepted"), (False, "Scaling")]
    assert new_events(nothing, nothing) == []
    pods = computed(pairs=PairReport(pending=1), previous=nothing)
    assert new_events(nothing, pods) == [
        (False, "PrefillReady"),
        (False, "DecodeReady"),
        (False, "RouterReady"),
        (False, "Complete"),
    ]
    ready = computed(previous=pods)
    assert new_events(pods, ready) == [(False, "KVTransferVerified"), (False, "Ready")]
    new = render(service(decode={"replicas": 2}, drain={"deadlineSeconds": 1}), Options())
    live = [settled(o) for o in deployments(DESIRED).values()]
    rolling = derive.accepted(
        new,
        observe(live, []),
        {},
        model="m",
        url="u",
        generation=5,
        previous=msgspec.to_builtins(ready),
        now=NOW,
        routers=[RouterStatus(False, 0, "", VERIFIED)],
        planned="decode abc has 0 of 2 ready",
    )
    rollout = new_events(ready, rolling)
    assert (False, "RollingOut") in rollout
    assert not any(warning for warning, _ in rollout), "a rollout is no misfortune"
    wrong = computed({"decode": 1}, [pod("decode", waiting("CrashLoopBackOff", last="boom"))], previous=ready)
    assert new_events(ready, wrong) == [(True, "NotDecodeReady"), (True, "Degraded"), (True, "NotReady")]
    assert new_events(wrong, computed(previous=wrong)) == [
        (False, "DecodeReady"),
        (False, "Recovered"),
        (False, "Ready"),
    ]


def with_ip(item: Object, ip: str, **metadata: Any) -> Object:
    state = {"podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]}
    return {"metadata": {**item["metadata"], **metadata}, "status": state}


class OperatorHarness:
    """An operator over a cluster in memory whose pods say what the test has them say."""

    def __init__(self) -> None:
        self.cluster = FakeCluster(document(decode={"replicas": 2}))
        self.pods = FakePods()
        self.again: list[float] = []
        self.operator = Reconciler(
            self.cluster,
            Options(),
            lambda model: None,
            lambda: NOW,
            self.pods,
            lambda namespace, name, seconds: self.again.append(seconds),
        )

    def reconcile(self) -> None:
        self.again.clear()
        self.operator.reconcile("default", "llama")

    def status(self) -> Any:
        return self.cluster.services["default", "llama"]["status"]


def test_routers_are_asked_until_a_canary_passed_and_no_longer() -> None:
    stand = OperatorHarness()
    stand.reconcile()
    assert stand.again == [], "no router is ready: its pod's event will come"
    stand.cluster.settle()
    router = with_ip(pod("router", {}), "10.0.0.9")
    stand.cluster.listed_pods = [router]
    stand.pods.pairs = PairReport(pending=1)
    stand.reconcile()
    assert stand.again == [SOON_SECONDS]
    assert stand.cluster.conditions()["Ready"]["reason"] == "Verifying"
    stand.pods.pairs = PairReport(failed=1, failures=("p to d: wrong",))
    stand.reconcile()
    assert stand.again == [FAILED_SECONDS]
    stand.pods.pairs = VERIFIED
    stand.reconcile()
    assert stand.again == []
    assert stand.cluster.conditions()["Ready"]["status"] == "True"
    assert stand.cluster.conditions()["KVTransferVerified"]["reason"] == "CanaryPassed"


def test_a_ready_router_that_did_not_answer_is_asked_again() -> None:
    stand = OperatorHarness()
    stand.reconcile()
    stand.cluster.settle()
    stand.cluster.listed_pods = [with_ip(pod("router", {}), "10.0.0.9")]
    stand.reconcile()
    assert stand.cluster.conditions()["KVTransferVerified"]["reason"] == "NoReport"
    assert stand.again == [FAILED_SECONDS], "all events have come: nothing else would have it looked at"
    stand.pods.pairs = VERIFIED
    stand.reconcile()
    stand.pods.pairs = None
    stand.reconcile()
    assert stand.cluster.conditions()["KVTransferVerified"]["reason"] == "CanaryPassed"
    assert stand.again == [], "what was verified is not doubted for one lost answer"


def test_a_worker_on_its_way_out_is_asked_what_it_has_until_it_is_gone() -> None:
    stand = OperatorHarness()
    stand.reconcile()
    stand.cluster.settle()
    stand.pods.pairs = VERIFIED
    leaving = with_ip(pod("decode", {}), "10.0.0.7", deletionTimestamp="2026-01-02T03:04:05Z")
    stand.cluster.listed_pods = [with_ip(pod("router", {}), "10.0.0.9"), leaving]
    stand.pods.left["10.0.0.7"] = WorkerStatus(True, 3, 1, 500.0)
    stand.reconcile()
    assert stand.status()["leaving"] == [{"pod": "llama-decode-x", "requests": 3, "leases": 1}]
    assert stand.again == [SOON_SECONDS]
    stand.pods.left.clear()
    stand.reconcile()
    assert stand.again == [FAILED_SECONDS], "one that does not answer may never"
    stand.cluster.listed_pods.pop()
    stand.reconcile()
    assert "leaving" not in stand.status()
    assert stand.again == []


def link(
    rate: float, problem: str = "", peer: str = "kvasir-1", pod_name: str = "p0", rank: int = 0
) -> MeasuredLink:
    return MeasuredLink(pod_name, LinkReport(peer, "rdma", round(rate), 1e-6, 1, problem, rank))


def test_the_rate_of_the_slowest_link_is_told_with_that_kv_moves() -> None:
    base = condition(computed(), "KVTransferVerified").message
    one = computed(links=[link(12.34e9)])
    assert condition(one, "KVTransferVerified").message == f"{base}; 12 GB/s by rdma"
    two = computed(links=[link(46e9), link(12.34e9, peer="kvasir-2")])
    assert condition(two, "KVTransferVerified").message == f"{base}; 12 GB/s by rdma at the slowest of 2 links"
    assert condition(computed(links=None, previous=two), "KVTransferVerified").message.endswith("of 2 links")
    assert judged(two, "FabricDegraded") == ("False", "AsExpected")
    assert "FabricDegraded" not in {c.type for c in computed(links=[]).conditions}
    failed = computed(pairs=PairReport(failed=1, failures=("p0 to d1: wrong",)), links=[link(1e9)])
    assert "GB/s" not in condition(failed, "KVTransferVerified").message


def test_a_link_that_is_slower_than_its_fabric_is_told_with_ready_and_takes_nothing_from_it() -> None:
    problem = "0.45 GB/s by rdma, which should give 50: look at UCX_TLS"
    found = computed(links=[link(46e9), link(0.45e9, problem, "kvasir-2", "p1")])
    assert judged(found, "FabricDegraded") == ("True", "SlowLink")
    assert condition(found, "FabricDegraded").message == f"pod p1 to kvasir-2: {problem}"
    assert judged(found, "Ready") == ("True", "AllReady")
    assert (
        condition(found, "Ready").message == f"requests are served; FabricDegraded: pod p1 to kvasir-2: {problem}"
    )
    assert judged(found, "Degraded") == ("True", "SlowLink")
    (event,) = [e for e in status_events(msgspec.to_builtins(computed()), found) if e.reason == "FabricDegraded"]
    assert event.warning
    assert judged(computed(links=None, previous=found), "FabricDegraded") == ("True", "SlowLink"), "no answer"
    mended = computed(links=[link(46e9)], previous=found)
    assert judged(mended, "Degraded") == ("False", "AsExpected")
    assert "FabricRecovered" in {e.reason for e in status_events(msgspec.to_builtins(found), mended)}
    many = computed(links=[link(1e6, "slow", f"kvasir-{n}") for n in range(5)])
    assert condition(many, "FabricDegraded").message.endswith("; and 2 more links")


def test_one_slow_rank_of_a_worker_makes_its_fabric_degraded_and_the_slowest_are_named_first() -> None:
    ranks = [link(46e9), link(0.9e9, "look at UCX_TLS", "kvasir-1-1", rank=1), link(45e9, "", "kvasir-1-2", rank=2)]
    found = computed(links=ranks)
    assert judged(found, "FabricDegraded") == ("True", "SlowLink")
    assert condition(found, "FabricDegraded").message == "pod p0 rank 1 to kvasir-1-1: look at UCX_TLS"
    assert condition(found, "KVTransferVerified").message.endswith("0.9 GB/s by rdma at the slowest of 3 links")
    many = computed(links=[link(1e9 - n, "slow", f"kvasir-1-{n}", rank=n) for n in range(5)])
    assert condition(many, "FabricDegraded").message == (
        "pod p0 rank 4 to kvasir-1-4: slow; pod p0 rank 3 to kvasir-1-3: slow; pod p0 rank 2 to kvasir-1-2: slow; "
        "and 2 more links"
    )


def test_prefill_workers_are_asked_for_their_links() -> None:
    stand = OperatorHarness()
    stand.reconcile()
    stand.cluster.settle()
    stand.pods.pairs = VERIFIED
    stand.cluster.listed_pods = [
        with_ip(pod(role, {}), ip) for role, ip in (("router", "10.0.0.9"), ("prefill", "10.0.0.7"))
    ]
    reported = LinkReport("kvasir-2", "rdma", 450_000_000, 1e-6, 1, "0.45 GB/s by rdma, which should give 50: look")
    stand.pods.left["10.0.0.7"] = WorkerStatus(False, 0, 0, None, None, (reported,))
    stand.reconcile()
    assert stand.cluster.conditions()["FabricDegraded"]["status"] == "True"
    assert "FabricDegraded: " in stand.cluster.conditions()["Ready"]["message"]
    stand.pods.left.clear()
    stand.reconcile()
    assert stand.cluster.conditions()["FabricDegraded"]["status"] == "True", "a lost answer takes nothing back"
