"""Runs `kvasir bench`: the warm-up, each load of the sweep, and the output."""

import contextlib
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from kvasir_engine.client.bench.datasets import Count, DatasetOptions, conversations
from kvasir_engine.client.bench.load import LoadOptions, LoadRun, warm_up
from kvasir_engine.client.bench.measured import Point, RequestRecord
from kvasir_engine.client.bench.plot import svg
from kvasir_engine.client.bench.report import as_json, sweep_table, table
from kvasir_engine.client.bench.settings import LoadPoint, described
from kvasir_engine.client.connection import CallError, EndpointConnection
from kvasir_engine.client.endpoint import CallTimeouts, EndpointAddress
from kvasir_engine.errors import UserError
from kvasir_engine.interruptible import run_interruptible


@dataclass(frozen=True)
class BenchRun:
    """The settings of a run. `load` is common to the sweep; without a model the first served one is used."""

    address: EndpointAddress
    dataset: DatasetOptions
    points: tuple[LoadPoint, ...]
    load: LoadOptions
    timeouts: CallTimeouts
    warmup: int = 1
    count: Count | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None
    plot: Path | None = None


class BenchFailed(Exception):
    """The endpoint could not be measured; the message is one line."""


def bench(run: BenchRun) -> list[Point]:
    """Measure, print, write. Raises UserError and BenchFailed."""
    for flag, path in (("--output", run.output), ("--plot", run.plot)):
        if path is not None:
            try:
                path.open("a").close()  # before hours of measuring, not after
            except OSError as error:
                raise UserError(f"{flag} {path}: {error.strerror}") from None
    _allow_many_connections()
    return run_interruptible(_bench(run))


async def _bench(run: BenchRun) -> list[Point]:
    workload = conversations(run.dataset, run.count)
    if run.dataset.dataset == "sharegpt" and len(workload) < run.dataset.number:
        _say(f"the file has {len(workload)} conversations of a suitable length, not {run.dataset.number}")
    points: list[Point] = []
    async with EndpointConnection(run.address, run.timeouts, run.headers) as connection:
        load = replace(run.load, model=run.load.model or await _first_model(connection))
        if run.warmup:
            before = replace(run.dataset, seed=run.dataset.seed + 1_000_003, number=run.warmup, prefixes=1)
            failed = await warm_up(connection, load, conversations(before, run.count), run.count)
            if failed is not None:
                raise BenchFailed(f"{run.address.base} failed at the warm-up: {failed.error}: {failed.message}")
        for each in run.points:
            options = replace(load, request_rate=each.request_rate, concurrency=each.concurrency)
            with _Progress(sum(len(one.turns) for one in workload)) as progress:
                point = await LoadRun(connection, options, run.count, progress.request_ended).run(workload)
            points.append(point)
            print("\n".join(table(point)), flush=True)  # noqa: T201
            _write(run, load.model, points)
    if len(points) > 1:
        print("\n".join(["", *sweep_table(points)]))  # noqa: T201
    if not any(point.completed for point in points):
        raise BenchFailed("no request was answered")
    return points


def _write(run: BenchRun, model: str, points: list[Point]) -> None:
    """Write the output after each point, so that an interrupted sweep keeps its results."""
    if run.output is not None:
        found: dict[str, Any] = {
            "base_url": run.address.base,
            "model": model,
            "endpoint": run.load.api,
            **described(run.dataset),
            "burstiness": run.load.burstiness,
            "goodput_limits_ms": {name: limit * 1e3 for name, limit in run.load.limits.items()},
            "extra_body": dict(run.load.body),
            "points": [as_json(point) for point in points],
        }
        run.output.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    if run.plot is not None:
        run.plot.write_text(svg(points, f"{model} at {run.address.base}"))


async def _first_model(connection: EndpointConnection) -> str:
    try:
        names = await connection.models()
    except CallError as error:
        raise BenchFailed(f"{connection.address.base} does not list its models: {error.kind}: {error}") from None
    if not names:
        raise BenchFailed(f"{connection.address.base} serves no model")
    return names[0]


class _Progress:
    """A line on a terminal with the progress."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._failed = total, 0, 0
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def request_ended(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._done += 1
        self._failed += bool(record.error)
        if self._shown:
            sys.stderr.write(f"\r{self._done}/{self._total} requests, {self._failed} failed\033[K")
            sys.stderr.flush()


def _say(text: str) -> None:
    sys.stderr.write(f"kvasir: note: {text}\n")


def _allow_many_connections() -> None:
    """Raise the limit of open files: each concurrent request needs a connection."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
