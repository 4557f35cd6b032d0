"""What the transfer thread does when the transport reports a death in the middle of its turn."""

import queue

import pytest

from kvasir_engine.connector import notifications, sender
from kvasir_engine.connector.commands import Open, Withdraw
from kvasir_engine.connector.nixl_agent import PeerDied, TransferHandle
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.protocol import Endpoint, Fingerprint, Lease, Region

FINGERPRINT = Fingerprint("m", "", "float32", "pages", 16, 4, 1, 16, "rope")


class DyingPeers:
    """Stands in for Agent: its peers know every lease, and writes never end, until `dead`; a forgotten peer's
    transfers are no longer known.
    """

    def __init__(self) -> None:
        self.endpoint = endpoint("us")
        self.dead = False
        self.forgotten: set[str] = set()
        self.written: queue.Queue[int] = queue.Queue()
        self.answers: list[tuple[str, bytes]] = []

    def connect(self, endpoint: Endpoint, rank: int = 0) -> None:
        pass

    def differs(self, endpoint: Endpoint, rank: int) -> bool:
        return False

    def sent(self, agent: str) -> None:
        return None

    def write(self, agent: str, local: object, remote: object, layers: range) -> TransferHandle:
        self.written.put(layers.start)
        return TransferHandle(None, "PROC")  # type: ignore[arg-type]

    def poll(self, agent: str, transfer: TransferHandle) -> bool | None:
        if agent in self.forgotten:
            raise LookupError("a transfer of an agent that was removed")
        if self.dead:
            raise PeerDied(agent)
        return None

    def cancel(self, transfer: TransferHandle) -> None:
        pass

    def notify(self, agent: str, message: bytes) -> None:
        if self.dead:
            raise PeerDied(agent)
        asked = notifications.decode(message)
        if isinstance(asked, notifications.Ping):
            pong = notifications.Pong(asked.lease, asked.epoch, asked.nonce)
            self.answers.append((agent, notifications.encode(pong)))

    def notifications(self) -> list[tuple[str, bytes]]:
        answers, self.answers = self.answers, []
        return answers

    def knows(self, agent: str) -> bool:
        return agent not in self.forgotten

    def forget(self, agent: str) -> None:
        self.forgotten.add(agent)

    def close(self) -> None:
        pass


def endpoint(name: str) -> Endpoint:
    return Endpoint(name, 1, b"", Region(0, 8, 64), FINGERPRINT)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_death_under_several_writes_fails_the_lease_once_and_not_the_thread(layers: int) -> None:
    agent, events = DyingPeers(), queue.Queue[Event]()
    connector = TransferThread(lambda: agent, events.put, None)  # type: ignore[arg-type, return-value]
    connector.start()
    key = "them", 1
    connector.command(Open(endpoint("them"), Lease(1, 1, [4], 0, 60.0, "us", 1)))
    for layer in range(layers):
        connector.push(key, sender.Push((1,), (4,), layer))
        assert agent.written.get(timeout=60) == layer
    agent.dead = True
    assert events.get(timeout=60) == sender.Failed(key, "the decode worker died")
    connector.command(Withdraw(key, "nothing happens"))
    assert connector.is_alive()
    connector.stop()
    assert events.empty()
