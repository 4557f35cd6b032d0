"""The output of `kvasir bench`: a table for people, and JSON with the field names of vLLM's benchmark."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvasir_engine.client.bench.measured import METRICS, PERCENTILES, Point

NAMES = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency (ITL)",
    "e2el": "End-to-end latency (E2EL)",
}
BUSY_CLIENT = 0.7


def load_name(point: Point) -> str:
    """For example `rate 4/s, concurrency 16`."""
    rate = "inf" if math.isinf(point.request_rate) else f"{point.request_rate:g}/s"
    limit = "" if point.concurrency is None else f", concurrency {point.concurrency}"
    return f"rate {rate}{limit}"


def table(point: Point) -> list[str]:
    """The lines of one point."""
    lines = [f"== {load_name(point)}"]

    def line(name: str, value: str) -> None:
        lines.append(f"{name:<34}{value:>12}")

    line("Successful requests", str(point.completed))
    for kind, number in sorted(point.errors.items()):
        line(f"Failed: {kind}", str(number))
    if point.not_sent:
        line("Not sent", str(point.not_sent))
    line("Duration (s)", f"{point.seconds:.2f}")
    line("Most requests at once", str(point.most_at_once))
    line("Input tokens", str(point.prompt_tokens))
    line("  of them cached", f"{_share(point):.1%}")
    line("Output tokens", str(point.output_tokens))
    line("Request throughput (req/s)", f"{point.a_second(point.completed):.2f}")
    if point.goodput is not None:
        line("Request goodput (req/s)", f"{point.goodput:.2f}")
    line("Input throughput (tok/s)", f"{point.a_second(point.prompt_tokens):.1f}")
    line("Output throughput (tok/s)", f"{point.a_second(point.output_tokens):.1f}")
    line("Client's share of a core", f"{point.client_cpu:.0%}")
    heads = ["mean", "median", *(f"p{each}" for each in PERCENTILES if each != 50)]
    lines.append(f"{'Milliseconds':<34}" + "".join(f"{head:>12}" for head in heads))
    for metric in METRICS:
        spread = point.spreads[metric]
        values = [spread.mean, *spread.percentiles.values()]
        lines.append(f"{NAMES[metric]:<34}" + "".join(f"{_number(value):>12}" for value in values))
    for kind, message in sorted(point.messages.items()):
        lines.append(f"{kind}: {message}")
    if point.client_cpu > BUSY_CLIENT:
        lines.append("The client was busy: it may have been slower than the endpoint.")
    return lines


def sweep_table(points: Sequence[Point]) -> list[str]:
    """One line a point."""
    heads = ("load", "req/s", "goodput", "out tok/s", "ttft p50", "ttft p99", "tpot p50", "tpot p99", "failed")
    rows = [
        (
            load_name(point),
            f"{point.a_second(point.completed):.2f}",
            "" if point.goodput is None else f"{point.goodput:.2f}",
            f"{point.a_second(point.output_tokens):.1f}",
            *(_number(point.spreads[metric].percentiles[each]) for metric in ("ttft", "tpot") for each in (50, 99)),
            str(sum(point.errors.values())),
        )
        for point in points
    ]
    widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest])

    return [line(heads), *map(line, rows)]


def as_json(point: Point) -> dict[str, Any]:
    """One point, with vLLM's names where it has them. Times in milliseconds, null where nothing was measured."""
    found: dict[str, Any] = {
        "request_rate": "inf" if math.isinf(point.request_rate) else point.request_rate,
        "max_concurrency": point.concurrency,
        "duration": point.seconds,
        "completed": point.completed,
        "failed": sum(point.errors.values()),
        "errors": point.errors,
        "error_messages": point.messages,
        "not_sent": point.not_sent,
        "total_input_tokens": point.prompt_tokens,
        "total_cached_tokens": point.cached_tokens,
        "total_output_tokens": point.output_tokens,
        "request_throughput": point.a_second(point.completed),
        "request_goodput": point.goodput,
        "input_throughput": point.a_second(point.prompt_tokens),
        "output_throughput": point.a_second(point.output_tokens),
        "total_token_throughput": point.a_second(point.prompt_tokens + point.output_tokens),
        "max_concurrent_requests": point.most_at_once,
        "client_cpu": point.client_cpu,
    }
    for metric in METRICS:
        spread: Mapping[int, float | None] = point.spreads[metric].percentiles
        found[f"mean_{metric}_ms"] = point.spreads[metric].mean
        found[f"median_{metric}_ms"] = spread[50]
        for percent in PERCENTILES:
            if percent != 50:
                found[f"p{percent}_{metric}_ms"] = spread[percent]
    return found


def _share(point: Point) -> float:
    return point.cached_tokens / point.prompt_tokens if point.prompt_tokens else 0.0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
