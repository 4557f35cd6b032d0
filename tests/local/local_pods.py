"""Pods of small real HTTP servers, and waiting for what they do."""

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvasir_operator.pods import Backoff, Host, PodRunner

SERVER = Path(__file__).with_name("podserver.py")


def free_port(ip: str = "127.0.0.1") -> int:
    with socket.socket() as sock:
        sock.bind((ip, 0))
        port: int = sock.getsockname()[1]
        return port


class Pod:
    """A runner, everything it reported, and waiting on the reports."""

    def __init__(self, spec: dict[str, Any], state: Path, host: Host, **options: Any) -> None:
        self.control = state / "control"
        self.control.mkdir(parents=True)
        self.lines: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.readiness: list[bool] = []
        self._changed = asyncio.Event()
        options.setdefault("backoff", Backoff(base=0.05, cap=0.4))
        self.runner = PodRunner(
            spec,
            "127.0.0.1",
            state / "pod",
            host,
            on_change=self._on_change,
            on_line=self._on_line,
            on_event=self._on_event,
            **options,
        )

    def _on_change(self, runner: PodRunner) -> None:
        self.readiness.append(runner.ready)
        self._changed.set()

    def _on_line(self, container: str, line: str) -> None:
        self.lines.append(line)
        self._changed.set()

    def _on_event(self, kind: str, reason: str, message: str) -> None:
        self.events.append((reason, message))
        self._changed.set()

    async def until(self, what: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until `what` holds; looked at after each report."""
        async with asyncio.timeout(seconds):
            while not what():
                self._changed.clear()
                await self._changed.wait()

    @property
    def container(self) -> dict[str, Any]:
        status: dict[str, Any] = self.runner.status()["containerStatuses"][0]
        return status


MakePod = Callable[..., Pod]


def http_probe(path: str, **fields: Any) -> dict[str, Any]:
    """A probe of `path` every tenth of a second that gives up at once."""
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": 0.1,
        "failureThreshold": 1,
        "timeoutSeconds": 60,
        **fields,
    }


def wait_gone(pid: int, seconds: float = 60) -> bool:
    """Whether the process ends in time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
