"""Which groups have the same structure: the same kinds of layers make, carry and read their units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from lightning_slim.units import UnitGroup
from lightning_slim.weight_norm import layer_of


def classes(model: nn.Module, groups: Iterable[UnitGroup]) -> dict[str, str]:
    """Group -> the first group that is isomorphic to it (Fang et al., 2024, Isomorphic Pruning for Vision Models).

    Two groups are isomorphic where as many layers of each type have their units at the same axes, in the same roles;
    widths, sizes of kernels and biases do not count. Blocks are isomorphic to blocks of the same types.

    Example:
        >>> from lightning_slim import find_groups
        >>> body = nn.Linear(3, 8), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 6), nn.LayerNorm(6)
        >>> network = nn.Sequential(*body, nn.Linear(6, 2))
        >>> classes(network, find_groups(network, torch.zeros(2, 3)))
        {'0': '0', '1': '0', '3': '3'}
    """
    first: dict[str, str] = {}
    return {group.name: first.setdefault(_structure(model, group), group.name) for group in groups}


def _structure(model: nn.Module, group: UnitGroup) -> str:
    """Equal for isomorphic groups."""
    if group.blocks:
        return str(sorted({type(model.get_submodule(path)).__qualname__ for path in group.blocks}))
    places: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
    for span in group.spans:
        places[layer_of(span.tensor)].add((span.role, span.axis))
    return str(sorted((type(model.get_submodule(name)).__qualname__, sorted(at)) for name, at in places.items()))
