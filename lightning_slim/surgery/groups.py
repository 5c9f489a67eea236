"""Turns coupled channels into groups of units: which entries of which tensors each unit owns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.surgery.graph import Channel, Component, Coupling, find_coupling
from lightning_slim.surgery.layers import Place, layer_kind
from lightning_slim.surgery.ties import half_tied, join_tied
from lightning_slim.surgery.tracing import Example, UntraceableError, untouched
from lightning_slim.units import MIN_UNITS, Reader, Role, Span, UnitGroup

Site = tuple[str, int, Role]  # tensor, axis, role


@dataclass
class Survey:
    """What can be removed from a network, and what is left whole.

    Attributes:
        groups: the units.
        left_whole: layer name -> why its channels stay.
    """

    groups: list[UnitGroup] = field(default_factory=list)
    left_whole: dict[str, str] = field(default_factory=dict)


def as_example(inputs: Any) -> Example:
    """The usual forms of example inputs: a tensor, a tuple of arguments, a dict of keyword arguments."""
    if isinstance(inputs, Example):
        return inputs
    if isinstance(inputs, Mapping):
        return Example((), dict(inputs))
    return Example(tuple(inputs)) if isinstance(inputs, tuple | list) else Example((inputs,))


SAMPLES = 2  # of a batch: enough to trace, small enough to be quick


def workable(network: nn.Module, call: Example) -> Example:
    """A call cut down to two samples, if the network takes it so, of the network's own floating type.

    Where the first axis is not the batch everywhere (attention masks, graphs, a single image), the whole call is kept.
    """
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)

    def alike(leaf: Any) -> Any:  # under autocast, one network's output in bfloat16 may be another one's input
        half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
        return leaf.to(weight.dtype) if half and weight is not None else leaf

    args, kwargs = tree_map(alike, (call.args, dict(call.kwargs)))
    call = Example(args, kwargs, call.samples)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    batch = tensors[0].shape[0] if tensors else 0
    if batch <= SAMPLES:
        return call if call.samples > 1 else call._replace(samples=max(batch, 1))

    def shrink(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return leaf[:SAMPLES].clone() if is_batch else leaf

    args, kwargs = tree_map(shrink, (args, kwargs))
    small = Example(args, kwargs, SAMPLES)
    with untouched(network), torch.no_grad():
        try:
            network(*small.args, **small.kwargs)
        except Exception:  # whatever a user's forward raises: the whole call, which it took in training, remains
            return call
    return small


def find_groups(model: nn.Module, example_inputs: Any) -> list[UnitGroup]:
    """All groups of units that can be removed from a network.

    Channels that reach an output of the network, or that are added to one of its inputs, are not among them.

    Args:
        model: the network; its weights, modes, `requires_grad` flags and the random state are left as they are.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for one forward pass.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(group.name, group.size) for group in find_groups(net, torch.randn(2, 4))]
        [('0', 8)]
    """
    return survey(model, example_inputs).groups


def survey(model: nn.Module, example_inputs: Any, prefix: str = "") -> Survey:
    """`find_groups`, and the reasons why the other layers stay whole.

    Args:
        model: the network to trace.
        example_inputs: see `find_groups`.
        prefix: put before every name, where `model` is a submodule of the module that will be cut.
    """
    result = Survey()
    try:
        coupling = find_coupling(model, as_example(example_inputs))
    except UntraceableError as error:
        result.left_whole[prefix.rstrip(".") or type(model).__name__] = str(error)
        return result
    units: defaultdict[tuple[Any, ...], list[_Unit]] = defaultdict(list)
    for component in join_tied(model, coupling.components):
        name, reason = _why_not(model, component)
        if reason:
            result.left_whole.setdefault(prefix + name, reason)
        elif name:
            unit = _Unit.of(model, component, coupling)
            units[name, unit.form].append(unit)
    order = {name: i for i, name in enumerate(dict(model.named_modules()))}
    for name, form in sorted(units, key=lambda key: order[key[0]]):
        _gather(model, name, units[name, form], prefix, result)
    for name in order:
        _add_inner(model, name, prefix, result)
        _add_cells(model, name, prefix, result)
    return result


def survey_networks(model: nn.Module, calls: Mapping[str, Example]) -> Survey:
    """Surveys several networks of one model; what is also called on its own is found there, and only there."""
    result = Survey()
    for root, call in calls.items():
        nested = [other for other in calls if other != root and (not root or other.startswith(f"{root}."))]
        prefix = f"{root}." if root else ""
        found = survey(model.get_submodule(root), call, prefix)
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


def _why_not(model: nn.Module, component: Component) -> tuple[str, str]:
    """The layer that makes a component's channels (empty if none does), and why they must stay (empty if not)."""
    kinds = {c.owner: layer_kind(model.get_submodule(c.owner)) for c in component.channels if c.axis is None}
    makers = [c.owner for c in component.channels if c.role == "out" and _makes_channels(model, c)]
    name = min(makers, key=list(dict(model.named_modules())).index, default="")
    unknown = next((owner for owner, kind in kinds.items() if kind is None), None)
    if unknown is not None:
        return (
            name,
            f"it meets {unknown}, and {type(model.get_submodule(unknown)).__name__} is not understood",
        )
    for channel in component.channels:
        reason = _cannot_be_followed(model, channel)
        if reason:
            return name, reason
    return name, component.fixed


def _cannot_be_followed(model: nn.Module, channel: Channel) -> str:
    """Why a channel cannot be found in its layer's tensors; empty if it can."""
    if channel.axis is not None:
        size = model.get_parameter(channel.owner).shape[channel.axis]
        return "" if channel.number < size else f"its channels could not be followed to {channel.owner}"
    module = model.get_submodule(channel.owner)
    if is_parametrized(module) or hasattr(module, "weight_g") or hasattr(module, "weight_orig"):
        return f"{channel.owner} is parametrized: remove the parametrization, or leave it whole"
    kind = layer_kind(module)
    places = kind.places(module, channel.role) if kind is not None else []
    fits = all(channel.number < len(place.index) for place in places)
    return "" if fits else f"its channels could not be followed to {channel.owner}"


def _makes_channels(model: nn.Module, channel: Channel) -> bool:
    """Linear layers, convolutions and embeddings do; normalisations and activations carry them."""
    if channel.axis is not None:
        return False
    module = model.get_submodule(channel.owner)
    kind = layer_kind(module)
    return isinstance(module, nn.Embedding) or (kind is not None and kind.channel_axis is not None)


@dataclass(frozen=True)
class _Unit:
    """The positions that one unit owns, and the layers that read it."""

    places: dict[Site, list[int]]
    readers: dict[str, Reader]  # their spans are filled in once the whole group is known
    order: int

    @property
    def form(self) -> tuple[Any, ...]:
        """Units of one form make a group: the same tensors, with the same number of positions in each."""
        return tuple(sorted((*site, len(at)) for site, at in self.places.items()))

    @classmethod
    def of(cls, model: nn.Module, component: Component, coupling: Coupling) -> _Unit:
        places: defaultdict[Site, set[int]] = defaultdict(set)
        readers: dict[str, Reader] = {}
        for channel in component.channels:
            if channel.axis is not None:
                places[channel.owner, channel.axis, "out"].add(channel.number)
                continue
            module = model.get_submodule(channel.owner)
            kind = layer_kind(module)
            assert kind is not None
            for place in kind.places(module, channel.role):
                role = place.role or channel.role
                site = (_join(channel.owner, place.tensor), place.axis, role)
                position = int(place.index[channel.number])
                if position < 0:
                    continue
                places[site].add(position)
                if channel.role == "in" and kind.channel_axis is not None:
                    readers[site[0]] = _reader(model, channel.owner, site, coupling)
        return cls(
            {site: sorted(at) for site, at in places.items()},
            readers,
            min(c.number for c in component.channels),
        )


def _reader(model: nn.Module, layer: str, site: Site, coupling: Coupling) -> Reader:
    module, norm = model.get_submodule(layer), coupling.normalised_by.get(layer)
    offset = None
    kind = layer_kind(module)
    assert kind is not None
    bias = kind.bias_of(module, site[0].rpartition(".")[2])
    if site[1] == 0:
        pass  # a transposed convolution spreads a constant unevenly over its outputs: no bias can take it
    elif bias is not None:
        offset = _join(layer, bias)
    elif norm is not None and getattr(model.get_submodule(norm), "running_mean", None) is not None:
        offset = _join(norm, "running_mean")
    axis = kind.channel_axis
    chunks = getattr(module, "groups", 1) if site[1] == 1 else 1
    return Reader(layer, Span(site[0], site[1], torch.empty(0, 0, dtype=torch.long), "in"), axis, chunks, offset)  # type: ignore[arg-type]


def _gather(model: nn.Module, name: str, members: list[_Unit], prefix: str, result: Survey) -> None:
    """Makes one group of units of one form, or says why not."""
    members = sorted(members, key=lambda unit: unit.order)
    index = {site: torch.tensor([unit.places[site] for unit in members]) for site in members[0].places}
    spans = {site: Span(prefix + site[0], site[1], at, site[2]) for site, at in index.items()}
    reason = half_tied(model, spans.values(), prefix)
    if reason or len(members) <= MIN_UNITS:
        few = f"it has {len(members)} units, and {MIN_UNITS} must stay"
        result.left_whole.setdefault(prefix + name, reason or few)
        return
    readers = tuple(
        replace(
            reader,
            layer=prefix + reader.layer,
            span=spans[reader.span.tensor, reader.span.axis, "in"],
            offset=prefix + reader.offset if reader.offset else None,
        )
        for reader in members[0].readers.values()
    )
    taken = sum(group.name.split("#")[0] == prefix + name for group in result.groups)
    unique = f"{prefix}{name}#{taken + 1}" if taken else prefix + name
    result.groups.append(UnitGroup(unique, tuple(spans.values()), readers))


def _add_inner(model: nn.Module, name: str, prefix: str, result: Survey) -> None:
    """Adds the groups that are not seen from outside a layer, and packs what must keep the same number of units."""
    module = model.get_submodule(name)
    kind = layer_kind(module)
    units = kind.pack(module) if kind is not None else 0
    if kind is None or not units:
        return
    layer = (prefix + name).rstrip(".")
    inner = [_inner_group(layer, part, places) for part, places in kind.inner(module)]
    mine = [group for group in result.groups if _parts(group, layer)]
    packs = {group.pack for group in mine if group.pack}  # of other layers that make the same units
    seen = [group for group in result.groups if group in mine or group.pack in packs]
    together = [*seen, *inner]
    result.groups = [group for group in result.groups if group not in seen]
    owned = sum(group.size * _parts(group, layer) for group in mine) + sum(group.size for group in inner)
    reason = next(filter(None, (half_tied(model, group.spans, prefix) for group in inner)), "")
    if owned != units or len({group.size for group in together}) != 1:
        reason = "its layers and directions must keep as many units each, and not all of them can be cut"
    if reason:
        for left in (layer, *(group.name for group in seen)):
            result.left_whole.setdefault(left, reason)
    else:
        result.groups += [replace(group, pack=min(packs, default=layer)) for group in together]


def _add_cells(model: nn.Module, name: str, prefix: str, result: Survey) -> None:
    """Adds the groups of cells behind the projections of a layer, packed."""
    module = model.get_submodule(name)
    kind = layer_kind(module)
    if kind is None:
        return
    layer, floor = (prefix + name).rstrip("."), kind.min_cells(module)
    pack = _join(layer, "cells")
    groups = [_inner_group(layer, part, places, pack, floor) for part, places in kind.cells(module)]
    for group in groups:
        few = f"it has {group.size} cells, and {floor} must stay" if group.size <= floor else ""
        reason = half_tied(model, group.spans, prefix) or few
        if reason:
            result.left_whole[pack] = reason
            return
    result.groups += groups


def _inner_group(layer: str, part: str, places: Sequence[Place], pack: str = "", floor: int = MIN_UNITS) -> UnitGroup:
    sites: dict[Site, list[Tensor]] = {}
    for place in places:
        site = (_join(layer, place.tensor), place.axis, place.role or "out")
        sites.setdefault(site, []).append(place.index)
    spans = tuple(Span(t, axis, torch.stack(at, 1), role) for (t, axis, role), at in sites.items())
    return UnitGroup(_join(layer, part), spans, pack=pack, floor=floor)


def _parts(group: UnitGroup, layer: str) -> int:
    """How many directions of a recurrent layer the units of a group span: two where a sum, say, couples them."""
    recurrent = _join(layer, "weight_hh")
    return len({span.tensor for span in group.spans if span.axis == 1 and span.tensor.startswith(recurrent)})


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
