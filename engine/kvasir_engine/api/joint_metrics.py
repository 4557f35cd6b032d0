"""One /metrics for several processes: each serves its own to the others, and the scraped one adds them up."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

SECONDS = 5.0
MOST_BYTES = 16 << 20


class MetricsUnknown(Exception):
    """Another process's metrics are missing; the message says which and why."""


@contextlib.asynccontextmanager
async def shown_at(path: Path, registry: CollectorRegistry) -> AsyncIterator[None]:
    """Serve `registry` at the Unix socket `path`, in a folder that only this user can open."""

    async def show(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(generate_latest(registry))
            writer.write_eof()
            await asyncio.wait_for(writer.drain(), SECONDS)
        writer.close()

    server = await asyncio.start_unix_server(show, path)
    os.chmod(path, 0o600)
    try:
        yield
    finally:
        server.close()


async def gathered(own: CollectorRegistry, others: Sequence[Path], seconds: float = SECONDS) -> bytes:
    """The sum of this process's metrics and the others'. Raises MetricsUnknown."""
    texts = await asyncio.gather(*(_ask(path, seconds) for path in others))
    return added(generate_latest(own).decode(), *texts)


async def _ask(path: Path, seconds: float) -> str:
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return (await _all(reader)).decode()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        raise MetricsUnknown(f"no metrics of {path.stem}: {type(error).__name__}: {error}") from error


async def _all(reader: asyncio.StreamReader) -> bytes:
    parts, size = [], 0
    while part := await reader.read(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
    return b"".join(parts)


class _Families:
    """The interface that `generate_latest` needs of a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families


def added(*expositions: str) -> bytes:
    """Adds up samples with equal name and labels; of `_created` it keeps the earliest."""
    families: dict[str, Metric] = {}
    for text in expositions:
        for family in text_string_to_metric_families(text):
            known = families.get(family.name)
            if known is None:
                families[family.name] = family
            else:
                known.samples.extend(family.samples)
    for family in families.values():
        joint: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            before = joint.get(key)
            if before is not None:
                both = (before.value, sample.value)
                value = min(both) if sample.name.endswith("_created") else sum(both)
                sample = before._replace(value=value)
            joint[key] = sample
        family.samples = list(joint.values())
    return generate_latest(_Families(families.values()))
