"""Who reaches a worker's ports without a credential of its InferenceService gets no answer; the log says why."""

import asyncio
import contextlib
import datetime
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from certificates import Authority, mount
from services import Service, WorkerProcess
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import InvalidHandshake, WebSocketException

from kvasir_engine.protocol import LATEST, VERSION, WORKER_PATH, Hello, decode_to_router, encode
from kvasir_engine.router.worker_trust import WorkerTrust
from kvasir_engine.tls import Credentials

pytestmark = [pytest.mark.dataplane, pytest.mark.asyncio]

Pair = tuple[WorkerProcess, WorkerProcess]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


async def hello(url: str, context: ssl.SSLContext | None, **more: str) -> bytes | str:
    """What a router's hello gets: the worker's, or how the connection has ended."""
    try:
        async with asyncio.timeout(60):
            async with connect(
                url + WORKER_PATH, ssl=context, proxy=None, additional_headers=more, compression=None
            ) as socket:
                await socket.send(encode(Hello(VERSION, 1, latest=LATEST)))
                return await socket.recv()
    except (OSError, WebSocketException) as error:
        return f"{type(error).__name__}: {error}"


def context(ca: bytes, files: tuple[bytes, bytes] | None, folder: Path) -> ssl.SSLContext:
    """A client's own, of whatever files, that believes anybody."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if files is not None:
        mount(folder, ca, *files)
        made.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return made


async def test_a_handoff_between_workers_with_certificates_gives_the_tokens_of_one(
    service: Service, pair: Pair
) -> None:
    async with service.router(*pair) as both, service.router(pair[1]) as alone:
        assert await both.generate(PROMPT, 8) == await alone.generate(PROMPT, 8, "alone")
    async with httpx.AsyncClient(timeout=60) as client:
        metrics = (await client.get(f"http://{pair[1].http}/metrics")).text
    assert "kvasir_kv_received_bytes_total" in metrics
    assert "kvasir_kv_received_bytes_total 0.0" not in metrics


async def test_who_shows_no_certificate_of_the_service_gets_nothing(
    service: Service, pair: Pair, tmp_path: Path
) -> None:
    decode, ca, stranger = pair[1], service.ca, Authority("stranger")
    attacks = {
        "nothing": (None, "peer did not return a certificate"),
        "another CA": (stranger.leaf("router"), "certificate verify failed"),
        "a foreign service": (ca.leaf("router", "other"), "InferenceService models/other, this is models/chat"),
        "another namespace": (ca.leaf("router", "chat", "evil"), "InferenceService evil/chat"),
        "an expired one": (ca.leaf("router", valid=-datetime.timedelta(hours=1)), "certificate has expired"),
        "a worker of the service": (ca.leaf("prefill"), "its role is prefill, only router may connect here"),
        "no URI": (ca.leaf("router", uris=[]), "0 URI SANs"),
    }
    for name, (files, why) in attacks.items():
        answer = await hello(decode.url, context(ca.pem, files, tmp_path / name))
        assert isinstance(answer, str), name
        decode.until(rf"refused address=127\.0\.0\.1 reason=.*{why}", 10)
    good = await hello(decode.url, context(ca.pem, ca.leaf("router"), tmp_path / "good"))
    assert isinstance(good, bytes)
    assert isinstance(decode_to_router(good), Hello)


async def test_a_foreign_origin_is_refused_also_with_a_certificate(
    service: Service, pair: Pair, tmp_path: Path
) -> None:
    router = context(service.ca.pem, service.ca.leaf("router"), tmp_path / "router")
    answer = await hello(pair[1].url, router, Origin="https://evil.example")
    assert isinstance(answer, str)
    assert "403" in answer


async def test_the_http_port_has_no_worker_path_any_more(pair: Pair) -> None:
    for worker in pair:
        with pytest.raises(InvalidHandshake):
            async with connect(f"ws://{worker.http}{WORKER_PATH}", proxy=None):
                pass
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.get(f"http://{worker.http}/ready")).status_code == 200
            assert (await client.get(f"http://{worker.http}/metrics")).status_code == 200


async def test_the_port_of_routers_has_nothing_but_the_worker_path(service: Service, pair: Pair) -> None:
    credentials = Credentials(service.tls("router"))
    url = pair[1].url.replace("wss:", "https:")
    async with httpx.AsyncClient(verify=credentials.client, timeout=60) as client:
        for path in ("/metrics", "/status", "/health", "/docs"):
            assert (await client.get(url + path)).status_code == 404
    with pytest.raises(httpx.TransportError):
        await asyncio.to_thread(httpx.get, pair[1].url.replace("wss:", "http:") + "/health")


@contextlib.asynccontextmanager
async def posing(ca: bytes, files: tuple[bytes, bytes], folder: Path) -> AsyncIterator[tuple[str, list[object]]]:
    """A worker's port of somebody who lets anybody in; its URL and what it was sent."""
    mount(folder, ca, *files)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    heard: list[object] = []

    async def session(socket: ServerConnection) -> None:
        async for data in socket:
            heard.append(data)

    async with serve(session, "127.0.0.1", 0, ssl=server) as serving:
        yield f"wss://127.0.0.1:{serving.sockets[0].getsockname()[1]}", heard


async def test_a_router_says_nothing_to_a_worker_that_it_cannot_believe(
    service: Service, pair: Pair, tmp_path: Path
) -> None:
    ca, stranger = service.ca, Authority("stranger")
    attacks = {
        "another CA": (stranger.leaf("decode"), "certificate verify failed"),
        "a foreign service": (ca.leaf("decode", "other"), "InferenceService models/other, this is models/chat"),
        "an expired one": (ca.leaf("decode", valid=-datetime.timedelta(hours=1)), "certificate has expired"),
        "a router": (ca.leaf("router"), "its role is router, only prefill and decode may connect here"),
    }
    for name, (files, why) in attacks.items():
        async with (
            posing(ca.pem, files, tmp_path / name) as (url, heard),
            service.router(pair[1], url, ready=1) as router,
        ):
            assert why in await router.state(url, "refused")
            assert await router.generate(PROMPT, 2)
            assert heard == []


async def test_workers_without_certificates_are_taken_only_when_the_router_is_told_to(service: Service) -> None:
    plain = service.worker("decode", plain=True)
    async with service.router(plain, ready=0) as router:
        assert "it has no TLS" in await router.state(plain.url, "refused")
    trust = WorkerTrust(Credentials(service.tls("router")), plain=True)
    async with service.router(plain, trust=trust) as router:
        assert await router.generate(PROMPT, 4), "as long as a rollout lasts"


async def test_a_router_without_certificates_says_why_it_cannot_use_a_worker_that_has_some(
    service: Service, pair: Pair
) -> None:
    async with service.router(pair[1], trust=WorkerTrust(), ready=0) as router:
        assert "no --tls-dir" in await router.state(pair[1].url, "refused")


async def test_a_worker_with_the_wrong_files_ends_with_one_line(service: Service, tmp_path: Path) -> None:
    wrong = service.worker("decode", tls=service.tls("prefill"))
    assert wrong.ended() == 2
    assert "error: tls-dir: the certificate is of the role prefill, this is decode" in wrong.log.read_text()
    nothing = service.worker("decode", tls=tmp_path / "nowhere")
    assert nothing.ended() == 2
    assert "ca.crt" in nothing.log.read_text().splitlines()[-1]


async def test_handshakes_that_do_not_end_keep_no_router_out(service: Service, pair: Pair, tmp_path: Path) -> None:
    decode = pair[1]
    port = int(decode.url.rpartition(":")[2])
    with contextlib.ExitStack() as held:
        for _ in range(300):
            sock = socket.create_connection(("127.0.0.1", port), 30, source_address=("127.0.0.9", 0))
            held.enter_context(sock)
        decode.until(r"refused address=127\.0\.0\.9 reason='\d+ handshakes are under way, 64 its own'", 30)
        answer = await hello(decode.url, context(service.ca.pem, service.ca.leaf("router"), tmp_path / "good"))
        assert isinstance(answer, bytes), answer
