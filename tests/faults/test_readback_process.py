"""A conversation's second turn, with its KV read back from decode by real processes; faults at each step of it."""

import asyncio
import random
import signal
import time

import httpx
import pytest
from cluster import Cluster, ask
from questions import Question, Reference, random_questions

from kvasir_engine.faults import READ_POINTS

pytestmark = pytest.mark.dataplane

BASELINE_SECONDS = 60.0
STOPPED_SECONDS = 2.6
SHORT = {
    "prefill.read_posted": "kill",
    "prefill.read_done": "stop",
    "decode.pages_lent": "kill",
    "decode.loan_digested": "kill",
}
assert SHORT.keys() == READ_POINTS
CASES = [
    pytest.param(point, action, id=f"{point}-{action}", marks=[] if SHORT[point] == action else [pytest.mark.soak])
    for point in sorted(READ_POINTS)
    for action in ("kill", "stop", "close")
]


def turns(reference: Reference, seed: int) -> tuple[Question, Question]:
    """A question, and one that goes on from its answer."""
    rng = random.Random(seed)
    while True:
        for first in reference.ask([q for q in random_questions(rng, 20) if len(q.prompt) > 80 and q.count > 12]):
            answer = [ord(letter) - 0x21 for letter in reference.answers[first]]
            second = Question((*first.prompt, *answer, *rng.choices(range(90), k=40)), 8)
            if reference.ask([second]):
                return first, second


async def talk(cluster: Cluster, first: Question, reference: Reference) -> None:
    """The first turn; then prefill is another, which has nothing."""
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await ask(client, cluster.members["r0"].url, first)
    assert (answer.text, answer.error) == (reference.answers[first], "")
    cluster.kill("p0")


async def test_a_second_turn_is_read_from_decode_and_not_computed(cluster: Cluster, reference: Reference) -> None:
    first, second = turns(reference, 1)
    cluster.start("p0", "d0", "r0")
    await talk(cluster, first, reference)
    (prefill,) = cluster.start("p0")
    router = cluster.members["r0"]
    deadline = time.monotonic() + 60
    while not router.metric("kvasir_router_pairs", state="verified"):  # by a canary, which is computed too
        assert time.monotonic() < deadline, "the pair was not verified"
        await asyncio.sleep(0.02)
    missed = prefill.metric("kvasir_prefix_cache_miss_tokens_total")
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await ask(client, router.url, second)
    assert (answer.text, answer.error) == (reference.answers[second], "")
    known = (len(first.prompt) + first.count - 1) // 8 * 8
    assert prefill.metric("kvasir_kv_read_tokens_total") == known
    assert prefill.metric("kvasir_kv_read_bytes_total") > 0
    assert prefill.metric("kvasir_prefix_cache_miss_tokens_total") - missed == len(second.prompt) - known
    assert prefill.metric("kvasir_prompt_tokens_total", source="read") == known
    assert prefill.metric("kvasir_kv_reads_total", outcome="read") == 1
    cluster.wait_quiet(BASELINE_SECONDS)
    for name in ("p0", "d0", "r0"):
        cluster.kill(name)


@pytest.mark.parametrize(("point", "action"), CASES)
async def test_a_fault_under_a_read_costs_no_token_and_no_page(
    cluster: Cluster, reference: Reference, point: str, action: str
) -> None:
    first, second = turns(reference, 2)
    name, fault = point[0] + "0", f"{point}={action}"
    cluster.start("p0", "r0")
    cluster.start("d0", fault=fault if name == "d0" else "")
    try:
        await talk(cluster, first, reference)
        cluster.start("p0", fault=fault if name == "p0" else "")
        victim = cluster.members[name]
        async with httpx.AsyncClient(timeout=60) as client:
            asking = asyncio.create_task(ask(client, cluster.members["r0"].url, second))
            while victim.state not in ("", "T") and not asking.done():  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.005)
            if victim.state == "T":
                await asyncio.sleep(STOPPED_SECONDS)
                victim.signal(signal.SIGCONT)
            answer = await asking
        assert f"fault point={point}" in cluster.log(name, 10_000)
        if name == "d0" and answer.error:  # there was no other
            assert (answer.text, answer.error) == ("", "no_worker")
        else:
            assert (answer.text, answer.error) == (reference.answers[second], "")
        cluster.wait_quiet(BASELINE_SECONDS)
    finally:
        for each in list(cluster.members):
            cluster.kill(each)
