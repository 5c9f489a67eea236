"""Structures of one budget, drawn at random: how the one that a score and a selection give compares with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_slim.budgets import Budget
from lightning_slim.chart import line_chart, save_svg
from lightning_slim.costs import Costs
from lightning_slim.monitor import Metrics, Monitor
from lightning_slim.selection import Selection
from lightning_slim.units import most_important_first

TOLERANCE = 0.02  # of the budget, relative
TRIES = 100  # draws for one structure, until one is that close


@dataclass(frozen=True)
class Structure:
    """One way to spend a budget.

    Attributes:
        widths: group -> units left.
        remaining: fraction of the budget that is left.
        params: parameters left.
        macs: multiply-accumulates left, for one sample.
        before: what validation logged right after the cut, with batch statistics measured anew.
        after: what it logged after the fine-tuning.
    """

    widths: dict[str, int]
    remaining: float
    params: int
    macs: int
    before: Metrics
    after: Metrics


@dataclass(frozen=True)
class Exploration:
    """Structures of one budget side by side.

    Attributes:
        monitor: the metric that they are compared by.
        dense: what validation logged of the network as it was.
        reference: the structure that the selection gives.
        drawn: those that were drawn at random.
        best: the network of the best of all of them, fine-tuned.
    """

    monitor: Monitor
    dense: Metrics
    reference: Structure
    drawn: list[Structure]
    best: nn.Module

    @property
    def best_structure(self) -> Structure:
        """The structure of `best`; of equals, the reference, else the first that was drawn."""
        return max([self.reference, *self.drawn], key=lambda structure: self.monitor.goodness(structure.after))

    @property
    def percentile(self) -> float:
        """Share of the drawn structures that are worse than the reference after fine-tuning; equals count half."""
        ours = self.monitor.goodness(self.reference.after)
        theirs = [self.monitor.goodness(structure.after) for structure in self.drawn]
        return sum((value < ours) + 0.5 * (value == ours) for value in theirs) / len(theirs)

    def to_markdown(self) -> str:
        """A Markdown table: the reference, then all that were drawn, the best first."""
        name = self.monitor.name
        lines = [
            f"| structure | budget left | params | MACs | {name}, as cut | {name}, fine-tuned | units |",
            "|---|---:|---:|---:|---:|---:|---|",
        ]
        ranked = sorted(self.drawn, key=lambda structure: self.monitor.goodness(structure.after), reverse=True)
        for label, s in [("reference", self.reference), *((f"drawn {i}", s) for i, s in enumerate(ranked, 1))]:
            before, after = self.monitor.of(s.before), self.monitor.of(s.after)
            widths = ", ".join(map(str, s.widths.values()))
            lines.append(
                f"| {label} | {s.remaining:.1%} | {s.params:,} | {s.macs:,} | {before:.4f} | {after:.4f} | {widths} |"
            )
        told = f"{name} of the dense network: {self.monitor.of(self.dense):.4f}. "
        told += f"The reference is better than {self.percentile:.0%} of {len(self.drawn)} drawn structures."
        return "\n".join([*lines, "", told, ""])

    def __str__(self) -> str:
        return self.to_markdown()

    def to_json(self) -> str:
        """Keys `monitor`, `dense`, `reference` and `drawn`; all but the network."""
        parts = {name: getattr(self, name) for name in ("monitor", "reference")}
        told = {name: asdict(part) for name, part in parts.items()}
        return json.dumps({**told, "dense": self.dense, "drawn": [asdict(s) for s in self.drawn]}, indent=2)

    def plot(self, path: str | Path) -> None:
        """Writes an SVG file: empirical distribution functions, as cut and fine-tuned, and where the reference is.

        Raises:
            ValueError: the file is not to be an SVG.
        """
        lines: dict[str, list[tuple[float, float]]] = {}
        for when in ("as cut", "fine-tuned"):
            of_drawn = [s.before if when == "as cut" else s.after for s in self.drawn]
            at = self.monitor.of(self.reference.before if when == "as cut" else self.reference.after)
            values = sorted(v for v in map(self.monitor.of, of_drawn) if math.isfinite(v))
            lines[f"drawn, {when}"] = [(v, (i + 1) / len(of_drawn)) for i, v in enumerate(values)]
            lines[f"reference, {when}"] = [(at, 0.0), (at, 1.0)]
        save_svg(path, line_chart(lines, self.monitor.name, "share of structures up to here", steps=True))


def draw_widths(
    budget: Budget,
    costs: Costs,
    importance: Mapping[str, Float[Tensor, "units"]],
    generator: torch.Generator,
) -> dict[str, int]:
    """Random widths at a budget: every group's fraction is uniform, and all are scaled alike until the budget is met.

    Fractions that would be above 1 are 1. Floors, ceilings, packs and steps of the costs hold.

    Args:
        budget: what may remain.
        costs: of a model that was not cut yet.
        importance: of its units; the most important blocks stay.
        generator: draws.

    Returns:
        Group -> width, as large as the budget allows, within 2 % of it.

    Raises:
        ValueError: no draw came within 2 % of the budget.
    """
    target, closest = budget.target(costs), 0.0
    costs = replace(costs, classes={})
    for _ in range(TRIES):
        fractions = dict(zip(importance, torch.rand(len(importance), generator=generator).tolist(), strict=True))
        by_share = {name: _proportional(fractions[name], values) for name, values in importance.items()}
        widths = Selection("global").fit(target, budget, costs, costs.original, by_share)
        remaining = budget.remaining(costs, widths)
        if abs(remaining / target - 1) <= TOLERANCE:
            return widths
        closest = min(closest, remaining, key=lambda value: abs(value - target)) if closest else remaining
    raise ValueError(
        f"Expected structures within {TOLERANCE:.0%} of {budget}, got {closest:.1%} of the original at the closest of "
        f"{TRIES} draws: lower `round_to`, skip less, or choose another budget."
    )


def _proportional(fraction: float, importance: Float[Tensor, "units"]) -> Float[Tensor, "units"]:
    """Values in the order of importance, of which `t * fraction * units` (all at most) are at least `1 / t`."""
    places = torch.empty(len(importance))
    places[most_important_first(importance)] = torch.arange(1.0, len(importance) + 1)
    return fraction * len(importance) / places
