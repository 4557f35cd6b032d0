"""Becomes the first process of a container of a built image: `enter_image.py SPEC.json FD`, as root.

SPEC.json: `overlay` (the mount's options), `root` (an empty folder), `user`, `environment`, `directory`, `volumes`
([source, target] of what may be written), `net` (another container's network namespace, or ""), `argv`. On FD it
says the process's number; FD is closed when the command is being executed, and says before what went wrong.

As a kubelet asks for with a restricted pod: a user that is not root, no capabilities, none to be got, a root file
system that cannot be written. /tmp is the pod's emptyDir, /dev/shm its memory.
"""

import fcntl
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "e2e/node"))
import sandbox

_DEVICES = ("null", "zero", "full", "random", "urandom")
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_SPACES = sandbox.CLONE_NEWNS | sandbox.CLONE_NEWUTS | sandbox.CLONE_NEWPID | sandbox.CLONE_NEWIPC


def loopback_up() -> None:
    """127.0.0.1, and nothing else, in a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, asked))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def enter(spec: dict[str, Any]) -> None:
    """Mounts and the new root."""
    root = spec["root"]
    sandbox.mount("none", "/", "", sandbox.MS_REC | sandbox.MS_PRIVATE)
    sandbox.mount("image", root, "overlay", sandbox.MS_RDONLY, spec["overlay"])
    sandbox.mount("proc", f"{root}/proc", "proc")
    sandbox.mount("sysfs", f"{root}/sys", "sysfs", sandbox.MS_RDONLY)
    sandbox.mount("dev", f"{root}/dev", "tmpfs", 0, "mode=755,size=64k")
    for name in _DEVICES:
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o600))
        sandbox.mount(f"/dev/{name}", f"{root}/dev/{name}", "", sandbox.MS_BIND)
    for name, target in (("fd", "/proc/self/fd"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):
        os.symlink(target, f"{root}/dev/{name}")
    os.mkdir(f"{root}/dev/shm")
    sandbox.mount("shm", f"{root}/dev/shm", "tmpfs", 0, "mode=1777,size=512m")
    sandbox.mount("dev", f"{root}/dev", "", sandbox.MS_REMOUNT | sandbox.MS_BIND | sandbox.MS_RDONLY)
    sandbox.mount("tmp", f"{root}/tmp", "tmpfs", 0, "mode=777")
    for source, target in spec["volumes"]:
        sandbox.mount(source, root + target, "", sandbox.MS_BIND)
    os.chroot(root)
    os.chdir(spec["directory"])


def become(spec: dict[str, Any]) -> None:
    """Give up what root has, and execute."""
    sandbox.drop([])
    user, group = map(int, spec["user"].split(":"))
    os.setgroups([group])
    os.setgid(group)
    os.setuid(user)
    sandbox.libc.prctl(sandbox.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.umask(0o022)
    os.execvpe(spec["argv"][0], spec["argv"], spec["environment"])


def main(path: str, fd: int) -> int:
    """Start the command, say its number, and end as it ends."""
    spec = json.loads(Path(path).read_text())
    if spec["net"]:
        net = os.open(spec["net"], os.O_RDONLY)
        sandbox.check(sandbox.libc.setns(net, sandbox.CLONE_NEWNET), f"setns {spec['net']}")
        os.close(net)
    else:
        sandbox.check(sandbox.libc.unshare(sandbox.CLONE_NEWNET), "unshare the network")
        loopback_up()
    sandbox.check(sandbox.libc.unshare(_SPACES), "unshare")
    os.set_inheritable(fd, False)
    child = os.fork()
    if child == 0:
        try:
            enter(spec)
            become(spec)
        except BaseException as error:
            os.write(fd, f"failed: {error}\n".encode())
            os._exit(125)
    os.write(fd, f"{child}\n".encode())
    os.close(fd)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
