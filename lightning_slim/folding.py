"""Compensation of a whole plan: what the readers of removed units hear instead of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lightning_slim.statistics import Moments, least_squares_image, merged
from lightning_slim.surgery.compensate import fold
from lightning_slim.units import Plan, Reader, UnitGroup, named_tensors

Compensate = Literal["none", "mean", "least_squares"]


def fold_plan(
    models: Sequence[nn.Module],
    groups: Sequence[UnitGroup],
    plan: Plan,
    moments: Mapping[str, Sequence[Moments | None]],
    compensate: Compensate,
) -> Iterator[Callable[[], None]]:
    """Folds all units that a plan removes, in a model and in copies of it; yields the undo of each step.

    Args:
        models: the model that was recorded first, then its copies.
        groups: all groups of the model.
        plan: group -> which units stay.
        moments: group -> moments at each of its readers, None where nothing was seen.
        compensate: `"least_squares"`: the image of removed units in those that stay; `"mean"`: their mean; `"none"`.
    """
    for group in groups:
        if compensate != "none" and group.name in plan and not group.blocks:
            seen = zip(moments[group.name], group.readers, strict=True)
            pairs = [(at_reader, reader) for at_reader, reader in seen if at_reader is not None]
            yield from _fold_group(models, group.size, plan[group.name], pairs, compensate)


def _fold_group(
    models: Sequence[nn.Module],
    units: int,
    keep: Tensor,
    pairs: Sequence[tuple[Moments, Reader]],
    compensate: Compensate,
) -> Iterator[Callable[[], None]]:
    tensors = named_tensors(models[0])
    tied: dict[int, list[Moments]] = {}  # readers of one weight: it is folded once, by what all of them see
    for moments, reader in pairs:
        tied.setdefault(id(tensors[reader.span.tensor]), []).append(moments)
    folded: set[int] = set()
    for moments, reader in pairs:
        weight = id(tensors[reader.span.tensor])
        kept, gone = (_present(moments, reader, mask) for mask in (keep, ~keep))
        image = least_squares_image(merged(tied[weight]), kept, gone, intercept=reader.offset is not None)
        share = image.weight.cpu() * (compensate == "least_squares")
        mean = moments.mean.cpu()
        constant = mean[gone] - share.T @ mean[kept]
        for model in models:
            yield fold(model, reader, keep, (share, constant), weight_too=weight not in folded)
        folded.add(weight)


def _present(moments: Moments, reader: Reader, units: Bool[Tensor, "units"]) -> Int[Tensor, "columns"]:
    """The columns of some units without their past: the first of each unit, or all where they are its channels."""
    width = len(moments.total) // len(units)
    present = torch.arange(width if reader.joint else 1)
    return (units.nonzero() * width + present).flatten()
