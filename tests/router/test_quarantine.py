"""A pair between which a page came wrong is left alone until a canary's KV comes right."""

import asyncio

from fake_worker import Fabric, Fail, FakeWorker, Moment, cluster, continuation

from kvasir_engine.protocol import Reserve, Submit

PROMPT = list(range(100, 140))


def reserved(worker: FakeWorker, canaries: bool = False) -> list[list[int]]:
    """Prompts that `worker` was asked to lease pages for; with `canaries`, only those."""
    asked = [frame for frame in worker.frames if isinstance(frame, Reserve)]
    return [frame.tokens for frame in asked if frame.salt.startswith("canary-") == canaries]


async def test_a_bad_pair_gets_no_request_until_a_canary_passes() -> None:
    fabric = Fabric()
    p, d = FakeWorker("prefill", fabric, "p"), FakeWorker("decode", fabric, "d")
    bad = True

    def spoil(now: Moment, tokens: int) -> None:
        handed_off = isinstance(d.frames[-1], Reserve)
        if bad and now == "token" and tokens == 0 and handed_off:
            raise Fail("kv_digest_mismatch")

    d.hook = spoil
    async with cluster(p, d) as running:
        assert await running.generate(PROMPT, 6) == continuation(PROMPT, 6)  # D did it alone in the end
        assert len(running.client.quarantine) == 1
        assert await running.generate(PROMPT[::-1], 6) == continuation(PROMPT[::-1], 6)
        assert reserved(d) == [PROMPT], "a request went through a pair in quarantine"
        await running.until(lambda: len(reserved(d, canaries=True)) >= 2)
        assert len(running.client.quarantine) == 1, "a canary that failed released the pair"
        bad = False
        await running.until(lambda: len(running.client.quarantine) == 0)
        assert await running.generate(PROMPT[5:], 6) == continuation(PROMPT[5:], 6)
        assert reserved(d) == [PROMPT, PROMPT[5:]]


async def test_other_pairs_go_on() -> None:
    fabric = Fabric()
    p, q, d = (
        FakeWorker(role, fabric, name) for role, name in [("prefill", "p"), ("prefill", "q"), ("decode", "d")]
    )

    def spoil(now: Moment, tokens: int) -> None:
        last = d.frames[-1]
        if now == "token" and tokens == 0 and isinstance(last, Reserve) and last.writer.agent == "p":
            raise Fail("kv_digest_mismatch")

    d.hook = spoil
    async with cluster(p, q, d) as running:
        for turn in range(6):
            prompt = [turn, *PROMPT]
            assert await running.generate(prompt, 4) == continuation(prompt, 4)
        writers = [f.writer.agent for f in d.frames if isinstance(f, Reserve) and not f.salt]
        assert writers.count("p") <= 1
        assert writers.count("q") >= 5
        assert not [f for f in d.frames if isinstance(f, Submit)]


async def test_a_worker_that_comes_back_is_not_in_quarantine() -> None:
    fabric = Fabric()
    p, d = FakeWorker("prefill", fabric, "p"), FakeWorker("decode", fabric, "d")

    def spoil(now: Moment, tokens: int) -> None:
        if now == "token" and tokens == 0 and isinstance(d.frames[-1], Reserve):
            raise Fail("kv_digest_mismatch")

    d.hook = spoil
    async with cluster(p, d) as running:
        assert await running.generate(PROMPT, 4) == continuation(PROMPT, 4)
        assert len(running.client.quarantine) == 1
        await asyncio.gather(p.stop())
        await running.until(lambda: len(running.client.quarantine) == 0)
