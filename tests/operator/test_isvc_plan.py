"""From what is observed to the next steps: traces, and that nothing is done twice or too early."""

import copy
from typing import Any

import pytest
from isvc_cases import advance, deployments, service, settled, stamped

from kvasir_operator.observed import observe
from kvasir_operator.plan import plan
from kvasir_operator.plan.difference import differs
from kvasir_operator.render import Object, Options, render

OLD = render(service(), Options())
NEW = render(service(drain={"deadlineSeconds": 5}), Options())


def named(objects: list[Object], role: str) -> str:
    return f"Deployment {deployments(objects)[role]['metadata']['name']}"


def all_ready(objects: list[Object]) -> list[Object]:
    return [settled(o) for o in objects]


def ready(objects: list[Object], name: str) -> list[Object]:
    """`objects` with this Deployment's pods all ready."""
    return [settled(o) if f"{o['kind']} {o['metadata']['name']}" == name else o for o in objects]


def test_everything_is_created_once_and_then_left_alone() -> None:
    words, live = advance(OLD, [])
    assert words == [f"apply {o['kind']} {o['metadata']['name']}" for o in OLD]
    assert advance(OLD, live) == ([], live)
    assert plan(OLD, observe(all_ready(live), [])) == []


def test_a_rollout_adds_the_new_revision_and_ends_the_old_when_both_roles_are_ready() -> None:
    _, live = advance(OLD, [])
    live = all_ready(live)
    words, live = advance(NEW, live)
    changed = ["Deployment llama-router", named(NEW, "prefill"), named(NEW, "decode")]
    assert words == [*(f"apply {name}" for name in changed), "wait"]
    assert advance(NEW, live)[0] == ["wait"]
    live = ready(live, named(NEW, "decode"))
    assert advance(NEW, live)[0] == ["wait"], "prefill's new revision is not ready yet"
    live = ready(live, named(NEW, "prefill"))
    words, live = advance(NEW, live)
    assert words == [f"delete {named(OLD, 'decode')}", f"delete {named(OLD, 'prefill')}"]
    assert advance(NEW, live)[0] == []


def test_a_rollback_half_way_keeps_the_old_revision_and_ends_the_new() -> None:
    _, live = advance(OLD, [])
    _, live = advance(NEW, all_ready(live))
    words, live = advance(OLD, live)
    assert words[0] == "apply Deployment llama-router"
    assert set(words[1:]) == {f"delete {named(NEW, 'decode')}", f"delete {named(NEW, 'prefill')}"}
    assert named(OLD, "decode") in {f"{o['kind']} {o['metadata']['name']}" for o in live}


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    "lag",
    [
        {"readyReplicas": 0},
        {"updatedReplicas": 0},
        {"observedGeneration": 0},
    ],
)
def test_the_old_revision_stays_while_anything_of_the_new_one_is_missing(role: str, lag: dict[str, int]) -> None:
    _, live = advance(OLD, [])
    _, live = advance(NEW, live)
    live = all_ready(live)
    for item in live:
        if f"{item['kind']} {item['metadata']['name']}" == named(NEW, role):
            item["status"] = {**item["status"], **lag}
    words, _ = advance(NEW, live)
    assert words == ["wait"]


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
