"""A folder in which files exist whole or not at all, after a crash too; used by one process at a time."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvasir_engine.errors import UserError

BATCH_HELP = (
    "where /v1/files and /v1/batches keep things: a folder of this process's own, or s3://bucket/prefix, which "
    "processes may share; default: there are none"
)
PARTIAL = ".partial-"


@dataclass(frozen=True)
class BatchLimits:
    """Limits of one server. Bytes and counts of files are for each tenant; `lines`: of one batch; `concurrency`:
    requests of all batches in flight at once; `running`: batches at once.
    """

    file_bytes: int = 200 * 2**20
    tenant_bytes: int = 10 * 2**30
    files: int = 1000
    batches: int = 1000
    lines: int = 50_000
    uploads: int = 4
    concurrency: int = 16
    running: int = 8
    seconds: int = 24 * 3600


class BatchFolder:
    """The folder of --batch-dir, locked. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for each in (path, self.files, self.batches):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"batch-dir {path}: another process uses it") from error
        except OSError as error:
            raise UserError(f"batch-dir {path}: {error.strerror or error}") from error
        for folder in (self.files, self.batches):
            for left in folder.glob(f"{PARTIAL}*"):
                left.unlink()

    @property
    def files(self) -> Path:
        return self.path / "files"

    @property
    def batches(self) -> Path:
        return self.path / "batches"

    def close(self) -> None:
        """Unlock the folder for other processes."""
        os.close(self._lock)


def partial(folder: Path) -> Path:
    """The temporary name of a file that is being written; the next start removes it after a crash."""
    return folder / f"{PARTIAL}{secrets.token_hex(8)}"


def synced(path: Path) -> None:
    """Flush a file or folder to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes) -> None:
    """Replace the file's content atomically. Raises OSError."""
    new = partial(path.parent)
    new.write_bytes(data)
    move_whole(new, path)


def move_whole(new: Path, path: Path) -> None:
    """Move a written file to its place, durably."""
    synced(new)
    new.rename(path)
    synced(path.parent)


def lines_of(path: Path) -> Iterator[bytes]:
    """The complete lines of a file, without their line ends; none if there is no file."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]
    except FileNotFoundError:
        return


def drop_half_line(path: Path) -> None:
    """Truncate an incomplete last line, which a crash leaves."""
    if not path.exists():
        return
    whole = sum(len(line) + 1 for line in lines_of(path))
    if path.stat().st_size > whole:
        os.truncate(path, whole)
