"""Where the channels of layers live, by what their kinds say; and what is made of it: readers, surveys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_slim.costs import Product
from lightning_slim.surgery.layers import LayerKind, Place, layer_kind
from lightning_slim.surgery.layers.embedding import Embedding
from lightning_slim.units import Reader, Role, Span, UnitGroup
from lightning_slim.weight_norm import layer_of, weight_norm_of

Site = tuple[str, int, Role]  # tensor, axis, role

ROLES: tuple[Role, Role] = ("out", "in")
FEW = "it has {} units, and {} must stay"


@dataclass
class Survey:
    """What can be removed from a network, and what is left whole.

    Attributes:
        groups: the units.
        left_whole: layer name -> why its channels stay.
        unreached: layers that the calls did not reach.
        products: module -> the products that it was seen to carry out itself.
        teachers: frozen networks beside what trains, of whose weights and of those that train none reads what others
            make.
    """

    groups: list[UnitGroup] = field(default_factory=list)
    left_whole: dict[str, str] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    products: dict[str, list[Product]] = field(default_factory=dict)


def makes_channels(module: nn.Module | None) -> bool:
    """Linear layers, convolutions and embeddings do; normalisations and activations carry them."""
    kind = layer_kind(module) if module is not None else None
    return isinstance(kind, Embedding) or (kind is not None and kind.channel_axis is not None)


def sites(layer: str, module: nn.Module | None, role: Role) -> Iterator[Site]:
    """Where the channels of one side of a layer live."""
    kind: LayerKind | None = layer_kind(module) if module is not None else None
    if kind is None or module is None:
        return
    for place in kind.places(module, role):
        for tensor, own in stored(module, place, place.role or role):
            yield join(layer, tensor), place.axis, own


def stored(module: nn.Module, place: Place, role: Role) -> list[tuple[str, Role]]:
    """The tensors that a place lies in: under weight norm, a row has a direction and a length."""
    path, _, leaf = place.tensor.rpartition(".")
    norm = weight_norm_of(module.get_submodule(path)) if leaf == "weight" else None
    if norm is None:
        return [(place.tensor, role)]
    length: list[tuple[str, Role]] = [(join(path, norm.length), "out")] if place.axis == norm.dim else []
    return [(join(path, norm.direction), role), *length]


def reader(model: nn.Module, span: Span, normalised_by: Mapping[str, str], joint: bool, prefix: str = "") -> Reader:
    """The layer that reads units by a span.

    Args:
        model: holds the layer.
        span: its columns.
        normalised_by: layer -> the batch norm that alone reads it.
        joint: whether the positions of a unit are variables of their own.
        prefix: stands before every name in the span, and nowhere else.
    """
    tensor = span.tensor.removeprefix(prefix)
    layer, leaf = layer_of(tensor), tensor.rpartition(".")[2]
    module, norm = model.get_submodule(layer), normalised_by.get(layer)
    kind = layer_kind(module)
    assert kind is not None
    assert kind.channel_axis is not None
    offset, bias = None, kind.bias_of(module, leaf)
    if isinstance(module, _ConvTransposeNd):
        pass  # it spreads a constant unevenly over its outputs: no bias can take it
    elif bias is not None:
        offset = prefix + join(layer, bias)
    elif norm is not None and getattr(model.get_submodule(norm), "running_mean", None) is not None:
        offset = prefix + join(norm, "running_mean")
    chunks = getattr(module, "groups", 1) if span.axis == 1 else 1
    return Reader(prefix + layer, span, kind.channel_axis, chunks, offset, joint)


def parts(group: UnitGroup, layer: str) -> int:
    """How many directions of a recurrent layer the units of a group span: two where a sum, say, couples them."""
    recurrent = join(layer, "weight_hh")
    return len({span.tensor for span in group.spans if span.axis == 1 and span.tensor.startswith(recurrent)})


def join(module: str, leaf: str) -> str:
    """A dotted name."""
    return f"{module}.{leaf}" if module else leaf
