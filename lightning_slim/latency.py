"""How long each layer takes at several widths, measured on the machine at hand."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from lightning_slim.costs import Costs, Table, Widths
from lightning_slim.profile import evaluating, one_thread, steady_memory
from lightning_slim.surgery import Example, calls_after, remove_units
from lightning_slim.units import UnitGroup
from lightning_slim.weight_norm import settle

LEVELS = 16  # of all widths, at which layers are timed
ROUNDS, SECONDS, MOST_ROUNDS = 9, 2.0, 100  # at least, then for so long, but not more
STEPS = (16, 8, 4, 2)
WIDEST = 32  # at more, a step is too small a part of a layer's time to be told from noise
CHEAPER = 1.12


def check_device(model: nn.Module) -> None:
    """Raises a ValueError where the model is not on the CPU."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise ValueError(
            f"Expected a model on the CPU to measure its latency, got {', '.join(sorted(devices))}: only CPU time is "
            "measured. Use `MACs`, and a number for `round_to`, there."
        )


def measure(
    model: nn.Module, groups: Sequence[UnitGroup], calls: Mapping[str, Example], costs: Costs, rows: Sequence[Widths]
) -> Table:
    """What each layer takes at several widths; a width that takes longer than a larger one counts as that one.

    Args:
        model: that was not cut yet; left as it was.
        groups: all of its groups.
        calls: its networks, each with one call; the batch in it is what is timed.
        costs: of the model.
        rows: the widths, all blocks kept.

    Returns:
        Layer -> share of its work that stays, ascending -> milliseconds, never falling.
    """
    times = _times(model, groups, calls, costs, rows)
    table: Table = {}
    for layer in times[0]:
        found: dict[float, float] = {}
        for widths, taken in zip(rows, times, strict=True):
            found.setdefault(costs.share(layer, widths), taken[layer])
        shares = sorted(found, reverse=True)
        table[layer] = list(zip(shares, accumulate((found[s] for s in shares), min), strict=True))[::-1]
    return table


def steps_of_table(costs: Costs) -> dict[str, int]:
    """No finer than what a table tells apart: the largest power of two in a sixteenth of a group, of at most 16.

    Odd widths between those of the table would often be slower than it says.

    Returns:
        Group -> step, of all groups of units; the groups of a pack stay in step.
    """
    alike = {name: costs.original[name] // step for name, step in costs.steps.items()}
    units = {name: 2 ** max((min(alike[name] // LEVELS, 16)).bit_length() - 1, 0) for name in alike}
    return {name: units[name] * step for name, step in costs.steps.items() if name not in costs.blocks.values()}


def best_steps(
    model: nn.Module, groups: Sequence[UnitGroup], calls: Mapping[str, Example], costs: Costs
) -> dict[str, int]:
    """What the width of each group should be a multiple of on this machine.

    Kernels take units in packets: between two full ones a width costs (nearly) as much as the next full one, or more.
    So a step s of 16, 8, 4 and 2 is good for a group if its layers take at least 12 % longer halfway between two
    multiples of s than the two multiples say, by linear interpolation in the multiply-accumulates of these layers. The
    largest good one is taken; 1 if there is none. What takes time at any width cancels out. Widths are tried just below
    the largest power of two that a group has, of at most 32; steps are no larger than half of that. All groups are cut
    alike, so one takes over what suits a layer that it shares with another.

    Args:
        model: that was not cut yet; left as it was.
        groups: all of its groups.
        calls: its networks, each with one call; the batch in it is what is timed.
        costs: of the model.

    Returns:
        Group -> step, of all groups of units; the groups of a pack stay in step.
    """
    packs: defaultdict[str, list[UnitGroup]] = defaultdict(list)
    for group in groups:
        if not group.blocks:
            packs[group.pack or group.name].append(group)
    tried = [_Tried.of(pack, costs) for pack in packs.values()]
    offsets = (0, 1, *STEPS[::-1])
    rows = [costs.original | {n: w for each in tried for n, w in each.widths(offset).items()} for offset in offsets]
    times = _times(model, groups, calls, costs, rows)
    steps: dict[str, int] = {}
    for each in tried:
        points = {
            offset: (costs.macs_of(each.layers, widths), sum(taken[layer] for layer in each.layers))
            for offset, widths, taken in zip(offsets, rows, times, strict=True)
            if each.base - offset >= each.least
        }
        good = [s for s in STEPS if s in points and _halfway(points[s], points[s // 2], points[0]) >= CHEAPER]
        steps |= {name: max(good, default=1) * units for name, units in each.members.items()}
    return steps


@dataclass(frozen=True)
class _Tried:
    """Groups that shrink together, while steps are tried.

    Attributes:
        members: group -> how many of its units go with one of the pack's smallest.
        base: units of the smallest, just below which widths are tried.
        least: of them, how many must stay.
        layers: that take less time then.
    """

    members: dict[str, int]
    base: int
    least: int
    layers: set[str]

    @classmethod
    def of(cls, pack: Sequence[UnitGroup], costs: Costs) -> _Tried:
        fewest = min(group.size for group in pack)
        base = 2 ** (min(fewest, WIDEST).bit_length() - 1)
        members = {group.name: group.size // fewest for group in pack}
        least = max(-(-group.floor // members[group.name]) for group in pack)
        layers = set().union(*(costs.layers_of(name) for name in members))
        return cls(members, base, max(least, base // 2), layers)

    def widths(self, offset: int) -> dict[str, int]:
        """Group -> width, so many units below the base."""
        return {name: max(self.base - offset, self.least) * each for name, each in self.members.items()}


def _halfway(lower: tuple[float, float], between: tuple[float, float], upper: tuple[float, float]) -> float:
    """How many times longer than its neighbours say a width takes, of (multiply-accumulates, milliseconds)."""
    share = (between[0] - lower[0]) / (upper[0] - lower[0])
    return between[1] / (lower[1] + share * (upper[1] - lower[1]))


def _times(
    model: nn.Module, groups: Sequence[UnitGroup], calls: Mapping[str, Example], costs: Costs, rows: Sequence[Widths]
) -> list[dict[str, float]]:
    """Cuts copies of a model to some widths, and times them in turns on one thread, layer by layer, by CPU time.

    A layer's time is that until the next one begins: norms, activations and sums that follow it count as its own.

    Returns:
        Of each of `rows`, layer -> median milliseconds.
    """
    settle(model)  # a weight with a graph behind it cannot be copied
    copies = []
    for widths in rows:
        plan = {n: torch.arange(u) < widths[n] for n, u in costs.original.items() if widths[n] < u}
        narrowed = calls_after(model, groups, plan, calls)
        cut = copy.deepcopy(model)
        remove_units(cut, groups, plan)
        copies.append((cut, narrowed))
    layers = {work.layer for work in costs.work}
    times: list[defaultdict[str, list[float]]] = [defaultdict(list) for _ in rows]
    order, shuffle, begin = list(range(len(copies))), random.Random(0), time.perf_counter()
    with one_thread(), steady_memory():
        for done in range(MOST_ROUNDS):
            if done > ROUNDS and time.perf_counter() - begin > SECONDS:
                break
            shuffle.shuffle(order)
            for i in order:
                spent = _spent(*copies[i], layers)
                for layer in spent if done else ():  # the first round warms up
                    times[i][layer].append(spent[layer])
    return [{layer: 1000 * statistics.median(t) for layer, t in taken.items()} for taken in times]


def _spent(model: nn.Module, calls: Mapping[str, Example], layers: set[str]) -> dict[str, float]:
    """CPU seconds of one pass, layer by layer; what comes before the first belongs to it."""
    marks: list[tuple[str, float]] = []

    def mark(name: str, *_: Any) -> None:
        marks.append((name, time.process_time()))

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(mark, name)) for name in layers]
    spent: defaultdict[str, float] = defaultdict(float)
    for root, call in calls.items():
        network = model.get_submodule(root)
        with evaluating(network), torch.no_grad():
            begin = time.process_time()
            network(*call.args, **call.kwargs)
            end = time.process_time()
        if marks:
            marks[0] = marks[0][0], begin
        for (name, start), (_, stop) in zip(marks, [*marks[1:], ("", end)], strict=True):
            spent[name] += stop - start
        marks.clear()
    for handle in handles:
        handle.remove()
    return spent
