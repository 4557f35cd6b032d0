"""No request waits without a bound on a worker that was sent nothing, or that answers nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from wire_harness import FINGERPRINT, WireHarness, running_workers

from kvasir_engine.engine_client import EngineError, GenerateRequest
from kvasir_engine.protocol import (
    ALIVE,
    Alive,
    Endpoint,
    Hello,
    Leased,
    Load,
    Region,
    Reserve,
    Sampling,
    Submit,
    ToRouter,
    decode_to_worker,
    encode,
)

pytestmark = [pytest.mark.dataplane, pytest.mark.asyncio]

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
Answer = Callable[[Submit | Reserve], list[ToRouter | bytes]]


@contextlib.asynccontextmanager
async def beside(answer: Answer, often: float = 0.02) -> AsyncIterator[tuple[WireHarness, list[str]]]:
    """Workers that are well, and one that requests go to first: it decodes, has no load, and answers so."""
    asked: list[str] = []

    async def session(socket: ServerConnection) -> None:
        await socket.recv()
        endpoint = Endpoint("rogue", 0x77, b"", Region(4096, 64, 64), FINGERPRINT)
        hello = Hello(2, 0x77, "decode", "", 64, 8, endpoint, latest=2, capabilities=(ALIVE,))
        await socket.send(encode(hello))
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            while True:
                try:
                    async with asyncio.timeout(often):
                        data = await socket.recv()
                except TimeoutError:
                    if often < 1:
                        await socket.send(encode(Alive([])))
                    continue
                assert isinstance(data, bytes)
                frame = decode_to_worker(data)
                if isinstance(frame, Submit | Reserve):
                    asked.append(frame.id)
                    for said in answer(frame):
                        await socket.send(said if isinstance(said, bytes) else encode(said))

    async with running_workers() as it, serve(session, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        pool = it.client._pool
        loaded = {worker.url: worker.role for worker in it.workers}
        pool.set_workers({**loaded, url: "rogue"})
        async with asyncio.timeout(60):
            while len(pool.ready()) < 3:
                await pool.change()
        for worker in pool.ready():  # so that the rogue is asked first
            if worker.name == "decode":
                worker.load = Load(queued_tokens=10**6)
        yield it, asked


async def test_a_request_that_its_worker_does_not_know_goes_to_another() -> None:
    async with beside(lambda frame: []) as (it, asked):
        await it.generate_undisturbed(PROMPT)
        assert asked


async def test_a_worker_that_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir_engine.router.connection.SILENT_SECONDS", 3.0)
    async with beside(lambda frame: [], often=3600) as (it, asked):
        await it.generate_undisturbed(PROMPT)
        assert asked


def step(frame: Submit | Reserve, **delta: object) -> bytes:
    """A step with one delta, as it comes from a worker that is wrong."""
    return msgspec.msgpack.encode({"t": "step", "deltas": [{"id": frame.id, **delta}], "load": {}})


@pytest.mark.parametrize(
    "answer",
    [
        lambda frame: [step(frame, tokens=[1], finish="handoff")],
        lambda frame: [step(frame), step(frame, tokens=[1], logprobs=[])],
        lambda frame: [step(frame, tokens=[-1])],
        lambda frame: [msgspec.msgpack.encode({"t": "leased", "id": frame.id, "lease": {"pages": [-1]}})],
        lambda frame: [Leased(frame.id), msgspec.msgpack.encode({"t": "step", "deltas": 7})],
        lambda frame: [b"\xc1"],
    ],
    ids=["handoff by decode", "logprobs amiss", "bad token", "bad lease", "bad step", "no frame"],
)
async def test_a_wrong_answer_is_a_failure_of_its_worker(answer: Answer) -> None:
    async with beside(answer) as (it, asked):
        await it.generate_undisturbed(PROMPT)
        assert asked


async def test_a_request_that_cannot_be_encoded_fails_alone() -> None:
    async with running_workers() as it:
        request = GenerateRequest("bad", PROMPT, Sampling(max_tokens=3), priority=2**64)
        with pytest.raises(EngineError, match="cannot be encoded") as failure:
            await asyncio.wait_for(anext(it.client.generate(request)), 60)
        assert failure.value.status == 400
        await it.generate_undisturbed(PROMPT)
        await it.wait_idle()
