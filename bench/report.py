"""The comparison as a table and as a picture."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.load import Row
from rich.table import Table

QUIET = 0.1
"""Cores that others may keep busy during a measurement for it to count as undisturbed."""


@dataclass(frozen=True)
class Measurement:
    """One workload on one system. `others`: cores that anything but the servers and the client kept busy."""

    system: str
    round: int
    others: float
    load_average: float
    row: Row


@dataclass(frozen=True)
class Cell:
    """The medians of a system's undisturbed rounds of a workload; with none, of its least disturbed one."""

    out_tok_s: float
    in_tok_s: float
    ttft_p50: float
    ttft_p95: float
    itl_p50: float
    errors: int
    rounds: int
    others: float


def cell(measurements: Iterable[Measurement], system: str, workload: str) -> Cell | None:
    """What is reported for a system and a workload, if it was measured and anything came of it."""
    own = [m for m in measurements if m.system == system and m.row.workload == workload]
    answered = [m for m in own if m.row.ttft_p50 is not None]
    if not answered:
        return None
    quiet = [m for m in answered if m.others <= QUIET] or [min(answered, key=lambda m: m.others)]

    def median(of: str) -> float:
        return statistics.median(getattr(m.row, of) or 0.0 for m in quiet)

    return Cell(
        median("out_tok_s"),
        median("in_tok_s"),
        median("ttft_p50"),
        median("ttft_p95"),
        median("itl_p50"),
        sum(m.row.errors for m in quiet),
        len(quiet),
        max(m.others for m in quiet),
    )


def table(
    measurements: Sequence[Measurement], workloads: Sequence[str], systems: Sequence[str], peer: str
) -> Table:
    """A line for each workload and system; ratios to `peer` in brackets, of rates and of latencies alike."""
    shown = Table("workload", "system", title="Serving", caption=f"(ratio to {peer}); ~ others used the processor")
    for heading in ("output tok/s", "input tok/s", "TTFT p50 ms", "TTFT p95 ms", "ITL p50 ms", "rounds", "errors"):
        shown.add_column(heading, justify="right")
    for workload in workloads:
        base = cell(measurements, peer, workload)
        for system in systems:
            own = cell(measurements, system, workload)
            if own is None:
                shown.add_row(workload, system, *["-"] * 7)
                continue
            reference = base if system != peer else None
            shown.add_row(
                workload,
                system,
                _ratio(own.out_tok_s, reference and reference.out_tok_s, 1),
                _ratio(own.in_tok_s, reference and reference.in_tok_s, 0),
                _ratio(own.ttft_p50, reference and reference.ttft_p50, 0),
                _ratio(own.ttft_p95, reference and reference.ttft_p95, 0),
                _ratio(own.itl_p50, reference and reference.itl_p50, 1),
                f"{own.rounds}" + ("~" if own.others > QUIET else ""),
                str(own.errors),
            )
        shown.add_section()
    return shown


def _ratio(value: float, reference: float | None, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return f"{text} ({value / reference:.2f})" if reference else text


def plot(
    measurements: Sequence[Measurement], workloads: Sequence[str], systems: Sequence[str], where: str, target: Path
) -> None:
    """Rates and time to first token, a group of bars a workload. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    width = 0.8 / len(systems)
    panels = {
        "out_tok_s": "output tokens a second (more is better)",
        "in_tok_s": "input tokens a second (more is better)",
        "ttft_p50": "TTFT p50, ms (less is better)",
    }
    for axis, (field, title) in zip(axes, panels.items(), strict=True):
        for place, system in enumerate(systems):
            cells = [cell(measurements, system, workload) for workload in workloads]
            at = [i + width * (place - (len(systems) - 1) / 2) for i in range(len(workloads))]
            bars = axis.bar(
                at, [getattr(each, field) if each else 0.0 for each in cells], width * 0.92, label=system
            )
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=7)
        axis.set_xticks(range(len(workloads)), workloads)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(systems), fontsize=8)
    figure.suptitle(f"SmolLM2-135M-Instruct, bfloat16, {where}", fontsize=10)
    figure.savefig(target, dpi=140)
    pyplot.close(figure)
