"""The first process of a container: it kills all child processes at the end, as a PID namespace would.

Run as a script (`python -I -S shim.py COMMAND...`), it starts COMMAND in a session of its own and ends as COMMAND
ends (128 + the signal's number when a signal ended it). Before that, and also when its standard input is closed, it
kills all child processes that COMMAND left behind. The supervisor holds the other end of standard input: the kernel
closes it however the supervisor dies, so nothing outlives it. (PR_SET_PDEATHSIG alone is not enough: it does not
reach grandchildren, and fires when the parent's forking thread ends.) COMMAND itself has a PDEATHSIG in case this
process is killed.

The first line on standard output is COMMAND's process id; what follows is COMMAND's output. The imports are few, as
a shim runs for each container.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LINUX = sys.platform == "linux"


def _prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _descendants(root: int) -> list[int]:
    """All living descendants of `root`; also orphans, since `root` is their subreaper."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if fields and fields[0] != b"Z":
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _kill_all(group: int) -> None:
    """Send SIGKILL to the command's process group and all descendants until none is left."""
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        for pid in _descendants(os.getpid()) if LINUX else []:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _exec(command: list[str], parent: int) -> None:
    os.setsid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(137)
    for number in (*FORWARDED, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.write(1, b"%d\n" % os.getpid())
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"kvasir: error: cannot run {command[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _reap(child: int) -> int | None:
    """Wait for the child's end, and reap other descendants meanwhile; returns the child's exit code."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                result = os.waitstatus_to_exitcode(status)
                code = result if result >= 0 else 128 - result
    return code


def main() -> int:
    """Run the command that the command line names (see the module)."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    # Blocked until parent and child have their own handlers: a SIGTERM in between must reach the command.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*FORWARDED, signal.SIGCHLD))
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _exec(sys.argv[1:], parent)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for handled in (*FORWARDED, signal.SIGCHLD):
        signal.signal(handled, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*FORWARDED, signal.SIGCHLD))
    code: int | None = None
    while code is None:
        readable, _, _ = select.select([0, wake_read], [], [])
        if wake_read in readable:
            for number in os.read(wake_read, 512):
                if number != signal.SIGCHLD:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, number)
            code = _reap(child)
        elif not os.read(0, 512):
            code = 137
    _kill_all(child)
    return code


if __name__ == "__main__":
    sys.exit(main())
