"""A program of the cluster: in its namespace, with its log in a file, and dying with this process."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from e2e import netns

_POLL_SECONDS = 0.05
_LOG_CHARS = 3000


class ClusterError(Exception):
    """The cluster could not be started or a part of it ended; the message has the end of its log."""


class Program:
    """A started program."""

    def __init__(
        self, name: str, namespace: str, argv: Sequence[str], logs: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                netns.command(namespace, argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def check(self) -> None:
        """Raise ClusterError when it has ended."""
        if self._process.poll() is not None:
            raise ClusterError(
                f"{self.name} ended with {self._process.returncode}:\n"
                f"{self.log.read_text(errors='replace')[-_LOG_CHARS:]}"
            )

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Poll until `condition()`; ClusterError when the program ends before, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.name}: not {what} after {seconds:g} s; its log is {self.log}")
            time.sleep(_POLL_SECONDS)

    def terminate(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL after `seconds`."""
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.wait()
