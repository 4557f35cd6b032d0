"""Limits of one HTTP server for its clients: times, sizes and counts. Every wait is bounded."""

import resource
from dataclasses import dataclass, replace

PLENTY_OF_FILES = 65536


@dataclass(frozen=True)
class HttpLimits:
    """The defaults suit a server behind a proxy that opens many connections from few addresses."""

    connections: int = 4096
    per_address: int = 2048  # half: one address never has them all
    reserve: int = 64  # beyond the others: answers to probes only

    head_bytes: int = 16384
    line_bytes: int = 8192
    headers: int = 100

    settled_seconds: float = 1.0  # an idle connection that is younger makes room for nobody
    header_seconds: float = 10.0  # from a connection, or a request's first byte, to the head's last
    idle_seconds: float = 75.0  # between requests: longer than proxies keep a connection, so that they close first
    body_seconds: float = 20.0  # for a body, and more for what has come of it:
    write_seconds: float = 30.0  # to read what waits to be written, and more for its size:
    bytes_per_second: int = 65536
    leaving_seconds: float = 5.0  # what a body gets that is unfinished when a drain begins

    body_bytes: int = 512 * 2**20  # of all requests whose answers have not begun


def fitted(limits: HttpLimits) -> HttpLimits:
    """`limits` with no more connections than the process may have open files; raises the soft limit first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = PLENTY_OF_FILES if hard == resource.RLIM_INFINITY else min(hard, PLENTY_OF_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == resource.RLIM_INFINITY:
        return limits
    room = max(soft - 256, soft // 2)
    reserve = min(limits.reserve, max(1, room // 8))
    connections = min(limits.connections, max(1, room - reserve))
    return replace(
        limits, connections=connections, reserve=reserve, per_address=min(limits.per_address, connections)
    )
