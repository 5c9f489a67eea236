"""How long each layer takes at several widths, measured on the machine at hand."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from lightning_slim.costs import Costs, Table
from lightning_slim.profile import evaluating, one_thread
from lightning_slim.surgery import Example, remove_units
from lightning_slim.units import UnitGroup
from lightning_slim.weight_norm import settle

LEVELS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)  # of all widths, beside the smallest
ROUNDS = 9


def measure(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    calls: Mapping[str, Example],
    costs: Costs,
    smallest: Mapping[str, int],
) -> Table:
    """Cuts copies of a model to several widths, and times them in turns on one thread, layer by layer, by CPU time.

    A layer's time is that until the next one begins: norms, activations and sums that follow it count as its own.

    Args:
        model: that was not cut yet; left as it was.
        groups: all of its groups.
        calls: its networks, each with one call; the batch in it is what is timed.
        costs: of the model.
        smallest: widths that are the smallest allowed.

    Returns:
        Layer -> share of its work that stays, ascending -> milliseconds, never falling.

    Raises:
        ValueError: the model is not on the CPU.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise ValueError(
            f"Expected a model on the CPU to measure its latency, got {', '.join(sorted(devices))}: only CPU time is "
            "measured. Use `MACs` there."
        )
    rows = [{n: max(round(level * units), smallest[n]) for n, units in costs.original.items()} for level in LEVELS]
    rows.append(dict(smallest))
    settle(model)  # a weight with a graph behind it cannot be copied
    copies = []
    for widths in rows:
        cut = copy.deepcopy(model)
        sizes = costs.original.items()
        remove_units(cut, groups, {n: torch.arange(u) < widths[n] for n, u in sizes if widths[n] < u})
        copies.append(cut)
    layers = {work.layer for work in costs.work}
    times: list[defaultdict[str, list[float]]] = [defaultdict(list) for _ in rows]
    with one_thread():
        for done in range(ROUNDS + 1):
            for cut, taken in zip(copies, times, strict=True):
                spent = _spent(cut, calls, layers)
                for layer in spent if done else ():  # the first round warms up
                    taken[layer].append(spent[layer])
    table: Table = {}
    for layer in times[0]:
        found: dict[float, float] = {}
        for widths, taken in zip(rows, times, strict=True):
            found.setdefault(costs.share(layer, widths), 1000 * statistics.median(taken[layer]))
        shares = sorted(found)
        table[layer] = list(zip(shares, accumulate((found[s] for s in shares), max), strict=True))
    return table


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
