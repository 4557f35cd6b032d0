"""Where the ranks of a model meet: a file on one machine, rank 0's store over several, and the interface to it."""

import fcntl
import ipaddress
import logging
import os
import socket
import struct
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

log = logging.getLogger("model")

_SIOCGIFADDR = 0x8915


def open_store(size: int, timeout: timedelta) -> tuple[Store, int]:
    """Rank 0's store for `size` ranks on several machines, on all its addresses, and the free port that it took."""
    store = TCPStore("localhost", 0, size, is_master=True, timeout=timeout, wait_for_workers=False)
    return store, store.port


def connect(address: str, size: int, timeout: timedelta) -> Store:
    """The store at `address`, see `Ranks`. Raises RuntimeError when there is none."""
    url = urlsplit(address)
    if url.scheme == "file":
        store: Store = FileStore(url.path, size)
        store.set_timeout(timeout)
        return store
    assert url.hostname is not None
    assert url.port is not None
    return TCPStore(url.hostname, url.port, size, is_master=False, timeout=timeout, wait_for_workers=False)


def use_interface(address: str, nodes: int) -> None:
    """Have gloo and NCCL use the network interface that leads to `address`; what the environment says wins.

    Ranks on one machine use loopback: nobody outside should be able to connect. NCCL leaves that alone, as it moves
    nothing over sockets there.
    """
    interface = "lo" if nodes == 1 else interface_to(address)
    if interface is None:
        log.warning("no network interface is known to lead to %s: gloo and NCCL choose", address)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if nodes > 1:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # this one, not all that begin so
        log.info("ranks meet address=%s interface=%s", address, os.environ["GLOO_SOCKET_IFNAME"])


def interface_to(address: str) -> str | None:
    """The interface that leads to tcp://HOST:PORT, or has HOST itself; None when that cannot be told."""
    url = urlsplit(address)
    family, kind, protocol, _, place = socket.getaddrinfo(url.hostname, url.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)  # sends nothing: the kernel only chooses the address to send from
        return interface_of(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The interface that has this IP address, the first one of its family; None when there is none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.is_loopback:
        return "lo"
    if ip.version == 6:
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            packed, *_, name = line.split()
            if bytes.fromhex(packed) == ip.packed:
                return name
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            if answer[20:24] == ip.packed:
                return name
    return None
