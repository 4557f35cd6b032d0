"""A process that speaks S3: moto's server, which stands in for an object store.

Started as a program it prints its port, and ends at the end of its standard input.
"""

import contextlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class ObjectServer:
    url: str

    def environment(self) -> dict[str, str]:
        """What a client of it has in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def bucket(self) -> str:
        """The address of a new bucket."""
        name = f"batches-{uuid.uuid4().hex}"
        httpx.put(f"{self.url}/{name}", timeout=60).raise_for_status()
        return f"s3://{name}/some/prefix"


@contextlib.contextmanager
def serving_objects() -> Iterator[ObjectServer]:
    words = [sys.executable, __file__]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            yield ObjectServer(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


def main() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
