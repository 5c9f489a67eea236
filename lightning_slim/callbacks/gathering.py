"""Evidence of units, gathered while a module trains: what callbacks that cut and callbacks that only look share."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_slim.callbacks.step_watch import StepWatch
from lightning_slim.capture import capture_calls
from lightning_slim.pruner import Pruner
from lightning_slim.surgery import Example


class Gathering:
    """Says which batches a pruner's recorder sees, and which gradients belong to them.

    The networks that a training step calls are found on the way, and with them what can be removed.

    Args:
        labels: which item of a batch holds the labels, a number or a key.
        every_n_steps: how often evidence is recorded.
    """

    def __init__(self, labels: int | str, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `record_every_n_steps` of at least 1, got {every_n_steps}.")
        self.step = StepWatch(labels)
        self._every = every_n_steps
        self._watching = ExitStack()
        self._calls: dict[str, Example] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Another run, or another model."""
        self._batches = 0
        self._gradients_due: list[int] = []  # optimizers whose next step follows a recorded batch

    def begin(
        self,
        pruner: Pruner,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        records: bool = True,
    ) -> None:
        """A batch is about to train.

        Args:
            pruner: is told.
            trainer: of the run.
            pl_module: what it trains.
            batch: that is about to train.
            batch_idx: its number.
            records: whether there is any evidence to gather.
        """
        due = records and self._batches % self._every == 0
        if not pruner.calls or (due and not pruner.history.events):
            self._calls = self._watching.enter_context(capture_calls(pl_module))
        if records and pruner.prepared and (due or not pruner.recorder.ready):
            self.step.begin(pruner.recorder, trainer, pl_module, batch, batch_idx)
            self._gradients_due = list(range(len(trainer.optimizers)))
        self._batches += 1

    def observe_gradients(self, pruner: Pruner, trainer: Trainer, optimizer: Optimizer) -> None:
        """An optimizer is about to take a step; gradients must be whole and unscaled, and not clipped yet."""
        for i in [i for i in self._gradients_due if trainer.optimizers[i] is optimizer]:
            self._gradients_due.remove(i)
            if pruner.witnessed.needs_gradients:
                pruner.recorder.observe_gradients(p for group in optimizer.param_groups for p in group["params"])

    def end(self, pruner: Pruner, trainer: Trainer, outputs: Any, batch: Any) -> bool:
        """A batch has trained; whether it showed what can be removed."""
        self._watching.close()
        self.step.end(trainer, outputs, batch)
        calls, self._calls = self._calls, {}
        new = calls.keys() - pruner.networks
        if new and not pruner.history.events:  # the first batch, or one that calls a network for the first time
            pruner.prepare(networks={**calls, **pruner.calls})
            return True
        if not pruner.calls:  # a resumed run: the groups are in the checkpoint, examples are not
            pruner.meet(calls)
        return False

    def close(self) -> None:
        """Looks away, whatever the step came to."""
        self._watching.close()
        self.step.close()

    def drop_gradients(self) -> None:
        """What the next steps will be taken by belongs to no recorded batch."""
        self._gradients_due = []

    def state_dict(self) -> dict[str, Any]:
        """Where in the run it is, as plain data."""
        return {"batches": self._batches, "gradients_due": list(self._gradients_due)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._batches, self._gradients_due = state["batches"], list(state["gradients_due"])
