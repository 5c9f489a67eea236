"""Evidence of units, gathered while a module trains: what callbacks that cut and callbacks that only look share."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_slim.callbacks.arrivals import Arrivals
from lightning_slim.callbacks.looking import looked_at, validated
from lightning_slim.callbacks.step_watch import StepWatch
from lightning_slim.capture import capture_calls
from lightning_slim.pruner import Pruner
from lightning_slim.ranks import together
from lightning_slim.surgery import Example
from lightning_slim.surgery.example import Calls, shapes_of


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
        self._arrivals = Arrivals()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Another run, or another model."""
        self._batches = self._batch_idx = 0
        self._looks = False  # for networks that are called
        self._arrivals.close()
        self._seen = Calls()  # what is known of the step
        self._validation: tuple[Any, dict[str, Example]] | None = None  # a batch of the sanity check, and its calls
        self.refused: ValueError | None = None  # nothing can be removed, by what was seen so far
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
        if due and pruner.prepared and not pruner.history.events:
            pruner.refuse_moving_teachers()  # rather now than when the run is over
        if due and pruner.prepared:
            pruner.check_present()
        self._batch_idx = batch_idx
        self._looks = not pruner.calls or ((due or bool(pruner.unreached)) and not pruner.history.events)
        if self._looks:
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
        looked = self._looks and not pruner.history.events
        calls, self._calls = self._calls, {}
        shapes = [shape for call in calls.values() for shape in shapes_of(call)]
        empty = bool(shapes) and all(0 in shape for shape in shapes)  # it shows nothing; a target alone may be empty
        module = trainer.lightning_module
        if looked and not (calls or self._seen or pruner.networks):
            self.refused = ValueError(
                f"Expected a training step that calls modules with parameters, got none in {type(module).__name__}: "
                "what is computed of parameters alone, or by scripted modules, cannot be watched. Call the network, "
                "as in `self.net(x)`."
            )
        new = bool(calls.keys() - pruner.networks) or self._arrivals.any
        ranks = pruner.gather((new, empty)) if looked else []
        if any(new for new, _ in ranks) and not any(empty for _, empty in ranks):
            # The first batch, or one that goes a way that none went before.
            self._seen = together(pruner.gather, lambda: self._look(module, calls, batch))
            return self._prepare(pruner, self._seen)
        if (
            pruner.prepared and not pruner.calls and not empty
        ):  # a resumed run: the groups are in the checkpoint, examples are not
            pruner.meet(looked_at(module, calls, batch, self._batch_idx))
            self._arrivals.wait(pruner)
        return False

    def _look(self, module: LightningModule, calls: dict[str, Example], batch: Any) -> Calls:
        seen = looked_at(module, calls, batch, self._batch_idx, self._seen)
        if self._validation is not None:
            validation, self._validation = self._validation, None
            seen = validated(module, validation[1], validation[0], seen)
        return seen

    def _prepare(self, pruner: Pruner, seen: Calls) -> bool:
        """Finds what can be removed; whether anything can, by what was seen so far."""
        self.refused = None
        try:
            pruner.prepare(networks=seen)
        except ValueError as error:
            if not pruner.unreached:
                raise
            self.refused = error  # what is reached later may be what everything waits for
        self._arrivals.wait(pruner)
        return self.refused is None

    def look_at_validation(self, module: LightningModule, batch: Any) -> None:
        """A batch of the sanity check is about to be validated on: that may go where training does not."""
        if self._validation is None:
            calls = self._watching.enter_context(capture_calls(module))
            self._validation = batch, calls

    def stop_looking(self) -> None:
        """It is over."""
        self._watching.close()

    def close(self) -> None:
        """Looks away, whatever the step came to."""
        self._watching.close()
        self.step.close()

    def finish(self) -> None:
        """The run is over."""
        self.close()
        self._arrivals.close()

    def drop_gradients(self) -> None:
        """What the next steps will be taken by belongs to no recorded batch."""
        self._gradients_due = []

    def state_dict(self) -> dict[str, Any]:
        """Where in the run it is, as plain data."""
        return {"batches": self._batches, "gradients_due": list(self._gradients_due)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._batches, self._gradients_due = state["batches"], list(state["gradients_due"])
