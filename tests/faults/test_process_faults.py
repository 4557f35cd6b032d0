"""Real processes that die, stop, hang up or lose their clients at each step of the protocol, while others run.

After each: every answer is the reference's; or, where its own router was the one that died, the beginning of it and
an error; or, where its own router had lost every worker as it came, a refusal by name. And no page of a worker that
lives stays owned by anyone.
"""

import asyncio
import random
import signal
import zlib
from collections.abc import Sequence

import httpx
import pytest
from cluster import Answer, Cluster, Member, ask
from questions import Question, Reference, random_questions

from kvasir_engine.faults import POINTS, READ_POINTS

pytestmark = pytest.mark.dataplane

ACTIONS = ("kill", "stop", "close", "abort")
BASELINE_SECONDS = 60.0
STOPPED_SECONDS = {"p": 2.6, "d": 0.6, "r": 0.6}  # a silent prefill worker is fenced after two seconds
TOGETHER = 8
SHORT = {  # one action a point in the short form; the soak has them all
    "prefill.submitted": "kill",
    "prefill.pushed_layer": "abort",
    "prefill.pushed_chunk": "stop",
    "prefill.pushed_last": "kill",
    "prefill.all_written": "close",
    "prefill.completed": "kill",
    "decode.reserved": "close",
    "decode.leased": "kill",
    "decode.pages_written": "stop",
    "decode.kv_complete": "abort",
    "decode.first_step": "kill",
    "router.reserved": "abort",
    "router.leased": "kill",
    "router.submitted": "close",
    "router.first_token": "stop",
    "router.streaming": "kill",
}
assert SHORT.keys() == POINTS - READ_POINTS


CASES = [
    pytest.param(point, action, id=f"{point}-{action}", marks=[] if SHORT[point] == action else [pytest.mark.soak])
    for point in sorted(POINTS - READ_POINTS)
    for action in ACTIONS
]


@pytest.fixture(scope="module")
def standing(cluster: Cluster) -> Cluster:
    """One of each, which no fault touches."""
    cluster.start("p0", "d0", "r0")
    return cluster


class Clients:
    """Streams of one test."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._together = asyncio.Semaphore(TOGETHER)

    def ask(self, router: Member, questions: Sequence[Question]) -> list[asyncio.Task[Answer]]:
        async def one(question: Question) -> Answer:
            async with self._together:
                return await ask(self._client, router.url, question)

        return [asyncio.create_task(one(question)) for question in questions]


@pytest.mark.parametrize(("point", "action"), CASES)
async def test_a_fault_at_any_step_costs_no_token_and_no_page(
    standing: Cluster, reference: Reference, point: str, action: str
) -> None:
    name = point[0] + "1"
    (victim,) = standing.start(name, fault=f"{point}@2={'stop' if action == 'abort' else action}")
    rng = random.Random(zlib.crc32(f"{point} {action}".encode()))
    questions = reference.ask(random_questions(rng, 40))
    questions = [each for each in questions if len(each.prompt) > 45 and each.count > 6]
    beyond = standing.members["r1" if name == "r1" else "r0"]
    limits = httpx.Limits(max_connections=2 * TOGETHER)
    try:
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            clients = Clients(client)
            if action == "abort":
                await leave_at_the_fault(clients, standing.members["r0"], beyond, victim, questions, reference)
            else:
                await ask_through_the_fault(clients, standing.members["r0"], beyond, victim, questions, reference)
        logs = "\n".join(f"--- {each}\n{standing.log(each, 40)}" for each in standing.members)
        assert f"fault point={point}" in standing.log(name, 10_000), logs
        standing.wait_quiet(BASELINE_SECONDS)
    finally:
        standing.kill(name)
    standing.wait_quiet(BASELINE_SECONDS)  # also when what is at rest dies
    dead = [each for each in ("p0", "d0", "r0") if not standing.members[each].state]
    assert not dead, "\n".join(f"--- {each}\n{standing.log(each)}" for each in dead)


async def ask_through_the_fault(
    clients: Clients, safe: Member, beyond: Member, victim: Member, questions: list[Question], reference: Reference
) -> None:
    """Half of the questions go through a router that no fault touches, half through `beyond`."""
    half = len(questions) // 2
    others, exposed = clients.ask(safe, questions[:half]), clients.ask(beyond, questions[half:])
    if await halted(victim, [*others, *exposed]) == "T":
        await asyncio.sleep(STOPPED_SECONDS[victim.name[0]])
        victim.signal(signal.SIGCONT)
    for question, answer in zip(questions, await asyncio.gather(*others, *exposed), strict=True):
        right = reference.answers[question]
        if answer.error and victim is beyond and not victim.state:
            assert right.startswith(answer.text), "a wrong token before the error"
        elif answer.error and victim is beyond:
            assert (answer.text, answer.error) == ("", "no_worker")
        else:
            assert (answer.text, answer.error) == (right, ""), f"{len(question.prompt)} tokens"


async def leave_at_the_fault(
    clients: Clients, safe: Member, beyond: Member, victim: Member, questions: list[Question], reference: Reference
) -> None:
    """Ask until `victim` stops at its point; others ask; who asked before leaves; `victim` goes on."""
    leavers, others = questions[:TOGETHER], questions[TOGETHER:]
    leaving = clients.ask(beyond, leavers)
    assert await halted(victim, leaving) == "T", "the fault point was not passed"
    staying = clients.ask(safe, others)
    await asyncio.sleep(0.1)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await asyncio.sleep(0.2)
    victim.signal(signal.SIGCONT)
    for question, answer in zip(others, await asyncio.gather(*staying), strict=True):
        assert (answer.text, answer.error) == (reference.answers[question], "")


async def halted(member: Member, streams: list[asyncio.Task[Answer]]) -> str:
    """Wait until the member is stopped (`T`) or gone (empty), or all streams have ended; its state then."""
    while member.state not in ("", "T") and not all(stream.done() for stream in streams):  # noqa: ASYNC110 - no event
        await asyncio.sleep(0.005)
    return member.state
