"""A network in which nothing takes some positions in: neither a product, nor a sum, a mean or a norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_slim.surgery.operations.labels import compact, support
from lightning_slim.surgery.operations.record import Watcher, slowly
from lightning_slim.surgery.operations.recurrent import unrolled
from lightning_slim.surgery.operations.rules import MIXES, NORMS, PRODUCTS, SOFTMAX, axes_reduced

Gone = Mapping[tuple[str, int], Tensor]  # (tensor, axis) -> positions


@contextmanager
def silenced(model: nn.Module, gone: Gone) -> Iterator[None]:
    """What the model computes within is what it computes when the positions that are gone are cut out.

    Means and norms are those over what stays. Recurrent layers go on reading what is gone: their columns must be zero.

    Args:
        model: left as it is.
        gone: what is to be left out.
    """
    silence = _Silence(model, gone)
    with slowly(), unrolled(model, silence), silence:
        yield


class _Silence(Watcher):  # type: ignore[no-untyped-call]
    """Carries operations out without the positions that are gone."""

    def __init__(self, model: nn.Module, gone: Gone) -> None:
        super().__init__(model)
        self.gone = torch.zeros_like(self.positions.made)
        for axis in self.positions.axes:
            for name in axis.names:
                if (name, axis.number) in gone:
                    self.gone[axis.labels[gone[name, axis.number]]] = True

    def execute(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with _disable_current_modes():
            if name in PRODUCTS:
                first = 1 if "add" in name else 0
                a, b = args[first : first + 2]
                own = not (self.of(a).data or self.of(b).data)  # a product of parameters, as in low-rank adapters
                quiet = (self._quiet(a, anyway=own), self._quiet(b, anyway=own))
                args = (*args[:first], *quiet, *args[first + 2 :])
            elif name == "convolution":
                args = (self._quiet(args[0]), *args[1:])
            elif name in SOFTMAX | MIXES or (name in NORMS and "batch" not in name):
                if self.of(args[0]).data and (done := self._without(func, name, args, kwargs)) is not None:
                    return done
                args = (self._quiet(args[0]), *args[1:])
            elif name in ("sum", "nansum"):
                args = (self._quiet(args[0]), *args[1:])
            return func(*args, **kwargs)

    def _masks(self, tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Layers in which something is gone, each with what is."""
        layers = (layer for layer in self.of(tensor).layers if bool(self.gone[compact(layer).clamp(min=0)].any()))
        return [(layer, self.gone[layer.clamp(min=0)]) for layer in layers]

    def _quiet(self, tensor: Tensor, anyway: bool = False) -> Tensor:
        """Zero where it is gone; parameters are read by what is not zero, and stay as they are."""
        if anyway or self.of(tensor).data:
            for _, mask in self._masks(tensor):
                tensor = tensor.masked_fill(mask, 0)
        return tensor

    def _without(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation on what stays, put back where it was; None where that is not along whole axes."""
        x, keep = args[0], dict[int, Tensor]()
        for layer, mask in self._masks(x):
            if len(support(layer)) != 1:
                return None
            axis = next(iter(support(layer)))
            kept = ~mask.movedim(axis, -1).reshape(-1, mask.shape[axis])[0]
            keep[axis] = keep[axis] & kept if axis in keep else kept
        if not keep:
            return func(*args, **kwargs)
        index = [keep[d].nonzero()[:, 0] if d in keep else torch.arange(n) for d, n in enumerate(x.shape)]
        small = x
        for axis in keep:
            small = small.index_select(axis, index[axis])
        out = func(*self._narrowed(name, [small, *args[1:]], keep, index, x.dim()), **kwargs)
        if name in MIXES:
            reduced = axes_reduced(name, args, kwargs, x.dim())
            made = [self._spread(each, x, reduced, keep, index) for each in (out if isinstance(out, tuple) else [out])]
            return tuple(made) if isinstance(out, tuple) else made[0]
        whole = torch.zeros_like(x)
        first = out[0] if isinstance(out, tuple) else out
        whole[torch.meshgrid(*index, indexing="ij")] = first
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    @staticmethod
    def _narrowed(name: str, args: list[Any], keep: Mapping[int, Tensor], index: list[Tensor], axes: int) -> list[Any]:
        """Weights, biases and sizes of a norm, for what stays."""
        own = 1 if "group" in name else axes - 1
        if name in NORMS and own in keep:
            at = slice(1, 3) if "group" in name else slice(2, 4)
            args[at] = [t.index_select(0, index[own]) if isinstance(t, Tensor) else t for t in args[at]]
            if "group" in name:
                args[4] = len(index[1])
            else:
                args[1] = [len(index[own])]
        return args

    @staticmethod
    def _spread(out: Tensor, x: Tensor, gone: set[int], keep: Mapping[int, Tensor], index: list[Tensor]) -> Tensor:
        """A mean or norm, back at the places of what stays along the axes that it left."""
        left = [d for d in range(x.dim()) if d not in gone] if out.dim() < x.dim() else list(range(x.dim()))
        sizes = [x.shape[d] if d in keep and d not in gone else n for d, n in zip(left, out.shape, strict=True)]
        at = [
            index[d] if d in keep and d not in gone else torch.arange(n) for d, n in zip(left, out.shape, strict=True)
        ]
        if not sizes:
            return out
        whole = out.new_zeros(sizes)
        whole[torch.meshgrid(*at, indexing="ij")] = out
        return whole
