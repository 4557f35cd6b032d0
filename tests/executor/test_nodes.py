"""Workers on two nodes: their tokens are one rank's, and a node's end is everybody's, with a reason."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_workers import TwoNodes
from rank_workers import Greedy, Request, Router, Workers, ended

pytestmark = pytest.mark.dataplane

COUNT = 6


@pytest.fixture(scope="module")
def nodes(workers: Workers, folder: Path) -> Iterator[TwoNodes]:
    """A prefill worker on two nodes."""
    nodes = TwoNodes(folder, "prefill")
    yield nodes
    nodes.kill()


def test_the_tokens_of_a_handoff_from_two_nodes_are_those_of_one_rank(
    nodes: TwoNodes, workers: Workers, greedy: Greedy
) -> None:
    rng, router = random.Random(5), Router(nodes.leader, workers("decode", 2, 16))
    first = Request("first", greedy.prompt(rng, 75, COUNT), COUNT)
    router.ask(first)
    router.run()
    together = [Request(f"{n}", greedy.prompt(rng, 40 + n, COUNT, first.prompt[:n]), COUNT) for n in (0, 9, 33)]
    for request in together:
        router.ask(request)
    router.run()
    for request in [first, *together]:
        assert not request.failures
        assert request.output == greedy(request.prompt, COUNT)
    nodes.leader.wait_quiet()
    router.decode.wait_quiet()


def test_another_node_has_probes_and_nothing_else(nodes: TwoNodes) -> None:
    assert nodes.leader.endpoint
    follower = nodes.follower
    assert [follower.status(path) for path in ("/health", "/ready", "/v1/worker", "/metrics")] == [
        200,
        200,
        404,
        404,
    ]


def test_sigterm_at_another_node_waits_for_the_leader(nodes: TwoNodes, workers: Workers, greedy: Greedy) -> None:
    assert nodes.leader.endpoint
    follower = nodes.follower
    os.kill(follower.process.pid or 0, signal.SIGTERM)
    while follower.status("/ready") == 200:
        assert follower.process.is_alive()
    assert (follower.status("/ready"), follower.status("/health")) == (503, 200)
    router = Router(nodes.leader, workers("decode", 2, 16))
    request = Request("late", greedy.prompt(random.Random(6), 70, COUNT), COUNT)
    router.ask(request)
    router.run()
    assert request.output == greedy(request.prompt, COUNT), "the rank there goes on"
    assert "a node has to leave node=1" in nodes.leader.log.read_text()
    nodes.leader.wait_quiet()
    nodes.leader.close()
    assert follower.errors() == []
    assert follower.process.exitcode == 0


@pytest.mark.soak
def test_a_rank_of_another_node_that_is_killed_ends_both_with_its_fate(
    folder: Path, workers: Workers, greedy: Greedy
) -> None:
    nodes = TwoNodes(folder, "prefill", fault="rank1:prefill.pushed_layer@2=kill")
    decode = workers("decode", 2, 16)
    try:
        router = Router(nodes.leader, decode)
        request = Request("victim", greedy.prompt(random.Random(7), 200, COUNT), COUNT)
        router.ask(request)
        router.run(lambda: request.over or not nodes.leader.process.is_alive())
        ended(nodes.leader, "rank 1 of 2 was killed by signal 9")
        assert nodes.follower.errors() == ["rank 1 of 2 was killed by signal 9; the worker ends with it"]
        router.abort(request)
        decode.wait_quiet()
    finally:
        nodes.kill()
