"""Messages that are made of the types of the wire, of every kind and in both directions, against running workers.

After each batch a bystander's stream comes right, both pools balance, and every thread runs.
"""

import asyncio
import contextlib
import os
from typing import Any, get_args

import msgspec
import pytest
from frame_fuzzer import Grammar
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from wire_harness import FINGERPRINT, WireHarness, router_of, running_workers

from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.connector.notifications import AnyMessage, Complete, Lent, Ping, Pong, Release, Stopped, Written
from kvasir_engine.protocol import (
    Abort,
    Alive,
    CacheEvents,
    Drain,
    Endpoint,
    Hello,
    Lease,
    Leased,
    Loan,
    Region,
    Reserve,
    Resync,
    Step,
    Submit,
    ToRouter,
    ToWorker,
    encode,
)

pytestmark = [pytest.mark.dataplane, pytest.mark.asyncio]

TO_WORKER = [*[Submit] * 20, *[Reserve] * 20, *[Abort] * 4, Resync, Resync, Hello]
TO_ROUTER = [*[Step] * 20, *[Leased] * 10, *[CacheEvents] * 5, *[Alive] * 2, Drain, Hello]
NOTIFICATIONS = [Complete, Written, Lent, Stopped, Release, Ping, Pong]
BATCH = 100
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def plain(value: object) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value))


def known(it: WireHarness, stranger: Endpoint) -> dict[str, list[object]]:
    """What makes frames go deep: real endpoints, leases that could be, prompts that fit."""
    endpoints = [plain(each) for each in (it.prefill.endpoint, it.decode.endpoint, stranger)]
    # Leases are the stranger's: one of the decode worker's has a nonce that nobody here knows.
    holder, writer = stranger, it.prefill.endpoint
    leases = [
        Lease(id, holder.epoch, [3, 4, 5][: 3 - first // 4], first, 0.5, writer.agent, writer.epoch, loan)
        for id in range(1, 9)
        for first, loan in ((0, None), (4, None), (4, Loan(id + 8, holder.epoch, [1], 0, 0.2)))
    ]
    return {
        "id": [*"abcdefgh", 1, 2, 3, 9],
        "lease": [*map(plain, leases), 1, 2, 3, None],
        "to": [endpoints[2], endpoints[2], endpoints[1], endpoints[0]],
        "writer": [*endpoints, "kvasir-0000000000000051"],
        "writer_epoch": [0x51],
        "epoch": [0x66, 0x66, 0x51, 0x52, 0x52],
        "version": [2, 3],
        "tokens": [PROMPT, PROMPT, PROMPT, PROMPT[:5], [7] * 40, 9],
        "stop_token_ids": [[], [1], [49]],
        "max_tokens": [1, 2, 5],
        "pages": [[0], [0, 1], [3, 4, 5], 3],
        "seconds": [0.05, 0.5],
        "first": [0, 0, 4, 8],
        "salt": ["", "s"],
    }


async def frames_to(it: WireHarness, grammar: Grammar, count: int, prefill: bool) -> int:
    """Send frames as a router, over as many connections as they cost. How many connections."""
    sent, connections = 0, 0
    while sent < count:
        connections += 1
        async with router_of(it.prefill if prefill else it.decode) as socket:

            async def listen(socket: Any = socket) -> None:
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await socket.recv()

            listening = asyncio.create_task(listen())
            try:
                while sent < count:
                    sent += 1
                    await socket.send(grammar.frame(TO_WORKER))
                    if sent % 4 == 0:  # what was sent to a connection that had closed was not heard
                        await (await socket.ping())
            except ConnectionClosed:
                pass
            finally:
                await socket.close()
                await listening
    return connections


async def fuzz_workers(messages: int, seed: int) -> None:
    async with running_workers() as it:
        pool = bytearray(64 * 64)
        import numpy as np

        region = Region(np.frombuffer(pool, np.uint8).ctypes.data, 64, 64)
        stranger = NixlAgent(0x66, region, FINGERPRINT)
        try:
            grammar = Grammar(seed, known(it, stranger.endpoint))
            for worker in it.workers:
                stranger.meet(worker.endpoint.address(0))
            for batch in range(messages // (3 * BATCH)):
                await frames_to(it, grammar, BATCH, prefill=True)
                await frames_to(it, grammar, BATCH, prefill=False)
                for _ in range(BATCH):
                    target = grammar.random.choice(it.workers)
                    stranger.notify(target.endpoint.agent, grammar.frame(NOTIFICATIONS))
                    stranger.notifications()

                async def answer() -> None:
                    """The stranger says that it has stopped, as any writer that is asked to."""
                    while True:
                        for agent, data in stranger.notifications():
                            asked = msgspec.msgpack.decode(data)
                            if asked["t"] == "release":
                                said = Stopped(asked["lease"], asked["epoch"], "asked to", asked.get("nonce", 0))
                                stranger.notify(agent, msgspec.msgpack.encode(said))
                            elif asked["t"] == "ping":
                                said_ = Pong(asked["lease"], asked["epoch"], asked.get("nonce", 0))
                                stranger.notify(agent, msgspec.msgpack.encode(said_))
                        await asyncio.sleep(0.01)

                answering = asyncio.create_task(answer())
                try:
                    await it.generate_undisturbed([*PROMPT, batch % 50, batch // 50 % 50], 3)
                    await it.wait_idle()
                finally:
                    answering.cancel()
        finally:
            stranger.close()


async def fuzz_router(messages: int, seed: int) -> None:
    """A worker that says anything, beside two that are well."""
    async with running_workers() as it:
        region = Region(4096, 64, 64)
        rogue = Endpoint("rogue", 0x77, b"", region, FINGERPRINT)
        grammar = Grammar(seed, {**known(it, rogue), "epoch": [0x77], "endpoint": [plain(rogue)]})
        left = messages

        async def session(socket: ServerConnection) -> None:
            nonlocal left
            with contextlib.suppress(ConnectionClosed):
                await socket.recv()
                if grammar.random.random() < 0.2:
                    await socket.send(grammar.frame([Hello]))
                else:
                    await socket.send(encode(Hello(2, 0x77, "prefill", "", 64, 8, rogue)))
                while left > 0:
                    left -= 1
                    await socket.send(grammar.frame(TO_ROUTER))
                    if left % 10 == 0:
                        await asyncio.sleep(0)

        async with serve(session, "127.0.0.1", 0) as server:
            url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            pool = it.client._pool
            pool.set_workers({worker.url: worker.role for worker in it.workers} | {url: "rogue"})
            asked = 0
            while left > 0:
                await it.generate_undisturbed([*PROMPT, asked % 50, asked // 50 % 50], 3)
                asked += 1
                await asyncio.sleep(0)
            assert asked
            # The rogue has gone: the others serve as before.
            pool.set_workers({worker.url: worker.role for worker in it.workers})
            await it.generate_undisturbed(PROMPT)
        await it.wait_idle()


async def test_every_type_of_frame_and_notification_is_sent() -> None:
    assert set(TO_WORKER) == set(get_args(ToWorker))
    assert set(TO_ROUTER) == set(get_args(ToRouter))
    assert set(NOTIFICATIONS) == set(get_args(AnyMessage))


async def test_no_message_to_a_worker_stops_anybody_else() -> None:
    await fuzz_workers(4500, seed=1)


async def test_no_message_to_a_router_stops_anybody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir_engine.router.connection.REFUSED_BACKOFF", 0.01)
    monkeypatch.setattr("kvasir_engine.router.connection.MOST_BACKOFF", 0.01)
    await fuzz_router(300, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_messages_stop_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir_engine.router.connection.REFUSED_BACKOFF", 0.01)
    monkeypatch.setattr("kvasir_engine.router.connection.MOST_BACKOFF", 0.01)
    seed = int(os.environ.get("KVASIR_FUZZ_SEED", "2"))
    await fuzz_workers(90_000, seed)
    await fuzz_router(10_000, seed)
