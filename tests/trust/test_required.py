"""`--encryption required`: what would leave the machine is refused by name, what stays serves."""

import os
from pathlib import Path

import pytest
from services import VOCAB, Service

pytestmark = [pytest.mark.dataplane, pytest.mark.asyncio]

PROMPT = [(11 * n + 1) % VOCAB for n in range(60)]


async def test_a_pair_on_one_machine_serves_with_tcp_on_loopback_alone(service: Service) -> None:
    pair = (
        service.worker("prefill", "--encryption", "required"),
        service.worker("decode", "--encryption", "required"),
    )
    try:
        async with service.router(*pair) as both, service.router(pair[1]) as alone:
            assert await both.generate(PROMPT, 6) == await alone.generate(PROMPT, 6, "alone")
            assert both.pool.unpaired() == []
        for worker in pair:
            listening = listeners(worker.process.pid or 0)
            assert listening
            assert set(listening) == {"0100007F"}, "a port that others reach"
    finally:
        for worker in pair:
            worker.kill()


def listeners(pid: int) -> list[str]:
    """The IPv4 addresses, as /proc has them, that a process listens on."""
    inodes = set()
    for each in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{each}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--fabric", "tcp"], "encryption required and fabric tcp: NIXL over tcp is not encrypted"),
        (["--fabric", "rdma"], "encryption required and fabric rdma: NIXL over rdma is not encrypted"),
    ],
)
async def test_a_fabric_that_is_not_encrypted_is_refused_before_anything_is_loaded(
    service: Service, arguments: list[str], why: str
) -> None:
    worker = service.worker("decode", "--encryption", "required", *arguments)
    assert worker.ended() == 2
    assert why in worker.log.read_text()


async def test_without_certificates_encryption_cannot_be_required(service: Service) -> None:
    worker = service.worker("decode", "--encryption", "required", plain=True)
    assert worker.ended() == 2
    assert "encryption required: it needs --tls-dir" in worker.log.read_text()
