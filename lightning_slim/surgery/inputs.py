"""Which layers read the inputs of a network, column by column: found out by changing inputs, not by reading a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_slim.surgery.example import Example, untouched
from lightning_slim.surgery.hearing import hearing
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.ties import half_tied
from lightning_slim.surgery.verify import loud, outputs
from lightning_slim.units import Plan, Reader, Span, UnitGroup
from lightning_slim.weight_norm import obstacle, weight_norm_of


class InputError(ValueError):
    """Inputs of a network cannot be removed."""


class Entry(NamedTuple):
    """Where inputs enter a network: a tensor among the arguments of its call.

    Attributes:
        leaf: which of the arguments, flattened.
        axis: the axis of the features there.
    """

    leaf: int
    axis: int


@dataclass(frozen=True, eq=False)
class InputUnits:
    """The layers that read the inputs of a model.

    Attributes:
        groups: one for each of these layers; its units are the columns of the weight.
        features: group name -> the feature that each column reads, and nothing else; -1: none, or several.
    """

    groups: list[UnitGroup]
    features: dict[str, Int[Tensor, "columns"]]

    def plan(self, keep: Bool[Tensor, "features"]) -> Plan:
        """Which columns stay if these features do; of a layer that reads one feature only, all."""
        masks = {name: (at < 0) | keep[at] for name, at in self.features.items()}
        return Plan({name: mask for name, mask in masks.items() if not bool(mask.all())})

    def read(self, features: int) -> Bool[Tensor, "features"]:
        """Which of the features are read at all."""
        at = torch.cat(list(self.features.values()))
        return torch.bincount(at[at >= 0], minlength=features) > 0


def find_entries(calls: Mapping[str, Example], inputs: Tensor, axis: int) -> dict[str, Entry]:
    """The networks that are called with some inputs, as they are or with steps and features exchanged.

    Inputs that were scaled or cast on the way are told by their shape, if no argument is equal to them.

    Args:
        calls: the networks of a model, each with one call.
        inputs: `(item, feature)`, `(item, step, feature)` or `(item, feature, ...)`.
        axis: the axis of the features.
    """
    forms = [(inputs, axis)]
    if inputs.ndim == 3:
        forms.append((inputs.transpose(1, 2), 3 - axis))
    entries = {}
    for name, call in calls.items():
        leaves = [leaf if isinstance(leaf, Tensor) else None for leaf in tree_flatten(_arguments(call))[0]]
        alike = [
            (leaf is not None and bool((leaf == form).all()), Entry(i, at))
            for form, at in forms
            for i, leaf in enumerate(leaves)
            if leaf is not None and leaf.is_floating_point() and leaf.shape == form.shape
        ]
        if alike:
            entries[name] = max(alike, key=lambda each: each[0])[1]
    return entries


def find_inputs(
    model: nn.Module, calls: Mapping[str, Example], entries: Mapping[str, Entry], removable: Bool[Tensor, "features"]
) -> InputUnits:
    """Finds all layers that read the inputs.

    Each feature is changed in a set of runs of its own (those of the ones and zeros of its number in binary), so that
    twice the logarithm of their number of runs says for every column of every layer whether it reads one feature, and
    which; as many more, in which these layers return zeros, say whether it does so directly. Whatever moves channels
    without mixing them may lie between: transpositions, padding, flattening, batch normalisation, functions of each
    value. That nothing else hears the inputs is tried, too.

    Args:
        model: left as it is.
        calls: its networks, each with one call.
        entries: where the inputs enter; what `find_entries` returned, of at least one network.
        removable: which features may go.

    Raises:
        InputError: something other than linear, convolutional and recurrent layers hears a removable feature.
    """
    size = len(removable)
    within = {name: calls[name] for name in entries}
    heard, directly = (_responses(model, within, entries, size, hushed) for hushed in (False, True))
    groups, features = [], {}
    for name, codes in heard.items():
        single = (codes.sum(-1) == 1).all(-1) & (codes == directly[name]).all((1, 2))
        number = (codes[..., 1].long() << torch.arange(codes.shape[1])).sum(-1)
        group = _group(model, name, len(codes))
        if bool(single.any()) and not half_tied(model, group.spans):
            groups.append(group)
            features[group.name] = torch.where(single, number, -1)
    found = InputUnits(groups, features)
    nothing = found.plan(~removable)
    none = torch.zeros(size).bool()
    reason = hearing(model, groups, nothing, _changed(within, entries, none), _changed(within, entries, removable))
    if reason:
        raise InputError(
            f"Expected linear, convolutional (of one group) and recurrent layers to be all that reads the inputs, got "
            f"{reason}: name what it reads in `protect`, or screen the data beforehand."
        )
    if not groups:
        raise InputError(
            "Expected a linear, convolutional or recurrent layer that reads the inputs, got none: check `inputs`."
        )
    return found


def _arguments(call: Example) -> tuple[Any, ...]:
    return tuple(call.args), dict(call.kwargs)


def _responses(
    model: nn.Module, calls: Mapping[str, Example], entries: Mapping[str, Entry], size: int, hushed: bool
) -> dict[str, Bool[Tensor, "columns bits values"]]:
    """Layer -> which of its columns change with the features whose number has a bit of that value."""
    bits = max(1, (size - 1).bit_length())
    numbers = torch.arange(size)
    with _watching(model, hushed) as seen:
        outputs(model, _changed(calls, entries, torch.zeros(size).bool()))
        before = {name: list(given) for name, given in seen.items()}
        found = {name: torch.zeros(given[0].shape[-1], bits, 2).bool() for name, given in before.items()}
        for bit in range(bits):
            for value in range(2):
                seen.clear()
                outputs(model, _changed(calls, entries, (numbers >> bit) % 2 == value))
                for name, given in seen.items():
                    for a, b in zip(before[name], given, strict=True):
                        found[name][:, bit, value] |= (a != b).flatten(0, -2).any(0).cpu()
    return found


@contextmanager
def _watching(model: nn.Module, hushed: bool) -> Iterator[dict[str, list[Tensor]]]:
    """What arrives at layers whose columns could be cut, channels last; in eval mode.

    Hushed, these layers say nothing: what still arrives did not come through another one of them.
    """
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, axis: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["input"]
            given = given.data if isinstance(given, PackedSequence) else given
            seen.setdefault(name, []).append(given.detach().movedim(axis, -1))

        return hook

    readers = {name: layer for name, layer in model.named_modules() if _may_read(layer)}
    handles = []
    for name, layer in readers.items():
        handles.append(layer.register_forward_pre_hook(watch(name, _axis(layer)), with_kwargs=True))
        if hushed:
            handles.append(layer.register_forward_hook(_hush))
    try:
        with untouched(model), torch.no_grad(), loud(model):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hush(layer: nn.Module, args: Any, result: Any) -> Any:
    """A forward hook: zeros instead of a result."""

    def zeros(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return PackedSequence(zeros(leaf.data), leaf.batch_sizes, leaf.sorted_indices, leaf.unsorted_indices)
        return torch.zeros_like(leaf)

    return tree_map(zeros, result, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def _may_read(layer: nn.Module) -> bool:
    """Whether a layer's columns can go one by one: depthwise convolutions only carry channels."""
    plain = isinstance(layer, _ConvNd) and layer.groups == 1 and not layer.transposed
    understood = plain or isinstance(layer, nn.Linear | nn.RNNBase)
    return understood and not any(map(is_lazy, layer.parameters())) and not obstacle(layer)


def _axis(layer: nn.Module) -> int:
    kind = layer_kind(layer)
    assert kind is not None
    assert kind.channel_axis is not None
    return kind.channel_axis


def _group(model: nn.Module, name: str, columns: int) -> UnitGroup:
    """The columns of one layer."""
    layer = model.get_submodule(name)
    kind, norm = layer_kind(layer), weight_norm_of(layer)
    assert kind is not None
    prefix, index = f"{name}." if name else "", torch.arange(columns)[:, None]
    readers = []
    for place in kind.places(layer, "in"):
        tensor = norm.direction if norm is not None else place.tensor
        bias = kind.bias_of(layer, place.tensor)
        span = Span(prefix + tensor, place.axis, index, "in")
        readers.append(Reader(name, span, _axis(layer), offset=None if bias is None else prefix + bias))
    return UnitGroup(f"inputs of {name}", tuple(reader.span for reader in readers), tuple(readers), floor=1)


def _changed(
    calls: Mapping[str, Example], entries: Mapping[str, Entry], features: Bool[Tensor, "features"]
) -> dict[str, Example]:
    """The calls with some features of other items; a feature that no item differs in gets noise."""
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for name, call in calls.items():
        leaves, structure = tree_flatten(_arguments(call))
        leaf, axis = entries[name]
        given: Tensor = leaves[leaf].nan_to_num(0.0)
        last = given.movedim(axis, -1).clone()
        other = last.roll(1, 0)
        same = (other == last).flatten(0, -2).all(0)
        noise = torch.randn(last.shape, generator=generator).to(last)
        other = torch.where(same, last + noise, other)
        leaves[leaf] = torch.where(features.to(last.device), other, last).movedim(-1, axis)
        args, kwargs = tree_unflatten(leaves, structure)
        changed[name] = Example(args, kwargs, call.samples)
    return changed
