"""Which multiply-accumulates shrink with which tensors."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from lightning_slim.costs import Work
from lightning_slim.profile import count_by_operator
from lightning_slim.surgery.example import Example
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.weight_norm import weight_norm_of


def find_work(model: nn.Module, calls: Mapping[str, Example], apart: Collection[str] = ()) -> list[Work]:
    """All multiply-accumulates of some calls, for one sample.

    Args:
        model: the module that the names refer to.
        calls: dotted name of a network in it -> one call.
        apart: names of modules whose work does not count.
    """
    work = (work for root, call in calls.items() for work in _of_network(model.get_submodule(root), call, root))
    inside = tuple(f"{name}." for name in apart)
    return [each for each in work if not f"{each.layer}.".startswith(inside)]


def _of_network(network: nn.Module, call: Example, root: str) -> Iterator[Work]:
    for name, by_operator in count_by_operator(network, call.args, call.kwargs).items():
        layer = network.get_submodule(name)
        path, kind, count = (
            "".join(f"{part}." for part in (root, name) if part),
            layer_kind(layer),
            sum(by_operator.values()),
        )
        mixing = kind.mixing(layer) if kind is not None else None
        matrices = _matrices(layer, path)
        if mixing is None:
            yield Work(count // call.samples, matrices, layer=path[:-1])
            continue
        # A layer may use the weights of others without calling these.
        projected = sum(by_operator[operator] for operator in WITH_WEIGHTS)
        yield Work((count - projected) // call.samples, (path + mixing[0],), mixing[1], path[:-1])
        if projected:
            inside = [_matrices(child, f"{path}{n}.") for n, child in layer.named_children()]
            yield Work(projected // call.samples, (*matrices, *itertools.chain(*inside)), layer=path[:-1])


aten = torch.ops.aten
WITH_WEIGHTS = (aten.mm, aten.addmm, aten.convolution, aten._convolution)  # attention itself is a product of batches


def _matrices(layer: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """What a layer multiplies its input by; under weight norm, its directions."""
    norm = weight_norm_of(layer)
    if norm is not None:
        return (prefix + norm.direction,)
    own = layer.named_parameters(recurse=False)
    return tuple(prefix + name for name, p in own if p.ndim > 1 and "bias" not in name)
