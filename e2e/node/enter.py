"""Run a command in a network namespace: `enter.py --netns PATH [--parent PID] -- COMMAND...`.

A script, started with `python -I -S`. It replaces itself by COMMAND, which keeps its process id; with `--parent`
the command dies with that process.
"""

import ctypes
import os
import signal
import sys

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Parse, enter, execute."""
    split = argv.index("--")
    options = dict(zip(argv[:split:2], argv[1:split:2], strict=True))
    command = argv[split + 1 :]
    libc = ctypes.CDLL(None, use_errno=True)
    if "--parent" in options:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(options["--parent"]):
            os._exit(137)  # it died before the line above
    fd = os.open(options["--netns"], os.O_RDONLY)
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {options['--netns']}")
    os.close(fd)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"kvasir: error: cannot run {command[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main(sys.argv[1:])
