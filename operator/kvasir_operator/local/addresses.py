"""Gives each pod a loopback address of its own, so that all pods can listen on the ports of their manifests.

Linux answers on all of 127.0.0.0/8, so each run takes a free /24 of 127.64.0.0/10. A guard socket on the last
address holds it for the life of the run. Where such addresses cannot be bound (macOS), pods share 127.0.0.1 and
get ports of their own instead.
"""

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from kvasir_operator.local.errors import LocalError

LOOPBACK = "127.0.0.1"
MOST_PODS = 250
_GUARD = 254
_TRIES = 256
_SUBNETS = 64 * 256


@dataclass(frozen=True)
class PodAddress:
    """The address at which a pod listens."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"{self.ip}:{self.port}"


class Reservation:
    """The addresses of one run. `close` frees them."""

    def __init__(self, addresses: list[PodAddress], guard: socket.socket | None) -> None:
        self.addresses = addresses
        self._guard = guard

    def close(self) -> None:
        """Free the addresses for other runs."""
        if self._guard is not None:
            self._guard.close()


def _bound(ip: str, port: int, shared: bool = True) -> socket.socket:
    sock = socket.socket()
    try:
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
    except OSError:
        sock.close()
        raise
    return sock


def _subnets() -> Iterator[str]:
    # Begin somewhere else in each process: two runs that start together seldom meet.
    first = os.getpid() * 31
    for number in range(first, first + _TRIES):
        place = number % _SUBNETS
        yield f"127.{64 + place // 256}.{place % 256}"


def reserve(count: int, port: int) -> Reservation:
    """`count` addresses on which `port` is free. Raises LocalError."""
    if count > MOST_PODS:
        raise LocalError(f"{count} pods are more than the {MOST_PODS} that run on one machine")
    for subnet in _subnets():
        addresses = [PodAddress(f"{subnet}.{host}", port) for host in range(1, count + 1)]
        try:
            # Without SO_REUSEADDR: two guards never share an address.
            guard = _bound(f"{subnet}.{_GUARD}", port, shared=False)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                break
            continue
        try:
            for address in addresses:
                _bound(address.ip, address.port).close()
        except OSError:
            guard.close()
            continue
        return Reservation(addresses, guard)
    return Reservation(_own_ports(count), None)


def _own_ports(count: int) -> list[PodAddress]:
    held = [_bound(LOOPBACK, 0) for _ in range(count)]
    try:
        return [PodAddress(LOOPBACK, sock.getsockname()[1]) for sock in held]
    finally:
        for sock in held:
            sock.close()


def free_port() -> int:
    """A port on which no process listens, at any address of this machine."""
    with _bound("", 0) as sock:
        port: int = sock.getsockname()[1]
        return port


def bind_endpoint(port: int) -> socket.socket:
    """Bind the endpoint's socket, which does not listen yet; port 0 takes any free port. Raises LocalError."""
    try:
        return _bound(LOOPBACK, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LocalError(f"port {port} of {LOOPBACK} is in use: choose another with --port") from None
        raise LocalError(f"port {port} of {LOOPBACK} cannot be opened: {error.strerror}") from None
    except OverflowError:
        raise LocalError(f"--port {port} is not between 0 and 65535") from None
