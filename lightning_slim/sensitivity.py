"""What becomes of a network's metrics when the least important units of one group after another are taken away."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from lightning_slim.chart import line_chart, save_svg
from lightning_slim.costs import Costs
from lightning_slim.monitor import Metrics, Mode, Monitor
from lightning_slim.selection import Selection, plan_for
from lightning_slim.units import Plan, UnitGroup

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Curve:
    """What taking units from one group costs. Groups that must shrink together are one.

    Attributes:
        layer: makes the units; by this name `keep_at_least` knows them.
        units: how many there are.
        gone: fraction that was asked for -> how many went: whole units, and never more than may go.
        metrics: fraction that was asked for -> what validation logged.
    """

    layer: str
    units: int
    gone: dict[float, int]
    metrics: dict[float, Metrics]


@dataclass(frozen=True)
class SensitivityTable:
    """How sensitive a network is to the loss of units, group by group.

    Attributes:
        fractions: of a group's units that were taken away, rising.
        whole: what validation logged of the network as it is.
        curves: group -> what taking units from it costs.
        left_whole: layer -> why nothing can be removed from it.
    """

    fractions: tuple[float, ...]
    whole: Metrics
    curves: dict[str, Curve]
    left_whole: dict[str, str] = field(default_factory=dict)

    def drops(self, monitor: str, mode: Mode) -> dict[str, dict[float, float]]:
        """Group -> fraction gone -> how much worse a metric is, in its own unit; below 0 where it is better."""
        watched = Monitor(monitor, mode)
        return {
            name: {fraction: watched.drop(self.whole, metrics) for fraction, metrics in curve.metrics.items()}
            for name, curve in self.curves.items()
        }

    def ceilings(self, monitor: str, max_drop: float, mode: Mode) -> dict[str, float]:
        """Group -> the largest fraction that may go alone: it, and all smaller ones tried, cost at most `max_drop`.

        It is 0 where even the smallest fraction cost more.

        Args:
            monitor: a metric that validation logs.
            max_drop: how much worse it may get, in its own unit.
            mode: `"max"` if larger is better, `"min"` if smaller is.

        Raises:
            ValueError: the metric was not logged.
        """
        found = {}
        for name, of_group in self.drops(monitor, mode).items():
            bad = [fraction for fraction, drop in of_group.items() if not drop <= max_drop]
            found[name] = max((f for f in of_group if not bad or f < min(bad)), default=0.0)
        return found

    def keep_at_least(self, monitor: str, max_drop: float, mode: Mode) -> dict[str, float]:
        """Layer -> fraction of its units that must stay: what `Prune(keep_at_least=...)` and `Selection` take.

        Each layer alone costs at most `max_drop` then; all together may cost more.
        """
        least: dict[str, float] = {}
        for name, ceiling in self.ceilings(monitor, max_drop, mode).items():
            layer = self.curves[name].layer
            least[layer] = max(least.get(layer, 0.0), round(1 - ceiling, 12))
        return least

    def to_markdown(self, *monitors: str) -> str:
        """One Markdown table for each metric (all that were logged, if none is named): a row for each group."""
        tables = []
        for monitor in monitors or tuple(self.whole):
            whole = Monitor(monitor, "min").of(self.whole)
            lines = [
                f"| {monitor} | units | 0% | {' | '.join(f'{fraction:.0%}' for fraction in self.fractions)} |",
                f"|---|{'---:|' * (len(self.fractions) + 2)}",
            ]
            for name, curve in self.curves.items():
                values = [whole, *(curve.metrics[fraction][monitor] for fraction in self.fractions)]
                lines.append(f"| {name} | {curve.units} | {' | '.join(f'{value:.4f}' for value in values)} |")
            tables.append("\n".join(lines))
        if self.left_whole:
            reasons = (f"- {layer}: {reason}" for layer, reason in self.left_whole.items())
            tables.append("\n".join(["Left whole:", "", *reasons]))
        return "\n\n".join(tables) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()

    def to_json(self) -> str:
        """Keys `fractions`, `whole`, `curves` (group -> `layer`, `units`, `gone`, `metrics`) and `left_whole`."""
        return json.dumps(asdict(self), indent=2)

    def plot(self, path: str | Path, monitor: str) -> None:
        """Writes an SVG file: the metric against the fraction gone, a line for each group.

        Raises:
            ValueError: the metric was not logged, or the file is not to be an SVG.
        """
        watched = Monitor(monitor, "min")
        lines = {
            name: [(0.0, watched.of(self.whole)), *((f, watched.of(m)) for f, m in curve.metrics.items())]
            for name, curve in self.curves.items()
        }
        save_svg(path, line_chart(lines, "fraction of the group's units taken away", monitor))


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises a ValueError unless fractions rise between 0 and 1."""
    if not fractions or sorted(set(fractions)) != list(fractions) or not 0 < fractions[0] <= fractions[-1] < 1:
        raise ValueError(f"Expected `fractions` that rise between 0 and 1, such as (0.25, 0.5), got {fractions}.")


def take_away(
    groups: Sequence[UnitGroup],
    importance: Mapping[str, Float[Tensor, "units"]],
    costs: Costs,
    fractions: Sequence[float],
    evaluate: Callable[[Plan], Metrics],
    left_whole: Mapping[str, str],
) -> SensitivityTable:
    """Takes the least important units from one group after another, and evaluates what is left.

    Args:
        groups: of the network as it is now.
        importance: of the units that are there now; groups without are left alone.
        costs: say which groups must shrink together, and how many units must stay.
        fractions: of a group's units that go, rising.
        evaluate: the metrics of the network without the units that a plan removes.
        left_whole: for the table.
    """
    by_name = {group.name: group for group in groups if group.name in importance}
    sizes = {name: group.size for name, group in by_name.items()}
    now = replace(costs, original=sizes, steps=dict.fromkeys(sizes, 1))  # fractions are of what is there, not rounded
    together: dict[str, list[str]] = {}
    for name, group in by_name.items():
        together.setdefault(group.pack or name, []).append(name)
    whole = evaluate(Plan())
    curves = {}
    for row, members in together.items():
        theirs = {name: importance[name].cpu() for name in members}
        units = sum(sizes[name] for name in members)
        gone: dict[float, int] = {}
        metrics: dict[float, Metrics] = {}
        known = {0: whole}
        for fraction in fractions:
            widths = Selection().widths(1 - fraction, now, sizes, theirs)
            plan = plan_for(widths, theirs)
            gone[fraction] = plan.removed
            if plan.removed not in known:  # a small group may lose as many units at two fractions
                known[plan.removed] = evaluate(plan)
            metrics[fraction] = known[plan.removed]
        curves[row] = Curve(_maker(by_name[members[0]]), units, gone, metrics)
    return SensitivityTable(tuple(fractions), whole, curves, dict(left_whole))


def _maker(group: UnitGroup) -> str:
    """A layer that makes a group's units: the one that it is named for, if that is one."""
    layer = group.name.partition("#")[0]
    return min(group.makers, key=lambda maker: (maker != layer, maker))
