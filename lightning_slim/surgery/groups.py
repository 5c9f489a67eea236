"""Turns positions that hang together into groups of units: which entries of which tensors each unit owns."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lightning_slim.surgery.example import Example, as_example, step_of
from lightning_slim.surgery.layers import Place, layer_kind
from lightning_slim.surgery.layers.attention import Attention
from lightning_slim.surgery.operations.observe import Bundle, Observation, Run, observe
from lightning_slim.surgery.operations.observe import Place as Held
from lightning_slim.surgery.sites import FEW, ROLES, Site, Survey, join, makes_channels, parts, reader, sites, stored
from lightning_slim.surgery.ties import half_tied
from lightning_slim.surgery.traced import survey_traced
from lightning_slim.units import MIN_UNITS, Role, Span, UnitGroup
from lightning_slim.weight_norm import layer_of, obstacle

FOLLOWED = "a frozen network that is not shipped goes along with it in the step, as a moving average of weights does"
TEACHER = "it is frozen and teaches others, or runs without gradients"


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


def survey(model: nn.Module, example_inputs: Any) -> Survey:
    """`find_groups`, and the reasons why the other layers stay whole."""
    return survey_networks(model, {"": as_example(example_inputs)})


def survey_networks(
    model: nn.Module, calls: Mapping[str, Example], waits_for: Callable[[str], bool] = lambda name: True
) -> Survey:
    """The same, of several networks of one model.

    Args:
        model: the module that will be cut.
        calls: its networks, each with one call.
        waits_for: whether a layer that these calls do not reach keeps whole what it may read.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    try:
        seen = observe(model, list(_runs(model, calls)), list(calls))
    except MemoryError:
        raise
    except Exception as error:  # whatever a network raises, perhaps only while its operations are recorded
        found = survey_traced(model, calls)  # raises what the network itself raises
        warnings.warn(
            f"The operations of {type(model).__name__} could not be recorded ({type(error).__name__}: {error}): what "
            "can be pruned goes by torch-pruning's graph, which finds less.",
            stacklevel=2,
        )
        return found
    return _Finder(model, seen, frozen, waits_for).find()


def _runs(model: nn.Module, calls: Mapping[str, Example]) -> Iterator[Run]:
    """All calls, in eval mode and in train mode."""
    modes = {module: module.training or not model.training for module in model.modules()}
    step = step_of(calls)

    def run(make: Callable[[], Any], training: bool) -> Any:
        for module, trains in modes.items():
            module.training = trains and training
        return make()

    for training in (False, True):
        if step is not None:
            yield partial(run, step, training)
        for name, call in calls.items() if step is None else ():
            for each in call.each:
                yield partial(run, partial(model.get_submodule(name), *each.args, **each.kwargs), training)


class _Finder:
    """Makes groups of what was observed.

    Args:
        model: the module that will be cut.
        seen: of it.
        frozen: names of the parameters that do not train.
        waits_for: whether a layer that was not reached keeps whole what it may read.
    """

    def __init__(self, model: nn.Module, seen: Observation, frozen: set[str], waits_for: Callable[[str], bool]) -> None:
        self.model, self.seen, self.frozen, self.waits_for = model, seen, frozen, waits_for
        self.modules = dict(model.named_modules())
        self.order = {name: i for i, name in enumerate(self.modules)}
        self.normalised_by = {layer_of(name): layer_of(norm) for name, norm in seen.normalised_by.items()}
        self.claimed: dict[tuple[str, int], set[int]] = {}
        self.result = Survey(products=seen.products)
        self._sites: dict[str, tuple[set[tuple[str, int]], set[tuple[str, int]]]] = {}

    def find(self) -> Survey:
        """All groups, and the reasons of what stays whole."""
        heads = [group for name in self.order for group in self._heads(name)]
        cells = [group for name in self.order for group in self._cells(name)]
        units: defaultdict[tuple[Any, ...], list[_Units]] = defaultdict(list)
        for bundle in self.seen.bundles:
            free = ~self._is_claimed(bundle)
            if bool(free.any()):
                form = self._form(bundle)
                reasons = [form.obstacle or reason for reason in bundle.fixed]
                fixed = torch.tensor([bool(reason) for reason in reasons])
                for i in (free & fixed).nonzero().flatten().tolist()[:1]:
                    self.result.left_whole.setdefault(form.name, reasons[i])
                if bool((free & ~fixed).any()):
                    found = form.units(bundle, free & ~fixed)
                    units[form.name, found.form].append(found)
        for form_of in sorted(units, key=lambda form: (self.order.get(self._layer(form[0]), 0), form[0])):
            self._gather(form_of[0], units[form_of])
        self.result.groups += heads
        for grid in self.seen.parts:
            self._keep_in_step(grid)
        for name in self.order:
            self._pack(name)
        self.result.groups += cells
        self._name_single()
        self._leave_teachers()
        self._protect_unreached()
        for group in self.result.groups:  # what stays of its layer is of another axis, as the tokens of an embedding
            self.result.left_whole.pop(group.name, None)
            for span in group.spans:  # or a part of the axis, as columns beside those of an embedding
                if span.role == "out":
                    self.result.left_whole.pop(layer_of(span.tensor), None)
        return self.result

    # --- bundles of components ---

    def _layer(self, name: str) -> str:
        """The layer that a group is named after: the name may be that of a level of it, or of a bare tensor."""
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        return name

    def _is_claimed(self, bundle: Bundle) -> Bool[Tensor, "components"]:
        """Which of the components a layer has claimed, for units of its own."""
        claimed = torch.zeros(len(bundle.fixed), dtype=torch.bool)
        for place in bundle.places:
            taken = self.claimed.get((place.axis.names[0], place.axis.number))
            if taken is not None:
                claimed |= torch.isin(place.at, torch.tensor(sorted(taken))).any(1)
        return claimed

    def _form(self, bundle: Bundle) -> _Form:
        name = self._name(bundle)
        layer, made = self._layer(name), [i for i, place in enumerate(bundle.places) if place.made]
        sites = [
            [(tensor, place.axis.number, self._role(tensor, place)) for tensor in place.axis.names]
            for place in bundle.places
        ]
        own = [i for i in made if layer in map(layer_of, bundle.places[i].axis.names)]
        makers = [i for i in made if not self._recurs(bundle.places[i].axis.names[0])]
        return _Form(name, self._obstacle(bundle), sites, makers, own[0] if own else 0)

    def _name(self, bundle: Bundle) -> str:
        """After the first layer that makes it, or the tensor."""
        made = [(layer_of(name), place, name) for place in bundle.places if place.made for name in place.axis.names]
        proper = [each for each in made if makes_channels(self.modules.get(each[0]))] or made
        layer, _, tensor = min(proper, key=lambda each: self.order.get(each[0], len(self.order)))
        module = self.modules.get(layer)
        if isinstance(module, nn.RNNBase):
            leaf = tensor.removeprefix(f"{layer}.").removeprefix("weight_").removeprefix("bias_")
            level = leaf.partition("_")[2]
            if int(level.removeprefix("l").partition("_")[0]) < module.num_layers - 1:
                return f"{layer}.{level}".lstrip(".")
        return tensor if module is None or layer_kind(module) is None else layer

    def _obstacle(self, bundle: Bundle) -> str:
        """Why the components' tensors cannot be cut as they are stored; empty if they can."""
        layers = dict.fromkeys(layer_of(name) for place in bundle.places for name in place.axis.names)
        for layer in layers:
            if any(isinstance(self.modules.get(part), torch.jit.ScriptModule) for part in _around(layer)):
                return f"{layer} is scripted, so its code cannot be changed: script it after training"
            around = (layer, layer.rpartition(".")[0])
            if any(
                isinstance(m := self.modules.get(each), nn.MultiheadAttention) and not layer_kind(m) for each in around
            ):
                return (
                    f"{layer} is of attention whose keys or values have a width of their own, which is not understood"
                )
        reasons = ((layer, obstacle(self.modules[layer])) for layer in layers if layer in self.modules)
        return next((f"{layer} {why}" for layer, why in reasons if why), "")

    def _role(self, tensor: str, place: Held) -> Role:
        out, read = self._sides(layer_of(tensor))
        site = (tensor, place.axis.number)
        if site in out or site in read:
            return "out" if site in out else "in"
        return "in" if place.read and not place.made else "out"

    def _sides(self, layer: str) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
        """(tensor, axis) of what a layer makes, and of what it reads."""
        if layer not in self._sites:
            module = self.modules.get(layer)
            sides = (sites(layer, module, role) for role in ROLES)
            made, read = (
                {(name, axis) for name, axis, own in side if own == role}
                for side, role in zip(sides, ROLES, strict=True)
            )
            self._sites[layer] = made, read
        return self._sites[layer]

    def _recurs(self, tensor: str) -> bool:
        return isinstance(self.modules.get(layer_of(tensor)), nn.RNNBase | nn.RNNCellBase)

    def _gather(self, name: str, members: list[_Units]) -> None:
        """Makes one group of units of one form, or says why not."""
        first = min(members, key=lambda units: int(units.order.min()))
        order = torch.cat([units.order for units in members]).argsort(stable=True)
        spans = {
            site: Span(site[0], site[1], torch.cat([units.places[site] for units in members])[order], site[2])
            for site in first.places
        }
        reason = half_tied(self.model, spans.values())
        if reason or len(order) <= MIN_UNITS:
            self.result.left_whole.setdefault(name, reason or FEW.format(len(order), MIN_UNITS))
            return
        # Several positions that a layer makes are variables of their own to whom reads them; several positions of one
        # channel, as behind a flatten, are repetitions.
        readers = tuple(
            reader(self.model, span, self.normalised_by, joint=len(first.places[site]) in first.made - {1})
            for site, span in spans.items()
            if self._is_read_by_layer(span)
        )
        taken = sum(group.name.split("#")[0] == name for group in self.result.groups)
        unique = f"{name}#{taken + 1}" if taken else name
        self.result.groups.append(UnitGroup(unique, tuple(spans.values()), readers))

    def _keep_in_step(self, grid: Tensor) -> None:
        """Parts of a layer's output that are split off by their number must stay equal parts."""
        rows = [self.seen.places(row) for row in grid]
        holders = []
        for row in rows:
            mine = [g for g in self.result.groups if any(self._holds(g, place) for place in row)]
            holders.append(mine)
        names = {group.name for mine in holders for group in mine}
        if len(names) < 2:
            return
        sizes = {group.size for mine in holders for group in mine}
        fits = all(len(mine) == 1 for mine in holders) and len(sizes) == 1 and len(names) == len(holders)
        packs = {group.pack for mine in holders for group in mine} - {""}
        for i, group in enumerate(self.result.groups):
            if fits and (group.name in names or group.pack in packs):
                self.result.groups[i] = replace(group, pack=min(packs, default=holders[0][0].name))
        if not fits:
            self.result.groups = [group for group in self.result.groups if group.name not in names]
            reason = "it is split into equal parts, and not all of them can be cut"
            self.result.left_whole |= dict.fromkeys(names, reason)

    @staticmethod
    def _holds(group: UnitGroup, place: tuple[str, int, int]) -> bool:
        tensor, axis, position = place
        return any(s.tensor == tensor and s.axis == axis and bool((s.index == position).any()) for s in group.spans)

    def _is_read_by_layer(self, span: Span) -> bool:
        """Whether a module reads it that takes the units along the channel axis of its first argument."""
        layer = layer_of(span.tensor)
        module = self.modules.get(layer)
        kind = layer_kind(module) if module is not None else None
        if span.role != "in" or kind is None or kind.channel_axis is None:
            return False
        recurs = isinstance(module, nn.RNNBase) and ".weight_hr" not in f".{span.tensor}"
        return recurs or (span.tensor, span.axis) in self._sides(layer)[1]

    # --- what kinds of layers know ---

    def _heads(self, name: str) -> Iterator[UnitGroup]:
        """Whole heads of attention; whatever else goes through these is no unit of its own."""
        kind, module = layer_kind(self.modules[name]), self.modules[name]
        if kind is None or isinstance(module, nn.RNNBase):
            return
        for inner, places in kind.inner(module):
            sites = self._reached(name, places)
            if not sites:
                continue
            group = self._inner_group(name, inner, sites)
            few = FEW.format(group.size, MIN_UNITS) if group.size <= MIN_UNITS else ""
            reason = half_tied(self.model, group.spans) or few or self._obstacles(name)
            if reason:
                self.result.left_whole.setdefault(group.name, reason)
            else:
                yield group

    def _obstacles(self, layer: str) -> str:
        inside = ((f"{layer}.{path}".strip("."), m) for path, m in self.modules[layer].named_modules())
        reasons = ((path, obstacle(m)) for path, m in inside if layer_kind(m) is not None)
        return next((f"{path} {why}" for path, why in reasons if why), "")

    def _reached(self, layer: str, places: Sequence[Place]) -> dict[Site, Tensor]:
        """Where the units of a layer live, and claims it; none if nothing reached the layer.

        What the layer's own computation shows to be something else is left out.
        """
        sites: dict[Site, list[Tensor]] = {}
        for place in places:
            for tensor, own in stored(self.modules[layer], place, place.role or "out"):
                index = place.index.reshape(len(place.index), -1)
                sites.setdefault((join(layer, tensor), place.axis, own), []).append(index)
        found = {site: torch.cat(at, 1) for site, at in sites.items()}
        core = {site: at for site, at in found.items() if self._is_projection(layer_of(site[0]))}
        if not any(self.seen.is_used(tensor, axis) for tensor, axis, _ in core):
            return {}
        owner: dict[int, set[int]] = {}
        for (tensor, axis, _), at in core.items():
            for unit, labels in enumerate(self.seen.labels(tensor, axis)[at]):
                for root in self.seen.alone[labels].tolist():
                    owner.setdefault(root, set()).add(unit)
        found = {site: at for site, at in found.items() if site in core or self._fits(site, at, owner)}
        if not any(role == "in" for _, _, role in found):
            found |= self._followed(core)
        for (tensor, axis, _), at in found.items():
            first = self.seen.first_name(tensor, axis)
            self.claimed.setdefault((first, axis), set()).update(at.flatten().tolist())
        return found

    def _is_projection(self, layer: str) -> bool:
        """Whether a layer makes channels itself; what attention holds beside its projections is named by guess."""
        module = self.modules.get(layer)
        return makes_channels(module) and not isinstance(layer_kind(module), Attention) if module is not None else False

    def _fits(self, site: Site, at: Tensor, owner: Mapping[int, set[int]]) -> bool:
        """Whether what a layer holds for its units hangs together with no unit but its own."""
        labels = self.seen.labels(site[0], site[1])[at]
        roots = self.seen.alone[labels].tolist()
        return all(owner.get(root, {unit}) == {unit} for unit, own in enumerate(roots) for root in own)

    def _followed(self, core: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """What reads the units of a layer behind which they are seen."""
        of_units: list[dict[tuple[str, int], set[int]]] = []
        for unit in range(len(next(iter(core.values())))):
            mine: dict[tuple[str, int], set[int]] = {}
            for (tensor, axis, _), at in core.items():
                for place, positions in self.seen.beside(tensor, axis, at[unit]).items():
                    mine.setdefault(place, set()).update(positions)
            of_units.append(mine)
        known = {site[:2] for site in core}
        alike = [p for p in of_units[0] if p not in known and len({len(unit.get(p, ())) for unit in of_units}) == 1]
        found: dict[Site, Tensor] = {}
        for tensor, axis in alike:
            role: Role = "in" if (tensor, axis) in self._sides(layer_of(tensor))[1] else "out"
            found[tensor, axis, role] = torch.tensor([sorted(unit[tensor, axis]) for unit in of_units])
        return found

    def _inner_group(self, layer: str, inner: str, sites: Mapping[Site, Tensor]) -> UnitGroup:
        spans = tuple(Span(tensor, axis, at, role) for (tensor, axis, role), at in sites.items())
        readers = tuple(
            reader(self.model, span, {}, joint=span.index.shape[1] > 1)
            for span in spans
            if span.role == "in" and ".weight_hr" not in f".{span.tensor}"
        )
        return UnitGroup(join(layer, inner).rstrip("."), spans, readers)

    def _cells(self, name: str) -> list[UnitGroup]:
        """The groups of cells behind the projections of a recurrent layer, packed."""
        kind, module = layer_kind(self.modules[name]), self.modules[name]
        if kind is None:
            return []
        pack, floor = join(name, "cells"), kind.min_cells(module)
        groups = []
        for inner, places in kind.cells(module):
            sites = self._reached(name, places)
            groups += [replace(self._inner_group(name, inner, sites), pack=pack, floor=floor)] if sites else []
        for group in groups:
            few = f"it has {group.size} cells, and {floor} must stay" if group.size <= floor else ""
            reason = half_tied(self.model, group.spans) or few
            if reason:
                self.result.left_whole[pack] = reason
                return []
        return groups

    def _pack(self, name: str) -> None:
        """All levels and directions of a recurrent layer must keep as many units each."""
        kind, module = layer_kind(self.modules[name]), self.modules[name]
        pack = kind.pack(module) if kind is not None else 0
        mine = [group for group in self.result.groups if pack and parts(group, name)]
        if not mine:
            return
        packs = {group.pack for group in mine if group.pack}  # of other layers that make the same units
        together = [group for group in self.result.groups if group in mine or group.pack in packs]
        self.result.groups = [group for group in self.result.groups if group not in together]
        owned = sum(group.size * parts(group, name) for group in mine)
        if owned != pack or len({group.size for group in together}) != 1:
            for left in (name, *(group.name for group in together)):
                self.result.left_whole.setdefault(
                    left, "its layers and directions must keep as many units each, and not all of them can be cut"
                )
        else:
            self.result.groups += [replace(group, pack=min(packs, default=name)) for group in together]

    # --- what stays for another reason ---

    def _leave_teachers(self) -> None:
        """Frozen networks that teach others are not shipped; what needs no gradients was not meant to change."""
        self.result.teachers = list(self._teachers())
        inside = tuple(f"{name}." for name in self.result.teachers)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for group in list(self.result.groups):
            made = [span.tensor for span in group.spans if span.role == "out" and span.tensor in parameters]
            taught = any(self.seen.trains(span.tensor, span.axis) for span in group.spans)
            teaches = any(span.tensor.startswith(inside) for span in group.spans)
            if teaches and not self.frozen.issuperset(made):
                self._leave(group, FOLLOWED)
            elif teaches or (made and self.frozen.issuperset(made) and not taught):
                self._leave(group, TEACHER)

    def _leave(self, group: UnitGroup, reason: str) -> None:
        """Leaves a group whole, and all that must keep as many units."""
        for other in [g for g in self.result.groups if g is group or (group.pack and g.pack == group.pack)]:
            self.result.groups.remove(other)
            self.result.left_whole[other.name] = reason

    def _teachers(self) -> Iterator[str]:
        """The outermost ones."""
        found: list[str] = []
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, module in self.modules.items() if self.frozen != parameters.keys() else ():
            own = {f"{name}.{leaf}" for leaf, _ in module.named_parameters(remove_duplicate=False)}
            beside = name and not name.startswith(tuple(f"{teacher}." for teacher in found))
            if beside and own and own <= self.frozen and own & self.seen.touched and self._teaches(own):
                found.append(name)
                yield name

    def _teaches(self, own: set[str]) -> bool:
        """Whether a frozen network, of which these are the parameters, stands beside what trains, and not within."""
        if not any(own & (made | read) for made, read in self._handed_on):
            return False  # a norm, say
        taught = any(self.seen.trains(tensor, number) for tensor, number in self.seen.sites if tensor in own)
        for made, read in self._handed_on:
            made_in, made_out, read_in, read_out = made & own, made - own, read & own, read - own
            if taught and (made_in or read_in) and (read_out or (made_out and read_in)):
                return False
            if (made_in and read_out and not made_out) or (made_out and read_in and not made_in):
                return False
        return True

    @cached_property
    def _handed_on(self) -> set[tuple[frozenset[str], frozenset[str]]]:
        """(tensors that make, tensors that read) the same positions."""
        return {
            (
                frozenset(place.axis.names[0] for place in bundle.places if place.made),
                frozenset(place.axis.names[0] for place in bundle.places if place.read),
            )
            for bundle in self.seen.bundles
        }

    def _name_single(self) -> None:
        """Layers that make one channel."""
        for name, module in self.modules.items():
            made = self._sides(name)[0] if makes_channels(module) else set()
            if made and all(not len(self.seen.labels(*site)) for site in made):
                self.result.left_whole.setdefault(name, FEW.format(1, MIN_UNITS))

    def _protect_unreached(self) -> None:
        """What no call reached may read, at another time, channels of the width that it reads."""
        for name, width, is_first in self._unreached():
            self.result.unreached.append(name)
            for group in list(self.result.groups) if is_first and self.waits_for(name) else ():
                if any(_count(span.index) == width for span in group.spans if span.role == "in"):
                    self._leave(
                        group,
                        f"{name} was not reached yet, and may read it, for it reads {width} channels, too: if it does "
                        f'not, say so by `skip=["{name}"]`',
                    )

    def _unreached(self) -> Iterator[tuple[str, int, bool]]:
        """Layers that no call reached, how many channels they read, and whether these come from elsewhere.

        They do not where another layer makes as many, before it in a part of which nothing was reached.
        """
        reached = {part for name in self.seen.touched for part in _around(layer_of(name))}
        metrics = tuple(f"{name}." for name, module in self.modules.items() if _is_metric(module))
        made: defaultdict[str, set[int]] = defaultdict(set)  # part -> widths that its layers make
        for name, module in self.modules.items():
            kind = layer_kind(module)
            if kind is None or kind.channel_axis is None or isinstance(kind, Attention) or name.startswith(metrics):
                continue
            if name in reached or not self._sides(name)[1]:
                continue
            part = next(part for part in _around(name) if part not in reached)
            width = len(kind.places(module, "in")[0].index)
            yield name, width, width not in made[part]
            made[part].update(len(place.index) for place in kind.places(module, "out")[:1])


def _around(name: str) -> Iterator[str]:
    """A layer, and what it lies in, the outermost first."""
    yield ""
    steps = name.split(".") if name else []
    for i in range(len(steps)):
        yield ".".join(steps[: i + 1])


@dataclass(frozen=True)
class _Form:
    """What components of the same axes have in common.

    Attributes:
        name: the layer that makes them.
        obstacle: why their tensors cannot be cut; empty if they can.
        sites: of each place, under every name of its tensor.
        makers: the places of weights that make them, each position a variable of its own.
        first: the place by which units are ordered.
    """

    name: str
    obstacle: str
    sites: list[list[Site]]
    makers: list[int]
    first: int

    def units(self, bundle: Bundle, chosen: Bool[Tensor, "components"]) -> _Units:
        """The positions of some components."""
        at = [place.at[chosen] for place in bundle.places]
        places = {site: held for sites, held in zip(self.sites, at, strict=True) for site in sites}
        return _Units(places, {at[i].shape[1] for i in self.makers}, at[self.first][:, 0])


@dataclass(frozen=True)
class _Units:
    """The positions that units own, each unit one row of every place.

    Attributes:
        places: positions at each site.
        made: how many positions of a unit weights make.
        order: among the units of their group.
    """

    places: dict[Site, Int[Tensor, "units positions"]]
    made: set[int]
    order: Int[Tensor, "units"]

    @property
    def form(self) -> tuple[Any, ...]:
        """Units of one form make a group: the same tensors, with the same number of positions in each."""
        return tuple(sorted((*site, at.shape[1]) for site, at in self.places.items()))


def _count(index: Tensor) -> int:
    """Of different positions."""
    return len(set(index.flatten().tolist()))


def _is_metric(module: nn.Module) -> bool:
    """Of torchmetrics: what lies in one judges the network, and is no part of it."""
    return any(
        kind.__name__ == "Metric" and kind.__module__.startswith("torchmetrics") for kind in type(module).__mro__
    )
