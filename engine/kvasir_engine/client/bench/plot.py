"""A sweep as an SVG: time to first token, time per token and throughput over the load. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kvasir_engine.client.bench.measured import Point

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 300, 200, 58, 34, 44, 24
COLOURS = ("#1f77b4", "#d62728", "#2ca02c")


@dataclass(frozen=True)
class Curve:
    """One curve of a panel; None where nothing was measured."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Curve]


def svg(points: Sequence[Point], title: str) -> str:
    """The picture; one point of a load is a dot."""
    by_rate = len({point.request_rate for point in points}) > 1
    names = [f"{point.request_rate:g}" if by_rate else str(point.concurrency or "any") for point in points]
    panels = (
        Panel("TTFT (ms)", [_percentile(points, "ttft", each) for each in (50, 99)]),
        Panel("TPOT (ms)", [_percentile(points, "tpot", each) for each in (50, 99)]),
        Panel("Output (tokens/s)", [Curve("all", [point.a_second(point.output_tokens) for point in points])]),
        Panel("Requests/s", _requests(points)),
    )
    axis = "request rate" if by_rate else "concurrency"
    width = len(panels) * (LEFT + WIDTH + GAP)
    height = TOP + HEIGHT + BOTTOM + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
    ]
    for place, panel in enumerate(panels):
        parts += _panel(panel, names, axis, place * (LEFT + WIDTH + GAP) + LEFT)
    return "\n".join([*parts, "</svg>", ""])


def _percentile(points: Sequence[Point], metric: str, percent: int) -> Curve:
    return Curve(f"p{percent}", [point.spreads[metric].percentiles[percent] for point in points])


def _requests(points: Sequence[Point]) -> list[Curve]:
    found = [Curve("answered", [point.a_second(point.completed) for point in points])]
    if any(point.goodput is not None for point in points):
        found.append(Curve("goodput", [point.goodput for point in points]))
    return found


def _panel(panel: Panel, names: Sequence[str], axis: str, left: int) -> list[str]:
    top, bottom = TOP + 12, TOP + 12 + HEIGHT
    highest = _round_up(max((value or 0.0 for line in panel.lines for value in line.values), default=0.0))
    step = WIDTH / max(1, len(names) - 1)
    parts = [f'<text x="{left}" y="{top - 6}">{escape(panel.title)}</text>']
    for tick in range(5):
        y = bottom - HEIGHT * tick / 4
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{highest * tick / 4:g}</text>')
    for place, name in enumerate(names):
        parts.append(f'<text x="{left + place * step:.1f}" y="{bottom + 14}" text-anchor="middle">{name}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{bottom + 30}" text-anchor="middle">{axis}</text>')
    for place, (line, colour) in enumerate(zip(panel.lines, COLOURS, strict=False)):
        at = [
            (left + where * step, bottom - HEIGHT * value / highest)
            for where, value in enumerate(line.values)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in at]
        x = left + WIDTH - 60 * (len(panel.lines) - place)
        parts.append(f'<text x="{x}" y="{top - 6}" fill="{colour}">{escape(line.name)}</text>')
    return parts


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten, so that quarters of it are short numbers."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return float(next(each * power for each in (1, 2, 4, 5, 8, 10) if each * power >= value))
