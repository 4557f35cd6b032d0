"""Each new pair gets one canary, and what became of it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fake_worker import Cluster, Fabric, Fail, FakeWorker, Moment, cluster, continuation
from prometheus_client import CollectorRegistry

from kvasir_engine.protocol import Reserve
from kvasir_engine.router.canary import PairVerifier
from kvasir_engine.status_reports import PairReport

PROMPT = list(range(100, 140))


def canaries(worker: FakeWorker) -> int:
    return sum(isinstance(frame, Reserve) and frame.salt.startswith("canary-") for frame in worker.frames)


@asynccontextmanager
async def verifying(running: Cluster) -> AsyncIterator[PairVerifier]:
    client = running.client
    verifier = PairVerifier(running.pool, client.canary, client.quarantine, CollectorRegistry(), interval=0.02)
    task = asyncio.create_task(verifier.run())
    try:
        yield verifier
    finally:
        assert not task.done(), "it ended by itself"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def four() -> tuple[list[FakeWorker], list[FakeWorker]]:
    fabric = Fabric()
    return (
        [FakeWorker("prefill", fabric, f"p{n}") for n in range(2)],
        [FakeWorker("decode", fabric, f"d{n}") for n in range(2)],
    )


async def test_every_pair_is_verified_once() -> None:
    prefills, decodes = four()
    async with cluster(*prefills, *decodes) as running, verifying(running) as verifier:
        assert verifier.report() == PairReport(pending=4)
        await running.until(lambda: verifier.report() == PairReport(verified=4))
        assert await running.generate(PROMPT, 6) == continuation(PROMPT, 6)
        assert [canaries(d) for d in decodes] == [2, 2]


async def test_a_worker_that_comes_back_is_verified_anew() -> None:
    (p, _), (d, _) = four()
    async with cluster(p, d) as running, verifying(running) as verifier:
        await running.until(lambda: verifier.report().verified == 1)
        await d.stop()
        await running.until(lambda: verifier.report() == PairReport())
        d.name = "d0 again"
        await d.start()
        await running.until(lambda: verifier.report().verified == 1)
        assert canaries(d) == 2


async def test_a_pair_whose_kv_comes_wrong_is_told_and_left_alone_until_it_comes_right() -> None:
    (p, _), (d, _) = four()
    bad = True

    def spoil(now: Moment, tokens: int) -> None:
        if bad and now == "token" and tokens == 0 and isinstance(d.frames[-1], Reserve):
            raise Fail("kv_digest_mismatch", "page 3 came wrong")

    d.hook = spoil
    async with cluster(p, d) as running, verifying(running) as verifier:
        await running.until(lambda: verifier.report().failed == 1)
        assert verifier.report().failures == ("p0 to d0: page 3 came wrong",)
        assert len(running.client.quarantine) == 1
        bad = False
        await running.until(lambda: verifier.report() == PairReport(verified=1))


async def test_a_pair_that_was_verified_and_then_moved_a_wrong_page_is_not_verified() -> None:
    (p, _), (d, _) = four()
    async with cluster(p, d) as running, verifying(running) as verifier:
        await running.until(lambda: verifier.report().verified == 1)

        def spoil(now: Moment, tokens: int) -> None:
            if now == "token" and tokens == 0 and isinstance(d.frames[-1], Reserve):
                raise Fail("kv_digest_mismatch")

        d.hook = spoil
        await running.generate(PROMPT, 6)
        assert (verifier.report().verified, verifier.report().failed) == (0, 1)


async def test_workers_that_do_not_fit_are_no_pair_and_told_by_name() -> None:
    (p, _), (d, _) = four()
    p.dtype = "float32"
    async with cluster(p, d) as running, verifying(running) as verifier:
        await running.until(lambda: bool(verifier.report().unpaired))
        (told,) = verifier.report().unpaired
        assert told.startswith("p0 and d0: dtype: 'float32', 'bfloat16'")
        assert verifier.report() == PairReport(unpaired=(told,))
        assert canaries(d) == 0
