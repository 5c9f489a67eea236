"""Which multiply-accumulates shrink with which tensors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_slim.costs import Work
from lightning_slim.profile import count_macs
from lightning_slim.surgery.layers import LayerKind, layer_kind
from lightning_slim.surgery.tracing import Example
from lightning_slim.weight_norm import weight_norm_of


def find_work(model: nn.Module, calls: Mapping[str, Example]) -> list[Work]:
    """All multiply-accumulates of some calls, for one sample.

    Args:
        model: the module that the names refer to.
        calls: dotted name of a network in it -> one call.
    """
    return [work for root, call in calls.items() for work in _of_network(model.get_submodule(root), call, root)]


def _of_network(network: nn.Module, call: Example, root: str) -> Iterator[Work]:
    projected: Counter[str] = Counter()

    def watch(name: str, kind: LayerKind) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            projected[name] += kind.projected(layer, *args, **kwargs)

        return hook

    kinds = {name: layer_kind(module) for name, module in network.named_modules()}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(watch(name, kind), with_kwargs=True)
        for name, kind in kinds.items()
        if kind is not None
    ]
    try:
        macs = count_macs(network, call.args, call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    prefix = f"{root}." if root else ""
    for name, count in macs.items():
        layer = network.get_submodule(name)
        path, kind = f"{prefix}{name}.".lstrip("."), kinds[name]
        mixing = kind.mixing(layer) if kind is not None else None
        matrices = _matrices(layer, path)
        if mixing is None:
            yield Work(count // call.samples, matrices)
            continue
        yield Work((count - projected[name]) // call.samples, (path + mixing[0],), mixing[1])
        if projected[name]:
            inside = [_matrices(child, f"{path}{n}.") for n, child in layer.named_children()]
            yield Work(projected[name] // call.samples, (*matrices, *itertools.chain(*inside)))


def _matrices(layer: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """What a layer multiplies its input by; under weight norm, its directions."""
    norm = weight_norm_of(layer)
    if norm is not None:
        return (prefix + norm.direction,)
    own = layer.named_parameters(recurse=False)
    return tuple(prefix + name for name, p in own if p.ndim > 1 and "bias" not in name)
