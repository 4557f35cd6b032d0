"""The figures of bench/gpu/harvest.py as a Markdown table: python -m bench.gpu.table HARVEST.json."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = {
    "limits": "the card alone",
    "decode": "decode, 60 in",
    "sharegpt_1000": "1,000 requests, ShareGPT-like, capped at 1,024",
    "c256_1024_in_128_out": "1,024 in, 128 out, 256 streams",
    "c256_128_in_1024_out": "128 in, 1,024 out, 256 streams",
    "prefill": "prefill",
    "sampling": "256 streams, sampling",
    "shared_prefix": "64 prompts of 3,064 tokens, 3,000 of them shared or not",
    "running_streams_beside_prefill": "32 running streams beside 16 prompts of 4k",
}
SHOWN = 5
"""Kernels of a profile."""


def rows(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was measured, and its figures in words."""
    for part, figures in results.items():
        if not isinstance(figures, dict):
            yield part.replace("_", " "), _number(figures)
            continue
        name = NAMES.get(part, part.replace("_", " "))
        if "failed" in figures:
            yield name, "failed: " + str(figures["failed"]).strip().splitlines()[-1]
        elif "skipped" in figures:
            yield name, f"left out: {figures['skipped']}"
        else:
            said = [f"{key.replace('_', ' ')} {_number(value)}" for key, value in figures.items() if key != "top"]
            said += [" ".join(str(line).split()) for line in figures.get("top", [])[:SHOWN]]
            yield name, "; ".join(said)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| what | figures |", "| --- | --- |"]
    lines += [f"| {what} | {figures.replace('|', '/')} |" for what, figures in rows(results)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
