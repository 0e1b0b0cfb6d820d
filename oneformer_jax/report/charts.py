"""Line charts as SVG text; their colours are those of the page's style."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from oneformer_jax.report.runs import Points

COLOURS = 6  # classes s0 to s5 of the style; further lines are dashed
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 520, 220, 52, 24, 8, 12
_MOST = 400  # points of a line: more than its pixels show


def text(value: object, most: int = 200) -> str:
    """Returns any text for HTML: escaped, shortened, and apart from the text around it."""
    shown = str(value)
    shown = shown if len(shown) <= most else f"{shown[: most - 1]}…"
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)
    return f"<bdi>{html.escape(shown)}</bdi>"


def line_chart(title: str, series: Sequence[tuple[str, Points]]) -> str:
    """Draws the series that have points, each with its last value in the legend; "" if none has.

    Args:
      title: above the chart.
      series: a label and points (step, value) with finite values, in order of their steps.
    """
    shown = [(i, label, _thin(points)) for i, (label, points) in enumerate(series) if points]
    if not shown:
        return ""
    steps = [step for _, _, points in shown for step, _ in points]
    values = [value for _, _, points in shown for _, value in points]
    columns, rows = ticks(min(steps), max(steps), 5), ticks(min(values), max(values), 4)
    right, left = max(columns[-1], *steps), min(columns[0], *steps)
    low, high = min(rows[0], *values), max(rows[-1], *values)

    def x(step: float) -> float:
        return _LEFT + (step - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for value in rows:
        line = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
        parts.append(f'<line class="grid" {line}/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>'
        )
    for step in columns:
        parts.append(
            f'<text x="{x(step):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{step:,.6g}</text>'
        )
    legend = []
    for i, label, points in shown:
        style = f"s{i % COLOURS}{' dashed' if i >= COLOURS else ''}"
        if len(points) > 1:
            path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            parts.append(f'<polyline class="{style}" points="{path}"/>')
        for step, value in points if len(points) < 12 else ():
            parts.append(f'<circle class="{style}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>')
        legend.append(
            f'<li><i class="{style}"></i>{text(label, 60)} <b>{points[-1][1]:.4g}</b></li>'
        )
    chart = "".join(parts) + "</svg>"
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    return f'<figure>{caption}{chart}<ul class="legend">{"".join(legend)}</ul></figure>'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Returns about so many round numbers that span `low` to `high`, at least two."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = abs(low) / 10 or 1.0
        low, high = low - around, high + around
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((n * power for n in (1, 2, 5) if n * power >= raw), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _thin(points: Points) -> Points:
    """Takes the means of neighbours where there are too many points; keeps the last one."""
    size = math.ceil(len(points) / _MOST)
    if size == 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [*means[:-1], points[-1]]
