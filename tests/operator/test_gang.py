"""All pods of a worker over several nodes are placed, or none: by Kueue, KAI or Volcano, in their own words."""

from typing import Any

import pytest
from foreign_schemas import LEADER_WORKER_SET, refusals
from isvc_cases import advance, deployments, document, service, settled

from kvasir_operator.admission import parse
from kvasir_operator.api import SET_KIND, InvalidService
from kvasir_operator.render import Object, Options, render

TWO = {"nodes": 2, "tensorParallel": 2, "replicas": 2}


def gang(provider: str, queue: str = "team-a", **decode: Any) -> dict[str, Any]:
    return {"scheduling": {"gang": {"provider": provider, "queue": queue}}, "decode": {**TWO, **decode}}


def sets(spec: dict[str, Any]) -> list[Object]:
    return [item for item in render(service(**spec), Options()) if item["kind"] == SET_KIND]


def pods_of(item: Object) -> list[Object]:
    group = item["spec"]["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]]


def test_kueue_finds_its_queue_in_the_sets_labels() -> None:
    for item in sets(gang("Kueue")):
        assert item["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        assert all("schedulerName" not in pod["spec"] for pod in pods_of(item))


def test_kai_finds_its_pods_by_the_schedulers_name_and_the_queue_by_their_label() -> None:
    for item in sets(gang("KAI")):
        for labelled in (item, *pods_of(item)):
            assert labelled["metadata"]["labels"]["kai.scheduler/queue"] == "team-a"
        assert {pod["spec"]["schedulerName"] for pod in pods_of(item)} == {"kai-scheduler"}


def test_volcano_finds_its_pods_by_the_schedulers_name_and_the_queue_by_the_sets_annotation() -> None:
    for item in sets(gang("Volcano")):
        assert item["metadata"]["annotations"]["scheduling.volcano.sh/queue-name"] == "team-a"
        assert {pod["spec"]["schedulerName"] for pod in pods_of(item)} == {"volcano"}


@pytest.mark.parametrize("provider", ["Kueue", "KAI", "Volcano"])
def test_whoever_makes_the_pod_groups_counts_all_pods_of_a_set_from_the_beginning(provider: str) -> None:
    """With another start-up policy the leader alone is a group of one, and takes a node that its followers lack."""
    for item in sets(gang(provider)):
        assert item["spec"]["startupPolicy"] == "LeaderCreated"
        assert item["spec"]["leaderWorkerTemplate"]["size"] == 2


@pytest.mark.parametrize("version", LEADER_WORKER_SET)
@pytest.mark.parametrize("spec", [{"decode": TWO}, *map(gang, ("Kueue", "KAI", "Volcano"))])
def test_sets_are_what_their_definition_takes(version: str, spec: dict[str, Any]) -> None:
    found = sets(spec)
    assert len(found) == 2
    for item in found:
        assert not list(refusals(LEADER_WORKER_SET[version], item["spec"]))
    for wrong in ({"size": 2}, {"leaderWorkerTemplate": {}}, {"startupPolicy": "Whenever"}):
        assert list(refusals(LEADER_WORKER_SET[version], {**found[0]["spec"], **wrong}))


@pytest.mark.parametrize("provider", ["Kueue", "KAI", "Volcano"])
def test_another_queue_is_another_group_and_no_gang_the_group_that_was(provider: str) -> None:
    def name(spec: dict[str, Any]) -> str:
        found: str = sets(spec)[0]["metadata"]["name"]
        return found

    names = [name({"decode": TWO}), name(gang(provider)), name(gang(provider, "team-b"))]
    assert len(set(names)) == 3


def test_workers_of_one_pod_and_routers_are_placed_as_ever() -> None:
    plain = deployments(render(service(decode=TWO), Options()))
    found = deployments(render(service(**gang("KAI")), Options()))
    assert set(found) == {"prefill", "router"}
    assert found == plain


def test_a_set_of_the_revision_before_is_made_anew_with_its_queue() -> None:
    """A rollout that turns back scales what is no longer wanted, from what is there."""
    before = render(service(**gang("Volcano", replicas=1)), Options())
    live = [settled(item) for item in before]
    for _ in range(2):
        _, live = advance(before, live)
    live = [settled(item) for item in live]
    after = render(service(**gang("Volcano", "team-b", replicas=1)), Options())
    _, live = advance(after, live)
    queues = {
        item["metadata"]["annotations"]["scheduling.volcano.sh/queue-name"]
        for item in live
        if item["kind"] == SET_KIND
    }
    assert queues == {"team-a", "team-b"}


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"scheduling": {"gang": {"provider": "Kueue", "queue": "q"}}}, "spec.scheduling.gang"),
        ({**gang("Slurm")}, "spec.scheduling.gang.provider"),
        ({**gang("Kueue", "Team A")}, "spec.scheduling.gang.queue"),
        ({**gang("Kueue", "")}, "spec.scheduling.gang.queue"),
        ({"decode": TWO, "scheduling": {"gang": {"provider": "KAI"}}}, "spec.scheduling.gang.queue"),
        (
            gang("KAI", template={"spec": {"schedulerName": "mine"}}),
            "spec.decode.template.spec.schedulerName",
        ),
        (
            gang("KAI", template={"metadata": {"labels": {"kai.scheduler/queue": "x"}}}),
            "spec.decode.template.metadata.labels[kai.scheduler/queue]",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(spec: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidService) as error:
        parse(document(**spec))
    assert path in [problem.path for problem in error.value.problems], error.value


def test_without_another_scheduler_the_template_may_name_one() -> None:
    found = sets(gang("Kueue", template={"spec": {"schedulerName": "mine"}}))
    assert {pod["spec"]["schedulerName"] for item in found for pod in pods_of(item)} == {"mine"}
