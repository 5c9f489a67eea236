"""What a model would cost after a plan, without carrying it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from lightning_slim.units import UnitGroup, named_tensors

Widths = Mapping[str, int]  # group name -> number of units that stay


@dataclass(frozen=True)
class _Axis:
    """One axis of a tensor: its full size, and how many positions each unit of each group takes of it."""

    size: int
    per_unit: dict[str, int]

    def kept(self, original: Widths, widths: Widths) -> int:
        return self.size - sum((original[g] - widths[g]) * width for g, width in self.per_unit.items())


@dataclass(frozen=True)
class Costs:
    """Units, parameters and MACs of a model as functions of the widths of its groups.

    A layer's MACs are proportional to the entries of its matrices, so they shrink as these do. That is exact for linear
    layers, convolutions and recurrent layers of every kind, as long as the sizes between them (pixels, steps) stay.

    Attributes:
        original: width of every group before anything was cut.
        parameters: number of all parameters of the model.
        layer_macs: layer -> multiply-accumulates of one forward pass of the example, its children's left out.
        shapes: tensor -> shape, of all parameters that a group touches, and of the matrices beside them.
        axes: tensor -> axis -> who owns how much of it.
        matrices: layer -> its matrices; a tied one stands under its first name everywhere.
        packs: group -> pack, of those that must keep as many units as others.
        floors: group -> how many units must stay at least.
    """

    original: dict[str, int]
    parameters: int
    layer_macs: dict[str, int]
    shapes: dict[str, list[int]]
    axes: dict[str, dict[int, _Axis]]
    matrices: dict[str, list[str]]
    packs: dict[str, str]
    floors: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, groups: Iterable[UnitGroup], layer_macs: Mapping[str, int]) -> Costs:
        """Costs of a model that was not cut yet; `layer_macs` come from `count_macs`."""
        groups = list(groups)
        tensors = named_tensors(model)
        first_name = {id(tensor): name for name, tensor in reversed(tensors.items())}
        owned: defaultdict[str, defaultdict[int, dict[str, set[int]]]] = defaultdict(lambda: defaultdict(dict))
        for group in groups:
            for span in group.spans:
                if isinstance(tensors[span.tensor], nn.Parameter):
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
        layers = {name.rpartition(".")[0] for name, tensor in tensors.items() if first_name[id(tensor)] in axes}
        matrices: defaultdict[str, list[str]] = defaultdict(list)
        for name, p in model.named_parameters(remove_duplicate=False):
            layer = name.rpartition(".")[0]
            if layer in layers and p.ndim > 1:
                matrices[layer].append(first_name[id(p)])
        measured = {*axes, *chain(*matrices.values())}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if name in measured}
        packs = {group.name: group.pack for group in groups if group.pack}
        floors = {group.name: group.floor for group in groups}
        parameters = sum(p.numel() for p in model.parameters())
        return cls(original, parameters, dict(layer_macs), shapes, axes, dict(matrices), packs, floors)

    def units(self, widths: Widths) -> int:
        """Number of units that stay."""
        return sum(widths[name] for name in self.original)

    def params(self, widths: Widths) -> int:
        """Number of parameters that stay."""
        return self.parameters - sum(self._full(name) - self._left(name, widths) for name in self.shapes)

    def macs(self, widths: Widths) -> int:
        """Multiply-accumulates of one forward pass of the example."""
        return round(sum(macs * self._share(layer, widths) for layer, macs in self.layer_macs.items()))

    def _full(self, tensor: str) -> int:
        entries = 1
        for size in self.shapes[tensor]:
            entries *= size
        return entries

    def _left(self, tensor: str, widths: Widths) -> int:
        entries = 1
        for axis, size in enumerate(self.shapes[tensor]):
            owners = self.axes.get(tensor, {}).get(axis)
            entries *= size if owners is None else owners.kept(self.original, widths)
        return entries

    def _share(self, layer: str, widths: Widths) -> float:
        """What stays of a layer's matrices."""
        mine = self.matrices.get(layer, [])
        full = sum(map(self._full, mine))
        return sum(self._left(name, widths) for name in mine) / full if full else 1.0

    def to_state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        axes = {
            name: {axis: (owner.size, owner.per_unit) for axis, owner in by_axis.items()}
            for name, by_axis in self.axes.items()
        }
        return {**vars(self), "axes": axes}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Costs:
        """The inverse of `to_state`."""
        axes = {
            name: {int(axis): _Axis(*owner) for axis, owner in by_axis.items()}
            for name, by_axis in state["axes"].items()
        }
        return cls(**{**state, "axes": axes})
