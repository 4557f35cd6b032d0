"""From what is observed to the next steps: traces, and that nothing is done twice or too early."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isvc_cases import SMOL, advance, deployments, service, settled, stamped

from kvasir_operator.api import Rollout
from kvasir_operator.plan import Apply, plan
from kvasir_operator.plan.difference import differs
from kvasir_operator.plan.observed import observe, reference
from kvasir_operator.plan.rollout import capacity, floor
from kvasir_operator.plan.workers import rollout_state
from kvasir_operator.render import Object, Options, render

OLD = render(service(), Options())
NEW = render(service(drain={"deadlineSeconds": 5}), Options())
OTHER_KV = render(service(model={"uri": SMOL, "dtype": "float32"}), Options())


def named(objects: list[Object], role: str) -> str:
    return f"Deployment {deployments(objects)[role]['metadata']['name']}"


def all_ready(objects: list[Object]) -> list[Object]:
    return [settled(o) for o in objects]


def ready(objects: list[Object], name: str) -> list[Object]:
    """`objects` with this Deployment's pods all ready."""
    return [settled(o) if f"{o['kind']} {o['metadata']['name']}" == name else o for o in objects]


def serving(objects: list[Object] = OLD) -> list[Object]:
    """What is there once `objects` were applied and all pods are ready."""
    return all_ready(advance(objects, [])[1])


def test_everything_is_created_once_and_then_left_alone() -> None:
    words, live = advance(OLD, [])
    assert {word.removesuffix(" 1") for word in words} == {f"apply {reference(o)}" for o in OLD}
    assert len(words) == len(OLD)
    assert advance(OLD, live) == (["wait"], live)
    assert plan(OLD, observe(all_ready(live), []), Rollout()) == []


def test_with_the_same_kv_each_role_goes_on_by_itself() -> None:
    words, live = advance(NEW, serving())
    assert words == [
        "apply Deployment llama-router 1",
        f"apply {named(NEW, 'prefill')} 1",
        f"apply {named(NEW, 'decode')} 1",
    ]
    assert advance(NEW, live)[0] == ["wait"]
    words, live = advance(NEW, ready(live, named(NEW, "decode")))
    assert words == [f"scale {named(OLD, 'decode')} 0"], "the new decode worker pairs with the old prefill worker"
    words, live = advance(NEW, ready(live, named(NEW, "prefill")))
    assert words == [f"scale {named(OLD, 'prefill')} 0", f"delete {named(OLD, 'decode')}"]
    assert advance(NEW, all_ready(live))[0] == [f"delete {named(OLD, 'prefill')}"]


def test_with_another_kv_pairs_go_together() -> None:
    words, live = advance(OTHER_KV, serving())
    live = all_ready(ready(live, named(OTHER_KV, "decode")))
    for item in live:
        if f"{item['kind']} {item['metadata']['name']}" == named(OTHER_KV, "prefill"):
            item["status"]["readyReplicas"] = 0
    assert advance(OTHER_KV, live)[0] == ["wait"], (
        "a new decode worker without a new prefill worker is worth nothing"
    )
    words, live = advance(OTHER_KV, all_ready(live))
    assert set(words) == {f"scale {named(OLD, 'decode')} 0", f"scale {named(OLD, 'prefill')} 0"}


def test_an_old_deployment_is_deleted_only_once_its_pods_are_gone() -> None:
    live = advance(NEW, serving())[1]
    words, live = advance(NEW, all_ready(live))
    scaled = [word for word in words if word.startswith("scale")]
    assert len(scaled) == 2
    for item in live:
        if item["kind"] == "Deployment" and item["metadata"]["name"] in " ".join(scaled):
            item["status"]["replicas"] = 1
    assert advance(NEW, live)[0] == ["wait"]
    for item in live:
        if item["kind"] == "Deployment" and item["metadata"]["name"] in " ".join(scaled):
            item["status"]["replicas"] = 0
            item["metadata"]["generation"] = 7
    assert advance(NEW, live)[0] == ["wait"], "what its controller has not seen yet does not count"


def test_a_rollback_half_way_keeps_the_old_revision_and_ends_the_new() -> None:
    live = advance(NEW, serving())[1]
    words, live = advance(OLD, live)
    assert words == [
        "apply Deployment llama-router 1",
        f"scale {named(NEW, 'prefill')} 0",
        f"scale {named(NEW, 'decode')} 0",
    ]
    words, live = advance(OLD, live)
    assert set(words) == {f"delete {named(NEW, 'decode')}", f"delete {named(NEW, 'prefill')}"}
    assert advance(OLD, all_ready(live))[0] == []


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("lag", [{"readyReplicas": 0}, {"readyReplicas": None}])
def test_the_old_revision_stays_while_the_new_one_is_not_ready(role: str, lag: dict[str, int | None]) -> None:
    live = all_ready(advance(OTHER_KV, serving())[1])
    for item in live:
        if f"{item['kind']} {item['metadata']['name']}" == named(OTHER_KV, role):
            item["status"] = {k: v for k, v in {**item["status"], **lag}.items() if v is not None}
    assert advance(OTHER_KV, live)[0] == ["wait"]


def test_what_is_planned_holds_only_for_what_was_seen() -> None:
    live = serving(render(service(decode={"replicas": 2}), Options()))
    for version, item in enumerate(live):
        item["metadata"]["resourceVersion"] = str(version)
    wanted = render(service(decode={"replicas": 3}), Options())
    (step,) = plan(wanted, observe(live, []), Rollout())
    assert isinstance(step, Apply)
    (seen,) = [o for o in live if reference(o) == reference(step.object)]
    assert step.object["metadata"]["resourceVersion"] == seen["metadata"]["resourceVersion"]


KINDS_OF_EDIT: list[dict[str, Any]] = [
    {"drain": {"deadlineSeconds": 5}},
    {"model": {"uri": SMOL, "dtype": "float32"}},
    {"model": {"uri": SMOL, "dtype": "float16"}},
    {},
]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_paired_capacity_keeps_to_its_bound_whatever_is_edited_when(data: st.DataObject) -> None:
    """Through Deployments and their labels, as the operator sees them: edits and scaling at any time, pods that
    become ready in any order, a controller that lags. The planner alone is searched through whole elsewhere."""
    counts = st.integers(1, 4)
    limits = Rollout(
        max_surge=data.draw(st.sampled_from([1, "50%"])), max_unavailable=data.draw(st.sampled_from([0, 1]))
    )
    sizes = {"prefill": data.draw(counts), "decode": data.draw(counts)}
    edit: dict[str, Any] = {}

    def wanted() -> list[Object]:
        return render(service(**{role: {"replicas": n} for role, n in sizes.items()}, **edit), Options())

    live = all_ready(advance(wanted(), [], limits)[1])
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["reconcile", "ready", "ready", "edit", "scale"])):
            case "edit":
                edit = data.draw(st.sampled_from(KINDS_OF_EDIT))
            case "scale":
                sizes[data.draw(st.sampled_from(["prefill", "decode"]))] = data.draw(counts)
            case "ready":
                lacking = [o for o in live if o["kind"] == "Deployment" and _lacks(o)]
                if lacking:
                    data.draw(st.sampled_from(lacking))["status"]["readyReplicas"] += 1
            case _:
                before = rollout_state(wanted(), observe(live, []), limits)
                _, live = advance(wanted(), live, limits)
                after = rollout_state(wanted(), observe(live, []), limits)
                assert capacity(after) >= min(capacity(before), floor(before))
    for _ in range(60):
        words, live = advance(wanted(), all_ready(live), limits)
        if not words:
            break
    assert words == []
    left = {o["metadata"]["name"]: o["spec"]["replicas"] for o in live if o["kind"] == "Deployment"}
    assert left == {o["metadata"]["name"]: o["spec"]["replicas"] for o in wanted() if o["kind"] == "Deployment"}


def _lacks(item: Object) -> bool:
    return bool(item["status"].get("readyReplicas", 0) < item["spec"]["replicas"])


def test_what_is_not_wanted_any_more_is_deleted_at_once() -> None:
    exposed = render(service(router={"expose": {"type": "Ingress"}}), Options())
    _, live = advance(exposed, [])
    assert advance(OLD, all_ready(live))[0] == ["delete Ingress llama-router"]


def test_an_object_on_its_way_out_does_not_count() -> None:
    _, live = advance(OLD, [])
    for item in live:
        item["metadata"] = {**item["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
    assert len(advance(OLD, live)[0]) == len(OLD)


def defaulted(item: Object) -> Object:
    """What an API server adds to a Deployment and writes its own way."""
    live = copy.deepcopy(stamped(item))
    live["metadata"]["resourceVersion"] = "7"
    live["spec"]["strategy"] = {"type": "RollingUpdate"}
    pod = live["spec"]["template"]["spec"]
    pod["dnsPolicy"] = "ClusterFirst"
    pod["containers"][0]["imagePullPolicy"] = "Always"
    pod["containers"][0]["env"].reverse()
    pod["containers"][0]["resources"]["requests"]["cpu"] = "500m"
    return live


def test_what_the_server_adds_is_no_difference() -> None:
    workers = {"device": "cpu", "resources": {"requests": {"cpu": "0.5"}}}
    item = deployments(render(service(decode=workers), Options()))["decode"]
    assert not differs(stamped(item), defaulted(item))


@pytest.mark.parametrize(
    "meddle",
    [
        lambda o: o["spec"].update(replicas=5),
        lambda o: o["metadata"]["labels"].pop("app.kubernetes.io/name"),
        lambda o: o["spec"]["template"]["spec"]["containers"][0]["args"].append("--extra"),
        lambda o: o["spec"]["template"]["spec"]["containers"][0].update(image="other"),
        lambda o: o["spec"]["template"]["spec"]["containers"].clear(),
        lambda o: o["metadata"]["annotations"].clear(),
    ],
)
def test_what_somebody_changed_is_put_right(meddle: Any) -> None:
    item = deployments(OLD)["decode"]
    live = copy.deepcopy(stamped(item))
    assert not differs(stamped(item), live)
    meddle(live)
    assert differs(stamped(item), live)


def test_a_field_that_is_no_longer_wanted_makes_a_difference() -> None:
    item = deployments(OLD)["decode"]
    more = copy.deepcopy(item)
    more["spec"]["template"]["spec"]["priorityClassName"] = "high"
    assert differs(stamped(item), stamped(more))


@pytest.mark.parametrize("truth", [0, 1])
def test_the_pods_themselves_say_what_is_ready(truth: int) -> None:
    """A Deployment's own count lags: behind pods that became ready, and behind pods that were lost."""
    live = [settled(o, 1 - truth) for o in advance(NEW, serving())[1]]
    pods = [
        {
            "metadata": {
                "name": f"{o['metadata']['name']}-x",
                "labels": o["spec"]["template"]["metadata"]["labels"],
            },
            "status": {"conditions": [{"type": "Ready", "status": "True" if truth else "False"}]},
        }
        for o in live
        if o["kind"] == "Deployment"
    ]
    state = rollout_state(NEW, observe(live, pods), Rollout())
    assert {group.ready for group in state.groups} == {truth}
