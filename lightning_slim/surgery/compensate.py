"""Folds removed units into those that stay, before the cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_slim.units import Reader, named_tensors
from lightning_slim.weight_norm import editing, stored

Image = tuple[Float[Tensor, "kept removed"], Float[Tensor, "removed"]]


@torch.no_grad()
def fold(
    model: nn.Module, reader: Reader, keep: Bool[Tensor, "units"], image: Image, weight_too: bool = True
) -> Callable[[], None]:
    """Lets a reader hear the removed units through the kept ones: `removed ~ constant + kept @ weight`.

    With `W` the reader's columns: `W_kept += W_removed weight'` at every kernel position and every position of a unit,
    and `W_removed constant` goes to the reader's bias, or is taken from the `running_mean` of the batch normalisation
    behind it. Exact for linearly dependent units; at zero-padded borders the constant is not. Of a joint reader the
    rows and columns of the image are all positions of all units; of one of patches, all taps of all positions, and
    the fold is the least-squares refit of the convolution, `W_kept + S_kk^-1 S_kr W_removed` over unfolded patches.

    Args:
        model: the module to change; the removed columns are left for the cut.
        reader: where the units are read.
        keep: which units stay.
        image: weight and constant, from `least_squares_image`.
        weight_too: False folds the constant only: the weight is tied, and was folded before, or makes the units, too.

    Returns:
        A function that undoes the fold.
    """
    weight, constant = image
    tensors = named_tensors(model)
    device = tensors[reader.span.tensor].device
    index, keep = reader.span.index.to(device), keep.to(device)
    if reader.patches:  # counted over channels and taps
        taps = tensors[reader.span.tensor].shape[2:].numel()
        index = (index.unsqueeze(-1) * taps + torch.arange(taps, device=device)).flatten(1)
    if reader.joint:  # every position is a variable of its own
        index, keep = index.reshape(-1, 1), keep.repeat_interleave(index.shape[1])
    undo = [(tensor, tensor.clone()) for tensor in stored(model, reader.span.tensor)]
    with editing(model, reader.span.tensor) as matrix:
        columns = matrix.movedim(reader.span.axis, 0)  # a view
        if reader.patches:
            columns = columns.movedim(1, -1)  # channels, taps, outputs: still one
        positions = columns.shape[:-1] if reader.patches else columns.shape[:1]
        kept, removed = (torch.unravel_index(index[of], positions) for of in (keep, ~keep))
        gone = columns[removed]  # removed, width, ...
        if weight_too:
            columns.index_put_(kept, torch.tensordot(weight.to(columns), gone, dims=1), accumulate=True)
    if reader.offset is not None:
        offset = tensors[reader.offset]
        undo.append((offset, offset.clone()))
        shift = _summed(torch.tensordot(constant.to(columns), gone, dims=1))
        offset += -shift if reader.offset.endswith("running_mean") else shift

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in undo:
                tensor.copy_(value)

    return restore


def _summed(constant: Tensor) -> Float[Tensor, "outputs"]:
    """A constant input's effect on each output: summed over a unit's positions (axis 0) and the kernel (axes 2 on)."""
    constant = constant.sum(0)
    return constant.flatten(1).sum(1) if constant.ndim > 1 else constant
