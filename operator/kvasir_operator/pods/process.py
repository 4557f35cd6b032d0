"""A container's process. The shim starts it, and kills all that it leaves behind."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from kvasir_operator.pods.environment import Launch
from kvasir_operator.pods.logs import LINE_BYTES

_SHIM = (sys.executable, "-I", "-S", str(Path(__file__).with_name("shim.py")))
_SHIM_SECONDS = 5.0


class Process:
    """A running command with all its child processes. `start` creates it; it has ended when `wait` returns."""

    def __init__(self, shim: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self.pid: int | None = None
        self._shim = shim
        self._on_line = on_line
        self._end = asyncio.ensure_future(self._follow())
        self._kill: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, launch: Launch, on_line: Callable[[str], None]) -> "Process":
        """Start the command; returns when its process id is known. `on_line` gets each line of output and errors.

        Raises OSError if the shim itself cannot start, for example without the working directory.
        """
        shim = await asyncio.create_subprocess_exec(
            *_SHIM,
            *launch.argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(launch.env),
            cwd=launch.cwd,
            start_new_session=True,
            limit=LINE_BYTES,
        )
        try:
            assert shim.stdout is not None
            first = await shim.stdout.readline()
        except asyncio.CancelledError:
            shim.kill()
            await _gone(shim)
            raise
        process = cls(shim, on_line)
        if first.strip().isdigit():
            process.pid = int(first)
        return process

    async def _follow(self) -> int:
        assert self._shim.stdout is not None
        rest = b""
        while data := await self._shim.stdout.read(LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._on_line(line.decode(errors="replace").rstrip("\r"))
            if len(rest) >= LINE_BYTES:
                self._on_line(rest.decode(errors="replace"))
                rest = b""
        if rest:
            self._on_line(rest.decode(errors="replace"))
        code = await _gone(self._shim)
        if self._kill is not None:
            self._kill.cancel()
        if code < 0:
            # The shim itself was killed; its command has a PDEATHSIG, what that started may not.
            self._kill_group()
            return 128 - code
        return code

    async def wait(self) -> int:
        """Wait until the command and all its child processes are gone; returns the exit code, 128 + N for
        signal N."""
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        """Send SIGTERM to the command, and not to its child processes, as in a container."""
        with contextlib.suppress(ProcessLookupError):
            self._shim.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the command and all its child processes."""
        if self._shim.stdin is not None:
            self._shim.stdin.close()
        if self._kill is None and not self._end.done():
            self._kill = asyncio.get_running_loop().call_later(_SHIM_SECONDS, self._kill_shim)

    def _kill_shim(self) -> None:
        # Only a stopped shim comes here: it could not act on its closed lifeline.
        with contextlib.suppress(ProcessLookupError):
            self._shim.kill()
        self._kill_group()

    def _kill_group(self) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


async def _gone(shim: asyncio.subprocess.Process) -> int:
    """The exit code, once the event loop holds nothing of the process any more."""
    code = await shim.wait()
    if shim.stdin is not None:
        shim.stdin.close()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await shim.stdin.wait_closed()
    return code
