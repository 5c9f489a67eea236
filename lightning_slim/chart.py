"""A small line chart as SVG: for pages and reports, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

Points = Sequence[tuple[float, float]]

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#9c6b4e", "#a463f2", "#6cc5b0", "#97bbf5")
WIDTH, HEIGHT = 480, 300  # of the plane within the axes
LEFT, TOP, LEGEND, LINE = 64, 16, 200, 16


def line_chart(lines: Mapping[str, Points], x: str, y: str, steps: bool = False) -> str:
    """A chart with one line for each name, as the text of an SVG file.

    Args:
        lines: name -> points from left to right; those that are not finite are left out.
        x: says what goes to the right.
        y: says what goes up.
        steps: whether a value holds up to the next point, as in a distribution function.

    Raises:
        ValueError: no point is finite.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in lines.items()}
    everywhere = [point for points in finite.values() for point in points]
    if not everywhere:
        raise ValueError("Expected at least one finite point to draw, got none.")
    (x_ticks, to_x), (y_ticks, to_y) = (
        _axis([point[axis] for point in everywhere], start, end)
        for axis, start, end in ((0, LEFT, LEFT + WIDTH), (1, TOP + HEIGHT, TOP))
    )
    bottom = TOP + HEIGHT
    height = max(bottom + 48, TOP + LINE * len(lines) + LINE)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + LEGEND} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{LEFT + WIDTH + LEGEND}" height="{height}" fill="white"/>',
    ]
    for value in x_ticks:
        parts.append(f'<path d="M{to_x(value):.1f} {TOP}V{bottom}" stroke="#eee"/>')
        parts.append(f'<text x="{to_x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    for value in y_ticks:
        parts.append(f'<path d="M{LEFT} {to_y(value):.1f}H{LEFT + WIDTH}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{to_y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for i, (name, points) in enumerate(finite.items()):
        colour, at = COLOURS[i % len(COLOURS)], TOP + LINE * (i + 1)
        if steps:
            points = [corner for (a, b), (c, _) in pairwise(points) for corner in ((a, b), (c, b))]
            points += finite[name][-1:]
        path = " ".join(f"{to_x(a):.1f},{to_y(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{LEFT + WIDTH + 12} {at - 4}h16" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 34}" y="{at}">{escape(name)}</text>')
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">{escape(x)}</text>')
    middle = TOP + HEIGHT / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y)}</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def save_svg(path: str | Path, text: str) -> None:
    """Writes a chart to a file.

    Raises:
        ValueError: the file is not to be an SVG.
    """
    if Path(path).suffix != ".svg":
        raise ValueError(f"Expected a file that ends with .svg, got {path}: charts are written as SVG only.")
    Path(path).write_text(text)


class _Scale:
    """From values to places on the page."""

    def __init__(self, values: tuple[float, float], places: tuple[float, float]) -> None:
        self.values, self.places = values, places

    def __call__(self, value: float) -> float:
        (low, high), (start, end) = self.values, self.places
        return start + (end - start) * (value - low) / (high - low)


def _axis(values: Sequence[float], start: float, end: float) -> tuple[list[float], _Scale]:
    """About five round numbers that hold all values, and where they lie."""
    low, high = min(values), max(values)
    raw = (high - low or abs(high) or 1.0) / 5
    digit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * digit for m in (1, 2, 2.5, 5, 10) if m * digit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks, _Scale((ticks[0], ticks[-1]), (start, end))
