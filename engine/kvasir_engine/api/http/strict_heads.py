"""Refuses request heads that a proxy before this server may parse differently.

RFC 9112 allows, and h11 accepts, lines that end in LF alone, folded header lines, and `Transfer-Encoding` together
with `Content-Length`. Each lets two parsers see two different requests (request smuggling). h11 also limits only
heads that are incomplete when it looks at them.
"""

import h11

from kvasir_engine.api.http.limits import HttpLimits

_END = b"\r\n\r\n"
TOO_LARGE = 431


def refusal(data: bytes, limits: HttpLimits) -> tuple[int, str] | None:
    """The status and reason to refuse the request at the beginning of `data`, or `None`.

    `data` may end within the head: what is known by then is checked.
    """
    end = data.find(_END)
    head = data if end < 0 else data[: end + 2]
    if len(head) > limits.head_bytes:
        return TOO_LARGE, f"the request's head is larger than {limits.head_bytes} bytes"
    if head.count(b"\n") != head.count(b"\r\n"):
        return 400, "a line of the request's head ends in a bare LF"
    if b"\r" in head.replace(b"\r\n", b"").removesuffix(b"\r"):
        return 400, "a bare CR in the request's head"
    if b"\r\n " in head or b"\r\n\t" in head:
        return 400, "a folded header line (obs-fold)"
    lines = head.split(b"\r\n")
    if max(map(len, lines)) > limits.line_bytes:
        return TOO_LARGE, f"a line of the request's head is longer than {limits.line_bytes} bytes"
    if len(lines) - 2 > limits.headers:
        return TOO_LARGE, f"the request has more than {limits.headers} headers"
    if end >= 0:
        names = [line.partition(b":")[0].strip().lower() for line in lines[1:]]
        if b"transfer-encoding" in names and b"content-length" in names:
            return 400, "Transfer-Encoding beside Content-Length"
        if names.count(b"transfer-encoding") > 1 or names.count(b"content-length") > 1:
            return 400, "more than one header says how long the body is"
    return None


class StrictConnection(h11.Connection):
    """h11's server side, with a check of each head before it is parsed."""

    def __init__(self, limits: HttpLimits) -> None:
        super().__init__(h11.SERVER, limits.head_bytes)
        self._limits = limits

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """See h11. Raises h11.RemoteProtocolError."""
        if self.their_state is h11.IDLE:
            data = self.trailing_data[0]
            refused = refusal(data, self._limits) if data else None
            if refused is not None:
                raise h11.RemoteProtocolError(refused[1], error_status_hint=refused[0])
        event = super().next_event()
        if isinstance(event, h11.EndOfMessage) and list(event.headers):
            raise h11.RemoteProtocolError("trailers after the body are not taken")
        return event
