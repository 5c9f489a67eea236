"""Structures of one budget, each cut out of a copy, fine-tuned for a while and validated."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_slim.arguments import check_arguments
from lightning_slim.budgets import Budget, MACs
from lightning_slim.callbacks.look import Recalibrate
from lightning_slim.callbacks.trials import Trials, set_up_once
from lightning_slim.candidates import Granularity
from lightning_slim.explore import Exploration, Structure, draw_widths
from lightning_slim.monitor import Mode, Monitor
from lightning_slim.pruner import Pruner
from lightning_slim.schedules import OneShot
from lightning_slim.scores import Magnitude, Score
from lightning_slim.selection import Selection, plan_for
from lightning_slim.skipping import Skip
from lightning_slim.surgery import keeping_statistics
from lightning_slim.units import Plan


def explore(
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    budget: Budget = MACs(),  # noqa: B008 (frozen)
    n: int = 20,
    *,
    monitor: str,
    mode: Mode,
    score: Score = Magnitude(),  # noqa: B008 (frozen)
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    finetune_epochs: int = 1,
    record_batches: int = 32,
    module: str = "",
    skip: Skip = (),
    granularity: Granularity = "units",
    labels: int | str = 1,
    seed: int = 0,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    **trainer_kwargs: Any,
) -> Exploration:
    """Draws structures at random at one budget, fine-tunes each, and says how the one that a selection gives compares.

    Every structure is cut out of a copy of the model (without a fold), its batch statistics are measured anew, it is
    validated, trained by its own `configure_optimizers` and validated again. All begin with the same random numbers, so
    the same arguments give the same result. The model is left as it is.

    Args:
        model: any LightningModule that trains with `trainer.fit`, and whose `validation_step` logs `monitor`.
        datamodule: is left as it is. It is set up once for training, and once for validating.
        budget: what may remain; drawn structures come within 2 % of it, relative.
        n: how many are drawn.
        monitor: the metric that structures are compared by.
        mode: `"max"` if larger is better, `"min"` if smaller is.
        score: says which units stay, in the reference and in those that are drawn; `Random()` draws them, too.
        selection: gives the reference; its rounding, floors and ceilings hold for all.
        finetune_epochs: of each structure. For a number of steps, give `limit_train_batches` as well.
        record_batches: how many training batches scores are given, and batch statistics are measured on.
        module: dotted name of the only part that may be cut; all of it if empty.
        skip: what stays whole: names of layers, patterns such as `"net.encoder.*"`, types or their names.
        granularity: what goes: `"units"` of layers, whole residual blocks (`"layers"`), or both.
        labels: which item of a batch holds the labels, a number or a key, for scores that ask for them.
        seed: of what is drawn, of scores that draw, and of random numbers in training and validation.
        train_dataloaders: instead of a data module, as for `Trainer.fit`.
        val_dataloaders: instead of a data module, as for `Trainer.validate`.
        **trainer_kwargs: of the Trainers that run it, such as `accelerator` or `gradient_clip_val`.

    Raises:
        ValueError: the budget cannot be reached, or the monitor is not logged (it names what is).

    Source: the comparison with distributions of random structures is that of Radosavovic et al. (2019, 2020); for
    pruning, He et al. (2023), *Network Pruning Spaces*.
    """
    check_arguments(explore, locals())
    if n < 1:
        raise ValueError(f"Expected `n` of at least 1 structure to draw, got {n}.")
    watched = Monitor(monitor, mode)
    trials = Trials(model, set_up_once(datamodule), train_dataloaders, val_dataloaders, seed, trainer_kwargs)
    dense = trials.validate(trials.without([], Plan()))
    watched.of(dense)
    make = partial(
        Pruner,
        score=score,
        budget=budget,
        schedule=OneShot(0.0),
        selection=selection,
        module=module,
        skip=skip,
        compensate="none",
        seed=seed,
        granularity=granularity,
    )
    pruner = trials.look(make, record_batches, labels)
    importance, costs = pruner.importance(), pruner.costs
    generator = torch.Generator().manual_seed(seed)
    drawn = [draw_widths(budget, costs, importance, generator) for _ in range(n)]
    left = costs.ranked(importance)

    def attempt(plan: Plan) -> tuple[Structure, LightningModule]:
        slim = trials.without(pruner.groups, plan)
        if keeping_statistics(slim):
            trials.stand_still(slim, record_batches, Recalibrate())
        before = trials.validate(slim)
        trials.fit(slim, max_epochs=finetune_epochs)
        widths = {**pruner.widths, **{name: int(keep.sum()) for name, keep in plan.items()}}
        share = budget.remaining(left, widths)
        return Structure(widths, share, left.params(widths), left.macs(widths), before, trials.validate(slim)), slim

    reference, best = attempt(pruner.plan(1.0))
    structures: list[Structure] = []
    for widths in drawn:
        structure, slim = attempt(plan_for(widths, importance))
        if watched.goodness(structure.after) > max(watched.goodness(s.after) for s in [reference, *structures]):
            best = slim
        structures.append(structure)
    return Exploration(watched, dense, reference, structures, best)
