"""Certificates and their CA are changed under streams: none is lost, and new connections use the new ones."""

import asyncio
from pathlib import Path

import pytest
from certificates import Authority, mount
from services import SECONDS, VOCAB, Router, Service, WorkerProcess

from kvasir_engine.router.worker_trust import WorkerTrust
from kvasir_engine.tls import LOOK_SECONDS, Credentials

pytestmark = [pytest.mark.dataplane, pytest.mark.asyncio]

STREAMS, TOKENS = 16, 12


def prompt(stream: int) -> list[int]:
    return [(stream * 5 + n * 3) % VOCAB for n in range(30)]


async def test_a_rotation_under_sixteen_streams_loses_none(
    service: Service, pair: tuple[WorkerProcess, WorkerProcess], tmp_path: Path
) -> None:
    roles, old, new = ("router", "prefill", "decode"), service.ca, Authority("new")
    leaves = {role: old.leaf(role) for role in roles}
    over, finished = asyncio.Event(), [0] * STREAMS

    async def stream(router: Router, number: int, right: list[int]) -> None:
        while not over.is_set():
            assert await router.generate(prompt(number), TOKENS) == right
            finished[number] += 1

    async with service.router(*pair) as router:
        right = await asyncio.gather(*(router.generate(prompt(n), TOKENS) for n in range(STREAMS)))
        async with asyncio.TaskGroup() as streams:
            for number in range(STREAMS):
                streams.create_task(stream(router, number, right[number]))
            for role in roles:  # both CAs are believed, before anybody has a leaf of the new one
                mount(service.tls(role), old.pem + new.pem, *leaves[role])
            await asyncio.sleep(LOOK_SECONDS + 0.5)
            leaves = {role: new.leaf(role) for role in roles}
            for role in roles:
                mount(service.tls(role), old.pem + new.pem, *leaves[role])
            await asyncio.sleep(LOOK_SECONDS + 0.5)
            before = finished[:]
            late = tmp_path / "late"
            mount(late, new.pem, *leaves["router"])
            async with service.router(*pair, trust=WorkerTrust(Credentials(late))) as fresh:
                assert await fresh.generate(prompt(0), TOKENS) == right[0]
            async with asyncio.timeout(SECONDS):
                while any(now == then for now, then in zip(finished, before, strict=True)):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            over.set()
        retries = [sample.value for family in router.client._retries.collect() for sample in family.samples]
        assert sum(retries) == 0
        assert {each.state for each in router.pool.ready()} == {"ready"}
    for worker in pair:
        worker.until("credential renewed", 1)
