"""Looks on while a module trains, or while batches pass through it and nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_slim.callbacks.step_watch import StepWatch
from lightning_slim.capture import capture_calls
from lightning_slim.pruner import Pruner
from lightning_slim.surgery import Example, recalibrating


class Look(Callback):
    """Finds what could be removed and gathers evidence of it, as a pruning callback does; nothing is cut.

    It looks once `begin_anew` was called, as it is when training starts.

    Args:
        make: a pruner that is not prepared yet, of the module that trains.
        labels: which item of a batch holds the labels, a number or a key.
        every_n_steps: how often evidence is recorded.
    """

    def __init__(self, make: Callable[[nn.Module], Pruner], labels: int | str, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `record_every_n_steps` of at least 1, got {every_n_steps}.")
        self._make, self._every = make, every_n_steps
        self._pruner: Pruner | None = None
        self._step = StepWatch(labels)
        self._watching = ExitStack()
        self._calls: dict[str, Example] = {}
        self._batches = 0
        self._gradients_due: list[int] = []  # optimizers whose next step follows a recorded batch

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
        self._batches, self._gradients_due = 0, []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin_anew(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.close()
        if self._pruner is None:
            return
        pruner, due = self._pruner, self._batches % self._every == 0
        self._batches += 1
        if due or not pruner.prepared:
            self._calls = self._watching.enter_context(capture_calls(pl_module))
        if pruner.prepared and (due or not pruner.recorder.ready):
            self._step.begin(pruner.recorder, trainer, pl_module, batch, batch_idx)
            self._gradients_due = list(range(len(trainer.optimizers)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for i in [i for i in self._gradients_due if trainer.optimizers[i] is optimizer]:
            self._gradients_due.remove(i)
            if self.pruner.witnessed.needs_gradients:  # they are whole and unscaled here, and not clipped yet
                self.pruner.recorder.observe_gradients(p for group in optimizer.param_groups for p in group["params"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watching.close()
        self._step.end(trainer, outputs, batch)
        calls, self._calls = self._calls, {}
        if self._pruner is not None and calls.keys() - self._pruner.networks:  # the first batch, or a new network
            self._pruner.prepare(networks={**calls, **self._pruner.calls})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Looks away, whatever the step came to."""
        self._watching.close()
        self._step.close()


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
        self._measuring = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measuring.enter_context(recalibrating(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measuring.close()
