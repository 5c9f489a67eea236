"""Copies of a module, looked at, validated and trained by Trainers of their own; the module does not notice."""

from __future__ import annotations

import copy
import functools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_slim.callbacks.base import metrics_of
from lightning_slim.callbacks.look import Look, Still
from lightning_slim.checkpoint import remember_cut
from lightning_slim.eager import eagerly
from lightning_slim.monitor import Metrics
from lightning_slim.pruner import Pruner
from lightning_slim.surgery import StructureChange
from lightning_slim.units import Plan, UnitGroup, named_tensors
from lightning_slim.weight_norm import settle

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
}


class Trials:
    """What is tried on copies of a module. Random numbers begin at a seed in every trial, and go on as before after it.

    Args:
        model: is left as it is.
        datamodule: what `set_up_once` or `set_up_already` returns.
        train_dataloaders: instead of a data module, as for `Trainer.fit`.
        val_dataloaders: instead of a data module, as for `Trainer.validate`.
        seed: of every trial.
        settings: of the Trainers.
    """

    def __init__(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        train_dataloaders: Any,
        val_dataloaders: Any,
        seed: int,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.seed = model, seed
        self.datamodule, self.train_dataloaders, self.val_dataloaders = datamodule, train_dataloaders, val_dataloaders
        base = next(c for c in type(model).__mro__ if c.__name__ == "LightningModule")
        self._package = base.__module__.partition(".core")[0]  # `lightning.pytorch` or `pytorch_lightning`
        self._settings = {**QUIET, **settings}

    def without(self, groups: list[UnitGroup], plan: Plan) -> LightningModule:
        """A copy of the module, cut."""
        settle(self.model)  # a weight with a graph behind it cannot be copied
        module = copy.deepcopy(self.model)
        module._metric_attributes = None  # Lightning knows the metrics that were logged by identity
        before = {name: tensor.shape for name, tensor in named_tensors(module).items()}
        StructureChange(groups, plan).apply(module)
        remember_cut(module, (name for name, tensor in named_tensors(module).items() if tensor.shape != before[name]))
        return module

    def validate(self, module: LightningModule) -> Metrics:
        """What validation logs of a copy."""
        with self._undisturbed(module):
            self._validating.validate(module, self.val_dataloaders, datamodule=self.datamodule, verbose=False)
        return metrics_of(self._validating)

    def fit(self, module: LightningModule, *callbacks: Callback, **settings: Any) -> None:
        """Trains a copy, without validating it."""
        with self._undisturbed(module):
            trainer = self._trainer(callbacks=list(callbacks), limit_val_batches=0, num_sanity_val_steps=0, **settings)
            trainer.fit(module, self.train_dataloaders, datamodule=self.datamodule)

    def stand_still(self, module: LightningModule, batches: int, *callbacks: Callback) -> None:
        """Lets training batches pass through a copy, of as many epochs as it takes; no weight moves."""
        limits = {"max_epochs": batches, "limit_train_batches": batches}
        self.fit(module, *callbacks, Still(batches), **limits)

    def look(self, make: Callable[[nn.Module], Pruner], batches: int, labels: int | str) -> Pruner:
        """Evidence of the units of a copy, from some batches; the first one shows what could be removed."""
        look = Look(make, labels)
        self.stand_still(self.without([], Plan()), batches + 1, look)
        if not look.pruner.recorder.ready:
            raise ValueError(
                f"Expected `record_batches` that are enough for {look.pruner.score}, got {batches}: raise it."
            )
        return look.pruner

    @cached_property
    def _validating(self) -> Trainer:
        return self._trainer()

    def _trainer(self, **settings: Any) -> Trainer:
        made: Trainer = import_module(self._package).Trainer(**{**self._settings, **settings})
        return made

    @contextmanager
    def _undisturbed(self, module: LightningModule) -> Iterator[None]:
        """The copy brings no callbacks of its own, which might prune it, and forgets the Trainer behind it."""
        logger = logging.getLogger(self._package)
        level = logger.level
        logger.setLevel(max(level, logging.WARNING))
        try:
            vars(module)["configure_callbacks"] = list
            with isolate_rng(), eagerly():
                torch.manual_seed(self.seed)
                random.seed(self.seed)
                np.random.seed(self.seed)  # noqa: NPY002 (what users' data sets draw from)
                yield
        finally:
            logger.setLevel(level)
            del module.configure_callbacks
            module.trainer = None


def set_up_once(datamodule: LightningDataModule | None) -> LightningDataModule | None:
    """A copy that shares what it holds, and is prepared and set up once, however many trainers ask."""
    if datamodule is None:
        return None
    shared = copy.copy(datamodule)
    once = {hook: functools.cache(getattr(shared, hook)) for hook in ("prepare_data", "setup")}
    vars(shared).update(once, teardown=_nothing)
    return shared


def set_up_already(trainer: Trainer) -> LightningDataModule:
    """What a trainer validates with, for other trainers: its loaders, and what becomes of a batch on its way."""
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    shared = LightningDataModule() if datamodule is None else copy.copy(datamodule)
    before = dict.fromkeys(("prepare_data", "setup", "teardown"), _nothing)
    vars(shared).update(before, val_dataloader=lambda: trainer.val_dataloaders)
    return shared


def _nothing(*_: Any, **__: Any) -> None:
    """It was done before."""
