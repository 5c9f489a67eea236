"""Scores -> plan: how many units of each group stay, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_slim.arguments import check_fields
from lightning_slim.budgets import Budget
from lightning_slim.costs import Costs
from lightning_slim.isomorphism import classes
from lightning_slim.skipping import skips
from lightning_slim.units import Plan, UnitGroup, most_important_first

Scope = Literal["local", "global", "isomorphic"]
RoundTo = int | Literal["auto"]
ENOUGH = 0.98  # of a budget, to be spent by rounding
COARSE = 0.97  # of what may remain: where less does, other widths are tried
TILT = 4.0  # a side may be favoured by up to e^4


@dataclass(frozen=True)
class Selection:
    """Which widths are allowed, and how a budget is spread over the groups.

    Attributes:
        scope: `"local"`: every group keeps the same fraction of its original units; `"global"`: the units with the
            highest importance stay, wherever they are; of units that are chosen greedily, those that add most for
            what they cost; `"isomorphic"`: the same among groups of the same structure, each such class keeping the
            same fraction, for importance compares among equals only (Fang et al., 2024, Isomorphic Pruning).
        round_to: widths are rounded up to multiples of this (8 suits most CPUs and GPUs), as far as the original goes;
            `"auto"`: of what suits this machine, group by group, as `latency.best_steps` measures it when a run begins.
        keep_at_least: layer -> fraction of its original units that stays whatever the budget; names, patterns and
            types as for `skip`, of the layers that make the units; of several that mean one layer, the largest.
        keep_at_most: the same, for what may stay at most, from the first cut on; of several, the smallest. Groups that
            must shrink alike have the bounds of each other.
        macs_to_params: bounds of the slim network's multiply-accumulates per parameter, relative to the original's:
            (0.8, 1.25) keeps the balance between layers of many positions and layers of many weights (after He et al.,
            2023, Network Pruning Spaces). Where a budget would leave it, layers on the one side keep more and those on
            the other less, by as little as it takes; with `scope="isomorphic"`, only within classes. None lets it be.
    """

    scope: Scope = "local"
    round_to: RoundTo = 1
    keep_at_least: Mapping[str, float] = field(default_factory=dict)
    keep_at_most: Mapping[str, float] = field(default_factory=dict)
    macs_to_params: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.round_to != "auto" and not (isinstance(self.round_to, Integral) and self.round_to >= 1):
            raise ValueError(f'Expected `round_to` of at least 1, or "auto", got {self.round_to!r}.')
        check_fields(self)
        if self.macs_to_params is not None and not 0 < self.macs_to_params[0] <= 1 <= self.macs_to_params[1]:
            raise ValueError(
                "Expected `macs_to_params` to be two bounds with the original's 1 between them, such as (0.8, 1.25), "
                f"got {self.macs_to_params}."
            )
        for argument in ("keep_at_least", "keep_at_most"):
            for entry, fraction in getattr(self, argument).items():
                if not 0 < fraction <= 1:
                    raise ValueError(f"Expected fractions in (0, 1] in `{argument}`, got {fraction} for {entry!r}.")

    def bounded(self, costs: Costs, model: nn.Module, groups: Iterable[UnitGroup]) -> Costs:
        """The costs with the floors, ceilings, steps and classes asked for; steps that are `"auto"` are to be measured.

        Raises:
            ValueError: an entry means no layer whose units can be removed, or a floor is above a ceiling.
        """
        groups = list(groups)
        members: dict[str, list[UnitGroup]] = {}
        for group in groups:
            members.setdefault(group.pack or group.name, []).append(group)
        makers = {
            pack: {name: model.get_submodule(name) for group in together for name in group.makers}
            for pack, together in members.items()
        }
        least = _strictest("keep_at_least", self.keep_at_least, makers, max)
        most = _strictest("keep_at_most", self.keep_at_most, makers, min)
        floors, ceilings = dict(costs.floors), dict(costs.ceilings)
        for pack, together in members.items():
            steps = min(group.size for group in together)  # in which all of them can shrink alike
            for group in together:
                each = group.size // steps
                if pack in least:
                    floors[group.name] = max(floors[group.name], math.ceil(least[pack] * steps - 1e-9) * each)
                if pack in most:
                    ceilings[group.name] = max(math.floor(most[pack] * steps + 1e-9), 1) * each
                if floors[group.name] > ceilings.get(group.name, group.size):
                    raise ValueError(
                        f"Expected `keep_at_most` to leave {group.name} at least {floors[group.name]} of its "
                        f"{group.size} units, got {most[pack]}: raise it, or lower `keep_at_least`."
                    )
        multiple = 1 if self.round_to == "auto" else self.round_to
        units = {name: multiple * step for name, step in costs.steps.items() if name not in costs.blocks.values()}
        alike = classes(model, groups) if self.scope == "isomorphic" else {}
        return replace(costs, floors=floors, ceilings=ceilings, steps=costs.steps | units, classes=alike)

    def course(self, costs: Costs, levels: int) -> list[dict[str, int]]:
        """Widths from the original to the smallest, the same fraction of all groups of units; all blocks are kept."""
        everything = {name: torch.ones(units) for name, units in costs.original.items()}
        local = replace(self, scope="local")
        blocks = {name: costs.original[name] for name in costs.blocks.values()}
        rows = [
            {**local.widths(level / levels, costs, costs.original, everything), **blocks}
            for level in range(levels, -1, -1)
        ]
        return [row for i, row in enumerate(rows) if row not in rows[:i]]

    def widths(
        self,
        level: float,
        costs: Costs,
        current: Mapping[str, int],
        importance: Mapping[str, Float[Tensor, "units"]],
        favour: Mapping[str, float] | None = None,
    ) -> dict[str, int]:
        """Widths at a level in [0, 1]: 1 keeps all, 0 as little as possible; never wider than now, never falling in it.

        Args:
            level: how much of the original units stays.
            costs: what the model had before anything was cut, and what bounds its widths: floors, steps, packs; the
                groups of a pack keep the same fraction of their original units, as much as the one that would alone
                keep most.
            current: width of every group now.
            importance: of the units that are there now, comparable across groups; groups without stay as they are.
            favour: group -> above 1 where it is to keep more than others, below 1 where less.
        """
        original = costs.original
        favour = dict.fromkeys(importance, 1.0) if favour is None else favour
        wanted = {name: level ** (1 / favour[name]) * original[name] for name in importance}
        if self.scope != "local":
            compared: dict[str, dict[str, Tensor]] = {}
            for name, values in importance.items():
                compared.setdefault(costs.classes.get(name, ""), {})[name] = values * favour[name]
            for together in compared.values():
                wanted |= _most_important(level, original, together)
        widths = {}
        for name in wanted:
            least = max(wanted[name] - 1e-9, costs.floors[name])  # 0.7 * 10 is 7.000000000000001
            step = costs.steps[name]
            widths[name] = min(math.ceil(least / step) * step, original[name], current[name])
        for members in _members(costs.packs, widths):
            steps = min(original[name] for name in members)  # in which all of them can shrink alike
            most = max(math.ceil(widths[name] * steps / original[name]) for name in members)
            widths.update({name: most * original[name] // steps for name in members})
        return {**current, **widths}

    def fit(
        self,
        remaining: float,
        budget: Budget,
        costs: Costs,
        current: Mapping[str, int],
        importance: Mapping[str, Float[Tensor, "units"]],
    ) -> dict[str, int]:
        """The largest widths at which at most `remaining` of the original budget is left.

        Where even the smallest widths leave more, the smallest are returned; where no widths keep the bounds of
        `macs_to_params`, those closest to them.
        """
        costs = costs.ranked(importance)
        if self.macs_to_params is None:
            return self._fitted(remaining, budget, costs, current, importance, None)
        low, high = self.macs_to_params
        lean = _lean(costs, current, importance)

        def tilted(tilt: float) -> dict[str, int]:
            favour = {name: math.exp(tilt * towards) for name, towards in lean.items()}
            return self._fitted(remaining, budget, costs, current, importance, favour)

        widths = tilted(0.0)
        if low <= costs.macs_to_params(widths) <= high:
            return widths
        if costs.macs_to_params(widths) > high:  # the ratio rises with the tilt
            return tilted(-TILT + TILT * _largest(lambda x: costs.macs_to_params(tilted(-TILT + TILT * x)) <= high))
        return tilted(TILT - TILT * _largest(lambda x: costs.macs_to_params(tilted(TILT - TILT * x)) >= low))

    def check_balance(self, budget: Budget, costs: Costs) -> None:
        """Raises a ValueError where no widths keep both a budget and the bounds of `macs_to_params`."""
        everything = {name: torch.ones(units) for name, units in costs.original.items()}
        local = replace(self, scope="local")
        widths = local.fit(budget.target(costs), budget, costs, costs.original, everything)
        if self._out_of_balance(costs, widths) > 0:
            raise ValueError(
                f"Expected bounds of `macs_to_params` that can be kept with {budget}, got {self.macs_to_params}: the "
                f"closest is {costs.macs_to_params(widths):.3f}. Widen them, ask for another budget, or skip less."
            )

    def _out_of_balance(self, costs: Costs, widths: Mapping[str, int]) -> float:
        """How far some widths are beyond the bounds of `macs_to_params`, as a factor; 0 within."""
        if self.macs_to_params is None:
            return 0.0
        ratio, (low, high) = costs.macs_to_params(widths), self.macs_to_params
        return max(low / ratio, ratio / high, 1.0) - 1

    def _fitted(
        self,
        remaining: float,
        budget: Budget,
        costs: Costs,
        current: Mapping[str, int],
        importance: Mapping[str, Float[Tensor, "units"]],
        favour: Mapping[str, float] | None,
    ) -> dict[str, int]:
        """The largest affordable widths, given which groups are to keep more than others."""
        blocks = set(costs.blocks.values())
        most = (remaining + 1e-12) * budget.whole(costs)
        bounds = {name: costs.ceilings[name] for name in importance if name in costs.ceilings}
        current = {name: min(units, bounds.get(name, units)) for name, units in current.items()}

        def at(level: float, fixed: Mapping[str, int]) -> dict[str, int]:
            return {**self.widths(level, costs, current, importance, favour), **fixed}

        def affordable(widths: Mapping[str, int]) -> bool:
            return budget.count(costs, widths) <= most

        def fitted(fixed: Mapping[str, int]) -> dict[str, int]:
            return at(_largest(lambda level: affordable(at(level, fixed))), fixed)

        widths = fitted({})
        # A block is worth many units: once it is known how many of them go, these may be wider.
        fixed = {name: widths[name] for name in blocks}
        widths = fitted(fixed)
        while (wider := self._spend_the_rest(widths, current, costs, affordable)) != widths:
            widths = wider
            if budget.count(costs, widths) >= ENOUGH * most:
                break
        # One step of a pack (all heads and the stream through them) may be worth more than what was left to go: it is
        # not taken where others, which have finer steps, can go instead.
        for members in _members(costs.packs, widths) if budget.count(costs, widths) < COARSE * most else ():
            finer = fitted({**fixed, **_one_step_wider(members, widths, current, costs)})
            more = budget.count(costs, finer) > budget.count(costs, widths)
            if more and affordable(finer) and self._out_of_balance(costs, finer) <= self._out_of_balance(costs, widths):
                widths = finer
        return widths

    def _spend_the_rest(
        self,
        widths: dict[str, int],
        current: Mapping[str, int],
        costs: Costs,
        affordable: Callable[[Mapping[str, int]], bool],
    ) -> dict[str, int]:
        """Groups of one size all change at the same level, which leaves something over: one step more for each."""
        packs = _members(costs.packs, widths)
        alone = [[name] for name in widths if name not in costs.packs]
        for members in sorted([*alone, *packs], key=lambda m: widths[m[0]] / costs.original[m[0]]):
            wider = {**widths, **_one_step_wider(members, widths, current, costs)}
            if affordable(wider) and self._out_of_balance(costs, wider) <= self._out_of_balance(costs, widths):
                widths = wider
        return widths


def _one_step_wider(
    members: Iterable[str], widths: Mapping[str, int], current: Mapping[str, int], costs: Costs
) -> dict[str, int]:
    return {name: min(widths[name] + costs.steps[name], current[name]) for name in members}


def _lean(costs: Costs, current: Mapping[str, int], groups: Iterable[str]) -> dict[str, float]:
    """Group -> from -1, where its units have parameters only, to 1, where they have multiply-accumulates only."""

    def of_one(count: Callable[[Mapping[str, int]], int], name: str) -> float:
        return 1 - count({**current, name: current[name] - 1}) / count(current)

    shares = {name: (of_one(costs.macs, name), of_one(costs.params, name)) for name in groups}
    return {name: (macs - params) / (macs + params) for name, (macs, params) in shares.items()}


def _strictest(
    argument: str,
    bounds: Mapping[str, float],
    makers: Mapping[str, Mapping[str, nn.Module]],
    choose: Callable[[Iterable[float]], float],
) -> dict[str, float]:
    """Group or pack -> the bound that counts, of all that mean a layer that makes its units."""
    found: dict[str, list[float]] = {}
    for entry, fraction in bounds.items():
        meant = [pack for pack, layers in makers.items() if any(skips(entry, n, m) for n, m in layers.items())]
        if not meant:
            raise ValueError(
                f"Expected `{argument}` to name layers, patterns or types of layers whose units can be removed, got "
                f"{entry!r}: there are {', '.join(makers)}."
            )
        for pack in meant:
            found.setdefault(pack, []).append(fraction)
    return {pack: choose(fractions) for pack, fractions in found.items()}


def _members(packs: Mapping[str, str], widths: Mapping[str, int]) -> list[list[str]]:
    """The groups of each pack, of those that have a width."""
    names: dict[str, list[str]] = {}
    for name, pack in packs.items():
        if name in widths:
            names.setdefault(pack, []).append(name)
    return list(names.values())


def plan_for(widths: Mapping[str, int], importance: Mapping[str, Float[Tensor, "units"]]) -> Plan:
    """Keeps the most important units of every group that shrinks; of equals, the first."""
    plan = Plan()
    for name, values in importance.items():
        if widths[name] < len(values):
            keep = torch.zeros(len(values), dtype=torch.bool)
            keep[most_important_first(values)[: widths[name]]] = True
            plan[name] = keep
    return plan


def comparable(importance: Float[Tensor, "units"]) -> Float[Tensor, "units"]:
    """Importance relative to its group's mean, so that layers of different scale compare (Molchanov et al., 2017)."""
    mean = importance.mean()
    return importance / mean if mean > 0 else importance


def steepness(
    curves: Mapping[str, Float[Tensor, "units"]], costs: Mapping[str, float]
) -> dict[str, Float[Tensor, "chosen"]]:
    """What each chosen unit of each group adds for what it costs, relative to the mean over all groups.

    Where units are chosen greedily, each group has a curve: how much its first 1, 2, ... chosen units explain. A budget
    for all groups is spent best where the curve is steepest. Curves are replaced by their concave hulls, so that a unit
    never adds more than one that was chosen before it.

    Args:
        curves: group -> what the first chosen units explain, one more at a time, as shares that compare across groups.
        costs: group -> what one unit costs, in any unit.

    Example:
        >>> steepness({"a": torch.tensor([0.75, 1.0])}, {"a": 2.0})["a"].tolist()
        [1.5, 0.5]
    """
    slopes = {name: _concave_slopes(curve) / max(costs[name], 1e-12) for name, curve in curves.items()}
    mean = float(torch.cat(list(slopes.values())).mean()) if slopes else 1.0
    return {name: slope / max(mean, 1e-300) for name, slope in slopes.items()}


def _concave_slopes(curve: Float[Tensor, "units"]) -> Float[Tensor, "units"]:
    """Slopes of the least concave curve from 0 that is nowhere below: isotonic regression of its steps."""
    blocks: list[tuple[float, int]] = []  # mean step, length
    for step in curve.diff(prepend=curve.new_zeros(1)).tolist():
        blocks.append((step, 1))
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            (later, m), (before, n) = blocks.pop(), blocks.pop()
            blocks.append(((later * m + before * n) / (m + n), m + n))
    return torch.cat([curve.new_full((length,), slope) for slope, length in blocks])


def _most_important(
    level: float, original: Mapping[str, int], importance: Mapping[str, Float[Tensor, "units"]]
) -> dict[str, float]:
    """How many of the most important units of some groups each has, if `level` of their original units stay."""
    everywhere = torch.cat(list(importance.values())).sort(descending=True).values
    count = min(math.floor(level * sum(original[name] for name in importance) + 1e-9), len(everywhere))
    if count == 0:
        return dict.fromkeys(importance, 0.0)
    return {name: float((values >= everywhere[count - 1]).sum()) for name, values in importance.items()}


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest level in [0, 1], to 1e-6, at which a condition that holds from below still holds; 0 if none."""
    if holds(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
