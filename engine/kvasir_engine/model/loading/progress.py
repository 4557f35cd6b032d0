"""A fetch's progress over HTTP: `GET /progress` gives `{"stage", "done", "total"}`."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kvasir_engine.errors import UserError
from kvasir_engine.supervisor import ExpectedEnd, end_process, start_thread


class ProgressServer:
    """Serves the latest `report`; a context manager. Raises UserError when the port is taken."""

    def __init__(self, host: str, port: int) -> None:
        self._body = json.dumps({"stage": "", "done": 0, "total": 0}).encode()
        server = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0  # of a connection that says nothing

            def do_GET(self) -> None:
                body = server._body if self.path == "/progress" else b""
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing: the operator polls every few seconds."""

        try:
            self._http = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._http.server_address[1])

    def report(self, stage: str, done: int, total: int) -> None:
        """Set the progress: bytes or files, `total` 0 while unknown."""
        self._body = json.dumps({"stage": stage, "done": done, "total": total}).encode()

    def __enter__(self) -> "ProgressServer":
        start_thread(self._serve, "progress", end_process)
        return self

    def _serve(self) -> None:
        self._http.serve_forever()
        raise ExpectedEnd

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
