"""One wrong frame fails its own request, with an error that names the field; everybody else goes on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from wire_harness import WireHarness, receive_frame, router_of, running_workers

from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.protocol import (
    WORKER_PATH,
    Hello,
    Lease,
    Leased,
    Loan,
    Reserve,
    Sampling,
    Step,
    Submit,
    agreed_version,
    decode_to_router,
    decode_to_worker,
    encode,
)

pytestmark = pytest.mark.dataplane

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def changed(frame: Submit | Reserve, path: str, value: object) -> bytes:
    """The frame with another value at `path`."""
    built: Any = msgspec.msgpack.decode(encode(frame))
    *way, last = path.split(".")
    place = built
    for name in way:
        place = place[name]
    place[last] = value
    return msgspec.msgpack.encode(built)


async def failure_of(socket: Any, request: str) -> str:
    async with asyncio.timeout(60):
        while True:
            frame = await receive_frame(socket)
            for delta in frame.deltas if isinstance(frame, Step) else []:
                if delta.id == request:
                    assert delta.failure is not None, delta
                    return f"{delta.failure.code}: {delta.failure.message}"


async def everything(socket: Any) -> None:
    async with asyncio.timeout(60):
        while True:
            await receive_frame(socket)


def submit(it: WireHarness, **sampling: Any) -> Submit:
    lease = Lease(
        5, it.decode.endpoint.epoch, [0, 1], 0, 60.0, it.prefill.endpoint.agent, it.prefill.endpoint.epoch
    )
    fields = {"max_tokens": 4, "top_k": 1, "min_tokens": 3, "stop_token_ids": [1], "logprobs": 1, "min_p": 0.1}
    return Submit("bad", PROMPT, Sampling(**{**fields, **sampling}), "", lease, it.decode.endpoint, 1)


TO_PREFILL: list[tuple[str, object, str]] = [
    ("to.fingerprint.page_size", 0, "page_size"),
    ("to.fingerprint.tensor_parallel", 0, "tensor_parallel"),
    ("to.fingerprint.tensor_parallel", 2**31, "tensor_parallel"),
    ("to.fingerprint.layers", 0, "layers"),
    ("to.fingerprint.kv_heads", -1, "kv_heads"),
    ("to.region.pages", 0, "pages"),
    ("to.region.page_bytes", 7, "page_bytes"),
    ("to.region.address", 2**64 - 1, "address"),
    ("lease.pages", [0, 64], "lease.pages"),
    ("lease.pages", [1, 1], "lease.pages"),
    ("lease.pages", [-1, 0], "lease.pages"),
    ("lease.first", -4, "first"),
    ("lease.first", 3, "first"),
    ("lease.seconds", float("nan"), "seconds"),
    ("lease.seconds", float("inf"), "seconds"),
    ("lease.epoch", 77, "lease.epoch"),
    ("lease.id", -1, "id"),
    ("lease.unknown", 1, "unknown"),
]
TO_DECODE: list[tuple[str, object, str]] = [
    ("sampling.logprobs", -1, "logprobs"),
    ("sampling.logprobs", 51, "logprobs"),
    ("sampling.stop_token_ids", [50], "stop_token_ids"),
    ("sampling.stop_token_ids", [-1], "stop_token_ids"),
    ("sampling.min_tokens", -1, "min_tokens"),
    ("sampling.max_tokens", 0, "max_tokens"),
    ("sampling.max_tokens", 2**64 - 1, "max_tokens"),
    ("sampling.top_k", 2**31, "top_k"),
    ("sampling.temperature", float("nan"), "temperature"),
    ("sampling.min_p", -0.5, "min_p"),
    ("sampling.top_p", float("inf"), "top_p"),
    ("sampling.processors", {"presence_penalty": 2.5}, "presence_penalty"),
    ("sampling.processors", {"frequency_penalty": float("nan")}, "frequency_penalty"),
    ("sampling.processors", {"repetition_penalty": 0.0}, "repetition_penalty"),
    ("sampling.processors", {"repetition_penalty": float("inf")}, "repetition_penalty"),
    ("sampling.processors", {"logit_bias": [[50, 1.0]]}, "logit_bias"),
    ("sampling.processors", {"logit_bias": [[3, 1.0], [3, 2.0]]}, "logit_bias"),
    ("sampling.processors", {"logit_bias": [[3, 100.5]]}, "logit_bias"),
    ("sampling.processors", {"logit_bias": [[3, 1.0]] * 1025}, "logit_bias"),
    ("sampling.processors", {"bad_words": [[]]}, "bad_words"),
    ("sampling.processors", {"bad_words": [[3, 50]]}, "bad_words"),
    ("sampling.processors", {"bad_words": [[3]] * 257}, "bad_words"),
    ("sampling.processors", {"bad_words": [[n] for n in range(50)]}, "bad_words"),
    ("sampling.processors", {"allowed_token_ids": []}, "allowed_token_ids"),
    ("sampling.processors", {"allowed_token_ids": [50]}, "allowed_token_ids"),
    ("sampling.processors", {"allowed_token_ids": [1]}, "allowed_token_ids"),  # the stop, and min_tokens is 3
    ("sampling.processors", {"allowed_token_ids": [3, 4], "bad_words": [[9, 4], [3]]}, "allowed_token_ids"),
    ("sampling.processors", {"replayed": -1}, "replayed"),
    ("sampling.processors", {"replayed": len(PROMPT)}, "replayed"),
    ("sampling.processors", {"unknown": 1}, "unknown"),
    ("tokens", [], "tokens"),
    ("tokens", [50], "tokens"),
    ("tokens", [-1], "tokens"),
    ("priority", 2**63, "priority"),
]


@pytest.mark.asyncio
async def test_a_frame_with_a_wrong_field_fails_its_own_request() -> None:
    async with running_workers() as it:
        lent = submit(it)
        assert lent.lease is not None
        alone = msgspec.structs.replace(lent, lease=None, to=None)
        reserve = Reserve("bad", PROMPT, lent.sampling, it.prefill.endpoint, "", 0, None, 1)
        twice = Loan(5, it.decode.endpoint.epoch, [2], 0, 30.0)
        cases = [(it.prefill, lent, *case) for case in TO_PREFILL]
        cases += [(it.decode, frame, *case) for frame in (alone, reserve) for case in TO_DECODE]
        cases += [
            (it.decode, reserve, "writer.fingerprint.page_size", 0, "page_size"),
            (it.decode, reserve, "threshold", -1, "threshold"),
            (it.decode, reserve, "lend_from", -1, "lend_from"),
            (
                it.decode,
                reserve,
                "writer",
                msgspec.to_builtins(it.decode.endpoint, builtin_types=(bytes,)),
                "writer.agent",
            ),
            (it.prefill, lent, "lease.loan", msgspec.to_builtins(twice), "lease.loan.id"),
        ]
        for worker, frame, path, value, named in cases:
            async with router_of(worker) as socket:
                await socket.send(changed(frame, path, value))
                assert named in await failure_of(socket, "bad"), (path, value)
                if worker is it.decode:  # the connection goes on
                    await socket.send(encode(Submit("good", PROMPT, Sampling(max_tokens=1))))
                    async with asyncio.timeout(60):
                        while not isinstance(step := await receive_frame(socket), Step) or not step.deltas:
                            pass
                    assert step.deltas[0].tokens
        await it.generate_undisturbed(PROMPT)
        await it.wait_idle()


@pytest.mark.asyncio
async def test_a_frame_that_is_none_closes_its_connection_and_no_other() -> None:
    async with running_workers() as it:
        for data in (b"", b"\xc1", b"\x80", encode(Hello(2, 1)), msgspec.msgpack.encode({"t": "submit", "id": 7})):
            async with router_of(it.decode) as socket:
                await socket.send(data)
                with pytest.raises(ConnectionClosed):
                    await everything(socket)
        await it.generate_undisturbed(PROMPT)
        await it.wait_idle()


@pytest.mark.asyncio
async def test_notifications_of_a_stranger_end_nothing() -> None:
    async with running_workers() as it:
        region = msgspec.structs.replace(it.decode.endpoint.region)
        attacker = NixlAgent(0x66, region, it.decode.endpoint.fingerprint)
        try:
            for worker in it.workers:
                attacker.meet(worker.endpoint.address(0))
                epoch = worker.endpoint.epoch
                for message in (
                    {"t": "lent", "lease": 1, "epoch": epoch, "pages": [1, 2], "digests": [3]},
                    {"t": "lent", "lease": 1, "epoch": epoch, "pages": [1, 2], "digests": [3, 4]},
                    {"t": "written", "lease": 1, "epoch": epoch, "first": -1, "layers": [0, 2], "digests": []},
                    {"t": "complete", "lease": -1, "epoch": epoch, "tokens": 1, "pages": 1, "token": 2**40},
                    {"t": "release", "lease": 1, "epoch": epoch, "sender": {"agent": 3}},
                    {"t": "stopped", "lease": 2**64 - 1, "epoch": epoch, "reason": "x"},
                ):
                    attacker.notify(worker.endpoint.agent, msgspec.msgpack.encode(message))
                attacker.notify(worker.endpoint.agent, b"\xc1 no message")
            async with asyncio.timeout(60):
                while min(worker.engine.stats.rejected_messages for worker in it.workers) < 5:
                    attacker.notifications()  # which makes its transport progress
                    await asyncio.sleep(0.01)
            await it.generate_undisturbed(PROMPT)
            await it.wait_idle()
        finally:
            attacker.close()


@pytest.mark.asyncio
async def test_a_worker_that_speaks_the_protocol_before_is_served_with_what_it_knows() -> None:
    recorded = json.loads((Path(__file__).parent / "protocol_v2.json").read_text())
    for data in map(bytes.fromhex, recorded["to_worker"].values()):
        assert encode(decode_to_worker(data)) == data
    for data in map(bytes.fromhex, recorded["to_router"].values()):
        assert encode(decode_to_router(data)) == data
    async with running_workers() as it:
        async with asyncio.timeout(60):
            async with connect(it.decode.url + WORKER_PATH, compression=None, proxy=None) as socket:
                await socket.send(bytes.fromhex(recorded["to_worker"]["hello"]))
                known = {"hello", "leased", "step", "cacheevents", "drain"}
                assert isinstance(await receive_frame(socket), Hello)
                await socket.send(encode(Reserve("a", PROMPT, Sampling(max_tokens=2), it.prefill.endpoint)))
                leased = False
                over = asyncio.create_task(asyncio.sleep(5))  # longer than a worker waits to say that it is alive
                while not (leased and over.done()):
                    coming = asyncio.create_task(socket.recv())
                    await asyncio.wait((coming, over) if leased else (coming,), return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        coming.cancel()
                        continue
                    data = coming.result()
                    assert isinstance(data, bytes)
                    assert msgspec.msgpack.decode(data)["t"] in known
                    leased = leased or isinstance(decode_to_router(data), Leased)
        await it.wait_idle()


def test_versions_are_agreed_on_or_refused_by_name() -> None:
    assert agreed_version(Hello(2, 1, latest=4), Hello(1, 1, latest=3)) == 3
    assert agreed_version(Hello(2, 1), Hello(2, 1, latest=3)) == 2
    assert agreed_version(Hello(3, 1, latest=4), Hello(1, 1, latest=2)) is None
