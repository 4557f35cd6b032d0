"""Run a command as a container would be run, without an image: `sandbox.py SPEC.json -- COMMAND...`.

A script, started with `python -I -S`. It hands signals on to COMMAND and ends as COMMAND ends. SPEC.json:

    netns         path of the pod's network namespace hostname      the pod's name stage         an empty directory
    that may be mounted on read_only     readOnlyRootFilesystem host_ipc      whether IPC and /dev/shm stay the
    machine's mounts        [source, target, read_only] of each volume tmpfs         [target, size] of each emptyDir
    in memory; size may be "" image         paths that the command itself needs; where a volume hides them (a
    checkout below /tmp) they are put back capabilities  numbers of the capabilities to keep, or null for all cwd
    working directory

The root file system is the machine's own, seen through an overlay: nothing that the command writes outside its
volumes reaches the machine, and with `read_only` it cannot write at all. Volumes are at their mount paths. /run is
new and empty, /sys shows the pod's network. COMMAND is process 1 of a namespace of its own, as in a container: it
sees no other pod's processes, and a signal that it does not handle does nothing. The user is the machine's.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 23, 24, 38
# Mounted anew, not carried over.
OWN = ("/proc", "/run", "/sys")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError for a failed call of the C library."""
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    check(
        libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount {source} {target}",
    )


def bind(fd: int, target: str, read_only: bool) -> None:
    """Mount what `fd` refers to, with what is mounted below it."""
    mount(f"/proc/self/fd/{fd}", target, "", MS_BIND | MS_REC)
    if read_only:
        mount("none", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
    os.close(fd)


def place(root: str, target: str, directory: bool) -> None:
    """Make sure there is something to mount on."""
    path = root + target
    if directory:
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


def mounted_on_root() -> list[str]:
    """Mount points directly below the root mount."""
    with open("/proc/self/mountinfo") as file:
        rows = [line.split(" ") for line in file]
    (root, *_) = [row[0] for row in reversed(rows) if row[4] == "/"]
    points = [row[4].encode().decode("unicode_escape") for row in rows if row[1] == root and row[4] != "/"]
    return list(dict.fromkeys(points))


def overlay(spec: dict[str, Any], targets: list[tuple[str, bool]]) -> str:
    """Mount the machine's root, with mount points for `targets`, below the stage; where."""
    stage = spec["stage"]
    submounts = [point for point in mounted_on_root() if point not in OWN]
    carried = [(point, os.open(point, os.O_PATH), os.path.isdir(point)) for point in submounts]
    mount("stage", stage, "tmpfs", 0, "mode=755")
    for name in ("layer", "work", "root"):
        os.mkdir(f"{stage}/{name}")
    for target, directory in targets:
        if not target.startswith(OWN):
            place(f"{stage}/layer", target, directory)
    os.chdir(stage)
    if spec["read_only"]:
        mount("root", "root", "overlay", MS_RDONLY, "lowerdir=layer:/")
    else:
        mount("root", "root", "overlay", 0, "lowerdir=/,upperdir=layer,workdir=work")
    root = f"{stage}/root"
    for point, fd, _ in carried:
        bind(fd, root + point, spec["read_only"] and point != "/dev")
    return root


def isolate(spec: dict[str, Any]) -> None:
    """Namespaces. The next child is the first process of the new process namespace."""
    fd = os.open(spec["netns"], os.O_RDONLY)
    check(libc.setns(fd, CLONE_NEWNET), f"setns {spec['netns']}")
    os.close(fd)
    ipc = 0 if spec["host_ipc"] else CLONE_NEWIPC
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWPID | ipc), "unshare")


def enter(spec: dict[str, Any]) -> None:
    """Mounts, the new root and the pod's name."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    # From here on: a descriptor from before would belong to the machine's mount namespace, and not be mountable.
    cgroups = os.open("/sys/fs/cgroup", os.O_PATH) if os.path.isdir("/sys/fs/cgroup") else None
    name = spec["hostname"].encode()
    check(libc.sethostname(name, len(name)), "sethostname")
    sources = []
    for source, target, read_only in spec["mounts"]:
        # /var/run is a link to /run on most machines.
        sources.append((os.open(source, os.O_PATH), os.path.isdir(source), os.path.realpath(target), read_only))
    tmpfs = [(os.path.realpath(target), size) for target, size in spec["tmpfs"]]
    targets = [(target, directory) for _, directory, target, _ in sources] + [(target, True) for target, _ in tmpfs]
    hidden = tuple(target.rstrip("/") + "/" for target, _ in targets)
    image = [(path, os.open(path, os.O_PATH)) for path in spec["image"] if path.startswith(hidden)]
    root = overlay(spec, targets)
    mount("proc", f"{root}/proc", "proc")
    mount("run", f"{root}/run", "tmpfs", 0, "mode=755,size=16m")
    mount("sysfs", f"{root}/sys", "sysfs", MS_RDONLY)
    if cgroups is not None and os.path.isdir(f"{root}/sys/fs/cgroup"):
        bind(cgroups, f"{root}/sys/fs/cgroup", read_only=False)
    if not spec["host_ipc"] and os.path.isdir(f"{root}/dev/shm"):
        mount("shm", f"{root}/dev/shm", "tmpfs", 0, "mode=1777,size=64m")  # a container's default
    for target, size in tmpfs:
        mount("tmpfs", root + target, "tmpfs", 0, f"mode=1777,size={size}" if size else "mode=1777")
    for fd, directory, target, read_only in sources:
        if target.startswith(OWN):
            place(root, target, directory)
        bind(fd, root + target, read_only)
    for path, fd in image:
        place(root, path, directory=True)
        bind(fd, root + path, read_only=True)
    os.chroot(root)
    os.chdir(spec["cwd"])


def drop(keep: list[int]) -> None:
    """Leave only these capabilities to what is executed, and no way to get more."""
    capability = 0
    while libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if capability not in keep:
            check(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), f"drop capability {capability}")
        capability += 1
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def start(spec: dict[str, Any], command: list[str]) -> None:
    """In the child: become the command."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    enter(spec)
    if spec["capabilities"] is not None:
        drop(spec["capabilities"])
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"kvasir: error: cannot run {command[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def main(argv: list[str]) -> int:
    """Read the spec, start the command, hand on signals, and return how it ended."""
    with open(argv[0]) as file:
        spec = json.load(file)
    isolate(spec)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    child = os.fork()
    if child == 0:
        start(spec, argv[2:])
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
