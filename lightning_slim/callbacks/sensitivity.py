"""How sensitive each group of units is: of a model beside a Trainer, and while one trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_slim.arguments import check_arguments
from lightning_slim.budgets import Units
from lightning_slim.callbacks.look import Look
from lightning_slim.callbacks.prune import Prune
from lightning_slim.callbacks.trials import Trials, set_up_already, set_up_once
from lightning_slim.candidates import Granularity
from lightning_slim.monitor import Metrics
from lightning_slim.payload import opened, sealed
from lightning_slim.pruner import NoEffectWarning, Pruner
from lightning_slim.schedules import OneShot
from lightning_slim.scores import Magnitude, Score
from lightning_slim.sensitivity import FRACTIONS, SensitivityTable, check_fractions, take_away
from lightning_slim.skipping import Skip
from lightning_slim.surgery import StructureChange
from lightning_slim.units import Plan


def sensitivity(
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    score: Score = Magnitude(),  # noqa: B008 (frozen)
    fractions: Sequence[float] = FRACTIONS,
    *,
    module: str = "",
    skip: Skip = (),
    granularity: Granularity = "units",
    labels: int | str = 1,
    record_batches: int = 32,
    seed: int = 0,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    **trainer_kwargs: Any,
) -> SensitivityTable:
    """Validates a model without the least important units of one group after another; the model is left as it is.

    Each cell of the table is the model's own validation, with all metrics that it logs, of a copy from which the units
    were cut without a fold. That is the network in which nothing reads them; a norm over channels no longer hears them.
    There are at most `groups x fractions + 1` validations: `limit_val_batches` makes them shorter.

    Args:
        model: any LightningModule whose `validation_step` logs something.
        datamodule: is left as it is. It is set up once for recording, and once for validating.
        score: says which units are least important. Its evidence is recorded in training steps of another copy, of
            which no weight moves.
        fractions: of a group's units that are taken away, rising.
        module: dotted name of the only part that is tried; all of it if empty.
        skip: what stays whole: names of layers, patterns such as `"net.encoder.*"`, types or their names.
        granularity: what goes: `"units"` of layers, whole residual blocks (`"layers"`), or each.
        labels: which item of a batch holds the labels, a number or a key, for scores that ask for them.
        record_batches: how many training batches scores are given.
        seed: of scores that draw, and of random numbers in every validation.
        train_dataloaders: instead of a data module, as for `Trainer.fit`.
        val_dataloaders: instead of a data module, as for `Trainer.validate`.
        **trainer_kwargs: of the Trainers that run it, such as `accelerator` or `limit_val_batches`.

    Raises:
        ValueError: nothing can be removed, or `fractions` do not rise between 0 and 1.
    """
    check_arguments(sensitivity, locals())
    check_fractions(fractions)
    trials = Trials(model, set_up_once(datamodule), train_dataloaders, val_dataloaders, seed, trainer_kwargs)
    make = partial(_looking, score=score, module=module, skip=skip, granularity=granularity, seed=seed)
    pruner = trials.look(make, record_batches, labels)
    return _measured(pruner, trials, fractions)


class Sensitivity(Look):
    """Measures, while a model trains, how sensitive each group of units is; the run does not notice.

    After every `every_n_epochs`-th epoch, `table` is what `sensitivity` would return of the model as it is then, on
    the run's validation batches. For each metric that validation logs and each group, its mean over the fractions is
    logged as `slim/sensitivity/<metric>/<group>`. Takes up to `groups x fractions + 1` validations each time.

    Beside a pruning callback it asks that one's score about the units that are left.

    Args:
        every_n_epochs: how often.
        fractions: of a group's units that are taken away, rising; of those that are there at that time.
        score: says which units are least important; None: that of the pruning callback beside this one, or
            `Magnitude()`.
        module: dotted name of the only part that is tried; all of it if empty.
        skip: what stays whole: names of layers, patterns such as `"net.encoder.*"`, types or their names.
        granularity: what goes: `"units"` of layers, whole residual blocks (`"layers"`), or each.
        labels: which item of a batch holds the labels, a number or a key, for scores that ask for them.
        record_every_n_steps: how often evidence is recorded.
        limit_val_batches: of each validation, as of a Trainer; None: as many as the run validates with.
        seed: of scores that draw, and of random numbers in every validation.

    Attributes:
        table: the last one; None before there is one.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        fractions: Sequence[float] = FRACTIONS,
        score: Score | None = None,
        module: str = "",
        skip: Skip = (),
        granularity: Granularity = "units",
        labels: int | str = 1,
        record_every_n_steps: int = 10,
        limit_val_batches: int | float | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(Sensitivity, locals())
        check_fractions(fractions)
        if every_n_epochs < 1:
            raise ValueError(f"Expected `every_n_epochs` of at least 1, got {every_n_epochs}.")
        make = partial(
            _looking, score=score or Magnitude(), module=module, skip=skip, granularity=granularity, seed=seed
        )
        super().__init__(make, labels, record_every_n_steps)
        self.every_n_epochs, self.fractions, self.score = every_n_epochs, fractions, score
        self.limit_val_batches, self.seed = limit_val_batches, seed
        self.table: SensitivityTable | None = None
        self._restored: dict[str, Any] = {}

    # --- set up, save, resume ---

    def state_dict(self) -> dict[str, Any]:
        pruner = self._pruner.state_dict() if self._pruner is not None else {}
        return sealed({"gathering": self._gathering.state_dict(), "pruner": pruner})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = opened(state_dict, type(self).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.val_dataloaders:
            raise MisconfigurationException(
                "Expected a run with validation, got none: sensitivity is what becomes of its metrics."
            )
        if _pruning(trainer) is None:
            super().on_train_start(trainer, pl_module)
            if self._restored:
                self.pruner.load_state_dict(self._restored["pruner"])
                self._gathering.load_state_dict(self._restored["gathering"])
                self._restored = {}
        elif self.score is not None:
            raise MisconfigurationException(
                f"Expected no `score` beside a pruning callback, got {self.score}: this one goes by that one's."
            )

    def on_structure_change(self, change: StructureChange) -> None:
        """Another callback cut the module: what was seen of it holds no longer."""
        if self._pruner is not None:
            self._pruner = self._make(self._pruner.model)

    # --- measure ---

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        pruning = _pruning(trainer)
        pruner = self.pruner if pruning is None else pruning.pruner
        if not pruner.prepared or not pruner.recorder.ready:
            rank_zero_warn("Sensitivity was not measured: nothing was recorded yet.", category=NoEffectWarning)
            return
        device = trainer.strategy.root_device
        settings = {
            "accelerator": device.type,
            "devices": 1 if device.index is None else [device.index],
            "precision": trainer.precision,
            "limit_val_batches": self.limit_val_batches or trainer.limit_val_batches,
        }
        trials = Trials(pl_module, set_up_already(trainer), None, None, self.seed, settings)
        self.table = _measured(pruner, trials, self.fractions, partial(_mean_over_ranks, trainer))
        scalars = {
            f"slim/sensitivity/{name}/{group}": sum(m[name] for m in curve.metrics.values()) / len(curve.metrics)
            for name in self.table.whole
            for group, curve in self.table.curves.items()
        }
        pl_module.log_dict(scalars)
        rank_zero_info(f"slim: sensitivity after epoch {trainer.current_epoch}\n{self.table}")


def _looking(model: nn.Module, score: Score, module: str, skip: Skip, granularity: Granularity, seed: int) -> Pruner:
    """A pruner that records what a score asks for, and nothing else."""
    return Pruner(
        model,
        score,
        Units(1.0),
        OneShot(0.0),
        module=module,
        skip=skip,
        compensate="none",
        granularity=granularity,
        seed=seed,
    )


def _measured(
    pruner: Pruner, trials: Trials, fractions: Sequence[float], agree: Callable[[Metrics], Metrics] = dict
) -> SensitivityTable:
    importance = pruner.agree(pruner.importance())

    def evaluate(plan: Plan) -> Metrics:
        return agree(trials.validate(trials.without(pruner.groups, plan)))

    return take_away(pruner.groups, importance, pruner.costs, fractions, evaluate, pruner.left_whole)


def _mean_over_ranks(trainer: Trainer, metrics: Metrics) -> Metrics:
    """Each rank validated on its own share of the data."""
    device = trainer.strategy.root_device
    values = {name: torch.tensor(value, device=device, dtype=torch.float32) for name, value in metrics.items()}
    return {name: float(trainer.strategy.reduce(value, reduce_op="mean")) for name, value in values.items()}


def _pruning(trainer: Trainer) -> Prune | None:
    """The pruning callback beside this one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Prune)), None)  # type: ignore[attr-defined]
