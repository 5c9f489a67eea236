"""A network in which nothing reads some units: what is left of it when they are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lightning_slim.units import Span, UnitGroup
from lightning_slim.weight_norm import editing, stored


@contextmanager
@torch.no_grad()
def unread(model: nn.Module, groups: Sequence[UnitGroup], plan: Mapping[str, Bool[Tensor, "units"]]) -> Iterator[None]:
    """Zeroes the columns that read the removed units, for the time being."""
    spans = [(span, plan[g.name]) for g in groups if g.name in plan for span in g.spans if span.role == "in"]
    undo: list[Callable[[], object]] = []
    try:
        for span, keep in spans:
            at = span.index[~keep].flatten()
            undo.append(_saved(model, span, at))
            with editing(model, span.tensor) as weight:
                weight.index_fill_(span.axis, at.to(weight.device), 0)
        yield
    finally:
        for put_back in reversed(undo):  # what two spans share was zero already when the second came
            put_back()


def _saved(model: nn.Module, span: Span, at: Int[Tensor, "columns"]) -> Callable[[], object]:
    """Remembers the columns of a weight; what it returns puts them back to the bit."""
    tensors = stored(model, span.tensor)
    if len(tensors) > 1:  # a direction and its lengths
        saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        return lambda: [tensor.copy_(value) for tensor, value in saved]
    weight, at = tensors[0], at.to(tensors[0].device)
    columns = weight.index_select(span.axis, at)
    return lambda: weight.index_copy_(span.axis, at, columns)
