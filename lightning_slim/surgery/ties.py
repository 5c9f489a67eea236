"""One tensor under several names: what is cut under one of them is cut under all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_slim.surgery.graph import Channel, Component
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.units import Role, Span, named_tensors

Position = tuple[int, int, int]  # tensor, axis, position
ROLES: tuple[Role, ...] = ("out", "in")


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """The id of every tensor that several layers hold -> its names; a layer that has several itself counts once."""
    layers = dict(model.named_modules())
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(model).items():
        if name.rpartition(".")[0] in layers:
            names[id(tensor)].append(name)
    return {tensor: shared for tensor, shared in names.items() if len(shared) > 1}


def join_tied(model: nn.Module, components: Sequence[Component]) -> list[Component]:
    """Joins components that own the same position of a tied tensor, to closure; one that must stay keeps the others."""
    owned = _Owned(model)
    if not owned.tied:
        return list(components)
    root = list(range(len(components)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    owner: dict[Position, int] = {}
    for i, component in enumerate(components):
        for position in (position for channel in component.channels for position in owned.by(channel)):
            root[find(i)] = find(owner.setdefault(position, i))
    together: defaultdict[int, list[Component]] = defaultdict(list)
    for i, component in enumerate(components):
        together[find(i)].append(component)
    return [_merged(members) for members in together.values()]


def _merged(components: Sequence[Component]) -> Component:
    if len(components) == 1:
        return components[0]
    fixed = next((component.fixed for component in components if component.fixed), "")
    channels = [channel for component in components for channel in component.channels]
    return Component(channels, f"it is tied, and {fixed}" if fixed else "")


class _Owned:
    """The positions of tied tensors that a channel owns."""

    def __init__(self, model: nn.Module) -> None:
        self.tied = {name: tensor for tensor, names in tied_names(model).items() for name in names}
        self.places: dict[tuple[str, Role], list[tuple[int, int, list[int]]]] = {}
        for layer in {layer for name in self.tied for layer in _around(name)}:
            module = model.get_submodule(layer)
            kind = layer_kind(module)
            prefix = f"{layer}." if layer else ""
            for role in ROLES:
                places = kind.places(module, role) if kind is not None else ()
                self.places[layer, role] = [
                    (self.tied[prefix + place.tensor], place.axis, place.index.tolist())
                    for place in places
                    if prefix + place.tensor in self.tied
                ]

    def by(self, channel: Channel) -> Iterator[Position]:
        owner, role, number, axis = channel
        if axis is not None and owner in self.tied:
            yield self.tied[owner], axis, number
        for tensor, along, index in self.places.get((owner, role), ()):
            if number < len(index) and index[number] >= 0:
                yield tensor, along, index[number]


def _around(name: str) -> list[str]:
    """The layers that a tensor lies in: one may be built of others, as attention is."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def half_tied(model: nn.Module, spans: Iterable[Span], prefix: str = "") -> str:
    """Why tied tensors forbid a cut: one would be cut under one of its names and not under another.

    Args:
        model: holds the tensors.
        spans: all that a group would cut.
        prefix: stands before every name in the spans.
    """
    cuts: defaultdict[tuple[int, str], set[tuple[int, tuple[int, ...]]]] = defaultdict(set)
    for span in spans:
        cuts[_holder(model, span.tensor.removeprefix(prefix))].add((span.axis, tuple(span.index.flatten().tolist())))
    for names in tied_names(model).values():
        if any(cuts[_holder(model, name)] != cuts[_holder(model, names[0])] for name in names):
            return f"it is tied: {' and '.join(names)} are one tensor, and only one of them would be cut"
    return ""


def _holder(model: nn.Module, name: str) -> tuple[int, str]:
    """The layer that holds a tensor, whichever of the layer's names was meant, and what it calls the tensor."""
    layer, _, leaf = name.rpartition(".")
    return id(model.get_submodule(layer)), leaf


@contextmanager
def untied(model: nn.Module, tensors: Iterable[str]) -> Iterator[None]:
    """Tied parameters have a tensor of their own under every name, for the time being."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(parameters[name]) for name in tensors if name in parameters}
    tied = [name for tensor, names in tied_names(model).items() if tensor in wanted for name in names[1:]]
    held = {name: parameters[name] for name in tied}
    try:
        for name, parameter in held.items():
            _put(model, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        yield
    finally:
        for name, parameter in held.items():
            _put(model, name, parameter)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    layer, _, leaf = name.rpartition(".")
    module = model.get_submodule(layer)
    module._parameters[leaf] = parameter
    kind = layer_kind(module)
    if kind is not None:
        kind.refresh(module)
