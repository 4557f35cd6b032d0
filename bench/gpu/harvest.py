"""One engine on one GPU, Llama-3.1-8B's shape with random weights: where it stands, and where the time goes.

    python -m bench.gpu.harvest FOLDER OUT.json SECONDS [BUILD_OPTION=VALUE ...]

Run from the project's root with engine, operator and the root on PYTHONPATH; FOLDER is a model that
`bench.h100.make_model` made. Every part is written to OUT.json as it ends, so a limit costs only what is left. Frames
go to the engine in this process: no HTTP is measured (http_load.py does that). HARVEST_DRY=1 tries the script on a
CPU with a model made for `bench.h100.DRY`; its figures mean nothing.
"""

import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
import torch
from bench.h100 import DRY, H100
from bench.h100_parts import Client, Stream, decode_rate, lengths, options_of, prompt_of, take

from kvasir_engine.entrypoints.build import build
from kvasir_engine.protocol import Sampling, Step, Submit

FOLDER, OUT, SECONDS = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
IS_DRY = bool(os.environ.get("HARVEST_DRY"))
LOAD = DRY if IS_DRY else replace(H100, max_running=512)
RESULTS: dict[str, Any] = {}
RNG = random.Random(5)


def part(name: str, need: float, measure: Callable[[], dict[str, Any]]) -> None:
    left = SECONDS - (time.perf_counter() - BEGAN)
    began = time.perf_counter()
    if left < need:
        RESULTS[name] = {"skipped": f"{left:.0f} s left"}
    else:
        try:
            RESULTS[name] = measure()
        except Exception:
            RESULTS[name] = {"failed": traceback.format_exc()[-2500:]}
    RESULTS[name]["part_seconds"] = round(time.perf_counter() - began, 2)
    OUT.write_text(json.dumps(RESULTS, indent=1, default=str))
    print(name, json.dumps({k: v for k, v in RESULTS[name].items() if k != "top"}, default=str)[:1200], flush=True)
    print("\n".join(RESULTS[name].get("top", [])), flush=True)


class Requests(Client):
    """As Client, for any sampling, and to be looked at while it runs."""

    def send(self, requests: list[tuple[list[int], Sampling]]) -> None:
        self.streams: dict[str, Stream] = {}
        self.began, self.left = time.perf_counter(), len(requests)
        for prompt, sampling in requests:
            self._count += 1
            submit = Submit(str(self._count), prompt, sampling)
            self.streams[submit.id] = Stream()
            self._thread.post(lambda engine, submit=submit: engine.submit(self._session, submit))

    def drain(self, until: Callable[[], bool] = lambda: False) -> float:
        ended = self.began
        while self.left and not until():
            ended, frames = self._frames.get(timeout=60)
            for delta in (delta for frame in frames if isinstance(frame, Step) for delta in frame.deltas):
                self.left -= take(self.streams, delta, ended)
        return ended - self.began

    def go(self, requests: list[tuple[list[int], Sampling]]) -> tuple[list[Stream], float]:
        self.send(requests)
        wall = self.drain()
        return list(self.streams.values()), wall


def tokens(count: int) -> list[int]:
    return prompt_of(min(some(count), LOAD.max_length - 200), LOAD, RNG)


def some(count: int) -> int:
    """So many, or a few where the script is only tried."""
    return max(2, count // 64) if IS_DRY and count > 2 else count


def on_a_gpu(measure: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """A part that has nothing to measure elsewhere."""
    return (lambda: {"skipped": "it is of a GPU"}) if IS_DRY else measure


def limits() -> dict[str, Any]:
    """What the card and its libraries can do: the yardstick of all that follows."""

    def milliseconds(work: Callable[[], Any], count: int) -> float:
        work()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    x = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    found = {
        "device": torch.cuda.get_device_name(),
        "copy_TBps": 4 * (1 << 30) / milliseconds(lambda: y.copy_(x), 10) / 1e9,
    }
    del x, y
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    found["matmul_TFLOPs"] = 2 * 8192**3 / milliseconds(lambda: a @ a, 10) / 1e9
    shapes = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
    weights = {
        name: [torch.randn(*shape, dtype=torch.bfloat16, device="cuda") * 0.02 for _ in range(4)]
        for name, shape in shapes.items()
    }
    head = torch.randn(128256, 4096, dtype=torch.bfloat16, device="cuda")
    for rows in (1, 16, 64, 128, 256, 512, 4096):
        inputs = {name: torch.randn(rows, s[1], dtype=torch.bfloat16, device="cuda") for name, s in shapes.items()}

        def step(inputs: dict[str, torch.Tensor] = inputs, rows: int = rows) -> None:
            for layer in range(32):
                for name in shapes:
                    torch.nn.functional.linear(inputs[name], weights[name][layer % 4])
            torch.nn.functional.linear(inputs["qkv"][: min(rows, 256)], head)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        found[f"linears_ms_{rows}"] = milliseconds(graph.replay, 3)
    return found


part("limits", 20, on_a_gpu(limits))
if not IS_DRY:
    torch.cuda.empty_cache()
BEGUN = time.perf_counter()
THREAD, _ = build(options_of(FOLDER, LOAD, 0), False)
CLIENT, STATS = Requests(THREAD), THREAD.engine.stats
RESULTS["build_seconds"] = time.perf_counter() - BEGUN
CLIENT.go([(tokens(count), Sampling(max_tokens=4)) for count in (4096, 7, 1, 220)])
CLIENT.go([(tokens(60), Sampling(max_tokens=8)) for _ in range(some(64))])


def counted(requests: list[tuple[list[int], Sampling]]) -> dict[str, Any]:
    idle, steps, seconds, cpu = STATS.idle_seconds, STATS.steps, STATS.step_seconds, time.process_time()
    streams, wall = CLIENT.go(requests)
    count, out = STATS.steps - steps, sum(len(stream.tokens) for stream in streams)
    firsts = sorted(stream.times[0] - CLIENT.began for stream in streams)
    gaps = sorted((s.times[-1] - s.times[0]) / max(1, len(s.times) - 1) for s in streams)
    return {
        "input": sum(len(prompt) for prompt, _ in requests), "output": out, "output_tok_s": out / wall, "wall": wall,
        "steps": count, "ms_step": (STATS.step_seconds - seconds) / count * 1e3,
        "idle_share": (STATS.idle_seconds - idle) / wall, "cpu_cores_busy": (time.process_time() - cpu) / wall,
        "ttft_p50": firsts[len(firsts) // 2], "ttft_max": firsts[-1], "tpot_p50_ms": gaps[len(gaps) // 2] * 1e3,
    }  # fmt: skip


def sharegpt() -> list[tuple[list[int], Sampling]]:
    ins, outs = ([min(1024, n) for n in lengths(some(1000), mean, 1024, RNG)] for mean in (220, 200))
    return [(tokens(a), Sampling(max_tokens=some(b))) for a, b in zip(ins, outs, strict=True)]


def decoding() -> dict[str, Any]:
    rates = {}
    for count in (1, 8, 32, 64, 128, 256, 512):
        asked = [(tokens(60), Sampling(max_tokens=4 if IS_DRY else 96)) for _ in range(some(count))]
        streams, _ = CLIENT.go(asked)
        rates[f"tok_s_{count}"] = decode_rate([stream.times for stream in streams])
    return rates


def sampling() -> dict[str, Any]:
    kinds = {
        "greedy": {}, "temperature": {"temperature": 0.8}, "top_p": {"temperature": 0.8, "top_p": 0.9},
        "top_k": {"temperature": 0.8, "top_k": 40}, "logprobs": {"logprobs": 5},
    }  # fmt: skip
    rates = {}
    for name, kind in kinds.items():
        length = 4 if IS_DRY else 48
        asked = [(tokens(60), Sampling(max_tokens=length, seed=i, **kind)) for i in range(some(256))]
        streams, _ = CLIENT.go(asked)
        rates[f"{name}_tok_s_256"] = decode_rate([stream.times for stream in streams])
    return rates


def prefill() -> dict[str, Any]:
    rates = {}
    for count, length in ((1, 4096), (16, 4096), (8, 8000)):
        asked = [(tokens(length), Sampling(max_tokens=1)) for _ in range(some(count))]
        _, wall = CLIENT.go(asked)
        rates[f"tok_s_{count}x{length}"] = sum(len(prompt) for prompt, _ in asked) / wall
    return rates


def shared() -> dict[str, Any]:
    prefix, found = tokens(3000), {}
    for name, prompts in (
        ("shared", [prefix + tokens(64) for _ in range(some(64))]),
        ("unique", [tokens(3064) for _ in range(some(64))]),
    ):
        streams, wall = CLIENT.go([(prompt, Sampling(max_tokens=some(32))) for prompt in prompts])
        found |= {
            f"{name}_wall": wall,
            f"{name}_ttft_p50": statistics.median(s.times[0] - CLIENT.began for s in streams),
        }
    return found


def mixed() -> dict[str, Any]:
    """What running streams feel while long prompts come."""
    running = [(tokens(60), Sampling(max_tokens=8 if IS_DRY else 200)) for _ in range(some(32))]
    streams, _ = CLIENT.go(running + [(tokens(4096), Sampling(max_tokens=2)) for _ in range(some(16))])
    gaps = sorted(b - a for s in streams[: len(running)] for a, b in zip(s.times, s.times[1:], strict=False))
    return {
        "itl_p50_ms": gaps[len(gaps) // 2] * 1e3,
        "itl_p99_ms": gaps[len(gaps) * 99 // 100] * 1e3,
        "itl_max_ms": gaps[-1] * 1e3,
    }


def profile(count: int, length: int, outputs: int, steps: int, **kind: Any) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        CLIENT.send([(tokens(length), Sampling(max_tokens=outputs, seed=i, **kind)) for i in range(count)])
        if outputs > 1:
            CLIENT.drain(lambda: all(len(stream.tokens) > 8 for stream in CLIENT.streams.values()))
        first = STATS.steps
        with profiler(activities=[ProfilerActivity.CUDA]) as profiled:
            began = time.perf_counter()
            CLIENT.drain(lambda: STATS.steps - first >= steps)
            torch.cuda.synchronize()
            wall, done = time.perf_counter() - began, STATS.steps - first
        CLIENT.drain()
        rows = sorted(((e.self_device_time_total, e.count, e.key) for e in profiled.key_averages()), reverse=True)
        total = sum(row[0] for row in rows)
        return {
            "steps": done, "wall_ms_step": wall * 1e3 / done, "device_ms_step": total / 1e3 / done,
            "top": [f"{t / 1e3 / done:8.3f} ms/step {100 * t / total:5.1f}% x{n / done:6.1f} {k[:140]}" for t, n, k in rows[:26]],
        }  # fmt: skip

    return measure


part("decode", 25, decoding)
part("sharegpt_1000", 40, lambda: counted(sharegpt()))
part(
    "c256_1024_in_128_out",
    25,
    lambda: counted([(tokens(1024), Sampling(max_tokens=some(128))) for _ in range(some(256))]),
)
part(
    "c256_128_in_1024_out",
    40,
    lambda: counted([(tokens(128), Sampling(max_tokens=some(1024))) for _ in range(some(256))]),
)
part("prefill", 15, prefill)
part("sampling", 20, sampling)
part("shared_prefix", 15, shared)
part("running_streams_beside_prefill", 15, mixed)
part("profile_decode_256", 12, on_a_gpu(profile(256, 60, 300, 40)))
part("profile_decode_1", 12, on_a_gpu(profile(1, 60, 300, 40)))
part("profile_decode_256_top_p", 20, on_a_gpu(profile(256, 60, 150, 30, temperature=0.8, top_p=0.9)))
part("profile_prefill", 12, on_a_gpu(profile(4, 4096, 1, 4)))
THREAD.stop()
print(f"all of it took {time.perf_counter() - BEGAN:.0f} s", flush=True)
os._exit(0)
