"""A worker that speaks the real protocol over a real socket, and can be made to die at chosen points.

Its tokens are a function of all tokens before them, so a continuation elsewhere is exact, and any token that is
lost, repeated or out of place changes the rest.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

from prometheus_client import CollectorRegistry
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from kvasir_engine.engine_client import GenerateRequest
from kvasir_engine.kv.hashing import page_hashes
from kvasir_engine.protocol import (
    VERSION,
    Abort,
    CacheEvent,
    CacheEvents,
    Delta,
    Drain,
    Endpoint,
    Failure,
    Fingerprint,
    Hello,
    Lease,
    Leased,
    Load,
    PromptLogprobs,
    Region,
    Reserve,
    Resync,
    Role,
    Sampling,
    Step,
    Submit,
    TokenLogprobs,
    ToRouter,
    decode_to_worker,
    encode,
)
from kvasir_engine.router.client import PooledClient
from kvasir_engine.router.pool import WorkerPool

PAGE = 4
Moment = Literal["reserve", "leased", "submit", "first", "token", "handoff", "scores"]


def next_token(history: Sequence[int]) -> int:
    """One of the tokens that are a printable character in the tiny tokenizer."""
    return int.from_bytes(blake2b(repr(list(history)).encode(), digest_size=4).digest()) % 94


def prompt_logprobs(prompt: Sequence[int]) -> list[PromptLogprobs]:
    """Of each token but the first; each is another."""
    return [PromptLogprobs(-next_token(prompt[: place + 1]) / 7, 2) for place in range(1, len(prompt))]


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history))
    return history[len(prompt) :]


def fingerprint(dtype: str = "bfloat16") -> Fingerprint:
    return Fingerprint("tiny", "", dtype, "layout", PAGE, 2, 1, 8, "rope")


class Fabric:
    """The KV that moves: what was written for which lease."""

    def __init__(self) -> None:
        self._written: dict[int, asyncio.Event] = {}
        self.leases = itertools.count(1)

    def written(self, lease: int) -> asyncio.Event:
        return self._written.setdefault(lease, asyncio.Event())


@dataclass
class FakeWorker:
    """`hook` is called at each moment of a request, with how many tokens are out.

    It raises Die to have the worker die, Fail to have it send a failure.
    """

    role: Role
    fabric: Fabric
    name: str = "worker"
    dtype: str = "bfloat16"
    model: str = ""
    version: int = VERSION
    max_length: int = 1000
    load: Load = field(default_factory=Load)
    cached: list[int] = field(default_factory=list)
    hook: Callable[[Moment, int], None] = lambda moment, tokens: None
    wrong_tokens: bool = False
    batch: int = 1  # tokens a delta
    gate: asyncio.Event | None = None  # waited for after the first token
    grants: bool = True  # leases
    writes: bool = True  # what a lease is for
    acknowledges: bool = True  # the end of its writes
    frames: list[object] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    live: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    late_scores: asyncio.Event | None = None  # waited for before the prompt's log-probabilities are sent
    scores: int | None = None  # so many of them are sent, whatever the prompt
    epoch: int = 1
    seq: int = 0
    sockets: list[ServerConnection] = field(default_factory=list)
    server: Server | None = None
    port: int = 0
    dying: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.server = await serve(self._session, "127.0.0.1", self.port, max_size=None, compression=None)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Die: every socket drops, and nothing listens any more."""
        if self.dying is not None and self.dying is not asyncio.current_task():
            await self.dying
        if self.server is not None:
            for socket in self.sockets:
                socket.transport.abort()
            self.server.close()
            await self.server.wait_closed()
            self.server = None
            self.epoch += 1

    async def send(self, frame: ToRouter) -> None:
        for socket in self.sockets:
            await socket.send(encode(frame))

    async def drain(self) -> None:
        await self.send(Drain())

    def snapshot(self) -> CacheEvents:
        self.seq += 1
        return CacheEvents(self.seq, [CacheEvent(stored=page_hashes(self.cached, PAGE))], snapshot=True)

    async def _session(self, socket: ServerConnection) -> None:
        decode_to_worker(bytes(await socket.recv()))  # type: ignore[arg-type]
        endpoint = Endpoint(self.name, self.epoch, b"", Region(0, 8, 64), fingerprint(self.dtype))
        fields = (self.version, self.epoch, self.role, self.model, self.max_length, 8, endpoint)
        hello = Hello(*fields, capabilities=self.capabilities)
        await socket.send(encode(hello))
        await socket.send(encode(Step([], self.load)))
        self.sockets.append(socket)
        try:
            async for data in socket:
                frame = decode_to_worker(bytes(data))  # type: ignore[arg-type]
                self.frames.append(frame)
                match frame:
                    case Submit() | Reserve():
                        self.live[frame.id] = asyncio.create_task(self._serve(socket, frame))
                    case Abort():
                        self.aborted.append(frame.id)
                        if frame.id in self.live:
                            self.live.pop(frame.id).cancel()
                    case Resync():
                        await socket.send(encode(self.snapshot()))
        except ConnectionClosed:
            pass
        finally:
            self.sockets.remove(socket)
            for task in self.live.values():
                task.cancel()
            self.live.clear()

    async def _serve(self, socket: ServerConnection, frame: Submit | Reserve) -> None:
        try:
            if isinstance(frame, Reserve):
                await self._reserve(socket, frame)
            elif frame.lease is not None:
                await self._prefill(socket, frame, frame.lease)
            else:
                self.hook("submit", 0)
                await self._score(socket, frame)
                await self._generate(socket, frame)
        except Die:
            self.dying = asyncio.create_task(self.stop())  # which ends this task too
        except Fail as failure:
            await socket.send(encode(Step([Delta(frame.id, failure=failure.failure)], self.load)))
        except ConnectionClosed:
            pass
        finally:
            self.live.pop(frame.id, None)

    async def _reserve(self, socket: ServerConnection, frame: Reserve) -> None:
        self.hook("reserve", 0)
        if not self.grants:
            await socket.send(encode(Leased(frame.id)))
            await self._score(socket, frame)
        else:
            lease = next(self.fabric.leases)
            writer = frame.writer
            granted = Lease(lease, self.epoch, [0], 0, 5.0, writer.agent, writer.epoch)
            await socket.send(encode(Leased(frame.id, granted)))
            self.hook("leased", 0)
            await self.fabric.written(lease).wait()
        await self._generate(socket, frame)

    async def _prefill(self, socket: ServerConnection, frame: Submit, lease: Lease) -> None:
        self.hook("submit", 0)
        first = next_token(frame.tokens)
        if self.late_scores is None:
            await self._score(socket, frame)
        finish = self._finish(frame.sampling, first, 1)
        await self._say(socket, frame, 0, [first], finish)
        if finish is None:
            self.hook("first", 1)
            if self.writes:
                self.fabric.written(lease.id).set()
            if self.late_scores is not None:
                await self.late_scores.wait()
                await self._score(socket, frame)
            self.hook("handoff", 1)
            if not (self.writes and self.acknowledges):
                await asyncio.get_running_loop().create_future()
            await socket.send(encode(Step([Delta(frame.id, index=1, finish="handoff")], self.load)))

    async def _generate(self, socket: ServerConnection, frame: Submit | Reserve) -> None:
        history = list(frame.tokens)
        finish = None
        while not finish:
            start = len(history) - len(frame.tokens)
            self.hook("token", start)
            if start and self.gate is not None:
                await self.gate.wait()
            while not finish and len(history) < len(frame.tokens) + start + self.batch:
                history.append(next_token(history))
                finish = self._finish(frame.sampling, history[-1], len(history) - len(frame.tokens))
            new = [token + self.wrong_tokens for token in history[len(frame.tokens) + start :]]
            await self._say(socket, frame, start, new, finish)
            await asyncio.sleep(0)

    async def _score(self, socket: ServerConnection, frame: Submit | Reserve) -> None:
        """The prompt's log-probabilities, where they are asked for, in two parts."""
        if frame.sampling.prompt_logprobs is None:
            return
        first = frame.sampling.unscored(len(frame.tokens))
        scores = prompt_logprobs(frame.tokens)[first - 1 :][: self.scores]
        for start, end in ((0, 3), (3, len(scores))):
            self.hook("scores", start)
            delta = Delta(frame.id, prompt_index=first + start, prompt_logprobs=scores[start:end])
            await socket.send(encode(Step([delta], self.load)))

    async def _say(
        self,
        socket: ServerConnection,
        frame: Submit | Reserve,
        index: int,
        tokens: list[int],
        finish: Literal["stop", "length"] | None,
    ) -> None:
        logprobs = None if frame.sampling.logprobs is None else [TokenLogprobs(-float(token)) for token in tokens]
        delta = Delta(frame.id, index, tokens, logprobs, finish, cached=PAGE)
        await socket.send(encode(Step([delta], self.load)))

    @staticmethod
    def _finish(sampling: Sampling, token: int, count: int) -> Literal["stop", "length"] | None:
        if token in sampling.stop_token_ids and count > sampling.min_tokens:
            return "stop"
        return "length" if count >= sampling.max_tokens else None


class Die(Exception):
    pass


class Fail(Exception):
    def __init__(self, code: str, message: str = "as asked") -> None:
        super().__init__(code)
        self.failure = Failure(code, message)


def once(moment: Moment, error: Exception, at: int = 0) -> Callable[[Moment, int], None]:
    """A hook that raises at the first such moment with at least `at` tokens out."""
    left = [error]

    def hook(now: Moment, tokens: int) -> None:
        if now == moment and tokens >= at and left:
            raise left.pop()

    return hook


def always(moment: Moment, error: Exception) -> Callable[[Moment, int], None]:
    def hook(now: Moment, tokens: int) -> None:
        if now == moment:
            raise error

    return hook


@dataclass
class Cluster:
    client: PooledClient
    pool: WorkerPool
    registry: CollectorRegistry
    workers: list[FakeWorker]

    def retries(self, reason: str) -> float:
        return self.registry.get_sample_value("kvasir_router_retries_total", {"reason": reason}) or 0

    async def until(self, what: Callable[[], bool]) -> None:
        """Return once `what` holds; the test's own timeout bounds it."""
        async with asyncio.timeout(60):
            while not what():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def generate(
        self, prompt: list[int], count: int, *, seen: list[int] | None = None, **sampling: object
    ) -> list[int]:
        """The whole output; `seen` gets it as it comes."""
        seen = [] if seen is None else seen
        async for output in self.client.generate(request(prompt, count, **sampling)):
            seen += output.tokens
        return seen


def request(prompt: list[int], count: int, **sampling: object) -> GenerateRequest:
    return GenerateRequest("r", prompt, Sampling(max_tokens=count, **sampling))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def cluster(
    *workers: FakeWorker, threshold: int = 0, model: str = "", ready: int | None = None, **options: float
) -> AsyncIterator[Cluster]:
    """The real router client over `workers`; begins when `ready` of them (all) are ready."""
    for worker in workers:
        await worker.start()
    registry, pool = CollectorRegistry(), WorkerPool(model)
    client = PooledClient(
        pool,
        registry=registry,
        remote_threshold=threshold,
        resume_seconds=1.0,
        canary_seconds=0.05,
        **options,  # type: ignore[arg-type]
    )
    pool.set_workers({worker.url: worker.name for worker in workers})
    running = Cluster(client, pool, registry, list(workers))
    try:
        await running.until(lambda: len(pool.ready()) >= (len(workers) if ready is None else ready))
        yield running
    finally:
        await client.close()
        await pool.close()
        for worker in workers:
            await worker.stop()
