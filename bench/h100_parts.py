"""The parts of bench/h100.py, each a process: `python -m bench.h100_parts engine|eager|pair FOLDER OUT [--dry]`.

Engines are driven as their routers drive them, by frames, in this process or through pipes: no HTTP is measured.
"""

import json
import math
import multiprocessing
import queue
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench.h100 import DRY, H100, Load

from kvasir_engine.config import EngineConfig
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.entrypoints.build import build
from kvasir_engine.logs import log_to_stderr
from kvasir_engine.protocol import Delta, Endpoint, Leased, Reserve, Role, Sampling, Step, Submit, ToRouter

SHAPE = 0.9
"""Sigma of the lengths' lognormal distribution: ShareGPT's are about as skewed."""


def lengths(count: int, mean: int, longest: int, rng: random.Random) -> list[int]:
    """So many lengths, skewed as ShareGPT's; their mean is `mean`, as far as whole tokens and `longest` allow."""
    drawn = [math.exp(rng.gauss(0.0, SHAPE)) for _ in range(count)]
    scale = mean * count / sum(drawn)
    return [max(1, min(longest, round(each * scale))) for each in drawn]


@dataclass
class Stream:
    """What came of a request: when each token did."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish: str | None = None


class Client:
    """A session on an engine of this process."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self._frames: queue.SimpleQueue[tuple[float, list[ToRouter]]] = queue.SimpleQueue()
        self._session = thread.attach(lambda frames: self._frames.put((time.perf_counter(), frames)))
        self._count = 0

    def run(self, requests: list[tuple[list[int], int]]) -> tuple[list[Stream], float]:
        """Submit (prompt, output length) all at once; the streams, and the seconds until the last has ended."""
        streams: dict[str, Stream] = {}
        began = time.perf_counter()
        for prompt, count in requests:
            self._count += 1
            submit = Submit(str(self._count), prompt, Sampling(max_tokens=count))
            streams[submit.id] = Stream()
            self._thread.post(lambda engine, submit=submit: engine.submit(self._session, submit))  # type: ignore[misc]
        left, ended = len(requests), began
        while left:
            ended, frames = self._frames.get(timeout=120)
            for delta in (delta for frame in frames if isinstance(frame, Step) for delta in frame.deltas):
                left -= take(streams, delta, ended)
        return list(streams.values()), ended - began


def take(streams: dict[str, Stream], delta: Delta, now: float) -> bool:
    """A delta to its stream. Whether that has ended. Raises RuntimeError for a failure or a token out of place."""
    if delta.id not in streams:
        return False
    if delta.failure is not None:
        raise RuntimeError(f"request {delta.id} failed: {delta.failure.code}: {delta.failure.message}")
    stream = streams[delta.id]
    for index, token in enumerate(delta.tokens, delta.index):
        if index == len(stream.tokens):
            stream.tokens.append(token)
            stream.times.append(now)
        elif stream.tokens[index : index + 1] != [token]:
            raise RuntimeError(f"request {delta.id}: token {index} is another one the second time, or is missing")
    if delta.finish in ("stop", "length"):
        stream.finish = delta.finish
        return True
    return False


def prompt_of(length: int, load: Load, rng: random.Random) -> list[int]:
    """Random tokens: no two prompts share a page."""
    return rng.choices(range(load.config["vocab_size"]), k=length)


def options_of(
    folder: Path, load: Load, kv_cache_memory: int, eager: bool = False, role: Role = "both"
) -> EngineConfig:
    """The engine that is measured; `eager`: without CUDA graphs, as it is anyway on a CPU."""
    return EngineConfig(
        f"file://{folder}",
        role=role,
        dtype=load.dtype,
        device=load.device,
        max_length=load.max_length,
        max_running=load.max_running,
        prefill_chunk=load.prefill_chunk,
        kv_cache_memory=kv_cache_memory,
        enforce_eager=eager and load.device == "cuda",
    )


def decode_rates(client: Client, load: Load, rng: random.Random) -> dict[str, float]:
    """Tokens a second of one stream and of a batch, while all of it decodes."""
    rates = {}
    for name, count in (("single", 1), ("batch", load.batch)):
        streams, _ = client.run([(prompt_of(60, load, rng), load.single_output) for _ in range(count)])
        rates[f"{name}_tokens_per_second"] = decode_rate([stream.times for stream in streams])
    return rates


def decode_rate(times: list[list[float]]) -> float:
    """Tokens a second from when the last stream has its first token until the first has its last; NaN if never."""
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    count = sum(begin < time <= end for each in times for time in each)
    return count / (end - begin) if end > begin else math.nan


def eager(folder: Path, load: Load) -> dict[str, Any]:
    """What CUDA graphs are for, without them: decoding, whose kernels are launched one by one."""
    rng = random.Random(0)
    thread, _ = build(options_of(folder, load, load.kv_cache_memory, eager=True), False)
    client = Client(thread)
    client.run([(prompt_of(n, load, rng), 4) for n in (60, 1)])  # compiles
    rates = decode_rates(client, load, rng)
    thread.stop()
    return {**rates, "graph_steps": thread.engine.stats.replayed_steps}


def engine(folder: Path, load: Load) -> dict[str, Any]:
    """One colocated engine: throughput and idle share, one stream, long prompts."""
    rng = random.Random(0)
    began = time.perf_counter()
    thread, _ = build(options_of(folder, load, load.kv_cache_memory), False)
    client, stats = Client(thread), thread.engine.stats
    loaded = time.perf_counter() - began
    longest = load.max_length // 2
    client.run([(prompt_of(n, load, rng), 4) for n in (load.prefill_length, 7, 1, load.mean_input)])  # compiles
    warm = time.perf_counter() - began - loaded

    inputs, outputs = (lengths(load.requests, mean, longest, rng) for mean in (load.mean_input, load.mean_output))
    requests = [(prompt_of(n, load, rng), count) for n, count in zip(inputs, outputs, strict=True)]
    idle, steps, seconds = stats.idle_seconds, stats.steps, stats.step_seconds
    streams, wall = client.run(requests)
    assert [len(stream.tokens) for stream in streams] == outputs
    idle, steps, seconds = stats.idle_seconds - idle, stats.steps - steps, stats.step_seconds - seconds

    rates = decode_rates(client, load, rng)
    prompts = [(prompt_of(load.prefill_length, load, rng), 1) for _ in range(load.prefill_prompts)]
    _, prefill = client.run(prompts)
    thread.stop()
    first = [stream.times[0] for stream in streams]
    return {
        "attention": type(thread.engine.runner._attention).__name__,
        "overlap": thread.engine.overlap,
        "requests": load.requests,
        "input_tokens": sum(inputs),
        "output_tokens": sum(outputs),
        "output_tokens_per_second": sum(outputs) / wall,
        "throughput_seconds": wall,
        "steps": steps,
        "step_milliseconds": seconds / steps * 1e3,
        "idle_share": idle / wall,
        "first_tokens_within_seconds": max(first) - min(first),
        "graph_steps": stats.replayed_steps,
        "eager_steps": stats.eager_steps,
        **rates,
        "batch": load.batch,
        "prefill_tokens_per_second": load.prefill_prompts * load.prefill_length / prefill,
        "load_seconds": loaded,
        "warm_up_seconds": warm,
    }


def serve(pipe: Connection, folder: Path, load: Load, role: Any) -> None:
    """A worker's process: frames of the router come through `pipe`, and what it says goes back."""
    log_to_stderr()
    thread, handoff = build(options_of(folder, load, load.pair_kv_cache_memory, role=role), True)
    assert handoff is not None
    pipe.send(handoff.endpoint)
    session = thread.attach(pipe.send)
    while (frame := pipe.recv()) is not None:
        if isinstance(frame, Submit):
            thread.post(lambda engine, frame=frame: engine.submit(session, frame))  # type: ignore[misc]
        else:
            thread.post(lambda engine, frame=frame: engine.reserve(session, frame))  # type: ignore[misc]
    pipe.send(handoff.stats.received_bytes)
    thread.stop()
    handoff.stop()


def pair(folder: Path, load: Load) -> dict[str, Any]:
    """A prefill and a decode worker, two processes on one device, and the KV from one to the other over NIXL."""
    context, rng = multiprocessing.get_context("spawn"), random.Random(1)
    pipes: list[Connection] = []
    processes = []
    for role in ("prefill", "decode"):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, folder, load, role), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    prefill, decode = pipes
    writer, holder = prefill.recv(), decode.recv()
    assert isinstance(writer, Endpoint)
    assert isinstance(holder, Endpoint)
    warm = [(prompt_of(load.pair_input, load, rng), 2) for _ in range(2)]
    drive(prefill, decode, writer, holder, warm, "w")
    requests = [(prompt_of(load.pair_input, load, rng), load.pair_output) for _ in range(load.pair_requests)]
    streams, wall = drive(prefill, decode, writer, holder, requests, "r")
    alone, _ = drive(prefill, decode, writer, holder, [(prompt_of(load.pair_input, load, rng), 8)], "a")
    for pipe in pipes:
        pipe.send(None)
    moved = [received(pipe) for pipe in pipes]
    for process in processes:
        process.join(20)
    tokens = sum(count for _, count in requests)
    assert sum(len(stream.tokens) for stream in streams) == tokens
    times = alone[0].times
    return {
        "memory": writer.region.memory,
        "requests": len(requests),
        "prompt_tokens_per_second": load.pair_input * len(requests) / wall,
        "output_tokens_per_second_of_the_pair": tokens / wall,
        "gigabytes_moved": moved[1] / 1e9,
        "alone_second_token_after_first_milliseconds": (times[1] - times[0]) * 1e3,
        "alone_later_token_milliseconds": statistics.median(b - a for a, b in pairwise(times[1:])) * 1e3,
    }


def received(pipe: Connection) -> int:
    """The last thing that a worker says: bytes of KV that came to it."""
    while not isinstance(said := pipe.recv(), int):
        pass
    return said


def drive(
    prefill: Connection,
    decode: Connection,
    writer: Endpoint,
    holder: Endpoint,
    requests: list[tuple[list[int], int]],
    name: str,
) -> tuple[list[Stream], float]:
    """Play the router: a lease at decode, the prompt to prefill, tokens from both."""
    streams: dict[str, Stream] = {}
    submits: dict[str, Submit] = {}
    began = time.perf_counter()
    for i, (prompt, count) in enumerate(requests):
        key, sampling = f"{name}{i}", Sampling(max_tokens=count)
        streams[key] = Stream()
        submits[key] = Submit(key, prompt, sampling)
        decode.send(Reserve(key, prompt, sampling, writer))
    left = len(requests)
    while left:
        for pipe in wait([prefill, decode], timeout=60):
            assert isinstance(pipe, Connection)
            for frame in pipe.recv():
                if isinstance(frame, Leased):
                    asked = submits[frame.id]
                    to = None if frame.lease is None else holder
                    assert to is not None, "decode wants to compute the prompt itself"
                    prefill.send(Submit(asked.id, asked.tokens, asked.sampling, "", frame.lease, to))
                elif isinstance(frame, Step):
                    for delta in frame.deltas:
                        left -= take(streams, delta, time.perf_counter())
    return list(streams.values()), time.perf_counter() - began


PARTS = {"engine": engine, "eager": eager, "pair": pair}


def main() -> None:
    """Entry point: writes FIGURES to OUT/PART.json."""
    part, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    log_to_stderr()
    figures = PARTS[part](folder, DRY if "--dry" in sys.argv[4:] else H100)
    (out / f"{part}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
