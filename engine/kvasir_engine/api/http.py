"""HTTP as uvicorn reads it, but for the answer to what is no HTTP: OpenAI's error body."""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvasir_engine.api.errors import ApiError


def refusal(message: str, status: int = 400) -> bytes:
    """The body for a request that cannot be read."""
    return ApiError(status, message).body


class HttpProtocol(H11Protocol):
    """One connection."""

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be read, such as one with a bad Content-Length, and close."""
        body = refusal(msg)
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
