"""What the API costs in processes of its own: `kvasir serve` with each number of --api-processes, in turn, twice.

    python -m bench.api_processes [--model URI] [--counts 0 1 2] [--requests 128] [--streams 64] [--tokens 64]

The server's processor time a 1,000 tokens, all its processes together, changes little with what else the machine
does; tokens a second change with it.
"""

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import httpx
from bench import machine, systems

STARTS = 3
PORT_TAKEN = "cannot listen on"
"""In the server's line where another process has its port."""


async def load(url: str, requests: int, streams: int, tokens: int) -> tuple[int, float]:
    """Events with text, and the seconds that all streams took."""
    limit, counted = asyncio.Semaphore(streams), 0
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:

        async def one(number: int) -> None:
            nonlocal counted
            asked = {"model": systems.NAME, "prompt": f"{number} is", "max_tokens": tokens, "stream": True}
            async with (
                limit,
                client.stream("POST", "/v1/completions", json={**asked, "ignore_eos": True}) as answer,
            ):
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    counted += line.startswith('data: {"id"')

        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(requests)))
        return counted, time.perf_counter() - began


def measured(count: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One server's figures. Raises systems.Failed, with the end of the server's log.

    A free port may be taken before the server has it: that it ended by this is no result, and it is started again.
    """
    for left in reversed(range(STARTS)):
        try:
            return _measured(count, options, folder)
        except systems.Failed as failed:
            if not left or PORT_TAKEN not in str(failed):
                raise
    raise AssertionError


def _measured(count: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-c", "from kvasir_engine.entrypoints.main import main; main()", "serve"]
    command += [options.model, "--served-model-name", systems.NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-cache-memory", "1Gi", "--max-running", str(options.streams), "--api-processes", str(count)]
    server = systems.Server("kvasir", systems.Launch(command, port, "/ready", dict(os.environ)), folder / "log")
    try:
        server.wait_ready()
        asyncio.run(load(server.url, options.streams, options.streams, 4))
        before = machine.Clock.now(server.pid)
        events, wall = asyncio.run(load(server.url, options.requests, options.streams, options.tokens))
        used = machine.Clock.now(server.pid).ours - before.ours
        tokens = options.requests * options.tokens
    except httpx.HTTPError as error:
        said = f"{type(error).__name__}: {error}"
        state = "runs" if server.ended is None else f"ended with status {server.ended}"
        raise systems.Failed(f"the load failed: {said}; the server {state}{server.log_end()}") from error
    finally:
        server.stop()
    return {
        "api_processes": count,
        "cpu_ms_a_1000_tokens": round(1e6 * used / tokens, 1),
        "tokens_per_second": round(tokens / wall, 1),
        "events": events,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=systems.MODEL)
    parser.add_argument("--counts", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    print(machine.describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.counts * 2:
            try:
                print(json.dumps(measured(count, options, Path(folder))), flush=True)
            except systems.Failed as failed:
                sys.exit(f"bench.api_processes, --api-processes {count}: {failed}")


if __name__ == "__main__":
    main()
