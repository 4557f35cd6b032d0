"""The operator's benchmark measures what it says: reconciles that do their work, and then none that writes."""

import asyncio

from bench.reconcile import measure, report


def test_each_occasion_is_what_it_says() -> None:
    found, memory = asyncio.run(measure(3))
    requests = {occasion: sent for occasion, (_, sent) in found.items()}
    assert requests["created"] > requests["pods ready"] > requests["nothing new"]
    assert requests["all edited"] > requests["nothing new"]
    assert all(len(latencies) == 3 and latencies == sorted(latencies) for latencies, _ in found.values())
    assert report(3, found, memory)[-1].startswith("  worst p99 ")
