"""Network namespaces of a test run: named after the process that owns them, so that a dead run's can be told apart.

    host namespace       the test process; no link into the cluster, only sockets (`forward.py`)
    OWNER.N              one cluster: `br0` 10.244.0.1/16, control plane, node agent, Service addresses on `lo`
    OWNER.N.pod-NODE-K   one pod: `eth0` 10.244.NODE.M/16, a veth pair into `br0`, default route to the bridge

No namespace has a way out: what is not in 10.244.0.0/16 or a Service is answered with "network unreachable".
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

DIRECTORY = Path("/run/netns")
ENTER = Path(__file__).resolve().parent / "node" / "enter.py"
GATEWAY = "10.244.0.1"
PREFIX_LENGTH = 16
_NAME = re.compile(r"^kvasir-e2e-(\d+)-(\d+)\.")
_CLONE_NEWNET = 0x40000000


class NetworkError(Exception):
    """A namespace or link could not be made."""


def _start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; `None` when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except OSError:
        return None


def owner() -> str:
    """This process's prefix of namespace names; unique even when process ids are used again."""
    return f"kvasir-e2e-{os.getpid()}-{_start_time(os.getpid())}"


def ip(*arguments: str, batch: Iterable[str] | None = None) -> str:
    """Run `ip` (with `batch`: one command a line). Raises NetworkError."""
    command = ["ip", *arguments, *(("-batch", "-") if batch is not None else ())]
    done = subprocess.run(
        command, input="\n".join(batch) if batch is not None else None, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NetworkError(f"`{' '.join(command)}`: {done.stderr.strip()}")
    return done.stdout


def unavailable() -> str | None:
    """Why no network namespaces can be made here, or `None` when they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command `ip` (package iproute2) is not installed"
    name = f"{owner()}.probe"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, batch=["link add br0 type bridge", "link add v0 type veth peer name v1"])
        finally:
            ip("netns", "delete", name)
    except NetworkError as error:
        return f"network namespaces cannot be made here: {error}"
    return None


def _mac(address: str) -> str:
    """The hardware address of an IPv4 address.

    Fixed ones, since what has been learned of them lives for half a minute: a bridge would otherwise take another
    with each port that comes or goes, and a pod's address would keep a former pod's.
    """
    return ":".join(["02", "00", *(f"{int(part):02x}" for part in address.split("."))])


def add_cluster(name: str) -> None:
    """Make a cluster's namespace with its bridge."""
    ip("netns", "add", name)
    ip(
        "-n",
        name,
        batch=[
            "link set lo up",
            f"link add br0 address {_mac(GATEWAY)} type bridge",
            f"addr add {GATEWAY}/{PREFIX_LENGTH} dev br0",
            "link set br0 up",
        ],
    )
    # With forwarding on and no route out, the kernel answers "unreachable" at once instead of dropping in silence.
    enable = "echo 1 > /proc/sys/net/ipv4/ip_forward"
    subprocess.run([*enter(name), "sh", "-c", enable], check=True)


def add_pod(cluster: str, name: str, link: str, address: str) -> None:
    """Make a pod's namespace with `eth0` at `address`, and `link` as the other end on the cluster's bridge."""
    ip("netns", "add", name)
    ip(
        "-n",
        cluster,
        batch=[
            f"link add {link} type veth peer name eth0 address {_mac(address)} netns {name}",
            f"link set {link} master br0 up",
        ],
    )
    ip(
        "-n",
        name,
        batch=[
            "link set lo up",
            f"addr add {address}/{PREFIX_LENGTH} dev eth0",
            "link set eth0 up",
            f"route add default via {GATEWAY}",
        ],
    )


def delete(name: str) -> None:
    """Kill what still runs in the namespace and remove it; not an error when it is gone.

    The kernel keeps a namespace as long as a socket in it waits to say goodbye, and with it the link: a dead pod
    would answer for half a minute at an address that is another's by then. So links are cut first.
    """
    if not (DIRECTORY / name).exists():
        return
    for pid in ip("netns", "pids", name).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    ip("-n", name, batch=[f"link delete {link}" for link in links(name, "type", "veth")])
    ip("netns", "delete", name)


def names(prefix: str) -> list[str]:
    """Existing namespaces whose name begins with `prefix`, pods before their cluster."""
    if not DIRECTORY.is_dir():
        return []
    return sorted((entry.name for entry in DIRECTORY.iterdir() if entry.name.startswith(prefix)), reverse=True)


def links(name: str, *which: str) -> list[str]:
    """The network devices in a namespace. `which`: as `ip link show` takes it."""
    shown = ip("-n", name, "-br", "link", "show", *which)
    return [line.split()[0].partition("@")[0] for line in shown.splitlines()]


def sweep() -> list[str]:
    """Remove the namespaces of runs whose owner is dead, and what still runs in them; their names."""
    swept = []
    for name in names("kvasir-e2e-"):
        match = _NAME.match(name)
        if match and _start_time(int(match.group(1))) != int(match.group(2)):
            delete(name)
            swept.append(name)
    return swept


def enter(name: str, *options: str) -> list[str]:
    """A command's prefix that runs it in the namespace (`node/enter.py`)."""
    return [sys.executable, "-I", "-S", str(ENTER), "--netns", str(DIRECTORY / name), *options, "--"]


def enter_thread(name: str) -> None:
    """Move the calling thread, and nothing else, into the namespace: the sockets it makes belong there."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(DIRECTORY / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"setns {name}: {os.strerror(error)}")
    finally:
        os.close(fd)


def command(name: str, argv: Sequence[str]) -> list[str]:
    """`argv` in the namespace, dying with this process."""
    return [*enter(name, "--parent", str(os.getpid())), *argv]
