"""Runs a built image as a pod's container would run, and asks it things from its own network."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from e2e.node import sandbox
from image_build import Image

SCRIPT = Path(__file__).with_name("enter_image.py")
WAIT = 600.0
_counter = iter(range(10**9))


@dataclass
class Container:
    """A running container. `pid` is that of its first process, as this machine sees it."""

    outer: subprocess.Popen[bytes]
    pid: int
    log: Path

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the first process, from outside its namespace, as a container runtime does."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The status it ended with; 128 and the signal's number if one ended it."""
        return self.outer.wait(WAIT)

    def children(self) -> list[int]:
        """What the first process has started, as this machine numbers it."""
        return [int(each) for each in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def log_text(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container as its user, as an exec probe or a hook is run."""
        environment = Path(f"/proc/{self.pid}/environ").read_bytes().decode().split("\0")[:-1]
        entered = ["--all", "--root", "--wd", "--setuid", "65532", "--setgid", "65532", "--target", str(self.pid)]
        return subprocess.run(
            ["nsenter", *entered, "--", "/usr/bin/env", "-i", *environment, *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT,
        )

    def connection(self, port: int = 8000) -> http.client.HTTPConnection:
        """A connection to the container's own loopback address. Raises OSError while nothing listens."""
        with ThreadPoolExecutor(1) as thread:  # a thread has a network namespace of its own, a socket keeps it
            sock = thread.submit(_connected, self.pid, port).result()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
        connection.sock = sock
        return connection

    def request(self, path: str, port: int = 8000, body: object = None) -> tuple[int, bytes]:
        """Ask it by HTTP, and read all of the answer. Raises OSError while nothing listens."""
        connection = self.connection(port)
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def until_ready(self, port: int = 8000) -> None:
        """Wait for /ready; a container that ended, or the time, is an error with its log."""
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline and self.outer.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("/ready", port)[0] == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(f"not ready:\n{self.log_text()[-3000:]}")


def _connected(pid: int, port: int) -> socket.socket:
    with open(f"/proc/{pid}/ns/net") as net:
        sandbox.check(sandbox.libc.setns(net.fileno(), sandbox.CLONE_NEWNET), "setns")
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT)


@contextlib.contextmanager
def running(
    image: Image,
    folder: Path,
    *arguments: str,
    volumes: Sequence[tuple[Path, str]] = (),
    network_of: Container | None = None,
    argv: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Container]:
    """A container of `image`: its entry point with these arguments, or `argv` instead. It is killed in the end."""
    number = next(_counter)
    here = folder / f"container-{number}"
    (here / "root").mkdir(parents=True)
    spec = {
        "overlay": image.layers.options(writable=False),
        "root": str(here / "root"),
        "user": image.stage.user,
        "environment": {"HOME": "/", **image.stage.environment, **(environment or {})},
        "directory": image.stage.directory,
        "volumes": [[str(source), target] for source, target in volumes],
        "net": f"/proc/{network_of.pid}/ns/net" if network_of else "",
        "argv": [*(argv or image.stage.entrypoint), *arguments],
    }
    (here / "spec.json").write_text(json.dumps(spec))
    reading, writing = os.pipe()
    with (here / "log").open("wb") as log:
        outer = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT), str(here / "spec.json"), str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
        )
    os.close(writing)
    try:
        with open(reading) as told:
            words = told.read().split("\n")  # to the end: now it is the image's program that runs
        if not words[0].isdecimal() or any(words[1:]):
            raise AssertionError(f"{words}: {(here / 'log').read_text()}")
        yield Container(outer, int(words[0]), here / "log")
    finally:
        outer.kill()  # and with it, by its parent-death signal, the first process and all others
        outer.wait()


def output_of(image: Image, folder: Path, *command: str) -> tuple[int, str]:
    """Run a command in place of the entry point, to its end: its status and what it said."""
    with running(image, folder, argv=command) as container:
        return container.wait(), container.log_text()


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def status(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return line.partition(":")[2].strip()


def has(pid: int, field: str, number: int) -> bool:
    return bool(int(status(pid, field), 16) >> (number - 1) & 1)
