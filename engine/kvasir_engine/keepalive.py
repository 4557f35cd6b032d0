"""Connections whose other end may fall silent: a machine without power or network closes nothing."""

import socket

IDLE_SECONDS = 2
PROBE_SECONDS = 1
SILENT_SECONDS = 5


def notice_silence(sock: socket.socket) -> None:
    """Let `sock` fail with ETIMEDOUT about SILENT_SECONDS after its peer's machine has last been heard.

    Kernels answer the probes, so a process that is busy or stopped is not taken for a lost machine. What a
    listening socket accepts inherits it. On systems other than Linux, what of it there is; nothing on a Unix
    socket, whose peer is on this machine.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {
        "TCP_KEEPIDLE": IDLE_SECONDS,
        "TCP_KEEPINTVL": PROBE_SECONDS,
        "TCP_KEEPCNT": (SILENT_SECONDS - IDLE_SECONDS) // PROBE_SECONDS,
        "TCP_USER_TIMEOUT": 1000 * SILENT_SECONDS,  # what was sent and is not acknowledged
    }.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
