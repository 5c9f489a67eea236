"""Attention layers that are built of linear layers: whole heads, in the many ways in which they are written.

A head is rows of the queries, keys and values, and the columns that read what it computes. Where several heads of
queries share one of keys and values (grouped queries), they are one unit: these go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lightning_slim.surgery.layers.base import LayerKind, Place
from lightning_slim.surgery.layers.conv import Conv
from lightning_slim.surgery.layers.linear import Conv1D, Linear
from lightning_slim.units import Role

# What projections, head counts and widths are called; a layer is understood if its names are here.
QUERIES = (
    "q_proj", "q_lin", "query", "queries", "to_q", "q", "wq", "w_q", "q_linear", "query_proj",
    "q_net", "Wq", "W_q",
)  # fmt: skip
KEYS = ("k_proj", "k_lin", "key", "keys", "to_k", "k", "wk", "w_k", "k_linear", "key_proj", "k_net", "Wk", "W_k")
VALUES = (
    "v_proj", "v_lin", "value", "values", "to_v", "v", "wv", "w_v", "v_linear", "value_proj",
    "v_net", "Wv", "W_v",
)  # fmt: skip
FUSED = ("qkv", "qkv_proj", "in_proj", "c_attn", "to_qkv", "Wqkv", "query_key_value", "qkv_linear", "proj_qkv", "w_qkv")
INTERLEAVED = ("query_key_value",)  # (heads, 3, width) instead of (3, heads, width)
OUTPUTS = (
    "o_proj", "out_proj", "out_lin", "to_out", "proj", "c_proj", "o", "wo", "w_o", "out", "output_proj", "dense",
    "out_linear", "proj_out", "Wo", "W_o", "fc_out", "o_net", "output",
)  # fmt: skip
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nheads", "nhead", "h", "num_query_heads")
SHARED_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
HEAD_WIDTH = ("head_dim", "attention_head_size", "head_size", "dim_head", "key_value_proj_dim", "d_head", "d_k", "hd")
WIDTH = (
    "all_head_size", "inner_dim", "attn_dim", "attention_dim", "split_size", "embed_dim", "hidden_size", "hidden_dim",
    "d_model", "n_embd", "dim", "width",
)  # fmt: skip


KINDS = (Linear(), Conv1D(), Conv())  # of projections


class Run(NamedTuple):
    """Where heads lie in the outputs of a projection: unit `u` owns `start + u * stride + [0, length)`."""

    projection: str
    start: int
    stride: int
    length: int

    def positions(self, units: int, width: int = 0) -> Int[Tensor, "units width"]:
        """Of every unit; repeated where a unit is wider than what it owns here."""
        width = width or self.length
        return self.start + self.stride * torch.arange(units)[:, None] + torch.arange(width) % self.length


class Heads(NamedTuple):
    """How the heads of a layer lie in its projections.

    Attributes:
        units: how many can be removed one by one.
        shared: heads of queries in each.
        width: channels of what each computes.
        runs: its rows in the projections of the input.
        output: the projection of the output; empty if that is another layer's.
    """

    units: int
    shared: int
    width: int
    runs: tuple[Run, ...]
    output: str


class Attention(LayerKind):
    """Linear layers of their own for queries, keys and values, or one for all three.

    The output is that of an output projection, behind which the heads are not seen; without one, they are the output.
    """

    channel_axis: ClassVar[int | None] = -1
    opaque: ClassVar[bool] = True

    def speaks_for(self, module: nn.Module) -> bool:
        return bool(module._modules) and _heads(module) is not None

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        heads = _understood(layer)
        if role == "in":
            return [place for name in _inputs(heads) for place in _places(layer, name, "in")]
        if heads.output:
            return _places(layer, heads.output, "out")
        made = _made(layer, heads, heads.width)
        return [Place(place.tensor, place.axis, place.index.flatten()) for place in made]

    def families(self, layer: nn.Module, role: Role) -> Int[Tensor, "channels"] | None:
        heads = _understood(layer)
        hidden = role == "in" or heads.output
        return None if hidden else torch.arange(heads.units).repeat_interleave(heads.width)

    def inner(self, layer: nn.Module) -> Sequence[tuple[str, Sequence[Place]]]:
        heads = _understood(layer)
        if not heads.output:
            return [("", _made(layer, heads))]
        channels = torch.arange(heads.units * heads.width).view(heads.units, heads.width)
        read = _places(layer, heads.output, "in")
        return [("heads", [*_made(layer, heads), *(Place(p.tensor, p.axis, p.index[channels], "in") for p in read)])]

    def mixing(self, layer: nn.Module) -> tuple[str, int]:
        value = _made(layer, _understood(layer))[0]
        return value.tensor, value.axis

    def refresh(self, layer: nn.Module) -> None:
        # The projections are refreshed after the layers around them: their attributes still tell how it was before.
        heads = _understood(layer)
        kind, projection = _projection(layer, heads.runs[0].projection)
        before = _channels(layer, heads.runs[0].projection, "out")
        kind.refresh(projection)
        units = heads.units * _channels(layer, heads.runs[0].projection, "out") // before
        for names, each in ((HEADS, heads.shared), (SHARED_HEADS, 1), (WIDTH, heads.width)):
            for name in names:
                if layer.__dict__.get(name) == heads.units * each:
                    setattr(layer, name, units * each)


def _heads(layer: nn.Module) -> Heads | None:
    """How the heads of a layer lie; None if it is not understood."""
    fused, output = _find(layer, FUSED), _find(layer, OUTPUTS)
    names = [fused] if fused else [_find(layer, names) for names in (QUERIES, KEYS, VALUES)]
    count, width = _attribute(layer, HEADS), _attribute(layer, HEAD_WIDTH)
    if not all(names) or not (count or width):
        return None
    if not fused:
        queries, keys, values = (_channels(layer, name, "out") for name in names)
    elif output:
        queries = _channels(layer, output, "in")
        keys = values = (_channels(layer, fused, "out") - queries) // 2
    else:
        queries = keys = values = _channels(layer, fused, "out") // 3
    width = width or queries // count
    units, total = keys // width, queries // width
    fits = units > 0 and total % units == 0 and (units * width, total * width) == (keys, queries) and not values % units
    if not fits or (fused and queries + keys + values != _channels(layer, fused, "out")):
        return None
    shared, value_width = total // units, values // units
    if output and _channels(layer, output, "in") != total * value_width:
        output = ""
    if fused in INTERLEAVED and shared == 1:
        runs = [Run(fused, part * width, 3 * width, width) for part in range(3)]
    else:
        starts = (0, queries, queries + keys) if fused else (0, 0, 0)
        lengths = (shared * width, width, value_width)
        names = names * 3 if fused else names
        runs = [Run(name, start, n, n) for name, start, n in zip(names, starts, lengths, strict=True)]
    return Heads(units, shared, shared * value_width, tuple(runs), output)


def _understood(layer: nn.Module) -> Heads:
    heads = _heads(layer)
    assert heads is not None
    return heads


def _inputs(heads: Heads) -> dict[str, None]:
    """The projections of the input, each once."""
    return dict.fromkeys(run.projection for run in heads.runs)


def _made(layer: nn.Module, heads: Heads, width: int = 0) -> list[Place]:
    """What makes each head: rows of its projections, and entries of what the layer holds for every head."""
    made = [
        Place(place.tensor, place.axis, place.index[run.positions(heads.units, width)])
        for run in heads.runs
        for place in _places(layer, run.projection, "out")
    ]
    for name, tensor in _own(layer, heads):
        for size in dict.fromkeys((heads.units * heads.shared, heads.units)):
            axes = [axis for axis, n in enumerate(tensor.shape) if n == size > 1]
            if tensor.is_floating_point() and len(axes) == 1:
                each = size // heads.units
                made.append(Place(name, axes[0], Run("", 0, each, each).positions(heads.units, width)))
                break
    return made


def _own(layer: nn.Module, heads: Heads) -> Iterator[tuple[str, Tensor]]:
    """What a layer holds beside projections and norms: biases of positions, temperatures."""
    projections = {*_inputs(heads), heads.output}
    for path, module in layer.named_modules():
        if path not in projections - {""} and "Norm" not in type(module).__name__:
            for held in (module._parameters, module._buffers):
                yield from ((f"{path}.{n}".lstrip("."), tensor) for n, tensor in held.items() if tensor is not None)


def _find(layer: nn.Module, names: Sequence[str]) -> str:
    """The first projection of one of these names, or the first in a sequence of that name; empty if there is none."""
    for name in names:
        child = dict(layer.named_children()).get(name)
        if isinstance(child, nn.Sequential) and len(child):
            name, child = f"{name}.0", child[0]
        if child is not None and any(kind.speaks_for(child) for kind in KINDS):
            return name
    return ""


def _projection(layer: nn.Module, name: str) -> tuple[LayerKind, nn.Module]:
    projection = layer.get_submodule(name)
    return next(kind for kind in KINDS if kind.speaks_for(projection)), projection


def _places(layer: nn.Module, name: str, role: Role) -> list[Place]:
    """The places of a projection, as places of the layer."""
    kind, projection = _projection(layer, name)
    return [Place(f"{name}.{place.tensor}", place.axis, place.index) for place in kind.places(projection, role)]


def _channels(layer: nn.Module, name: str, role: Role) -> int:
    return len(_places(layer, name, role)[0].index)


def _attribute(layer: nn.Module, names: Sequence[str]) -> int:
    """The first of these attributes that is a count; 0 if there is none."""
    values = (layer.__dict__.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)
