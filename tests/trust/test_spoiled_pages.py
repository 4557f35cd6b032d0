"""A pool that is overwritten behind its worker's back: what is used of it again is found, and computed again."""

import asyncio
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from services import VOCAB, Service, WorkerProcess
from websockets.asyncio.client import connect

from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.protocol import LATEST, VERSION, WORKER_PATH, Hello, Region, decode_to_router, encode
from kvasir_engine.router.worker_trust import WorkerTrust

pytestmark = [pytest.mark.dataplane, pytest.mark.asyncio]

PROMPT = [(7 * n + 3) % VOCAB for n in range(100)]


async def endpoint_of(worker: WorkerProcess) -> Hello:
    """What a worker without certificates tells anybody."""
    async with connect(worker.url + WORKER_PATH, proxy=None, compression=None) as socket:
        await socket.send(encode(Hello(VERSION, 1, latest=LATEST)))
        data = await socket.recv()
    assert isinstance(data, bytes)
    hello = decode_to_router(data)
    assert isinstance(hello, Hello)
    return hello


async def overwrite(hello: Hello, pages: range) -> None:
    """As an attacker with a worker's metadata, and no lease, writes to its pool."""
    endpoint = hello.endpoint
    assert endpoint is not None
    size = endpoint.region.page_bytes
    memory = np.full((endpoint.region.pages, size), 0x3F, np.uint8)
    region = Region(memory.ctypes.data, endpoint.region.pages, size)
    attacker = NixlAgent(0xA77AC, region, endpoint.fingerprint)
    try:
        attacker.connect(endpoint)
        layers = range(endpoint.fingerprint.layers)
        transfer = attacker.write(endpoint.agent, tuple(pages), tuple(pages), layers)
        async with asyncio.timeout(60):
            while attacker.poll(endpoint.agent, transfer) is None:
                attacker.notifications()
                await asyncio.sleep(0.001)
    finally:
        attacker.close()


async def metric(worker: WorkerProcess, name: str) -> float:
    async with httpx.AsyncClient(timeout=60) as client:
        text = (await client.get(f"http://{worker.http}/metrics")).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


@pytest.fixture(params=["float32", "bfloat16"])
def worker(service: Service, request: pytest.FixtureRequest) -> Iterator[WorkerProcess]:
    """Its KV is stored by torch, without digests, or by kernels that make them."""
    worker = service.worker("decode", "--dtype", request.param, plain=True)
    yield worker
    worker.kill()


async def test_an_overwritten_pool_gives_the_right_answer_and_is_counted(
    service: Service, worker: WorkerProcess
) -> None:
    async with service.router(worker, trust=WorkerTrust()) as router:
        right = await router.generate(PROMPT, 6)
        again = await router.generate(PROMPT, 6)
        assert again == right
        assert await metric(worker, "kvasir_kv_cached_pages_verified_total") >= len(PROMPT) // 16
        assert await metric(worker, "kvasir_kv_cached_pages_spoiled_total") == 0
        hello = await endpoint_of(worker)
        assert hello.endpoint is not None
        await overwrite(hello, range(hello.endpoint.region.pages))
        assert await router.generate(PROMPT, 6) == right
        assert await metric(worker, "kvasir_kv_cached_pages_spoiled_total") >= 1
        assert await router.generate(PROMPT, 6) == right


async def test_without_the_checks_the_answer_is_wrong(service: Service) -> None:
    """So the test above can fail."""
    blind = service.worker("decode", "--verify-cached-pages", "off", plain=True)
    try:
        async with service.router(blind, trust=WorkerTrust()) as router:
            right = await router.generate(PROMPT, 6)
            hello = await endpoint_of(blind)
            assert hello.endpoint is not None
            await overwrite(hello, range(hello.endpoint.region.pages))
            assert await router.generate(PROMPT, 6) != right
    finally:
        blind.kill()
