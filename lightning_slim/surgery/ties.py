"""One tensor under several names: what is cut under one of them is cut under all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

from torch import nn

from lightning_slim.surgery.graph import Component
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.units import Role, Span, named_tensors
from lightning_slim.weight_norm import stored

Site = tuple[str, int, Role]  # tensor, axis, role
Position = tuple[int, int, int]  # tensor, axis, position
Places = Callable[[str, Role], Sequence[tuple[Site, list[int]]]]


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """The id of every tensor that several layers hold -> its names; a layer that has several itself counts once."""
    layers = dict(model.named_modules())
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(model).items():
        if name.rpartition(".")[0] in layers:
            names[id(tensor)].append(name)
    return {tensor: shared for tensor, shared in names.items() if len(shared) > 1}


def join_tied(model: nn.Module, components: Sequence[Component], places: Places) -> list[Component]:
    """Joins components that own the same position of a tied tensor, to closure; one that must stay keeps the others.

    Args:
        model: the network.
        components: of its channels.
        places: (layer, side) -> where its channels live: the site, and the position of every channel there.
    """
    tied = {name: tensor for tensor, names in tied_names(model).items() for name in names}
    if not tied:
        return list(components)
    root = list(range(len(components)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    owner: dict[Position, int] = {}
    for i, position in _positions(components, tied, places):
        root[find(i)] = find(owner.setdefault(position, i))
    together: defaultdict[int, list[Component]] = defaultdict(list)
    for i, component in enumerate(components):
        together[find(i)].append(component)
    return [_merged(members) for members in together.values()]


def _positions(
    components: Sequence[Component], tied: Mapping[str, int], places: Places
) -> Iterator[tuple[int, Position]]:
    """Which component owns which position of a tied tensor; `tied` are the names and ids of these."""

    @cache
    def held(layer: str, role: Role) -> list[tuple[int, int, list[int]]]:
        return [(tied[name], axis, index) for (name, axis, _), index in places(layer, role) if name in tied]

    for i, component in enumerate(components):
        for owner, role, number, axis in component.channels:
            if axis is None:
                for tensor, along, index in held(owner, role):
                    if number < len(index) and index[number] >= 0:
                        yield i, (tensor, along, index[number])
            elif owner in tied:
                yield i, (tied[owner], axis, number)


def _merged(components: Sequence[Component]) -> Component:
    if len(components) == 1:
        return components[0]
    fixed = next((component.fixed for component in components if component.fixed), "")
    channels = [channel for component in components for channel in component.channels]
    return Component(channels, f"it is tied, and {fixed}" if fixed else "")


def half_tied(model: nn.Module, spans: Iterable[Span], prefix: str = "") -> str:
    """Why tied tensors forbid a cut: one would be cut under one of its names and not under another.

    Args:
        model: holds the tensors.
        spans: all that a group would cut.
        prefix: stands before every name in the spans.
    """
    tied = tied_names(model)
    if not tied:
        return ""
    cuts: defaultdict[tuple[int, str], set[tuple[int, tuple[int, ...]]]] = defaultdict(set)
    for span in spans:
        cuts[_holder(model, span.tensor.removeprefix(prefix))].add((span.axis, tuple(span.index.flatten().tolist())))
    for names in tied.values():
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
    wanted = {id(tensor) for name in tensors for tensor in stored(model, name)}
    tied = [name for tensor, names in tied_names(model).items() if tensor in wanted for name in names[1:]]
    held = {name: parameters[name] for name in tied if name in parameters}
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
