"""The state of local runs on disk: who runs, what its pods are, and that each name runs once.

`ROOT/NAME/state.json` is written whole or not at all, by the run's supervisor only. The supervisor holds a lock on
`ROOT/NAME/lock` for its life; the kernel frees it however the supervisor ends, and readers tell a dead
supervisor's state by its process id and start time.
"""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

import msgspec

from kvasir_operator.local.errors import LocalError


class LocalPodState(msgspec.Struct, frozen=True):
    """One pod of a run. `state` is a word for people; `message` says why it is not ready, or why it last ended.

    `group`: its leader's name, where it is one of several pods of a worker.
    """

    name: str
    role: str
    address: str
    url: str
    log: str
    pid: int | None = None
    ready: bool = False
    restarts: int = 0
    state: str = "pending"
    message: str = ""
    group: str = ""


class RunState(msgspec.Struct, frozen=True):
    """One run. `supervisor` is its process id, `started` when that process began (clock ticks since boot)."""

    name: str
    url: str
    ready: bool
    supervisor: int
    started: int | None
    model: str = ""
    pods: list[LocalPodState] = []


def root() -> Path:
    """`$KVASIR_STATE`, by default `~/.local/state/kvasir`."""
    return Path(os.environ.get("KVASIR_STATE") or Path.home() / ".local" / "state" / "kvasir").absolute()


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; `None` if it has ended or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        # A zombie has ended, though whoever started it has not asked yet.
        return None if fields[0] == b"Z" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def alive(run: RunState) -> bool:
    """Whether the run's supervisor still runs, and is the process that it was."""
    try:
        os.kill(run.supervisor, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return run.started is None or start_time(run.supervisor) == run.started


class Directory:
    """A run's directory, held by its supervisor. Raises LocalError when the name runs already."""

    def __init__(self, name: str, at: Path | None = None) -> None:
        self.path = (at or root()) / name
        self.name = name
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock: IO[str] = open(self.path / "lock", "a")  # noqa: SIM115
        except OSError as error:
            raise LocalError(f"the state directory {self.path} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise already_running(name) from None
        # What an earlier run left: its logs are for reading until the next run begins.
        shutil.rmtree(self.path / "pods", ignore_errors=True)
        self._remove_state()

    def pod(self, name: str) -> Path:
        """The directory of one pod."""
        return self.path / "pods" / name

    def write(self, run: RunState) -> None:
        """Replace the state."""
        partial = self.path / "state.json.partial"
        partial.write_bytes(msgspec.json.encode(run))
        partial.replace(self.path / "state.json")

    def close(self) -> None:
        """The run is over. Logs stay; volumes and state go."""
        for volumes in (self.path / "pods").glob("*/volumes"):
            shutil.rmtree(volumes, ignore_errors=True)
        self._remove_state()
        self._lock.close()

    def _remove_state(self) -> None:
        (self.path / "state.json").unlink(missing_ok=True)


def already_running(name: str) -> LocalError:
    """The error of a second `up` under one name."""
    return LocalError(f"{name} is running already: `kvasir status` shows it, `kvasir down --name {name}` stops it")


def load(name: str, at: Path | None = None) -> RunState | None:
    """A running run's state. A dead supervisor's state is removed: its pods ended with it."""
    file = (at or root()) / name / "state.json"
    try:
        run = msgspec.json.decode(file.read_bytes(), type=RunState)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.DecodeError:
        run = None
    if run is not None and alive(run):
        return run
    with contextlib.suppress(OSError):
        file.unlink()
    return None


def running(at: Path | None = None) -> list[RunState]:
    """All running runs, by name."""
    where = at or root()
    names = sorted(p.name for p in where.iterdir() if p.is_dir()) if where.is_dir() else []
    return [run for name in names if (run := load(name, where)) is not None]


def find(name: str | None) -> RunState:
    """The run of that name, or the only one. Raises LocalError (status 1) when that is none or not one."""
    if name is not None:
        if (run := load(name)) is not None:
            return run
        raise LocalError(f"{name} is not running", status=1)
    runs = running()
    if not runs:
        raise LocalError("nothing is running; `kvasir up -f FILE` starts an InferenceService", status=1)
    if len(runs) > 1:
        raise LocalError(f"{', '.join(r.name for r in runs)} are running: choose one with --name")
    return runs[0]
