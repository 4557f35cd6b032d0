"""A run in the background: `python -m kvasir_operator.local.detached`, started by `start`.

The supervisor reads its configuration from standard input, so that no Secret is on disk or in a command line, and
writes events to standard output until it is ready or has failed. Its own log is standard error.
"""

import asyncio
import os
import subprocess
import sys
from typing import IO

import msgspec

from kvasir_operator.local import events, state
from kvasir_operator.local.config import RunConfig
from kvasir_operator.local.supervisor import LocalSupervisor

COMMAND = (sys.executable, "-m", "kvasir_operator.local.detached")


def start(config: RunConfig, name: str, report: events.Report) -> int:
    """Start a supervisor in a session of its own and report its events until Ready or Failed; returns the exit
    status.

    Ctrl-C while waiting stops the run.
    """
    directory = state.root() / name
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = directory / "supervisor.log"
    with log.open("wb") as errors:
        child = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(config))
    child.stdin.close()
    while True:
        try:
            status = _follow(child.stdout, report)
            break
        except KeyboardInterrupt:
            child.terminate()
    if status is None:
        # Ended, or stopped by another command, before it was ready.
        code = child.wait()
        report(events.Failed(f"stopped before it was ready; the supervisor's log is {log}", code or 1))
        return code or 1
    if status:
        child.wait()
    return status


def _follow(lines: IO[bytes], report: events.Report) -> int | None:
    """Report events; returns the exit status of Ready or Failed, or `None` if the pipe ends before."""
    for line in lines:
        event = events.decode(line)
        report(event)
        match event:
            case events.Ready():
                return 0
            case events.Failed():
                return event.status
    return None


class _Pipe:
    """Writes events to standard output until the run is ready, has failed, or the reader is gone."""

    def __init__(self) -> None:
        self._open = True

    def __call__(self, event: events.Any) -> None:
        if self._open and not isinstance(event, events.Line):
            try:
                os.write(1, events.encode(event))
            except BrokenPipeError:
                self._close()
            if isinstance(event, events.Ready | events.Failed):
                self._close()
        if isinstance(event, events.Failed):
            sys.stderr.write(f"kvasir: error: {event.reason}\n")

    def _close(self) -> None:
        self._open = False
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def main() -> int:
    """Entry point of the supervisor's process."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=RunConfig)

    async def run() -> int:
        return await LocalSupervisor(config, _Pipe()).run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
