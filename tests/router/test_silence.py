"""Lost machines are noticed by keepalive probes: on both ends of a connection between router and worker."""

import asyncio
import socket
from pathlib import Path
from urllib.parse import urlsplit

from fake_worker import Fabric, FakeWorker, cluster

from kvasir_engine.keepalive import SILENT_SECONDS, notice_silence

KEEPALIVE = "02"


def timers_towards(port: int) -> set[str]:
    """Which timers run on the connections to `port` on this machine, as /proc/net/tcp has them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[5].partition(":")[0] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"}


async def test_a_router_probes_its_workers() -> None:
    worker = FakeWorker("both", Fabric())
    async with cluster(worker) as running:
        port = urlsplit(worker.url).port
        assert port is not None
        await running.until(lambda: timers_towards(port) == {KEEPALIVE})


async def test_what_a_worker_accepts_is_probed() -> None:
    accepted: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

    def made(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        probed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        accepted.put_nowait((probed, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)))
        writer.close()

    with socket.create_server(("127.0.0.1", 0)) as sock:
        notice_silence(sock)
        async with await asyncio.start_server(made, sock=sock):
            _, writer = await asyncio.open_connection(*sock.getsockname())
            assert await asyncio.wait_for(accepted.get(), 60) == (1, 1000 * SILENT_SECONDS)
            writer.close()
