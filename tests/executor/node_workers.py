"""Workers on two nodes: two processes that find each other by TCP, on loopback or in namespaces of their own."""

import os
import secrets
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from rank_workers import SECONDS, Worker, engine_options, forkserver, log_into

from kvasir_engine.entrypoints.follower_node import follow
from kvasir_engine.errors import UserError
from kvasir_engine.executor.node_protocol import Nodes
from kvasir_engine.faults import VARIABLE

Setup = Callable[[], None]
"""Done in a node's process before anything else: it enters a namespace, or is more impatient."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _follow(
    folder: Path,
    role: str,
    nodes: Nodes,
    port: int,
    ranks: int,
    log: Path,
    setup: Setup | None,
    fault: str,
) -> None:
    log_into(log)
    os.environ[VARIABLE] = fault
    if setup is not None:
        setup()
    try:
        here = {"role": role, "host": "127.0.0.1", "port": port, "drain_seconds": SECONDS}
        follow(engine_options(folder, ranks, 16, nodes, **here))
    except UserError as error:  # as the command does
        with log.open("a") as file:
            file.write(f"kvasir: error: {error}\n")
        raise SystemExit(2) from None


class Follower:
    """The process of node 1."""

    def __init__(
        self,
        folder: Path,
        role: str,
        nodes: Nodes,
        ranks: int = 2,
        setup: Setup | None = None,
        fault: str = "",
    ) -> None:
        self.log = folder / f"{secrets.token_hex(4)}.log"
        self.port = free_port()
        arguments = (folder, role, nodes, self.port, ranks, self.log, setup, fault)
        self.process = forkserver().Process(target=_follow, args=arguments)
        self.process.start()

    def status(self, path: str) -> int | None:
        """What a probe gets; None when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=SECONDS) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return int(error.code)
        except OSError:
            return None

    def errors(self) -> list[str]:
        """The lines that say why it ended, after its end."""
        self.process.join(SECONDS)
        return errors(self.log)


def errors(log: Path) -> list[str]:
    """The lines that say why a process ended."""
    mark = "kvasir: error: "
    return [line.removeprefix(mark) for line in log.read_text().splitlines() if line.startswith(mark)]


class TwoNodes:
    """A worker of two ranks on two nodes."""

    def __init__(
        self,
        folder: Path,
        role: str,
        leader: tuple[str, int] | None = None,
        setups: Sequence[Setup | None] = (None, None),
        fault: str = "",
    ) -> None:
        address = leader or ("127.0.0.1", free_port())
        here, there = (Nodes(2, node, *address) for node in range(2))
        self.follower = Follower(folder, role, there, setup=setups[1], fault=fault)
        self.leader = Worker(folder, role, 2, 16, "", here, setups[0])

    def kill(self) -> None:
        for process in (self.leader.process, self.follower.process):
            process.kill()
            process.join()
