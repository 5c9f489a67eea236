"""Looks on while a module trains, or while batches pass through it and nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_slim.callbacks.companions import gathered
from lightning_slim.callbacks.gathering import Gathering
from lightning_slim.pruner import Pruner
from lightning_slim.surgery import begin_recalibrating, end_recalibrating


class Look(Callback):
    """Finds what could be removed and gathers evidence of it, as a pruning callback does; nothing is cut.

    It looks once `begin_anew` was called, as it is when training starts.

    Args:
        make: a pruner that is not prepared yet, of the module that trains.
        labels: which item of a batch holds the labels, a number or a key.
        every_n_steps: how often evidence is recorded.
    """

    def __init__(self, make: Callable[[nn.Module], Pruner], labels: int | str, every_n_steps: int = 1) -> None:
        self._make = make
        self._pruner: Pruner | None = None
        self._gathering = Gathering(labels, every_n_steps)

    @property
    def pruner(self) -> Pruner:
        """What holds the evidence; there is one once training began."""
        if self._pruner is None:
            raise RuntimeError("Expected training to have begun: nothing was seen yet.")
        return self._pruner

    def begin_anew(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets all that was seen."""
        self._pruner = self._make(pl_module)
        self._pruner.agree = partial(trainer.strategy.broadcast, src=0)
        self._pruner.gather = partial(gathered, trainer.strategy)
        self._gathering.begin_anew()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin_anew(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._gathering.close()
        if self._pruner is not None:
            self._gathering.begin(self._pruner, trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._pruner is not None:
            self._gathering.observe_gradients(self._pruner, trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._pruner is not None:
            self._gathering.end(self._pruner, trainer, outputs, batch)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._gathering.finish()


class Still(Callback):
    """Some training batches pass, forward and backward, and the fit ends: no optimizer moves a weight.

    Gradients are taken away before every step; what has none is left alone by every optimizer.

    Args:
        batches: how many.
    """

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.left -= 1
        trainer.should_stop = self.left <= 0


class Recalibrate(Callback):
    """Batch statistics are measured anew on the batches that train, or pass."""

    def __init__(self) -> None:
        self._momenta: dict[str, float | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._momenta = begin_recalibrating(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end_recalibrating(pl_module, self._momenta)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        end_recalibrating(pl_module, self._momenta)
