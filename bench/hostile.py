"""What hostile clients cost the others: the pace of 16 streams, /health and the server's memory, attack by attack.

    python -m bench.hostile [--streams 16] [--seconds 10] [--step-ms 20] [--only NAME]

The server is that of bench.frontend: the real tokenizer, HTTP server, limits and events, behind an engine that
gives each stream a token a step. First nobody attacks; each row after it has one attack beside the same streams.
`itl_ms` is the time between events of a stream, `rss_mib` the most that the server's process had in memory. Its
children's, which check grammars and render templates, is not in it.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.frontend import MODEL, WORDS

MIB = 1 << 20
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: b\r\ncontent-type: application/json\r\n"
Attack = Callable[[int], Awaitable[None]]


def posting(length: int) -> bytes:
    return (HEAD + f"content-length: {length}\r\n\r\n").encode()


def asking(**body: object) -> bytes:
    data = json.dumps({"model": "m", **body}).encode()
    return posting(len(data)) + data


async def repeated(count: int, once: Callable[[int], Awaitable[None]]) -> None:
    """`count` clients that each do it again and again, whatever the server says."""

    async def forever(place: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                await once(place)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(forever(place) for place in range(count)))


async def sent(port: int, *parts: bytes, pause: float = 0.0, read: bool = True) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        while read and await reader.read(65536):
            pass
        if not read:
            await asyncio.sleep(3600)
    finally:
        writer.close()


async def nobody(port: int) -> None:
    await asyncio.sleep(3600)


async def slow_bodies(port: int) -> None:
    parts = [posting(100_000), *[b" "] * 3600]
    await repeated(200, lambda _: sent(port, *parts, pause=1.0))


async def large_bodies(port: int) -> None:
    """64 MiB each: said to be so, and in chunks that do not say."""
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    said, unsaid = posting(64 * MIB), (HEAD + "transfer-encoding: chunked\r\n\r\n").encode()

    async def once(place: int) -> None:
        body = [b" " * 65536] * 1024 if place % 2 else [chunk] * 1024
        await sent(port, said if place % 2 else unsaid, *body)

    await repeated(8, once)


async def deep_json(port: int) -> None:
    body = b'{"model": "m", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    await repeated(8, lambda _: sent(port, posting(len(body)), body, b""))


async def idle_connections(port: int) -> None:
    await repeated(1000, lambda _: sent(port, b"GET /health HTTP/1.1\r\n"))


async def never_reading(port: int) -> None:
    body = asking(prompt="a", max_tokens=8000, stream=True, ignore_eos=True)
    await repeated(16, lambda _: sent(port, body, read=False))


async def long_prompts(port: int) -> None:
    """As many characters as the context might hold, and far more tokens than it does."""
    body = asking(prompt=" ".join(WORDS) * 8000, max_tokens=1)
    await repeated(16, lambda _: sent(port, body))


ATTACKS: dict[str, Attack] = {
    "nobody": nobody,
    "slow_bodies": slow_bodies,
    "large_bodies": large_bodies,
    "deep_json": deep_json,
    "idle_connections": idle_connections,
    "never_reading": never_reading,
    "long_prompts": long_prompts,
}


async def stream(port: int, gaps: list[float]) -> None:
    """One of the others: asks again when its answer has ended."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asking(prompt="The sky is", max_tokens=2000, stream=True, ignore_eos=True))
        last = 0.0
        try:
            while data := await reader.read(65536):
                now = time.perf_counter()
                if last and b"data: " in data:
                    gaps.append(now - last)
                last = now
        finally:
            writer.close()


async def probe(port: int, times: list[float]) -> None:
    while True:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        if b" 200 " not in answer[:20]:
            raise RuntimeError(f"/health said {answer[:200]!r}")
        times.append(time.perf_counter() - began)
        await asyncio.sleep(0.1)


def resident(pid: int) -> float:
    line = next(each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def memory(pid: int, most: list[float]) -> None:
    while True:
        most.append(resident(pid))
        await asyncio.sleep(0.05)


def share(values: list[float], part: float) -> float:
    """The value below which so great a part of them is, in milliseconds."""
    return round(1e3 * sorted(values)[min(len(values) - 1, int(len(values) * part))], 1)


async def row(name: str, port: int, pid: int, options: argparse.Namespace) -> dict[str, object]:
    gaps, health, rss = list[float](), list[float](), list[float]()
    command = [sys.executable, "-m", "bench.hostile", f"--attack={name}", f"--port={port}"]
    attacker = await asyncio.create_subprocess_exec(*command)
    tasks = [asyncio.create_task(stream(port, gaps)) for _ in range(options.streams)]
    tasks += [asyncio.create_task(probe(port, health)), asyncio.create_task(memory(pid, rss))]
    try:
        done, _ = await asyncio.wait(tasks, timeout=options.seconds, return_when=asyncio.FIRST_EXCEPTION)
        for each in done:
            each.result()
        if attacker.returncode is not None:
            raise RuntimeError(f"the attack {name} ended by itself")
    finally:
        attacker.kill()
        await attacker.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "attack": name,
        "events": len(gaps),
        "itl_ms_p50": share(gaps, 0.5),
        "itl_ms_p99": share(gaps, 0.99),
        "health_ms_p50": share(health, 0.5),
        "health_ms_max": share(health, 1.0),
        "rss_mib": round(max(rss)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--only", choices=ATTACKS)
    parser.add_argument("--attack", choices=ATTACKS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        asyncio.run(ATTACKS[options.attack](options.port))  # type: ignore[arg-type]
        return
    command = [sys.executable, "-m", "bench.frontend", "--serve", f"--step-ms={options.step_ms}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        print(json.dumps({"model": MODEL, "streams": options.streams, "step_ms": options.step_ms}), flush=True)
        for name in ["nobody", options.only] if options.only else ATTACKS:
            print(json.dumps(asyncio.run(row(name, port, process.pid, options))), flush=True)
        process.stdin.close()


if __name__ == "__main__":
    main()
