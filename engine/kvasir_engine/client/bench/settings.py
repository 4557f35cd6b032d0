"""Parses the settings of a benchmark from the command line. Pure except for the files that it reads."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvasir_engine.client.bench.datasets import Count, DatasetOptions
from kvasir_engine.client.bench.measured import METRICS
from kvasir_engine.errors import UserError

MOST_POINTS = 100


@dataclass(frozen=True)
class LoadPoint:
    """One load of a sweep."""

    request_rate: float
    concurrency: int | None


def points_of(rates: str, concurrencies: str) -> list[LoadPoint]:
    """Each rate with each concurrency; lists are separated by commas. Raises UserError."""
    found = [
        LoadPoint(rate, limit)
        for rate in _list("--request-rate", rates, _rate)
        for limit in (_list("--max-concurrency", concurrencies, _concurrency) if concurrencies else [None])
    ]
    if len(found) > MOST_POINTS:
        raise UserError(f"--request-rate and --max-concurrency give {len(found)} loads; {MOST_POINTS} are the most")
    return found


def _list(flag: str, text: str, parse: Any) -> list[Any]:
    try:
        return [parse(each.strip()) for each in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag} {text}: {error}") from None


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise ValueError(f"{text or 'nothing'!r} is no rate: requests a second above 0, or inf")
    return rate


def _concurrency(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1_000_000):
        raise ValueError(f"{text or 'nothing'!r} is no concurrency: a whole number from 1 on")
    return int(text)


def goodput_limits(pairs: Sequence[str]) -> dict[str, float]:
    """Limits in seconds by metric, from pairs such as `ttft:200`, in milliseconds. Raises UserError."""
    found: dict[str, float] = {}
    for pair in (each for said in pairs for each in said.replace(",", " ").split()):
        name, _, limit = pair.partition(":")
        name = {"e2e": "e2el"}.get(name, name)
        try:
            milliseconds = float(limit)
        except ValueError:
            milliseconds = math.nan
        if name not in METRICS or not 0 < milliseconds < math.inf:
            raise UserError(f"--goodput {pair}: a limit is one of {', '.join(METRICS)}, a colon and milliseconds")
        if name in found:
            raise UserError(f"--goodput {pair}: {name} has two limits")
        found[name] = milliseconds / 1e3
    return found


def headers_of(pairs: Sequence[str]) -> dict[str, str]:
    """Headers from pairs such as `X-Team: a`. Raises UserError."""
    found = {}
    for pair in pairs:
        name, colon, value = pair.partition(":")
        value = value.strip()
        fine = name and all(each.isascii() and (each.isalnum() or each in "-_") for each in name)
        if not (colon and fine and value.isascii() and (value.isprintable() or not value)):
            raise UserError(f"--header {pair!r}: a header is NAME:VALUE")
        found[name] = value
    return found


OWN_FIELDS = frozenset({"model", "prompt", "messages", "stream", "stream_options", "max_tokens"})


def extra_body(text: str) -> dict[str, Any]:
    """Fields from a JSON object. Raises UserError."""
    try:
        found = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError as error:
        raise UserError(f"--extra-body: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError("--extra-body: has to be a JSON object")
    for name in found:
        if name in OWN_FIELDS:
            raise UserError(f"--extra-body: the benchmark sets {name} itself")
    return found


def checked(options: DatasetOptions) -> DatasetOptions:
    """The options, if they are consistent. Raises UserError."""
    if (options.dataset == "sharegpt") != bool(options.path):
        raise UserError("--dataset sharegpt and --dataset-path FILE belong together")
    if not 0 <= options.range_ratio < 1:
        raise UserError(f"--range-ratio {options.range_ratio:g}: has to be at least 0 and below 1")
    if options.dataset == "shared-prefix" and not options.prefix_len:
        raise UserError("--dataset shared-prefix needs a --prefix-len")
    if options.dataset == "multi-turn" and options.turns < 2:
        raise UserError("--dataset multi-turn needs --turns from 2 on")
    if options.dataset != "multi-turn" and options.turns != 1:
        raise UserError(f"--turns {options.turns}: only --dataset multi-turn has several")
    if options.dataset == "sharegpt" and options.prefix_len:
        raise UserError("--prefix-len: a ShareGPT file has prompts of its own")
    if options.prefixes > options.number:
        raise UserError(f"--num-prefixes {options.prefixes}: there are only {options.number} conversations")
    return options


def counter(path: str) -> Count | None:
    """Counts tokens by the `tokenizer.json` at `path`, or in that folder. Raises UserError."""
    if not path:
        return None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"--tokenizer {path}: there is no tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("--tokenizer: the package tokenizers is not installed (pip install tokenizers)") from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain ones
        raise UserError(f"--tokenizer {path}: {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def described(options: DatasetOptions) -> Mapping[str, Any]:
    """The dataset in the form of the JSON output."""
    return {
        "dataset": options.dataset,
        "dataset_path": options.path,
        "num_prompts": options.number,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "range_ratio": options.range_ratio,
        "prefix_len": options.prefix_len,
        "num_prefixes": options.prefixes,
        "turns": options.turns,
        "seed": options.seed,
    }
