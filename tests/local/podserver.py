"""A small HTTP server as a container's program, steered through files in $CONTROL.

`/health` and `/ready` answer 200 unless the file `no-health` or `no-ready` is there; `/note/X` makes the file X.
It prints `listening` once it serves. With `--fail TEXT` it prints TEXT and exits with 2; with `--ignore-term` it
ignores SIGTERM; with `--child` it starts a grandchild in a session of its own and writes its pid to `child`.
Every request is printed as `GET PATH`, and its path a line of the file `asked`.
"""

import argparse
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTROL = Path(os.environ["CONTROL"])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        print("GET", self.path, flush=True)
        with (CONTROL / "asked").open("a") as file:  # before the answer; what is printed may be read after it
            print(self.path, file=file)
        if self.path.startswith("/note/"):
            (CONTROL / self.path.removeprefix("/note/")).touch()
        denied = (CONTROL / f"no-{self.path.strip('/')}").exists()
        self.send_response(503 if denied else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fail", default="")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.fail:
        print("about to fail")
        print(options.fail, file=sys.stderr)
        sys.exit(2)
    server = ThreadingHTTPServer((os.environ["POD_IP"], options.port), Handler)

    def terminate(*_: object) -> None:
        (CONTROL / "terminated").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_term else terminate)
    if options.child:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (CONTROL / "child").write_text(str(child.pid))
    print("listening", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
