"""Stands for the engine's image: its commands with their flags, HTTP paths and exit statuses.

Steered by the environment of its pod: FAKE_FAIL exits with that error (of a group only at node FAKE_FAIL_NODE),
FAKE_UNREADY is never ready. A router is ready when all its workers are. `/slow` streams a line, waits until the
file that the query names exists, and streams another; SIGTERM lets such requests finish.
"""

import argparse
import json
import os
import signal
import ssl
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

READY = Path(os.environ.get("KVASIR_CACHE", ".")) / "unready"


def fail(message: str) -> None:
    print(f"kvasir: error: {message}", file=sys.stderr)
    sys.exit(2)


def fetch(uri: str) -> None:
    if "missing" in uri:
        fail(f"{uri} does not exist")
    for done in (0, 5, 10):
        print(json.dumps({"stage": "download", "done": done, "total": 10}), flush=True)
    (Path(os.environ["KVASIR_CACHE"]) / "fetched").write_text(uri)
    print(json.dumps({"heads": 9, "kv_heads": 3, "max_positions": 8192}))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5  # a probe given up before it asked may leave its connection, and the server waits for its thread
    workers: tuple[str, ...] = ()
    trust: ssl.SSLContext | None = None  # with which a router comes to its workers

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/slow":
            self.slow(Path(unquote(parts.query)))
        elif parts.path == "/ready":
            reason = self.unready()
            self.answer(503 if reason else 200, {"reason": reason})
        elif parts.path == "/env":
            self.answer(200, {"argv": sys.argv, "env": dict(os.environ), "pid": os.getpid()})
        else:
            self.answer(200, {"path": parts.path})

    def unready(self) -> str:
        if os.environ.get("FAKE_UNREADY"):
            return "told not to be"
        for worker in self.workers:
            try:
                urllib.request.urlopen(f"{worker}/ready", timeout=5, context=self.trust).close()
            except OSError as error:
                return f"{worker}: {error}"
        return ""

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def slow(self, until: Path) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"first\n")
        while not until.exists():
            time.sleep(0.02)
        self.wfile.write(b"second\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False


def trusting(folder: str, server: bool) -> ssl.SSLContext:
    """Both ends show a certificate of the folder's authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
    context.load_cert_chain(f"{folder}/tls.crt", f"{folder}/tls.key")
    context.load_verify_locations(f"{folder}/ca.crt")
    return context


def serve(options: argparse.Namespace) -> None:
    Handler.workers = tuple(options.worker)
    host = os.environ["KVASIR_HOST"]
    server = Server((host, int(os.environ.get("KVASIR_PORT", "8000"))), Handler)
    if options.tls_dir and options.command == "router":
        Handler.trust = trusting(options.tls_dir, server=False)
    elif options.tls_dir and options.node_rank in (None, "0"):
        spoken = Server((host, int(os.environ.get("KVASIR_WORKER_PORT", "8443"))), Handler)
        spoken.socket = trusting(options.tls_dir, server=True).wrap_socket(spoken.socket, server_side=True)
        threading.Thread(target=spoken.serve_forever, args=(0.05,), daemon=True).start()

    def terminate(*_: object) -> None:
        print("draining", flush=True)
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, terminate)
    print("serving", flush=True)
    server.serve_forever(poll_interval=0.05)
    server.server_close()


def main() -> None:
    if sys.argv[1] == "fetch":
        fetch(sys.argv[2])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["worker", "router", "drain"])
    parser.add_argument("--worker", action="append", default=[])
    parser.add_argument("--node-rank")
    parser.add_argument("--tls-dir")
    options, _ = parser.parse_known_args()
    if options.command == "drain":
        return  # SIGTERM alone lets requests finish
    if (message := os.environ.get("FAKE_FAIL")) and os.environ.get("FAKE_FAIL_NODE") in (None, options.node_rank):
        fail(message)
    serve(options)


if __name__ == "__main__":
    main()
