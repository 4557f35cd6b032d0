"""The state of local runs on disk: which runs there are, and their pods. A name runs only once.

Only the run's supervisor writes `ROOT/NAME/state.json`, atomically. It holds a lock on `ROOT/NAME/lock` while it
lives; the kernel frees the lock however the supervisor ends. Readers recognise a dead supervisor's state by the
process id and start time.
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
    """One pod of a run. `state` is one word for users; `message` says why it is not ready, or why it last ended.

    `group`: the name of its leader, if its worker has several pods.
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
    """One run. `supervisor` is the supervisor's process id, `started` that process's start (clock ticks since
    boot)."""

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
    """The start of a process in clock ticks since boot; `None` if it has ended or the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        # A zombie has ended, though whoever started it has not asked yet.
        return None if fields[0] == b"Z" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def alive(run: RunState) -> bool:
    """Whether the run's supervisor still runs; another process with its id does not count."""
    try:
        os.kill(run.supervisor, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return run.started is None or start_time(run.supervisor) == run.started


class Directory:
    """A run's directory, locked by its supervisor. Raises LocalError if a run of that name exists."""

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
        """The directory of a pod."""
        return self.path / "pods" / name

    def write(self, run: RunState) -> None:
        """Replace the state."""
        partial = self.path / "state.json.partial"
        partial.write_bytes(msgspec.json.encode(run))
        partial.replace(self.path / "state.json")

    def close(self) -> None:
        """Clean up after the run: remove volumes and state, keep logs."""
        for volumes in (self.path / "pods").glob("*/volumes"):
            shutil.rmtree(volumes, ignore_errors=True)
        self._remove_state()
        self._lock.close()

    def _remove_state(self) -> None:
        (self.path / "state.json").unlink(missing_ok=True)


def already_running(name: str) -> LocalError:
    """The error of a second `up` with the same name."""
    return LocalError(f"{name} is running already: `kvasir status` shows it, `kvasir down --name {name}` stops it")


def load(name: str, at: Path | None = None) -> RunState | None:
    """The state of a run. If its supervisor is dead, its pods are too, and the state is removed."""
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
    """All active runs, sorted by name."""
    where = at or root()
    names = sorted(p.name for p in where.iterdir() if p.is_dir()) if where.is_dir() else []
    return [run for name in names if (run := load(name, where)) is not None]


def find(name: str | None) -> RunState:
    """The run of that name, or the only run. Raises LocalError (status 1) if there is none, or more than one."""
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
