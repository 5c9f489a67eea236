"""What a model would cost after a plan, without carrying it out."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_slim.units import UnitGroup, most_important_first, named_tensors

Table = dict[str, list[tuple[float, float]]]  # layer -> shares of its work that stay, ascending, with milliseconds
Widths = Mapping[str, int]  # group name -> number of units that stay


@dataclass(frozen=True)
class _Axis:
    """One axis of a tensor: its full size, and how many positions each unit of each group takes of it."""

    size: int
    per_unit: dict[str, int]

    def kept(self, original: Widths, widths: Widths) -> int:
        return self.size - sum((original[g] - widths[g]) * width for g, width in self.per_unit.items())


class Factor(NamedTuple):
    """One index of a product: it takes fewer values when units go.

    Attributes:
        size: how many it takes.
        at: (tensor, axis) -> the positions that these stand for, each as often as it occurs.
    """

    size: int
    at: Mapping[tuple[str, int], Tensor]


class Product(NamedTuple):
    """A product of matrices, or a convolution, that a layer carried out.

    Attributes:
        macs: of it.
        factors: what these are proportional to.
    """

    macs: int
    factors: Sequence[Factor]


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates that shrink as some tensors do.

    Attributes:
        macs: of one forward pass of one sample.
        tensors: what they are proportional to; to nothing that can shrink, if there is none.
        axis: only the size of this axis counts, not all entries.
        layer: that does it.
        indices: what they are proportional to instead, all at once.
    """

    macs: float
    tensors: tuple[str, ...] = ()
    axis: int | None = None
    layer: str = ""
    indices: tuple[_Axis, ...] = ()


@dataclass(frozen=True)
class Costs:
    """Units, parameters, MACs and bytes of a model as functions of the widths of its groups.

    The MACs of a product are proportional to each of its indices, as far as it was seen. Otherwise those of a layer are
    proportional to the entries of its matrices, and those of attention itself to its heads. That is exact for linear
    layers, convolutions and recurrent layers of every kind, as long as the sizes between them (pixels, steps) stay.

    Attributes:
        original: width of every group before anything was cut.
        parameters: number of all parameters of the model.
        work: all multiply-accumulates of one forward pass.
        shapes: tensor -> shape, of all parameters and buffers that a group touches or that work goes by.
        axes: tensor -> axis -> who owns how much of it.
        packs: group -> pack, of those that must keep as many units as others.
        floors: group -> how many units must stay at least.
        ceilings: group -> how many units may stay at most, where that is bounded.
        steps: group -> what its width is a multiple of.
        classes: group -> class of those that its units are ranked among; empty if among all.
        storage: bytes of the whole state dict; a tied tensor counts once.
        itemsizes: tensor -> bytes of an entry, of those of `shapes` that are in the state dict.
        buffers: those of `shapes` that are no parameters.
        blocks: block -> its group, of those that are still there, the most important first: a width leaves the first.
        gone: blocks that were taken out.
        table: measured milliseconds of every layer; empty if nothing was measured.
    """

    original: dict[str, int]
    parameters: int
    work: list[Work]
    shapes: dict[str, list[int]]
    axes: dict[str, dict[int, _Axis]]
    packs: dict[str, str]
    floors: dict[str, int]
    ceilings: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    storage: int = 0
    itemsizes: dict[str, int] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    blocks: dict[str, str] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    table: Table = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        groups: Iterable[UnitGroup],
        work: Iterable[Work],
        apart: Collection[str] = (),
        products: Mapping[str, Sequence[Product]] = MappingProxyType({}),
    ) -> Costs:
        """Costs of a model that was not cut yet.

        Args:
            model: as it is.
            groups: all of its groups.
            work: what `surgery.find_work` found.
            apart: names of modules; what lies in them does not count.
            products: layer -> what it was seen to carry out, of those that were seen.
        """
        groups = list(groups)
        tensors = named_tensors(model)
        first_name = {id(tensor): name for name, tensor in reversed(tensors.items())}
        owned: defaultdict[str, defaultdict[int, dict[str, set[int]]]] = defaultdict(lambda: defaultdict(dict))
        for group in groups:
            for span in group.spans:
                name = first_name[id(tensors[span.tensor])]
                owned[name][span.axis].setdefault(group.name, set()).update(span.index.flatten().tolist())
        original = {group.name: group.size for group in groups}
        axes = {
            name: {
                axis: _Axis(tensors[name].shape[axis], {g: len(at) // original[g] for g, at in by_group.items()})
                for axis, by_group in by_axis.items()
            }
            for name, by_axis in owned.items()
        }
        work = _by_index(list(work), products, owned, original)
        work = [replace(each, tensors=tuple(first_name[id(tensors[n])] for n in each.tensors)) for each in work]
        blocks = {path: group.name for group in groups for path in group.blocks}
        inside = {first_name[id(t)] for path in blocks for t in named_tensors(model.get_submodule(path)).values()}
        names = {*axes, *inside, *(name for each in work for name in each.tensors)}
        shapes = {name: list(tensors[name].shape) for name in tensors if name in names}
        packs = {group.name: group.pack for group in groups if group.pack}
        least: dict[str, int] = {}  # pack -> in how many steps all of it can shrink alike
        for name, pack in packs.items():
            least[pack] = min(original[name], least.get(pack, original[name]))
        aside = tuple(f"{name}." for name in apart)
        counted = {name: t for name, t in model.state_dict(keep_vars=True).items() if not name.startswith(aside)}
        stored = {id(t): t for t in counted.values() if isinstance(t, Tensor)}
        return cls(
            original=original,
            parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith(aside)),
            work=work,
            shapes=shapes,
            axes=axes,
            packs=packs,
            floors={group.name: group.floor for group in groups},
            steps={name: units // least[packs[name]] if name in packs else 1 for name, units in original.items()},
            storage=sum(t.numel() * t.itemsize for t in stored.values()),
            itemsizes={name: tensors[name].itemsize for name in shapes if id(tensors[name]) in stored},
            buffers=tuple(name for name in shapes if not isinstance(tensors[name], nn.Parameter)),
            blocks=blocks,
        )

    def units(self, widths: Widths) -> int:
        """Number of units that stay."""
        return sum(widths[name] for name in self.original)

    def params(self, widths: Widths) -> int:
        """Number of parameters that stay."""
        return self.parameters - self._saved(dict.fromkeys(self.shapes.keys() - set(self.buffers), 1), widths)

    def bytes(self, widths: Widths) -> int:
        """Bytes of the tensors of the state dict that stay."""
        return self.storage - self._saved(self.itemsizes, widths)

    def macs(self, widths: Widths) -> int:
        """Multiply-accumulates of one forward pass of the example."""
        lost = self._lost(widths)
        left = (each for each in self.work if not f"{each.layer}.".startswith(lost))
        return round(sum(each.macs * self._share(each, widths) for each in left))

    def macs_to_params(self, widths: Widths) -> float:
        """Multiply-accumulates per parameter that stays, relative to those of the original."""
        whole = self.whole
        return self.macs(widths) / self.params(widths) / (whole.macs(self.original) / whole.params(self.original))

    def milliseconds(self, widths: Widths) -> float:
        """Time of one forward pass of the example batch, from the measured table; between its entries, linear."""
        if not self.table:
            raise ValueError("Expected a measured table of latencies, got none: let `Pruner.prepare` measure it.")
        lost = self._lost(widths)
        left = (layer for layer in self.table if not f"{layer}.".startswith(lost))
        return sum(_interpolated(self.table[layer], self.share(layer, widths)) for layer in left)

    def share(self, layer: str, widths: Widths) -> float:
        """Share of a layer's multiply-accumulates that stays."""
        return self.macs_of({layer}, widths) / self.macs_of({layer}, self.original)

    def macs_of(self, layers: Collection[str], widths: Widths) -> float:
        """Multiply-accumulates of some layers, none of them in a block that goes."""
        return sum(each.macs * self._share(each, widths) for each in self.work if each.layer in layers)

    def layers_of(self, group: str) -> set[str]:
        """The layers whose work shrinks with a group."""
        touched = {name for name, axes in self.axes.items() if any(group in axis.per_unit for axis in axes.values())}
        return {
            each.layer
            for each in self.work
            if not touched.isdisjoint(each.tensors) or any(group in index.per_unit for index in each.indices)
        }

    def ranked(self, importance: Mapping[str, Float[Tensor, "units"]]) -> Costs:
        """The costs where the most important blocks stay; `importance` is in the order of `blocks`."""
        ranked: dict[str, str] = {}
        for group in dict.fromkeys(self.blocks.values()):
            paths = [path for path, owner in self.blocks.items() if owner == group]
            order = most_important_first(importance[group]) if group in importance else range(len(paths))
            ranked.update((paths[i], group) for i in order)
        return replace(self, blocks=ranked)

    def without(self, blocks: Iterable[str]) -> Costs:
        """The costs after some blocks were taken out."""
        blocks = set(blocks)
        left = {path: group for path, group in self.blocks.items() if path not in blocks}
        return replace(self, blocks=left, gone=(*self.gone, *sorted(blocks)))

    @property
    def whole(self) -> Costs:
        """The costs with all blocks that there ever were, at `original` widths: what fractions are fractions of."""
        return replace(self, gone=())

    def _lost(self, widths: Widths) -> tuple[str, ...]:
        """What the names of tensors and layers begin with that are in blocks that go."""
        left, lost = dict(widths), list(self.gone)
        for path, group in self.blocks.items():
            left[group] -= 1
            if left[group] < 0:
                lost.append(path)
        return tuple(f"{path}." for path in lost)

    def _saved(self, each: Mapping[str, int], widths: Widths) -> int:
        """What goes of some tensors, given what an entry of each counts."""
        lost = self._lost(widths)
        return sum(
            count * (self._full(name) - (0 if name.startswith(lost) else self._left(name, widths)))
            for name, count in each.items()
        )

    def _full(self, tensor: str) -> int:
        return math.prod(self.shapes[tensor])

    def _left(self, tensor: str, widths: Widths) -> int:
        return math.prod(self._size(tensor, axis, widths) for axis in range(len(self.shapes[tensor])))

    def _size(self, tensor: str, axis: int, widths: Widths) -> int:
        """Of one axis of a tensor."""
        owners = self.axes.get(tensor, {}).get(axis)
        return self.shapes[tensor][axis] if owners is None else owners.kept(self.original, widths)

    def _share(self, work: Work, widths: Widths) -> float:
        """What stays of it."""
        if work.indices:
            return math.prod(index.kept(self.original, widths) / index.size for index in work.indices)
        if work.axis is not None:
            full = sum(self.shapes[tensor][work.axis] for tensor in work.tensors)
            return sum(self._size(tensor, work.axis, widths) for tensor in work.tensors) / full
        full = sum(map(self._full, work.tensors))
        return sum(self._left(tensor, widths) for tensor in work.tensors) / full if full else 1.0

    def to_state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        axes = {
            name: {axis: (owner.size, owner.per_unit) for axis, owner in by_axis.items()}
            for name, by_axis in self.axes.items()
        }
        work = [
            {**vars(each), "indices": [(index.size, index.per_unit) for index in each.indices]} for each in self.work
        ]
        return {**vars(self), "axes": axes, "work": work}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Costs:
        """The inverse of `to_state`."""
        axes = {
            name: {int(axis): _Axis(*owner) for axis, owner in by_axis.items()}
            for name, by_axis in state["axes"].items()
        }
        table = {layer: [tuple(entry) for entry in entries] for layer, entries in state["table"].items()}
        work = [
            Work(**{**each, "tensors": tuple(each["tensors"]), "indices": tuple(_Axis(*i) for i in each["indices"])})
            for each in state["work"]
        ]
        sequences = {name: tuple(state[name]) for name in ("buffers", "gone")}
        return cls(**{**state, "axes": axes, "work": work, "table": table, **sequences})


def _by_index(
    work: list[Work],
    products: Mapping[str, Sequence[Product]],
    owned: Mapping[str, Mapping[int, Mapping[str, set[int]]]],
    original: Widths,
) -> list[Work]:
    """The work of layers whose products were seen, product by product."""
    made = [each for each in work if each.layer not in products]
    for layer in dict.fromkeys(each.layer for each in work if each.layer in products):
        whole = sum(each.macs for each in work if each.layer == layer)
        seen = sum(product.macs for product in products[layer])
        for product in products[layer]:
            indices = tuple(_index(factor, owned, original) for factor in product.factors)
            made.append(Work(whole * product.macs / seen, layer=layer, indices=indices))
    return made


def _index(factor: Factor, owned: Mapping[str, Mapping[int, Mapping[str, set[int]]]], original: Widths) -> _Axis:
    """How many values of an index go with a unit of each group."""
    per_unit: defaultdict[str, int] = defaultdict(int)
    for (tensor, axis), at in factor.at.items():
        for group, positions in owned.get(tensor, {}).get(axis, {}).items():
            per_unit[group] += int(torch.isin(at, torch.tensor(sorted(positions))).sum())
    return _Axis(factor.size, {group: count // original[group] for group, count in per_unit.items() if count})


def _interpolated(entries: list[tuple[float, float]], share: float) -> float:
    """Between neighbours linear, beyond the last ones constant."""
    at = bisect.bisect_left(entries, (share, -math.inf))
    if at in (0, len(entries)):
        return entries[min(at, len(entries) - 1)][1]
    (a, low), (b, high) = entries[at - 1], entries[at]
    return low + (high - low) * (share - a) / (b - a)
