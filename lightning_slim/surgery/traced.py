"""Groups of units by torch-pruning's graph: a second opinion, and what is left where operations cannot be recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_slim.surgery.example import Example
from lightning_slim.surgery.graph import Component, find_coupling
from lightning_slim.surgery.layers import LayerKind, Place, layer_kind
from lightning_slim.surgery.sites import FEW, Site, Survey, join, makes_channels, parts, reader, stored
from lightning_slim.surgery.ties import half_tied, join_tied
from lightning_slim.surgery.tracing import UntraceableError
from lightning_slim.units import MIN_UNITS, Role, Span, UnitGroup
from lightning_slim.weight_norm import obstacle


def survey_traced(model: nn.Module, calls: Mapping[str, Example]) -> Survey:
    """Surveys networks that cannot be recorded by their autograd graphs; what is also called alone is found there only.

    Args:
        model: the module that will be cut.
        calls: its networks, each with one call.
    """
    result = Survey()
    for root, call in calls.items():
        nested = [other for other in calls if other != root and (not root or other.startswith(f"{root}."))]
        found = _survey(model.get_submodule(root), call, f"{root}." if root else "")
        result.left_whole.update(found.left_whole)
        reasons = {group.name: _not_here(model, group, nested) for group in found.groups}
        packs = {group.pack: reasons[group.name] for group in found.groups if group.pack and reasons[group.name]}
        for group in found.groups:
            reason = reasons[group.name] or packs.get(group.pack, "")
            if reason:
                result.left_whole[group.name] = reason
            else:
                result.groups.append(group)
    return result


def _not_here(model: nn.Module, group: UnitGroup, nested: Sequence[str]) -> str:
    """Why a group of one network of a model cannot be cut; empty if it can."""
    if any(layer == other or layer.startswith(f"{other}.") for layer in group.layers for other in nested):
        return "it lies in a network that is also called on its own"
    return half_tied(model, group.spans)


def _survey(model: nn.Module, call: Example, prefix: str) -> Survey:
    """Surveys one of them, with a prefix put before every name."""
    result = Survey()
    try:
        coupling = find_coupling(model, call)
    except UntraceableError as error:
        result.left_whole[prefix.rstrip(".") or type(model).__name__] = str(error)
        return result
    network = _Network(model)
    units: defaultdict[tuple[Any, ...], list[_Unit]] = defaultdict(list)
    for component in join_tied(model, coupling.components, network.places):
        name, reason = _why_not(network, component)
        if reason:
            result.left_whole.setdefault(prefix + name, reason)
        elif name:
            unit = _Unit.of(network, name, component)
            units[name, unit.form].append(unit)
    for name, form in sorted(units, key=lambda key: network.order[key[0]]):
        _gather(model, name, units[name, form], coupling.normalised_by, prefix, result)
    for name in network.order:
        _add_inner(network, name, prefix, result)
        _add_cells(network, name, prefix, result)
    return result


class _Network:
    """A model, and what is asked of its layers for every channel."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.order = {name: i for i, name in enumerate(self.modules)}
        self._kinds: dict[str, LayerKind | None] = {}
        self._strange: dict[str, str] = {}
        self._places: dict[tuple[str, Role], list[tuple[Site, list[int]]]] = {}

    def kind(self, layer: str) -> LayerKind | None:
        """The kind that speaks for a layer."""
        if layer not in self._kinds:
            self._kinds[layer] = layer_kind(self.modules[layer])
        return self._kinds[layer]

    def places(self, layer: str, role: Role) -> list[tuple[Site, list[int]]]:
        """Where the channels of one side of a layer live: the site, and the position of every channel there."""
        if (layer, role) not in self._places:
            kind, module = self.kind(layer), self.modules[layer]
            places = kind.places(module, role) if kind is not None else ()
            self._places[layer, role] = [
                ((join(layer, tensor), place.axis, own), place.index.tolist())
                for place in places
                for tensor, own in stored(module, place, place.role or role)
            ]
        return self._places[layer, role]

    def strange(self, layer: str) -> str:
        """Why a layer cannot be cut; empty if it can."""
        if layer not in self._strange:
            module = self.modules[layer]
            reason = ""
            if self.kind(layer) is None:
                reason = f"it meets {layer}, and {type(module).__name__} is not understood"
            else:
                inside = {path: inner for path, inner in module.named_modules() if layer_kind(inner) is not None}
                reasons = ((f"{layer}.{path}".strip("."), obstacle(inner)) for path, inner in inside.items())
                reason = next((f"{path} {why}" for path, why in reasons if why), "")
            self._strange[layer] = reason
        return self._strange[layer]


def _why_not(network: _Network, component: Component) -> tuple[str, str]:
    """The layer that makes a component's channels (empty if none does), and why they must stay (empty if not)."""
    layers = dict.fromkeys(c.owner for c in component.channels if c.axis is None)
    makers = (c.owner for c in component.channels if c.axis is None and c.role == "out")
    name = min(
        (layer for layer in makers if makes_channels(network.modules[layer])), key=network.order.__getitem__, default=""
    )
    reason = next(filter(None, map(network.strange, layers)), "")
    if reason:
        return name, reason
    for channel in component.channels:
        if channel.axis is not None:
            followed = channel.number < network.model.get_parameter(channel.owner).shape[channel.axis]
        else:
            followed = all(channel.number < len(at) for _, at in network.places(channel.owner, channel.role))
        if not followed:
            return name, f"its channels could not be followed to {channel.owner}"
    return name, component.fixed


@dataclass(frozen=True)
class _Unit:
    """The positions that one unit owns.

    Attributes:
        places: positions at each site.
        read: the sites that layers read it by -> whether its positions there are variables of their own.
        order: among the units of its group.
    """

    places: dict[Site, list[int]]
    read: dict[Site, bool]
    order: int

    @property
    def form(self) -> tuple[Any, ...]:
        """Units of one form make a group: the same tensors, with the same number of positions in each."""
        return tuple(sorted((*site, len(at)) for site, at in self.places.items()))

    @classmethod
    def of(cls, network: _Network, maker: str, component: Component) -> _Unit:
        places: defaultdict[Site, set[int]] = defaultdict(set)
        read: dict[Site, None] = {}
        for channel in component.channels:
            if channel.axis is not None:
                places[channel.owner, channel.axis, "out"].add(channel.number)
                continue
            kind = network.kind(channel.owner)
            for site, at in network.places(channel.owner, channel.role):
                if at[channel.number] >= 0:
                    places[site].add(at[channel.number])
                    if site[2] == "in" and kind is not None and kind.channel_axis is not None:
                        read[site] = None
        # Several channels of the layer that makes them are variables of their own; several positions of one channel,
        # as behind a flatten, are repetitions.
        made = sum(c.owner == maker and c.role == "out" and c.axis is None for c in component.channels)
        return cls(
            {site: sorted(at) for site, at in places.items()},
            {site: len(places[site]) == made > 1 for site in read},
            min(c.number for c in component.channels),
        )


def _gather(
    model: nn.Module,
    name: str,
    members: list[_Unit],
    normalised_by: Mapping[str, str],
    prefix: str,
    result: Survey,
) -> None:
    """Makes one group of units of one form, or says why not."""
    members = sorted(members, key=lambda unit: unit.order)
    index = {site: torch.tensor([unit.places[site] for unit in members]) for site in members[0].places}
    spans = {site: Span(prefix + site[0], site[1], at, site[2]) for site, at in index.items()}
    reason = half_tied(model, spans.values(), prefix)
    if reason or len(members) <= MIN_UNITS:
        result.left_whole.setdefault(prefix + name, reason or FEW.format(len(members), MIN_UNITS))
        return
    readers = tuple(reader(model, spans[site], normalised_by, joint, prefix) for site, joint in members[0].read.items())
    taken = sum(group.name.split("#")[0] == prefix + name for group in result.groups)
    unique = f"{prefix}{name}#{taken + 1}" if taken else prefix + name
    result.groups.append(UnitGroup(unique, tuple(spans.values()), readers))


def _add_inner(network: _Network, name: str, prefix: str, result: Survey) -> None:
    """Adds the groups that are not seen from outside a layer, and packs what must keep the same number of units."""
    kind, module = network.kind(name), network.model.get_submodule(name)
    inner = [_inner_group(network.model, name, *inner, prefix) for inner in kind.inner(module)] if kind else []
    pack = kind.pack(module) if kind else 0
    if not pack:
        for group in inner:
            few = FEW.format(group.size, MIN_UNITS) if group.size <= MIN_UNITS else ""
            reason = half_tied(network.model, group.spans, prefix) or few
            if reason:
                result.left_whole.setdefault(group.name, reason)
            else:
                result.groups.append(group)
        return
    layer = (prefix + name).rstrip(".")
    mine = [group for group in result.groups if parts(group, layer)]
    packs = {group.pack for group in mine if group.pack}  # of other layers that make the same units
    seen = [group for group in result.groups if group in mine or group.pack in packs]
    together = [*seen, *inner]
    result.groups = [group for group in result.groups if group not in seen]
    owned = sum(group.size * parts(group, layer) for group in mine) + sum(group.size for group in inner)
    reason = next(filter(None, (half_tied(network.model, group.spans, prefix) for group in inner)), "")
    if owned != pack or len({group.size for group in together}) != 1:
        reason = "its layers and directions must keep as many units each, and not all of them can be cut"
    if reason:
        for left in (layer, *(group.name for group in seen)):
            result.left_whole.setdefault(left, reason)
    else:
        result.groups += [replace(group, pack=min(packs, default=layer)) for group in together]


def _add_cells(network: _Network, name: str, prefix: str, result: Survey) -> None:
    """Adds the groups of cells behind the projections of a layer, packed."""
    kind, module = network.kind(name), network.model.get_submodule(name)
    if kind is None:
        return
    pack, floor = join((prefix + name).rstrip("."), "cells"), kind.min_cells(module)
    groups = [_inner_group(network.model, name, *cells, prefix) for cells in kind.cells(module)]
    for group in groups:
        few = f"it has {group.size} cells, and {floor} must stay" if group.size <= floor else ""
        reason = half_tied(network.model, group.spans, prefix) or few
        if reason:
            result.left_whole[pack] = reason
            return
    result.groups += [replace(group, pack=pack, floor=floor) for group in groups]


def _inner_group(model: nn.Module, layer: str, inner: str, places: Sequence[Place], prefix: str) -> UnitGroup:
    """A group inside a layer."""
    sites: dict[Site, list[Tensor]] = {}
    for place in places:
        for tensor, own in stored(model.get_submodule(layer), place, place.role or "out"):
            site = (join(layer, tensor), place.axis, own)
            sites.setdefault(site, []).append(place.index.reshape(len(place.index), -1))
    spans, readers = [], []
    for site, at in sites.items():
        tensor, axis, role = site
        spans.append(Span(prefix + tensor, axis, torch.cat(at, 1), role))
        if role == "in" and ".weight_hr" not in tensor:  # what the cells behind projections say is not seen
            readers.append(reader(model, spans[-1], {}, spans[-1].index.shape[1] > 1, prefix))
    return UnitGroup(f"{join(prefix.rstrip('.'), layer)}.{inner}".strip("."), tuple(spans), tuple(readers))
