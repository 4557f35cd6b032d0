"""Rollouts, rollbacks and scaling under traffic, and what goes wrong meanwhile: no stream fails, pairs are kept.

A node is lost, the API server is killed, the operator is killed after each of its writes. The timeline that is
printed is what the API server told of the worker pods, ready/all by role and revision/KV, with the paired capacity.
The tests go on from each other's service; `test_rollout_soak.py` has what takes long.
"""

from collections.abc import Iterator

import pytest

from e2e import steps
from e2e.controlplane.cluster import Cluster
from e2e.crash import ends, operator_killed
from e2e.stage import SPARE, Stage, service, set_up

# The least number of writes of a rollout of both roles and the router: objects, sizes, and the status on the way.
FEWEST_WRITES = 8


@pytest.fixture(scope="module")
def stage(cluster: Cluster) -> Iterator[Stage]:
    with set_up(cluster, service(1, 2, True)) as found:
        yield found


def test_a_lost_nodes_worker_is_replaced_and_its_streams_go_on(stage: Stage) -> None:
    lost = stage.on(SPARE.name)
    assert len(lost) == 1, "one of two decode workers is on the spare node"
    stage.answered()
    try:
        stage.until(lambda: lost <= stage.busy(), "a stream is on the worker that is about to be lost")
        stage.window("node lost", {"prefill": 1, "decode": 2}, bound=0.5)
        stage.cluster.lose(stage.spare, silently=False)
        steps.node_unknown(stage.cluster, SPARE.name)
        stage.until(lambda: stage.rolled({"prefill": 1, "decode": 2}), "another worker takes its place")
        assert not lost & stage.on("cpu-1")
        stage.answered()
        stage.until(lambda: stage.left_by(lost), "the status says who does not answer")
    finally:
        steps.forget_node(stage.cluster, SPARE.name)
        stage.settled()


def test_rollout_scaling_and_rollback_under_traffic(stage: Stage) -> None:
    """Each window is judged by the smaller of the sizes before and after its edit."""
    try:
        stage.answered()
        first = stage.revisions()
        assert len(first) == 2

        # With digests and without do not pair: it is another KV, and pairs move together.
        stage.edit("rollout", service(1, 2, False), {"prefill": 1, "decode": 2})
        stage.until(lambda: len(stage.revisions() - first) == 2, "the pods of the new KV are made")
        stage.cluster.restart_apiserver()
        stage.until(lambda: len(stage.revisions(ready=1) - first) == 2, "a pair of the new KV")
        assert stage.revisions() & first, "it is half way only"
        stage.answered(1)

        stage.edit("scaled up half way", service(1, 3, False), {"prefill": 1, "decode": 2})
        stage.until(lambda: stage.ready("decode") >= 3, "three decode workers are ready")
        stage.answered(1)

        with stage.long.flowing(3):
            stage.until(lambda: len(stage.busy()) >= 3, "there are streams on all of them, two of which will leave")
            stage.edit("rolled back and scaled down", service(1, 1, True), {"prefill": 1, "decode": 1})
            stage.until(stage.drain_told, "the status says what a drain waits for")
            stage.until(lambda: stage.rolled({"prefill": 1, "decode": 1}), "rolled back to one pair")
        stage.answered()
    finally:
        stage.settled()


def test_a_rollout_whose_operator_is_killed_after_each_of_its_writes(stage: Stage) -> None:
    """The same KV: each role rolls by itself, and so does the router."""
    before = stage.revisions()
    try:
        with operator_killed(stage.cluster) as operator, stage.long.flowing(1):
            stage.edit("killed after each write", service(1, 1, True, deadline=61), {"prefill": 1, "decode": 1})
            stage.until(
                lambda: stage.rolled({"prefill": 1, "decode": 1}) and not before & stage.revisions(),
                "rolled to the new deadline",
            )
        stage.answered()
        print(*(f"killed after {each}" for each in ends(operator)), sep="\n")
        assert len(ends(operator)) >= FEWEST_WRITES
    finally:
        stage.settled()
