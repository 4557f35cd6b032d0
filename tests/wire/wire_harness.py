"""A prefill and a decode worker with a toy model, real sockets and real NIXL, and the router of bystanders."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from toy import LAYERS, ToyRunner, reference
from websockets.asyncio.client import ClientConnection, connect

from kvasir_engine.api.http.server import listen
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.nixl_agent import NixlAgent, choose_fabric
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.engine_client import GenerateRequest
from kvasir_engine.entrypoints.worker_server import WorkerServer
from kvasir_engine.protocol import (
    CAPABILITIES,
    GRAMMAR,
    HEADS_APART,
    LATEST,
    VERSION,
    WORKER_PATH,
    Endpoint,
    Fingerprint,
    Hello,
    Region,
    Role,
    Sampling,
    ToRouter,
    decode_to_router,
    encode,
)
from kvasir_engine.router.client import PooledClient
from kvasir_engine.router.pool import WorkerPool

PAGES, PAGE, MAX_LENGTH = 64, 4, 64
FINGERPRINT = Fingerprint("toy", "", "int64", HEADS_APART, PAGE, LAYERS, 1, 8, "toy")


class QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class ToyWorker:
    """As `kvasir worker` has it, but for the model."""

    def __init__(self, role: Role, epoch: int, grammars: GrammarService | None = None) -> None:
        self.role = role
        runner = ToyRunner(PAGES, PAGE)
        region = Region(runner.pool.address, PAGES, runner.pool.page_bytes)
        choose_fabric("auto", False)
        self.ended: list[str] = []
        self.own = TransferThread(
            lambda: NixlAgent(epoch, region, FINGERPRINT),
            lambda event: self.thread.post(lambda engine: engine.reported(0, event)),
            None,
            ended=self.ended.append,
        )
        self.own.start()
        limits = Limits(tokens=32, running=8, page_size=PAGE)
        connector = KVConnector(self.own)
        self.engine = Engine(runner, role, limits, MAX_LENGTH, epoch, connector, grammars=grammars)  # type: ignore[arg-type]
        self.thread = EngineThread(self.engine, check_pages=True, ended=self.ended.append)
        self.thread.start()
        knows = CAPABILITIES if grammars is None else (*CAPABILITIES, GRAMMAR)
        self.hello = Hello(
            VERSION, epoch, role, "", MAX_LENGTH, 8, self.own.endpoint, latest=LATEST, capabilities=knows
        )
        self.server = WorkerServer(self.thread, self.hello)
        self.sock = listen("127.0.0.1", 0)
        config = uvicorn.Config(self.server.app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        self.http = QuietServer(config)

    @property
    def endpoint(self) -> Endpoint:
        return self.own.endpoint

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.sock.getsockname()[1]}"

    def balanced(self) -> bool:
        """Every page is free or cached, and nothing is owed."""
        pool = self.engine.cache.pool
        return not self.engine.unfinished and pool.available == pool.size

    def stop(self) -> None:
        self.thread.stop()
        self.own.stop()


@dataclass
class WireHarness:
    prefill: ToyWorker
    decode: ToyWorker
    client: PooledClient

    @property
    def workers(self) -> tuple[ToyWorker, ToyWorker]:
        return self.prefill, self.decode

    async def generate_undisturbed(self, prompt: list[int], count: int = 4) -> list[int]:
        """What a plain client gets, in bounded time."""
        got: list[int] = []
        request = GenerateRequest("b", prompt, Sampling(max_tokens=count), "bystander")
        async with asyncio.timeout(60):
            async for output in self.client.generate(request):
                got += output.tokens
        assert got == reference(prompt, count)
        return got

    async def wait_idle(self) -> None:
        """Return once both pools balance; both workers are healthy."""
        async with asyncio.timeout(60):
            while not all(worker.balanced() for worker in self.workers):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        for worker in self.workers:
            assert worker.thread.unhealthy_reason() is None
            assert not worker.ended


@contextlib.asynccontextmanager
async def running_workers() -> AsyncIterator[WireHarness]:
    async with served(ToyWorker("prefill", 0x51), ToyWorker("decode", 0x52)) as client:
        yield client


@contextlib.asynccontextmanager
async def served(prefill: ToyWorker, decode: ToyWorker, *more: ToyWorker) -> AsyncIterator[WireHarness]:
    """The workers behind a router."""
    workers = prefill, decode, *more
    serving = [asyncio.create_task(worker.http.serve(sockets=[worker.sock])) for worker in workers]
    pool = WorkerPool()
    client = PooledClient(pool, registry=CollectorRegistry(), remote_threshold=0)
    pool.set_workers({worker.url: worker.role for worker in workers})
    try:
        async with asyncio.timeout(60):
            while len(pool.ready()) < len(workers):
                await pool.change()
        yield WireHarness(prefill, decode, client)
    finally:
        await client.close()
        await pool.close()
        for worker in workers:
            worker.http.should_exit = True
        await asyncio.gather(*serving)
        for worker in workers:
            worker.stop()


@contextlib.asynccontextmanager
async def router_of(worker: ToyWorker) -> AsyncIterator[ClientConnection]:
    """A connection as a router's, greeted."""
    async with connect(worker.url + WORKER_PATH, max_size=None, compression=None, proxy=None) as socket:
        await socket.send(encode(Hello(VERSION, 1, latest=LATEST, capabilities=CAPABILITIES)))
        assert isinstance(await receive_frame(socket), Hello)
        yield socket


async def receive_frame(socket: ClientConnection) -> ToRouter:
    data = await socket.recv()
    assert isinstance(data, bytes)
    return decode_to_router(data)
