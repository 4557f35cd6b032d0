"""A process for untrusted work, one question at a time, that can be killed without ending the server."""

import json
import os
import select
import subprocess
import sys
import time
from typing import Any

from kvasir_engine.api.template_process import HEADER


class ProcessEnded(Exception):
    """The process ended instead of answering. `code`: its exit status, or the signal that ended it, below 0."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"exit status {code}")
        self.code = code


class BoundedProcess:
    """A Python module that exchanges messages as template_process.py does. Any failure ends the process."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def exchange(self, message: Any, patience: float) -> Any:
        """The answer. Raises TimeoutError after `patience` seconds, and ProcessEnded; either ends the process."""
        assert self._process.stdin is not None
        data = json.dumps(message).encode()
        ends = time.monotonic() + patience
        try:
            os.set_blocking(self._process.stdin.fileno(), False)
            self._send(memoryview(HEADER.pack(len(data)) + data), ends)
            (length,) = HEADER.unpack(self._receive(HEADER.size, ends))
            return json.loads(self._receive(length, ends))
        except TimeoutError:
            self.end()
            raise
        except (OSError, EOFError):
            self.end()
            raise ProcessEnded(self._process.returncode) from None
        except BaseException:
            self.end()
            raise

    def kill(self) -> None:
        """Kill it. A thread that exchanges a message with it meanwhile gets ProcessEnded."""
        self._process.kill()

    def end(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.wait()
        for each in (self._process.stdin, self._process.stdout):
            if each is not None:
                each.close()

    def _send(self, data: memoryview, ends: float) -> None:
        assert self._process.stdin is not None
        fd = self._process.stdin.fileno()
        while data:
            _wait(ends, writing=fd)
            data = data[os.write(fd, data) :]

    def _receive(self, size: int, ends: float) -> bytes:
        assert self._process.stdout is not None
        fd, parts = self._process.stdout.fileno(), []
        while size:
            _wait(ends, reading=fd)
            part = os.read(fd, min(size, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _wait(ends: float, reading: int | None = None, writing: int | None = None) -> None:
    left = ends - time.monotonic()
    poll = select.poll()
    if reading is not None:
        poll.register(reading, select.POLLIN)
    if writing is not None:
        poll.register(writing, select.POLLOUT)
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError
