"""Workers over several nodes in the plan and in the reconcile: what is made, what goes first, and who is asked."""

import copy
import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isvc_cases import (
    SMOL,
    FakeCluster,
    FakePods,
    advance,
    document,
    group_pods,
    pods_of_sets,
    service,
    settled,
)

from kvasir_engine.status_reports import PairReport, WorkerStatus
from kvasir_operator.api import Rollout
from kvasir_operator.api.kinds import SET_API_VERSION, SET_KIND
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.plan import plan
from kvasir_operator.plan.observed import Observed, Reference, observe
from kvasir_operator.plan.rollout import capacity, floor
from kvasir_operator.plan.steps import Apply, Delete
from kvasir_operator.plan.workers import rollout_state
from kvasir_operator.reconcile.reconciler import API_SECONDS, Reconciler
from kvasir_operator.render import Object, Options, render
from kvasir_operator.scaling.autoscaler import Autoscaler
from kvasir_operator.scaling.signals import median_startup_seconds

TWO = {"device": "cpu", "tensorParallel": 2, "nodes": 2}
ONE = {"device": "cpu", "tensorParallel": 2}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def wanted(replicas: int = 3, **more: Any) -> list[Object]:
    return render(service(prefill={**TWO, "replicas": replicas}, **more), Options())


def serving(objects: list[Object]) -> list[Object]:
    """What is there once `objects` were applied and all pods are ready."""
    return [settled(o) for o in advance(objects, [])[1]]


def sets(objects: list[Object]) -> list[Object]:
    return [o for o in objects if o["kind"] == SET_KIND]


def numbers(objects: list[Object]) -> list[int]:
    return sorted(int(o["metadata"]["name"].rpartition("-")[2]) for o in sets(objects))


def looked(objects: list[Object], pods: list[Object] | None = None, removing: Any = ()) -> Observed:
    return observe(objects, pods_of_sets(objects) if pods is None else pods, removing)


def deleted(desired: list[Object], observed: Observed) -> list[str]:
    steps = plan(desired, observed, Rollout())
    return [str(step.target) for step in steps if isinstance(step, Delete)]


def created(desired: list[Object], observed: Observed) -> list[str]:
    steps = plan(desired, observed, Rollout())
    return [s.object["metadata"]["name"].rpartition("-")[2] for s in steps if isinstance(s, Apply)]


def test_as_many_sets_are_made_as_workers_are_wanted_and_then_left_alone() -> None:
    words, live = advance(wanted(), [])
    assert numbers(live) == [0, 1, 2]
    assert all(word.endswith(" 1") for word in words if SET_KIND in word)
    assert advance(wanted(), live) == (["wait"], live)
    assert plan(wanted(), looked(serving(wanted())), Rollout()) == []


def test_no_set_is_there_where_no_worker_is_wanted() -> None:
    assert sets(advance(wanted(0), [])[1]) == []
    words, live = advance(wanted(0), serving(wanted(2)))
    assert sets(live) == []
    assert len([word for word in words if word.startswith(f"delete {SET_KIND}")]) == 2
    assert numbers(advance(wanted(1), live)[1]) == [0]


def test_what_is_not_ready_goes_first_and_then_the_newest() -> None:
    live = serving(wanted(4))
    by_number = {int(o["metadata"]["name"][-1]): o for o in sets(live)}
    pods = [pod for k, o in by_number.items() for pod in group_pods(o, 1 if k == 1 else 2)]
    (name,) = deleted(wanted(3), looked(live, pods))
    assert name.endswith("-1"), "a group of which a follower is not ready is no worker"
    assert [name[-1] for name in deleted(wanted(2), looked(live, pods))] == ["1", "3"]
    assert [name[-1] for name in deleted(wanted(3), looked(live))] == ["3"]


def test_a_worker_is_ready_when_all_pods_of_its_group_are() -> None:
    live = serving(wanted(1))
    (item,) = sets(live)
    for ready, leaving, expected in ((2, (), 1), (1, (), 0), (0, (), 0), (2, (0,), 0), (2, (1,), 0)):
        pods = group_pods(item, ready)
        for index in leaving:
            pods[index]["metadata"]["deletionTimestamp"] = "now"
        (found,) = looked(live, pods).workloads("prefill")
        assert (found.wanted, found.ready) == (1, expected)
    (found,) = looked(live, []).workloads("prefill")
    assert found.ready == 0


def test_a_name_is_free_when_no_pod_of_it_is_left() -> None:
    live = [o for o in serving(wanted(3)) if not o["metadata"]["name"].endswith("-1")]
    gone = next(o for o in sets(wanted(3)) if o["metadata"]["name"].endswith("-1"))
    drains = group_pods(gone)
    for pod in drains:
        pod["metadata"]["deletionTimestamp"] = "now"
    assert created(wanted(3), looked(live, [*pods_of_sets(live), *drains])) == ["3"]
    assert created(wanted(3), looked(live, [*pods_of_sets(live), drains[1]])) == ["3"]
    assert created(wanted(3), looked(live)) == ["1"]
    ending = copy.deepcopy(gone)
    ending["metadata"]["deletionTimestamp"] = "now"
    assert created(wanted(3), looked([*live, ending], pods_of_sets(live))) == ["3"]


def test_pods_that_outlive_their_set_are_no_workers() -> None:
    live = serving(wanted(2))
    first, second = sets(live)
    without = [o for o in live if o is not second]
    (found,) = looked(without, [*group_pods(first), *group_pods(second)]).workloads("prefill")
    assert (found.wanted, found.ready) == (1, 1)


def test_what_somebody_changed_in_a_set_is_put_right_by_its_own_name() -> None:
    live = serving(wanted(2))
    second = sets(live)[1]
    second["spec"]["replicas"] = 4
    second["metadata"]["resourceVersion"] = "7"
    (step,) = plan(wanted(2), looked(live, [p for o in sets(live) for p in group_pods(o, 2)]), Rollout())
    assert isinstance(step, Apply)
    assert step.object["metadata"]["name"] == second["metadata"]["name"]
    assert step.object["metadata"]["resourceVersion"] == "7"
    assert step.object["spec"]["replicas"] == 1


@pytest.mark.parametrize("label", ["role", "revision", "kv"])
@pytest.mark.parametrize("prefill", [TWO, ONE], ids=["sets", "deployment"])
def test_a_worker_that_somebody_labelled_otherwise_is_still_that_worker(
    label: str, prefill: dict[str, Any]
) -> None:
    """In place of a set that counted for nothing another would be made; an older Deployment would go at once."""
    desired = render(service(prefill={**prefill, "replicas": 3}), Options())
    there = copy.deepcopy(serving(desired))
    workers = (o for o in there if o["kind"] in (SET_KIND, "Deployment"))
    changed = next(o for o in workers if "-prefill-" in o["metadata"]["name"])
    changed["metadata"]["labels"][f"serving.kvasir.dev/{label}"] = "theirs"
    (step,) = plan(desired, looked(there), Rollout())
    assert isinstance(step, Apply)
    assert step.object["metadata"]["name"] == changed["metadata"]["name"]
    older = render(service(prefill={**prefill, "replicas": 3}, model={"uri": SMOL, "maxLength": 512}), Options())
    steps = plan(older, looked(there), Rollout())
    assert not [s for s in steps if isinstance(s, Delete) and s.target.name == changed["metadata"]["name"]]


def test_a_set_beyond_those_that_were_rendered_is_of_the_same_pods() -> None:
    objects = wanted(1, placement={"topologyKey": "rack"})
    (first,) = sets(objects)
    left = group_pods(first)
    for pod in left:
        pod["metadata"]["deletionTimestamp"] = "now"
    (made,) = sets([s.object for s in plan(objects, looked([], left), Rollout()) if isinstance(s, Apply)])
    expected = sets(wanted(2, placement={"topologyKey": "rack"}))[1]
    assert made["metadata"]["name"] == expected["metadata"]["name"]
    assert made["spec"] == expected["spec"], "also in the name that its pods prefer to be with"


def test_an_older_revision_grows_by_sets_like_its_own() -> None:
    """The planner may let what serves take over the share of a third fingerprint that goes."""
    other = {"model": {"uri": SMOL, "dtype": "float32"}}
    third = {"model": {"uri": SMOL, "dtype": "float16"}}
    decode = {"decode": {"device": "cpu", "replicas": 3}}
    live = serving(wanted(3, **decode))
    live = [settled(o) for o in advance(wanted(3, **decode, **other), live)[1]]
    desired = wanted(3, **decode, **third)
    revisions = {o["metadata"]["labels"]["serving.kvasir.dev/revision"] for o in sets(live)}
    for _ in range(30):
        words, live = advance(desired, [settled(o) for o in live])
        if not words:
            break
        for item in sets(live):
            assert f"-{item['metadata']['labels']['serving.kvasir.dev/revision']}-" in item["metadata"]["name"]
    assert len(revisions) == 2
    assert numbers(live) == [0, 1, 2]


HAPPENINGS = ["reconcile", "reconcile", "ready", "ready", "lose", "edit", "scale", "nodes"]
EDITS: list[dict[str, Any]] = [
    {},
    {"drain": {"deadlineSeconds": 5}},
    {"model": {"uri": SMOL, "dtype": "float32"}},
    {"model": {"uri": SMOL, "dtype": "float16"}},
]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_paired_capacity_keeps_to_its_bound_also_between_one_node_and_two(data: st.DataObject) -> None:
    """Edits, sizes and nodes of either role at any time; groups become ready, and are lost, in any order."""
    counts, kinds = st.integers(0, 4), st.sampled_from([ONE, TWO])
    limits = Rollout(
        max_surge=data.draw(st.sampled_from([1, "50%"])), max_unavailable=data.draw(st.sampled_from([0, 1]))
    )
    sizes = {role: data.draw(st.integers(1, 4)) for role in ("prefill", "decode")}
    shapes = {role: data.draw(kinds) for role in ("prefill", "decode")}
    edit: dict[str, Any] = {}

    def desired() -> list[Object]:
        roles = {role: {**shapes[role], "replicas": sizes[role]} for role in sizes}
        return render(service(**roles, **edit), Options())

    live = [settled(o) for o in advance(desired(), [], limits)[1]]
    for _ in range(data.draw(st.integers(1, 15))):
        role = data.draw(st.sampled_from(["prefill", "decode"]))
        match data.draw(
            st.sampled_from(["reconcile", "reconcile", "ready", "ready", "lose", "edit", "scale", "nodes"])
        ):
            case "edit":
                edit = data.draw(st.sampled_from(EDITS))
            case "scale":
                sizes[role] = data.draw(counts)
            case "nodes":
                shapes[role] = data.draw(kinds)
            case "ready" | "lose" as what:
                if running := [o for o in live if "status" in o]:
                    item = data.draw(st.sampled_from(running))
                    now, most = item["status"].get("readyReplicas", 0), item["spec"]["replicas"]
                    item["status"]["readyReplicas"] = min(most, now + 1) if what == "ready" else max(0, now - 1)
            case _:
                before = rollout_state(desired(), looked(live), limits)
                _, live = advance(desired(), live, limits)
                after = rollout_state(desired(), looked(live), limits)
                assert capacity(after) >= min(capacity(before), floor(before))
    for _ in range(60):
        words, live = advance(desired(), [settled(o) for o in live], limits)
        if not words:
            break
    assert words == []
    runs = [o for o in live if o["kind"] in ("Deployment", SET_KIND)]
    left = {
        role: sum(o["spec"]["replicas"] for o in runs if f"-{role}-" in o["metadata"]["name"]) for role in sizes
    }
    assert left == sizes
    kinds_left = {o["metadata"]["labels"]["serving.kvasir.dev/role"]: o["kind"] for o in runs}
    for role, shape in shapes.items():
        assert kinds_left.get(role) in ({SET_KIND, None} if shape is TWO else {"Deployment"})


# Reconciles


class OperatorHarness:
    """One service in a cluster in memory, with its operator."""

    def __init__(self, **spec: Any) -> None:
        self.cluster = FakeCluster(document(**spec))
        self.pods = FakePods()
        self.pods.pairs = PairReport(verified=1)
        self.looks: list[float] = []
        self.operator = self.another()

    def another(self) -> Reconciler:
        """An operator beside the first."""
        return Reconciler(
            self.cluster,
            Options(),
            lambda model: None,
            lambda: NOW,
            self.pods,
            lambda namespace, name, seconds: self.looks.append(seconds),
        )

    def reconcile(self) -> None:
        self.operator.reconcile("default", "llama")

    def settle(self) -> None:
        for _ in range(8):
            self.reconcile()
            self.cluster.settle()
        self.cluster.calls.clear()
        self.reconcile()
        assert self.cluster.calls == [], "all is well, so nothing is written"

    def edit(self, change: Callable[[Any], object]) -> None:
        found = self.cluster.services["default", "llama"]
        change(found["spec"])
        found["metadata"]["generation"] += 1

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.cluster.services["default", "llama"]["status"]
        return found

    def sets(self) -> list[str]:
        return sorted(r.name for r in self.cluster.objects if r.kind == SET_KIND)


def two_nodes(replicas: int = 2, **more: Any) -> dict[str, Any]:
    return {"prefill": {**TWO, "replicas": replicas}, "decode": {"device": "cpu"}, **more}


def test_the_status_counts_workers_and_not_pods() -> None:
    stand = OperatorHarness(**two_nodes())
    stand.reconcile()
    assert stand.cluster.conditions()["PrefillReady"]["message"] == "0 of 2 ready"
    stand.settle()
    assert stand.status["prefill"] == {"replicas": 2, "ready": 2, "summary": "2/2"}
    assert stand.cluster.conditions()["PrefillReady"]["message"] == "2 of 2 ready"
    stand.edit(lambda spec: spec["prefill"].update(replicas=0))
    stand.settle()
    assert stand.cluster.conditions()["PrefillReady"]["reason"] == "ScaledToZero"


def test_from_one_node_to_two_and_back_is_a_rollout() -> None:
    stand = OperatorHarness(**two_nodes(3, decode={"device": "cpu", "replicas": 3}))
    stand.edit(lambda spec: spec["prefill"].update(nodes=1))
    stand.settle()
    for nodes in (2, 1):
        stand.edit(lambda spec, nodes=nodes: spec["prefill"].update(nodes=nodes))
        for _ in range(8):
            stand.reconcile()
            stand.cluster.settle()
            runs = [n for name, n in stand.cluster.replicas().items() if "-prefill-" in name]
            assert 3 <= sum(runs) <= 4
        stand.settle()
        assert len(stand.sets()) == (3 if nodes == 2 else 0)
        assert sum(n for name, n in stand.cluster.replicas().items() if "-prefill-" in name) == 3


def test_which_set_goes_is_in_the_status_before_it_goes() -> None:
    stand = OperatorHarness(**two_nodes())
    stand.settle()
    before = stand.sets()
    stand.edit(lambda spec: spec["prefill"].update(replicas=1))
    said: list[Any] = []
    delete = stand.cluster.delete

    def watched(namespace: str, target: Reference, uid: str = "") -> None:
        said.append((target.name, uid, stand.status.get("removing")))
        delete(namespace, target, uid)

    stand.cluster.delete = watched  # type: ignore[method-assign]
    uid = stand.cluster.objects[Reference(SET_API_VERSION, SET_KIND, before[1])]["metadata"]["uid"]
    stand.reconcile()
    assert said == [(before[1], uid, [before[1]])]
    assert stand.sets() == before[:1]
    assert "removing" not in stand.status, "it is gone"


def test_an_operator_that_dies_after_it_chose_has_chosen_for_the_next() -> None:
    stand = OperatorHarness(**two_nodes(3))
    stand.settle()
    before = stand.sets()
    stand.edit(lambda spec: spec["prefill"].update(replicas=2))

    def dies(*_: Any) -> None:
        raise ClusterError(0, "cut off")

    stand.cluster.delete = dies  # type: ignore[method-assign,assignment]
    with pytest.raises(ClusterError):
        stand.reconcile()
    assert stand.status["removing"] == before[2:]
    del stand.cluster.delete
    # Meanwhile another became worse, and would be the one to go.
    first = Reference(SET_API_VERSION, SET_KIND, before[0])
    stand.cluster._store(settled(stand.cluster.objects[first], 0))
    stand.reconcile()
    assert stand.sets() == before[:2]
    assert "removing" not in stand.status
    stand.settle()
    assert stand.sets() == before[:2]


def test_of_two_operators_that_choose_at_the_same_time_one_is_refused() -> None:
    stand = OperatorHarness(**two_nodes(2))
    stand.settle()
    first = Reference(SET_API_VERSION, SET_KIND, stand.sets()[0])
    stand.edit(lambda spec: spec["prefill"].update(replicas=1))
    worse = settled(stand.cluster.objects[first], 0)
    objects = {**stand.cluster.objects, first: worse}
    read = copy.deepcopy(stand.cluster.services["default", "llama"])
    stand.reconcile()
    assert len(stand.sets()) == 1
    slow = stand.another()
    stand.cluster.get_service = lambda *_: copy.deepcopy(read)  # type: ignore[method-assign]
    stand.cluster.owned = lambda *_: list(objects.values())  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="modified"):
        slow.reconcile("default", "llama")
    assert len(stand.sets()) == 1


def test_a_pause_keeps_what_was_to_go() -> None:
    stand = OperatorHarness(**two_nodes(2))
    stand.settle()
    before = stand.sets()
    found = stand.cluster.services["default", "llama"]
    found["metadata"]["annotations"] = {"serving.kvasir.dev/paused": "true"}
    found["status"]["removing"] = before[1:]
    stand.reconcile()
    assert stand.sets() == before
    assert stand.status["removing"] == before[1:]
    assert stand.status["prefill"]["ready"] == 1, "it counts for nothing any more"


def test_without_the_api_nothing_is_changed_and_the_refusal_names_it() -> None:
    stand = OperatorHarness(**two_nodes())
    stand.edit(lambda spec: spec["prefill"].update(nodes=1))
    stand.settle()
    before = dict(stand.cluster.objects)
    stand.cluster.unserved.add(SET_KIND)
    stand.edit(lambda spec: spec["prefill"].update(nodes=2))
    stand.looks.clear()
    stand.reconcile()
    assert stand.cluster.objects == before
    found = stand.cluster.conditions()["Accepted"]
    assert found["status"] == "False"
    message = (
        "spec.prefill.nodes: 2 takes leaderworkerset.x-k8s.io/v1, which this cluster does not serve: "
        "install LeaderWorkerSet"
    )
    assert found["message"] == message
    assert [text for (reason, _), text in stand.cluster.events.items() if reason == "NotAccepted"] == [
        f"Invalid: {message}"
    ]
    assert stand.looks == [API_SECONDS], "nothing tells when it is installed"
    stand.cluster.unserved.clear()
    stand.settle()
    assert len(stand.sets()) == 2
    assert stand.cluster.conditions()["Accepted"]["status"] == "True"


def test_who_needs_no_sets_is_not_asked_for_them() -> None:
    stand = OperatorHarness()
    stand.cluster.unserved.add(SET_KIND)
    stand.settle()
    assert stand.cluster.conditions()["PrefillReady"]["status"] == "True"


def test_a_set_of_somebody_else_is_left_alone_and_named() -> None:
    stand = OperatorHarness(**two_nodes(1))
    (name,) = [o["metadata"]["name"] for o in sets(wanted(1))]
    stand.cluster.theirs.add(Reference(SET_API_VERSION, SET_KIND, name))
    with pytest.raises(ClusterError, match="does not belong"):
        stand.reconcile()
    assert stand.sets() == []
    found = stand.cluster.conditions()["PrefillReady"]
    assert found["reason"] == "ApplyFailed"
    assert name in found["message"]


def test_sets_that_are_refused_are_their_roles_trouble_whatever_their_numbers() -> None:
    stand = OperatorHarness(**two_nodes(1))
    stand.settle()
    (name,) = stand.sets()
    gone = stand.cluster.objects.pop(Reference(SET_API_VERSION, SET_KIND, name))
    left = group_pods(gone)
    for pod in left:
        pod["metadata"]["deletionTimestamp"] = "now"
    stand.cluster.listed_pods = left
    stand.cluster.refuse[SET_KIND] = ClusterError(403, "exceeded quota")
    with pytest.raises(ClusterError):
        stand.reconcile()
    assert stand.cluster.conditions()["PrefillReady"]["message"].endswith("exceeded quota")
    assert stand.cluster.calls[-2].endswith("-1"), "the name is taken until the pods are gone"


def test_a_group_that_fails_says_why_though_its_pods_are_new() -> None:
    stand = OperatorHarness(**two_nodes(1))
    stand.settle()
    (item,) = sets(list(stand.cluster.objects.values()))
    ended = {"exitCode": 1, "message": "kvasir: error: node 1 does not answer"}
    failed = group_pods(item, 0)[0]
    failed["metadata"]["deletionTimestamp"] = "now"
    failed["status"]["containerStatuses"] = [{"name": "kvasir", "ready": False, "state": {"terminated": ended}}]
    stand.cluster._store(settled(item, 0))
    stand.cluster.listed_pods = [failed]
    stand.reconcile()
    found = stand.cluster.conditions()["PrefillReady"]
    assert found["reason"] == "Error"
    assert "node 1 does not answer" in found["message"]
    stand.edit(lambda spec: spec["prefill"].update(replicas=0))
    stand.reconcile()
    stand.reconcile()
    assert stand.cluster.conditions()["PrefillReady"]["reason"] == "ScaledToZero", "a set that goes has not failed"


def test_of_a_group_that_leaves_the_leader_says_what_it_has() -> None:
    stand = OperatorHarness(**two_nodes(1))
    item = sets(wanted(1))[0]
    left = group_pods(item)
    for pod in left:
        pod["metadata"]["deletionTimestamp"] = "now"
    leader, follower = (pod["metadata"]["name"] for pod in left)
    stand.cluster.listed_pods = left
    stand.pods.left[leader] = WorkerStatus(True, 2, 1, 9.0, None)
    stand.reconcile()
    assert stand.status["leaving"] == [{"pod": leader, "requests": 2, "leases": 1}]
    stand.cluster.listed_pods = left[1:]
    stand.reconcile()
    assert stand.status["leaving"] == [{"pod": follower}], "while anything of it is there"


def test_only_leaders_are_asked_for_their_load_and_count_as_starts() -> None:
    item = settled(sets(wanted(1))[0])
    pods = group_pods(item)
    for pod, became in zip(pods, ("2026-01-01T00:00:40Z", "2026-01-01T00:00:10Z"), strict=True):
        pod["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
        pod["status"]["conditions"][0]["lastTransitionTime"] = became
    observed = observe([item], pods)
    assert median_startup_seconds(observed) == 40.0
    asked: list[str] = []

    class Ask:
        def routers(self, ips: Any) -> list[Any]:
            return []

        def workers(self, ips: Any) -> list[Any]:
            asked.extend(ips)
            return [None for _ in ips]

    Autoscaler(Ask(), lambda: NOW, lambda *_: None)._measure(observed)
    assert asked == [pods[0]["metadata"]["name"]]


def test_a_role_that_others_size_is_counted_in_workers() -> None:
    stand = OperatorHarness(**two_nodes(2, scaling={"mode": "External"}))
    stand.settle()
    role = stand.cluster.objects[Reference("serving.kvasir.dev/v1alpha1", "InferenceRole", "llama-prefill")]
    assert role["spec"]["replicas"] == 2
    assert role["status"] == {"replicas": 2}
    role["spec"]["replicas"] = 3
    stand.settle()
    assert len(stand.sets()) == 3


def test_a_download_holds_back_the_first_sets_of_a_revision_only() -> None:
    model = {"uri": "hf://a/b", "cache": {"claimName": "c"}}
    stand = OperatorHarness(**two_nodes(1, model=model))
    stand.reconcile()
    assert stand.sets() == []
    (job,) = [r for r in stand.cluster.objects if r.kind == "Job"]
    done = {"conditions": [{"type": "Complete", "status": "True"}]}
    stand.cluster.objects[job] = {**stand.cluster.objects[job], "status": done}
    stand.settle()
    assert len(stand.sets()) == 1
    del stand.cluster.objects[job]["status"]
    stand.edit(lambda spec: spec["prefill"].update(replicas=2))
    stand.reconcile()
    assert len(stand.sets()) == 2, "what is there found its model before"


def test_names_go_on_as_workers_come_and_go() -> None:
    stand = OperatorHarness(**two_nodes(2))
    stand.settle()
    for replicas in itertools.chain([4, 1, 3, 0, 2]):
        stand.edit(lambda spec, n=replicas: spec["prefill"].update(replicas=n))
        stand.settle()
        assert [int(name.rpartition("-")[2]) for name in stand.sets()] == list(range(replicas))
