"""Compensation of a whole plan: what the readers of removed units hear instead of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_slim.statistics import Moments, least_squares_image, merged
from lightning_slim.surgery.compensate import fold
from lightning_slim.surgery.ties import tied_names
from lightning_slim.units import Plan, Reader, UnitGroup, named_tensors

Compensate = Literal["none", "mean", "least_squares", "exact"]


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
        compensate: `"least_squares"`: the image of removed units in those that stay; `"exact"`: the same, of groups
            whose readers tell taps apart (`with_patches`); `"mean"`: their mean; `"none"`.
    """
    for group in groups:
        if compensate != "none" and group.name in plan and not group.blocks:
            seen = zip(moments[group.name], group.readers, strict=True)
            pairs = [(at_reader, reader) for at_reader, reader in seen if at_reader is not None]
            yield from _fold_group(models, group, plan[group.name], pairs, compensate)


ITERATES = ("z", "p0", "ax", "slow_buffer", "slow_param")  # of schedule-free, Prodigy, ASGD and Lookahead


@torch.no_grad()
def fold_iterates(
    optimizers: Iterable[Optimizer],
    model: nn.Module,
    groups: Sequence[UnitGroup],
    plan: Plan,
    moments: Mapping[str, Sequence[Moments | None]],
    compensate: Compensate,
) -> None:
    """Folds what optimizers keep that stands for weights as the weights themselves are folded; momentum stays.

    Without that, a schedule-free average would lead back to weights that nothing was folded into.

    Args:
        optimizers: whose states are replaced, not written into.
        model: whose weights serve as the place to fold in; they are as they were in the end.
        groups: as in `fold_plan`.
        plan: as in `fold_plan`.
        moments: as in `fold_plan`.
        compensate: as in `fold_plan`.
    """
    weights = {id(parameter) for parameter in model.parameters()}
    for optimizer in (getattr(optimizer, "_optimizer", optimizer) for optimizer in optimizers):
        for key in ITERATES:
            held = {p: s for p, s in optimizer.state.items() if id(p) in weights and _stands_for(s.get(key), p)}
            now = [p.clone() for p in held]
            for p, state in held.items():
                p.copy_(state[key].reshape(p.shape))
            before = [p.clone() for p in held]
            for _ in fold_plan([model], groups, plan, moments, compensate) if held else ():
                pass
            for (p, state), then in zip(held.items(), before, strict=True):
                state[key] = state[key] + (p - then).to(state[key]).reshape(state[key].shape)
            for p, value in zip(held, now, strict=True):
                p.copy_(value)


def _stands_for(iterate: object, weight: Tensor) -> bool:
    """Whether a state is as large as its weight."""
    return isinstance(iterate, Tensor) and iterate.numel() == weight.numel()


def _fold_group(
    models: Sequence[nn.Module],
    group: UnitGroup,
    keep: Tensor,
    pairs: Sequence[tuple[Moments, Reader]],
    compensate: Compensate,
) -> Iterator[Callable[[], None]]:
    tensors, tied = named_tensors(models[0]), tied_names(models[0])
    making = {(id(tensors[span.tensor]), span.axis) for span in group.spans if span.role == "out"}
    heard: dict[int, dict[int, list[tuple[Moments, Reader]]]] = {}  # weight -> bias -> who reads with these
    for at_reader, reader in pairs:
        theirs = id(tensors[reader.offset]) if reader.offset else 0
        heard.setdefault(id(tensors[reader.span.tensor]), {}).setdefault(theirs, []).append((at_reader, reader))
    for weight, by_bias in heard.items():
        everywhere = merged([at_reader for same in by_bias.values() for at_reader, _ in same])
        for i, (bias, same) in enumerate(by_bias.items()):
            reader = same[0][1]
            kept, gone = (_present(everywhere, reader, mask) for mask in (keep, ~keep))
            if len(tied.get(bias, ())) > len({reader.offset for _, reader in same}):  # other layers have it, too
                reader = replace(reader, offset=None)
            # A tied weight is folded once. One that makes the units as it reads them, as that of a decoder tied to its
            # embedding, is not: it would make others.
            weight_too = compensate != "mean" and (weight, reader.span.axis) not in making
            image = least_squares_image(everywhere, kept, gone, intercept=reader.offset is not None)
            share = image.weight.cpu() * weight_too
            mean = merged([at_reader for at_reader, _ in same]).mean.cpu()
            constant = mean[gone] - share.T @ mean[kept]
            for model in models:
                yield fold(model, reader, keep, (share, constant), weight_too=weight_too and i == 0)


def _present(moments: Moments, reader: Reader, units: Bool[Tensor, "units"]) -> Int[Tensor, "columns"]:
    """The columns of some units without their past: the first of each unit, or all where they are its channels."""
    width = len(moments.total) // len(units)
    present = torch.arange(width if reader.joint else 1)
    return (units.nonzero() * width + present).flatten()
