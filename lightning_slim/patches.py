"""Convolutions as linear layers on patches: every tap of the kernel reads a variable of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_slim.units import Reader, UnitGroup

# Channels times taps of one reader, 512 x 3 x 3, whose moments take 170 MB. Above, pixels are recorded.
MAX_COLUMNS = 4608

# What a convolution that computes something else, or pads in its own way, does not have.
PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def with_patches(model: nn.Module, group: UnitGroup) -> UnitGroup:
    """A group whose readers tell the taps of their kernels apart, where they can.

    These are `Conv1d`, `Conv2d` and `Conv3d` of one group that read at most `MAX_COLUMNS` channels times taps. Grouped
    and transposed convolutions, and layers of all other kinds, stay as they are.

    Args:
        model: the module that `group` was found in.
        group: the units.
    """
    readers = (replace(r, joint=True, patches=True) if _unfolds(model, r) else r for r in group.readers)
    return replace(group, readers=tuple(readers))


def _unfolds(model: nn.Module, reader: Reader) -> bool:
    layer = model.get_submodule(reader.layer)
    if not isinstance(layer, _ConvNd) or type(layer).forward not in PLAIN or layer.groups > 1:
        return False
    return reader.span.index.numel() * math.prod(layer.kernel_size) <= MAX_COLUMNS


def patches(
    layer: nn.Module, inputs: Float[Tensor, "items channels *space"], index: Int[Tensor, "units width"], enough: int
) -> Float[Tensor, "rows units columns"]:
    """What a convolution multiplies its kernel with, padding included: one row for every position of its output.

    The step between the rows that are taken shares no factor with the number of positions of an item, so that borders
    come as often as they do among all. Nothing but these rows is unfolded.

    Args:
        layer: a `Conv1d`, `Conv2d` or `Conv3d` of one group.
        inputs: what it is given.
        index: which channels are wanted: those of one unit a row.
        enough: at most so many rows.

    Returns:
        The columns of a unit are its channels and, within each, the taps of the kernel in the order of the weight.
    """
    assert isinstance(layer, _ConvNd)
    padding: list[int] = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(inputs, padding, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]  # a view
    positions = windows.shape[2 : -len(layer.kernel_size)]
    step = -(-len(inputs) * math.prod(positions) // enough)
    while math.gcd(step, math.prod(positions)) > 1:
        step += 1
    rows = torch.arange(0, len(inputs) * math.prod(positions), step, device=inputs.device)
    item, *place = (at[:, None, None] for at in torch.unravel_index(rows, (len(inputs), *positions)))
    return windows[(item, index.to(inputs.device), *place)].flatten(2)
