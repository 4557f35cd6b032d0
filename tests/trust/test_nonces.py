"""Who does not know a lease's nonce changes nothing of it, whatever name it goes by; it is counted."""

import asyncio
import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from toy import reference
from wire_harness import FINGERPRINT, ToyWorker, WireHarness, receive_frame, router_of, running_workers

from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.connector.notifications import Complete, Lent, Message, Pong, Release, Stopped, Written, encode
from kvasir_engine.protocol import Delta, Encryption, Lease, Leased, Region, Reserve, Sampling, Step, Submit
from kvasir_engine.protocol import encode as frame
from kvasir_engine.transport_policy import TransportPolicy

pytestmark = [pytest.mark.dataplane, pytest.mark.asyncio]

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


async def until(true: Callable[[], Any], poll: Callable[[], Any] = lambda: None) -> None:
    async with asyncio.timeout(60):
        while not true():
            poll()
            await asyncio.sleep(0.002)


async def deltas(socket: Any, request: str) -> list[Delta]:
    """Those of a request, until it ends."""
    found: list[Delta] = []
    async with asyncio.timeout(60):
        while not found or (found[-1].finish is None and found[-1].failure is None):
            answer = await receive_frame(socket)
            if isinstance(answer, Step):
                found += [delta for delta in answer.deltas if delta.id == request]
    return found


async def lease_of(it: WireHarness, socket: Any) -> Lease:
    """A lease that the decode worker grants the prefill worker."""
    reserve = Reserve("a", PROMPT, Sampling(max_tokens=3), it.prefill.endpoint, "mine", nonces=True)
    await socket.send(frame(reserve))
    async with asyncio.timeout(60):
        while not isinstance(answer := await receive_frame(socket), Leased):
            pass
    assert answer.lease is not None
    return answer.lease


def memory_of(worker: ToyWorker) -> np.ndarray[Any, Any]:
    region = worker.endpoint.region
    pool: Any = worker.engine.runner.pool
    assert pool.address == region.address
    view = (ctypes.c_uint8 * (region.pages * region.page_bytes)).from_address(region.address)
    return np.frombuffer(view, np.uint8)


def impostor(it: WireHarness, epoch: int) -> tuple[NixlAgent, np.ndarray[Any, Any]]:
    """An agent that goes by the name of the worker with this epoch."""
    memory = np.zeros(64 * FINGERPRINT.page_size * 1024, np.uint8)
    return NixlAgent(
        epoch, Region(memory.ctypes.data, 64, it.decode.endpoint.region.page_bytes), FINGERPRINT
    ), memory


async def test_a_notification_with_a_wrong_nonce_from_the_writers_own_name_changes_nothing() -> None:
    async with running_workers() as it, router_of(it.decode) as decode, router_of(it.prefill) as prefill:
        false, _memory = impostor(it, it.prefill.endpoint.epoch)
        try:
            assert false.name == it.prefill.endpoint.agent
            lease = await lease_of(it, decode)
            assert lease.nonce > 1 << 20
            said: list[Message] = []
            for nonce in (0, lease.nonce ^ 1):
                said += [
                    Stopped(lease.id, lease.epoch, "forged", nonce),
                    Complete(lease.id, lease.epoch, len(PROMPT), len(lease.pages), 7, nonce=nonce),
                    Written(lease.id, lease.epoch, 0, (0, 1), [1], nonce),
                    Pong(lease.id, lease.epoch, nonce),
                ]
            before = it.decode.engine.stats.rejected_messages
            false.meet(it.decode.endpoint.address(0))
            for message in said:
                false.notify(it.decode.endpoint.agent, encode(message))  # type: ignore[arg-type]
            await until(lambda: it.decode.engine.stats.rejected_messages >= before + len(said), false.notifications)
            assert lease.id in it.decode.engine.leases.open
            await prefill.send(
                frame(Submit("a", PROMPT, Sampling(max_tokens=3), "mine", lease, it.decode.endpoint))
            )
            assert [t for d in await deltas(decode, "a") for t in d.tokens] == reference(PROMPT, 3)
            await it.wait_idle()
        finally:
            false.close()


async def test_a_forged_release_or_loan_stops_no_prefill() -> None:
    async with running_workers() as it, router_of(it.decode) as decode, router_of(it.prefill) as prefill:
        false, _memory = impostor(it, it.decode.endpoint.epoch)
        try:
            lease = await lease_of(it, decode)
            false.meet(it.prefill.endpoint.address(0))
            for nonce in (0, lease.nonce ^ 1):
                release = Release(lease.id, lease.epoch, false.endpoint.address(0), nonce)
                false.notify(it.prefill.endpoint.agent, encode(release))
                false.notify(it.prefill.endpoint.agent, encode(Lent(lease.id, lease.epoch, [0], [1], nonce)))
            heard: list[Any] = []
            await until(lambda: len(heard) >= 2, lambda: heard.extend(false.notifications()))  # it says Stopped
            await prefill.send(
                frame(Submit("a", PROMPT, Sampling(max_tokens=3), "mine", lease, it.decode.endpoint))
            )
            assert [t for d in await deltas(decode, "a") for t in d.tokens] == reference(PROMPT, 3)
            await it.wait_idle()
        finally:
            false.close()


@pytest.mark.parametrize("nonce", [0, 12345])
async def test_nothing_is_written_under_a_lease_that_its_holder_did_not_grant(nonce: int) -> None:
    async with running_workers() as it, router_of(it.prefill) as prefill:
        await it.generate_undisturbed(PROMPT)
        await it.wait_idle()
        before = memory_of(it.decode).copy()
        writer, holder = it.prefill.endpoint, it.decode.endpoint
        lease = Lease(77, holder.epoch, [0, 1, 2], 0, 60.0, writer.agent, writer.epoch, nonce=nonce)
        await prefill.send(frame(Submit("a", PROMPT, Sampling(max_tokens=3), "mine", lease, holder)))
        found = await deltas(prefill, "a")
        assert found[-1].failure is not None
        assert found[-1].failure.code == "handoff_failed"
        assert (memory_of(it.decode) == before).all()
        await it.wait_idle()


async def test_encryption_that_is_required_refuses_a_pair_on_two_machines_before_anything_is_leased() -> None:
    async with running_workers() as it, router_of(it.decode) as decode, router_of(it.prefill) as prefill:
        for worker in it.workers:
            worker.engine.policy = TransportPolicy("required", "here")
        for place, nonces, why in (
            ("there", True, "NIXL between two machines or pods is not encrypted"),
            ("", True, "not encrypted"),
            ("here", False, "knows no nonces"),
        ):
            name = f"{place}-{nonces}"
            reserve = Reserve(name, PROMPT, Sampling(max_tokens=3), it.prefill.endpoint, nonces=nonces, place=place)
            await decode.send(frame(reserve))
            failure = (await deltas(decode, name))[-1].failure
            assert failure is not None
            assert failure.code == "not_encrypted"
            assert why in failure.message
            lease = Lease(1, it.decode.endpoint.epoch, [0, 1, 2], 0, 60.0, it.prefill.endpoint.agent, 0x51)
            lease = msgspec.structs.replace(lease, nonce=int(nonces))
            to = it.decode.endpoint
            await prefill.send(frame(Submit(name, PROMPT, Sampling(max_tokens=3), "", lease, to, place=place)))
            failure = (await deltas(prefill, name))[-1].failure
            assert failure is not None
            assert failure.code == "not_encrypted"
        assert not it.decode.engine.leases.open
        await it.wait_idle()


async def test_a_router_pairs_nobody_whose_encryption_cannot_be_had_and_says_why() -> None:
    async with running_workers() as it:
        workers = {each.url: each for each in it.client._pool.ready()}
        prefill, decode = (workers[each.url] for each in it.workers)
        cases: list[tuple[Encryption, str, str]]
        cases = [("required", "here", "there"), ("auto", "here", "there"), ("required", "x", "x")]
        for one, ours, theirs in cases:
            for connection, place in ((prefill, ours), (decode, theirs)):
                assert connection.peer is not None
                policy = TransportPolicy(one, place)
                connection.peer = dataclasses.replace(connection.peer, transport=policy)
            before = it.prefill.engine.stats.sent_pages
            await it.generate_undisturbed([*PROMPT, len(one), len(ours), 5], 2)
            await it.wait_idle()
            moved = it.prefill.engine.stats.sent_pages > before
            assert moved == (one == "auto" or ours == theirs)
            assert bool(it.client._pool.unpaired()) != moved
