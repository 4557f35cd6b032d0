"""Whoever only knows a worker's address makes it keep nothing, and takes no name that is another's."""

import asyncio
from typing import Any

import msgspec
import pytest
from test_nonces import PROMPT, deltas, impostor, lease_of, memory_of, until
from toy import reference
from wire_harness import WireHarness, receive_frame, router_of, running_workers

from kvasir_engine.connector import sender
from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.connector.notifications import Ping, Release, Stopped, encode
from kvasir_engine.protocol import Abort, Address, Lease, Leased, Reserve, Sampling, Submit
from kvasir_engine.protocol import encode as frame

pytestmark = [pytest.mark.dataplane, pytest.mark.asyncio]


def stranger_of(it: WireHarness, epoch: int) -> NixlAgent:
    agent, _memory = impostor(it, epoch)
    return agent


async def aborted(it: WireHarness, decode: Any, lease: Lease) -> None:
    """The request of a lease of the prefill worker's is gone, and its pages are back."""
    await decode.send(frame(Abort("a")))
    await until(lambda: lease.id not in it.decode.engine.leases.open)


async def test_after_a_flood_of_forged_releases_nothing_is_written_under_a_lease_that_was_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "EARLY", 16)
    async with running_workers() as it, router_of(it.decode) as decode, router_of(it.prefill) as prefill:
        false = stranger_of(it, 0x99)
        try:
            lease = await lease_of(it, decode)
            await aborted(it, decode, lease)
            await it.wait_idle()
            false.meet(it.prefill.endpoint.address(0))
            heard: list[Any] = []
            for forged in range(100):
                release = Release(1000 + forged, lease.epoch, false.endpoint.address(0), forged)
                false.notify(it.prefill.endpoint.agent, encode(release))
            await until(lambda: len(heard) >= 100, lambda: heard.extend(false.notifications()))
            before = memory_of(it.decode).copy()
            late = Submit("late", PROMPT, Sampling(max_tokens=3), "mine", lease, it.decode.endpoint)
            await prefill.send(frame(late))
            found = await deltas(prefill, "late")
            assert found[-1].failure is not None
            assert found[-1].failure.code == "handoff_failed"
            assert (memory_of(it.decode) == before).all()
            await it.wait_idle()
        finally:
            false.close()


async def test_a_writer_that_asks_when_its_lease_is_wanted_no_more_is_not_told_to_begin() -> None:
    async with running_workers() as it, router_of(it.decode) as decode:
        writer = stranger_of(it, 0x66)
        try:
            reserve = Reserve("a", PROMPT, Sampling(max_tokens=3), writer.endpoint, "mine", nonces=True)
            await decode.send(frame(reserve))
            async with asyncio.timeout(30):
                while not isinstance(answer := await receive_frame(decode), Leased):
                    pass
            lease = answer.lease
            assert lease is not None
            heard: list[Any] = []

            def hear() -> None:
                heard.extend(msgspec.msgpack.decode(data) for _, data in writer.notifications())

            writer.meet(it.decode.endpoint.address(0))
            ask = Ping(lease.id, lease.epoch, lease.nonce)
            writer.notify(it.decode.endpoint.agent, encode(ask))
            await until(lambda: any(each["t"] == "pong" for each in heard), hear)
            await decode.send(frame(Abort("a")))
            await until(lambda: any(each["t"] == "release" for each in heard), hear)
            heard.clear()
            for _ in range(20):
                writer.notify(it.decode.endpoint.agent, encode(ask))
            await until(lambda: len([each for each in heard if each["t"] == "release"]) >= 20, hear)
            assert {each["t"] for each in heard} == {"release"}
            stopped = Stopped(lease.id, lease.epoch, "as asked", lease.nonce)
            writer.notify(it.decode.endpoint.agent, encode(stopped))
            await until(it.decode.balanced, hear)
        finally:
            writer.close()


async def test_strangers_that_want_an_answer_are_not_kept_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir_engine.connector.nixl_agent.MOST_STRANGERS", 3)
    workers: list[NixlAgent] = []

    class Kept(NixlAgent):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            workers.append(self)

    monkeypatch.setattr("wire_harness.NixlAgent", Kept)
    async with running_workers() as it:
        met: list[NixlAgent] = []
        try:
            for number in range(6):
                each = stranger_of(it, 0x9000 + number)
                met.append(each)
                each.meet(it.prefill.endpoint.address(0))
                each.notify(it.prefill.endpoint.agent, encode(Release(1, 2, each.endpoint.address(0), 3)))
                heard: list[Any] = []
                await until(lambda heard=heard: heard, lambda e=each, h=heard: h.extend(e.notifications()))
            (prefill,) = [each for each in workers if each.name == it.prefill.endpoint.agent]
            assert [each.name for each in met if prefill.knows(each.name)] == [each.name for each in met[-3:]]
            await it.generate_undisturbed(PROMPT)
            assert prefill.named(it.decode.endpoint.agent)
            met[0].notify(prefill.name, encode(Release(1, 2, met[0].endpoint.address(0), 3)))
            heard = []
            await until(lambda: heard, lambda: heard.extend(met[0].notifications()))
            assert prefill.named(it.decode.endpoint.agent)
        finally:
            for each in met:
                each.close()


async def test_a_workers_name_that_is_hidden_behind_another_keeps_nobody_from_it() -> None:
    async with running_workers() as it, router_of(it.decode) as decode, router_of(it.prefill) as prefill:
        false, speaks = stranger_of(it, it.decode.endpoint.epoch), stranger_of(it, 0x99)
        try:
            assert false.name == it.decode.endpoint.agent
            behind = Address(speaks.name, false.endpoint.metadata, false.endpoint.region)
            speaks.meet(it.prefill.endpoint.address(0))
            heard: list[Any] = []
            for who in (behind, speaks.endpoint.address(0)):  # the second is answered, after the first
                speaks.notify(it.prefill.endpoint.agent, encode(Release(1, 2, who, 3)))
            await until(lambda: heard, lambda: heard.extend(speaks.notifications()))
            lease = await lease_of(it, decode)
            await prefill.send(
                frame(Submit("a", PROMPT, Sampling(max_tokens=3), "mine", lease, it.decode.endpoint))
            )
            assert [t for d in await deltas(decode, "a") for t in d.tokens] == reference(PROMPT, 3)
            await it.wait_idle()
        finally:
            false.close()
            speaks.close()
