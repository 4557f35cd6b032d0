"""The long forms of `test_rollout.py`: an operator or an API server killed at every point of a rollout, and a node
that falls silent with workers of both roles."""

import itertools
from collections.abc import Iterator

import pytest

from e2e import steps
from e2e.controlplane.cluster import Cluster
from e2e.crash import ends, operator_killed
from e2e.stage import SPARE, Stage, Targets, service, set_up

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

PAIRS: Targets = {"prefill": 2, "decode": 2}
PAIR: Targets = {"prefill": 1, "decode": 1}


@pytest.fixture(scope="module")
def stage(cluster: Cluster) -> Iterator[Stage]:
    with set_up(cluster, service(2, 2, True, spread=True)) as found:
        yield found


def test_a_node_that_falls_silent_with_a_pair_of_workers_is_survived(stage: Stage) -> None:
    """Nothing tells the routers, prefill and decode workers of the others: packets just do not come back."""
    lost = stage.on(SPARE.name)
    assert {name.split("-")[1] for name in lost} == {"prefill", "decode"}
    stage.answered()
    try:
        with stage.long.flowing(1):
            stage.until(lambda: lost & stage.busy(), "a stream is on a worker that is about to fall silent")
            stage.window("node silent", PAIRS, bound=0.5)
            stage.cluster.lose(stage.spare, silently=True)
            stage.answered()  # a stream stands still until a ping is not answered
            steps.node_unknown(stage.cluster, SPARE.name)
            stage.until(lambda: stage.rolled(PAIRS), "others take their places")
            stage.until(lambda: stage.left_by(lost), "the status says who does not answer")
        stage.answered()
    finally:
        steps.forget_node(stage.cluster, SPARE.name)
        stage.settled()


def test_an_api_server_that_is_killed_at_every_change_of_a_rollout(stage: Stage) -> None:
    kills = 0
    try:
        stage.edit("API server killed at every change", service(2, 2, False, spread=True), PAIRS)
        seen = stage.timeline.now()
        first = stage.revisions()

        def rolled() -> bool:
            nonlocal kills, seen
            if stage.timeline.now() != seen:
                seen = stage.timeline.now()
                stage.cluster.restart_apiserver()
                kills += 1
            return stage.rolled(PAIRS) and not first & stage.revisions()

        # While the API server is away leaders lose the Lease, and another may follow after 15 seconds only.
        stage.until(rolled, "rolled to the other KV", seconds=900)
        stage.answered()
        print(f"{kills} API servers were killed")
        assert kills >= 4
    finally:
        stage.settled()


def test_an_operator_that_is_killed_once_after_any_of_the_writes_of_a_rollout(stage: Stage) -> None:
    """A rollout for each N, until one has fewer writes than N."""
    steps.apply(stage.cluster, service(1, 1, False), namespace=stage.timeline.namespace)
    stage.until(lambda: stage.rolled(PAIR), "one pair")
    try:
        for n in itertools.count(1):
            before = stage.revisions()
            with operator_killed(stage.cluster, writes=n, lives=1) as operator:
                stage.edit(f"killed after write {n}", service(1, 1, bool(n % 2)), PAIR)
                stage.until(
                    lambda before=before: stage.rolled(PAIR) and not before & stage.revisions(),
                    f"rolled though killed after write {n}",
                )
            stage.answered()
            print(f"N={n}: killed after {ends(operator)}")
            if not ends(operator):
                break
        assert n > 8
    finally:
        stage.settled()
