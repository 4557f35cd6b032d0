"""Run a command in a network namespace, and with `--private` in mount, IPC and UTS namespaces of its own.

    enter.py --netns PATH [--parent PID]
             [--private [--hostname NAME] [--shm SIZE] [--bind SOURCE:TARGET]...] -- COMMAND...

A script, started with `python -I -S`, as it runs before every process of the cluster. It replaces itself by COMMAND, which
keeps its process id. With `--parent` the command dies with that process. Private means what a container sees
without an image of its own: /run and /dev/shm are new and empty, /sys shows the namespace's network, the machine's other
mounts stay. `--bind` makes TARGET (below a new mount) and mounts SOURCE there, read-only.
"""

import ctypes
import os
import signal
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET = 0x00020000, 0x04000000, 0x08000000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError for a failed call of the C library."""
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = [text.encode() for text in (source, target, kind)]
    check(libc.mount(*arguments, flags, data.encode()), f"mount {target}")


def private(hostname: str, binds: list[str], shm: str) -> None:
    """Namespaces and mounts of a container."""
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC), "unshare")
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    if hostname:
        check(libc.sethostname(hostname.encode(), len(hostname.encode())), "sethostname")
    cgroups = os.open("/sys/fs/cgroup", os.O_PATH) if os.path.isdir("/sys/fs/cgroup") else None
    mount("sysfs", "/sys", "sysfs", MS_RDONLY)
    if cgroups is not None:
        if os.path.isdir("/sys/fs/cgroup"):
            mount(f"/proc/self/fd/{cgroups}", "/sys/fs/cgroup", "", MS_BIND | MS_REC)
        os.close(cgroups)
    if os.path.isdir("/dev/shm"):
        mount("shm", "/dev/shm", "tmpfs", 0, f"mode=1777,size={shm}")
    sources = [(os.open(source, os.O_PATH), target) for source, _, target in (b.partition(":") for b in binds)]
    mount("run", os.path.realpath("/run"), "tmpfs", 0, "mode=755,size=16m")
    for fd, target in sources:
        os.makedirs(target, exist_ok=True)
        mount(f"/proc/self/fd/{fd}", target, "", MS_BIND)
        mount("none", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
        os.close(fd)


def main(argv: list[str]) -> None:
    """Parse, enter, execute."""
    netns = hostname = ""
    shm = "64m"  # a container's default
    parent = 0
    binds: list[str] = []
    alone = False
    while argv and (option := argv.pop(0)) != "--":
        if option == "--private":
            alone = True
        elif option == "--netns":
            netns = argv.pop(0)
        elif option == "--parent":
            parent = int(argv.pop(0))
        elif option == "--hostname":
            hostname = argv.pop(0)
        elif option == "--shm":
            shm = argv.pop(0)
        elif option == "--bind":
            binds.append(argv.pop(0))
        else:
            raise SystemExit(f"enter.py: unknown option {option}")
    if parent:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(137)
    fd = os.open(netns, os.O_RDONLY)
    check(libc.setns(fd, CLONE_NEWNET), f"setns {netns}")
    os.close(fd)
    if alone:
        private(hostname, binds, shm)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"kvasir: error: cannot run {argv[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main(sys.argv[1:])
