"""Many short requests while clients leave and processes are killed, stopped and started again: no wrong token, and
no page lost. `make soak` runs the long form and prints its figures.
"""

import asyncio
import contextlib
import math
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import pytest
from cluster import PAGES, ROLES, Answer, Cluster, Member, ask
from questions import Question, Reference, random_questions

from kvasir_engine.faults import POINTS

pytestmark = pytest.mark.dataplane

TOGETHER = 12
LEAVING = 0.1  # share of the clients that leave before the end
TRIES = 30
HANGS_SECONDS = 60.0
BASELINE_SECONDS = 60.0


@dataclass
class Figures:
    """What happened."""

    requests: int = 0
    answered: int = 0
    left: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    hanging: int = 0
    given_up: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: float = 0.0
    baseline_seconds: float = 0.0
    leaked: int = 0

    def __str__(self) -> str:
        return "\n".join(
            f"{name:>16}: {dict(value) if isinstance(value, Counter) else value}"
            for name, value in {**vars(self), "tokens_per_second": round(self.tokens / self.seconds)}.items()
        )


class Soak:
    """`requests` requests, and `disturbances` spread over them."""

    def __init__(self, cluster: Cluster, reference: Reference, requests: int, disturbances: int, seed: int) -> None:
        self._cluster = cluster
        self._rng = random.Random(seed)
        self._answers = reference.answers
        candidates = random_questions(self._rng, max(60, requests // 12), longest=120, most=16)
        self._questions = reference.ask(candidates)
        self._requests = requests
        self._disturbances = disturbances
        self._over = False
        self.figures = Figures()

    async def run(self) -> Figures:
        names = [kind + digit for kind in ROLES for digit in "01"]
        await asyncio.to_thread(self._cluster.start, *names)
        began = time.monotonic()
        disturbing = asyncio.create_task(self._disturb())
        limits = httpx.Limits(max_connections=2 * TOGETHER)
        async with httpx.AsyncClient(timeout=HANGS_SECONDS, limits=limits) as client:
            await asyncio.gather(*(self._client(client) for _ in range(TOGETHER)))
        self.figures.seconds = round(time.monotonic() - began, 1)
        self._over = True
        await disturbing
        return self._account()

    def _account(self) -> Figures:
        figures, cluster = self.figures, self._cluster
        for member in cluster.members.values():
            if member.state:
                member.signal(signal.SIGCONT)
        cluster.wait_settled()
        try:
            figures.baseline_seconds = round(cluster.wait_quiet(BASELINE_SECONDS), 2)
        finally:
            cluster.wait_settled()
            for member in cluster.workers():
                with contextlib.suppress(AssertionError):  # a canary may be under way
                    cluster.wait(lambda member=member: _not_at_rest(member) == 0, "rest", BASELINE_SECONDS)  # type: ignore[misc]
                figures.leaked += _not_at_rest(member)
        return figures

    async def _client(self, client: httpx.AsyncClient) -> None:
        figures = self.figures
        while figures.requests < self._requests:
            figures.requests += 1
            question = self._rng.choice(self._questions)
            leave = self._rng.randint(0, question.count) if self._rng.random() < LEAVING else None
            for _ in range(TRIES):
                url = f"http://127.0.0.1:{self._cluster.ports['r' + self._rng.choice('01')]}"
                answer = await ask(client, url, question, leave)
                if not self._again(question, answer, leave):
                    break
                await asyncio.sleep(0.1)
            else:
                figures.given_up += 1

    def _again(self, question: Question, answer: Answer, leave: int | None) -> bool:
        """Account for an answer; whether the client asks again."""
        figures, right = self.figures, self._answers[question]
        figures.tokens += len(answer.text)
        whole = not answer.error and answer.finish
        if answer.text != right if whole else not right.startswith(answer.text):
            figures.wrong.append(f"{answer.text!r} for {right!r}")
        if answer.error == "ReadTimeout":
            figures.hanging += 1
        if answer.error:
            figures.retried[answer.error] += 1
            return True
        figures.answered += bool(whole)
        figures.left += not whole
        assert whole or leave is not None
        return False

    async def _disturb(self) -> None:
        """Kill or stop somebody, and start who has died, some of them with a fault that waits for its step."""
        each = self._requests // (self._disturbances + 1)
        for number in range(1, self._disturbances + 1):
            await self._asked(number * each)
            name = self._rng.choice(list(self._cluster.members))
            member, role = self._cluster.members[name], ROLES[name[0]]
            if self._rng.random() < 0.3 and member.state:
                self.figures.stopped[role] += 1
                member.signal(signal.SIGSTOP)
                await asyncio.sleep(self._rng.choice([0.05, 0.5, 2.5]))
                if member.state:
                    member.signal(signal.SIGCONT)
            else:
                self.figures.killed[role] += 1
                member.kill()
            await self._revive()
        await self._asked(math.inf)

    async def _asked(self, requests: float) -> None:
        """Wait until so many were asked or all is over. All clients may wait for a kind of which nobody is left."""
        while self.figures.requests < requests and not self._over:
            if self._missing():
                await self._revive()
            await asyncio.sleep(0.02)

    def _missing(self) -> bool:
        """Whether no process of some kind is left."""
        alive = {name[0] for name, member in self._cluster.members.items() if member.state}
        return not alive >= ROLES.keys()

    async def _revive(self) -> None:
        for name, member in list(self._cluster.members.items()):
            if member.state:
                continue
            del self._cluster.members[name]
            fault = ""
            if self._rng.random() < 0.4:
                point = self._rng.choice([point for point in sorted(POINTS) if point[0] == name[0]])
                action = self._rng.choice(["kill", "exit", "close"])
                self.figures.faults[action] += 1
                fault = f"{point}@{self._rng.randint(1, 50)}={action}"
            await asyncio.to_thread(self._cluster.launch, name, fault)


def _not_at_rest(member: Member) -> int:
    """Pages of a worker that are neither free nor cached, by one scrape; none of one that has died."""
    try:
        values = member.metrics()
    except httpx.TransportError:
        assert not member.state  # of a fault that a canary came upon: its pages are gone with it
        return 0
    return PAGES - int(sum(values["kvasir_kv_pages", (("owner", owner),)] for owner in ("free", "cached")))


async def soak(cluster: Cluster, reference: Reference, requests: int, disturbances: int) -> None:
    figures = await Soak(cluster, reference, requests, disturbances, seed=requests).run()
    print(f"\n{figures}")
    assert not figures.wrong
    assert (figures.hanging, figures.given_up, figures.leaked) == (0, 0, 0)
    assert figures.answered + figures.left == figures.requests


async def test_a_short_soak_has_no_wrong_token_and_no_lost_page(cluster: Cluster, reference: Reference) -> None:
    await soak(cluster, reference, requests=250, disturbances=5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_twenty_thousand_requests_have_no_wrong_token_and_no_lost_page(
    cluster: Cluster, reference: Reference
) -> None:
    await soak(cluster, reference, requests=20_000, disturbances=150)
