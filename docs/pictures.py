"""Draws the schedules into `schedules.svg`, without a plotting library.

python docs/pictures.py
"""

from __future__ import annotations

from pathlib import Path

from lightning_slim.schedules import Schedule

WIDTH, HEIGHT, GAP, COLUMNS, POINTS = 150, 90, 40, 3, 300


def panel(schedule: Schedule, left: int, top: int) -> str:
    """One schedule over a run, from left to right; below, what share of the removal is done."""
    course = [(i / POINTS, schedule(i / POINTS)) for i in range(POINTS + 1)]
    line = " ".join(f"{left + WIDTH * t:.1f},{top + HEIGHT * (1 - done):.1f}" for t, done in course)
    return (
        f'<text x="{left}" y="{top - 8}" font-weight="bold">{type(schedule).__name__}</text>\n'
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>\n'
        f'<polyline points="{line}" fill="none" stroke="#1f6fb4" stroke-width="2"/>\n'
        f'<text x="{left - 6}" y="{top + 9}" text-anchor="end">1</text>\n'
        f'<text x="{left - 6}" y="{top + HEIGHT}" text-anchor="end">0</text>\n'
        f'<text x="{left}" y="{top + HEIGHT + 14}">0</text>\n'
        f'<text x="{left + WIDTH}" y="{top + HEIGHT + 14}" text-anchor="end">1</text>\n'
    )


def draw() -> str:
    """All schedules with their defaults, side by side."""
    schedules = [kind() for kind in Schedule.__subclasses__()]
    panels = "".join(
        panel(schedule, GAP + i % COLUMNS * (WIDTH + GAP), GAP + i // COLUMNS * (HEIGHT + 2 * GAP))
        for i, schedule in enumerate(schedules)
    )
    width, height = GAP + COLUMNS * (WIDTH + GAP), -(-len(schedules) // COLUMNS) * (HEIGHT + 2 * GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{panels}</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("schedules.svg").write_text(draw())
