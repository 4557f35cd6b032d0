"""The part of the Hugging Face hub that downloads use, over one folder, on loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repo: str, revision: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The hub's URL, and the list that every request's path is added to."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            asked.append(self.path)
            path = self.path.split("?")[0]
            if path == f"/api/models/{repo}/revision/{revision}":
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                self._send(json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode(), body)
            elif path.startswith(f"/api/models/{repo}/tree/"):
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file)}
                    for file in folder.iterdir()
                ]
                self._send(json.dumps(tree).encode(), body)
            elif path.startswith(f"/{repo}/resolve/{COMMIT}/"):
                file = folder / path.rsplit("/", 1)[1]
                self._send(file.read_bytes(), body, {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT})
            elif path.startswith(f"/api/models/{repo}/revision/"):
                self._send(b'{"error": "Invalid rev id"}', body, {"X-Error-Code": "RevisionNotFound"}, 404)
            else:
                self._send(b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"}, 404)

        def _send(
            self, content: bytes, body: bool, headers: dict[str, str] | None = None, status: int = 200
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
