"""Labels of positions: integer tensors that ride along with the tensors of a forward pass.

A tensor carries layers of labels, each of the tensor's own shape; along axes on which a layer does not vary, its stride
is 0, so that it takes hardly any memory. A positive label is a position of a parameter or buffer, a negative one a
position that nobody may remove (of an input, say), 0 one of any size (of `torch.zeros`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Labels:
    """What a tensor carries.

    Attributes:
        layers: label tensors of its shape.
        data: whether it depends on the inputs; False: it is computed of parameters and constants alone.
        number: equal for equal labels, once it is asked for.
    """

    layers: list[Tensor] = field(default_factory=list)
    data: bool = False
    number: int | None = None


def support(layer: Tensor) -> set[int]:
    """The axes along which a layer varies."""
    return {axis for axis in range(layer.dim()) if layer.size(axis) > 1 and layer.stride(axis) != 0}


def compact(layer: Tensor) -> Tensor:
    """Size 1 along all other axes."""
    for axis in range(layer.dim()):
        if layer.size(axis) > 1 and layer.stride(axis) == 0:
            layer = layer.narrow(axis, 0, 1)
    return layer


def shrink(layer: Tensor) -> Tensor:
    """Stride 0 wherever the labels do not vary."""
    small = compact(layer)
    for axis in range(small.dim()):
        if small.size(axis) > 1 and _same(small, axis):
            small = small.narrow(axis, 0, 1)
    return small.contiguous().expand(layer.shape)


def filled(layer: Tensor) -> Tensor:
    """Zeros take the label that all others have along an axis, as where sequences are padded; channels stay apart."""
    small = compact(layer)
    for axis in support(small):
        labels = small.amax(axis, keepdim=True)
        alone = support(shrink(labels)) and bool((small >= 0).all())
        if alone and bool(((small == labels) | (small == 0)).all()):
            small = labels
    return small.expand(layer.shape)


def _same(layer: Tensor, axis: int) -> bool:
    """Whether a layer does not vary along an axis; most that vary do so from the first position to the second."""
    first = layer.narrow(axis, 0, 1)
    return torch.equal(first, layer.narrow(axis, 1, 1)) and bool((layer == first).all())


def removable(layer: Tensor) -> bool:
    """Whether a layer has positions of parameters or buffers."""
    return bool((compact(layer) > 0).any())


def along(axis: int, labels: Tensor, shape: Sequence[int]) -> Tensor:
    """A layer that varies along one axis."""
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return labels.view(view).expand(shape)


def fixed(shape: Sequence[int], axes: Iterable[int] | None = None) -> list[Tensor]:
    """A layer of negative labels for each axis."""
    chosen = range(len(shape)) if axes is None else axes
    return [along(axis, -torch.arange(1, shape[axis] + 1), shape) for axis in chosen if shape[axis] > 1]


def distinct(layers: Iterable[Tensor]) -> list[Tensor]:
    """Layers that say something, each once."""
    kept: list[Tensor] = []
    for layer in layers:
        if support(layer) and not any(
            support(layer) == support(other) and torch.equal(compact(layer), compact(other)) for other in kept
        ):
            kept.append(layer)
    return kept
