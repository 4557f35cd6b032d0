"""Folders that are this user's alone: what lies in them is executed or obeyed, so nobody else may write there."""

import contextlib
import os
import socket
import stat
import tempfile
from pathlib import Path

from kvasir_engine.errors import UserError

RUN_VARIABLE = "KVASIR_RUN_DIR"


class NotPrivate(UserError):
    """A folder could be written by others; the message is one sentence for the user."""


def private_folder(path: Path) -> Path:
    """`path`, made with mode 0700 if it is not there. Raises NotPrivate, or OSError where it cannot be made.

    A symbolic link, another owner, or any right of others or of the group is refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    wrong = None
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is not a folder of its own"
    elif found.st_uid != os.geteuid():
        wrong = f"belongs to user {found.st_uid}, not to user {os.geteuid()}"
    elif found.st_mode & 0o077:
        wrong = f"has mode {stat.S_IMODE(found.st_mode):04o}, not 0700"
    if wrong:
        raise NotPrivate(f"{path} {wrong}: others could replace what this process trusts; remove it or mend it")
    return path


def run_folder() -> Path:
    """This user's folder for sockets and compiled code, on this machine or in this container: no shared volume.

    `$KVASIR_RUN_DIR`, or `kvasir-UID` in the folder for temporary files. Raises NotPrivate and OSError.
    """
    named = os.environ.get(RUN_VARIABLE)
    return private_folder(Path(named) if named else Path(tempfile.gettempdir()) / f"kvasir-{os.geteuid()}")


def drain_socket(host: str, port: int) -> Path:
    """Where the process that listens at `host` and `port` hears that it is to leave. Raises NotPrivate, OSError."""
    address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][4][0]
    return run_folder() / f"drain-{address}-{port}.sock"
