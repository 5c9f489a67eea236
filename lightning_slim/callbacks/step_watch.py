"""What a recorder sees of a training step while it runs, and hears of it afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_slim.callbacks.batches import item_of
from lightning_slim.callbacks.replay import replay
from lightning_slim.capture import capture_outputs
from lightning_slim.losses import HearLosses, NoLossError
from lightning_slim.recording import Recorder


class StepWatch:
    """Lets a recorder look on one training step after another.

    Args:
        labels: which item of a batch holds the labels, a number or a key.
    """

    def __init__(self, labels: int | str) -> None:
        self.labels = labels
        self._recorder: Recorder | None = None  # of the step that is under way, if it is recorded
        self._looking = ExitStack()
        self._outputs: dict[str, Tensor] = {}
        self._heard: HearLosses | None = None
        self._silent = 0  # steps in a row that called no loss function: one may pass over its batch

    def begin(
        self, recorder: Recorder, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Records the step that is about to run."""
        if recorder.experiments:
            try:
                recorder.experiment(lambda: replay(trainer, pl_module, batch, batch_idx))
            except NoLossError as error:
                self._pass_over(error)
                return
        self._recorder = recorder
        self._looking.enter_context(recorder.recording())
        if "outputs" in recorder.known:
            self._outputs = self._looking.enter_context(capture_outputs(pl_module))
        if "losses" in recorder.known:
            self._heard = self._looking.enter_context(HearLosses())

    def end(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        """Tells the recorder what became known, if it looked on.

        Args:
            trainer: which divides losses by the batches it accumulates.
            outputs: what the training step returned.
            batch: what it was given.
        """
        self._looking.close()
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        known: dict[str, Any] = {}
        if "labels" in recorder.known:
            known["labels"] = item_of(batch, self.labels, "`labels`")
        if "outputs" in recorder.known:
            known["outputs"], self._outputs = self._outputs, {}
        if self._heard is not None:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
            whole = None if loss is None else loss * trainer.accumulate_grad_batches
            heard, self._heard = self._heard, None
            try:
                known["losses"] = heard.of_items(whole)
            except NoLossError as error:
                self._pass_over(error)
                return
        self._silent = 0
        recorder.hear(**known)

    def _pass_over(self, error: NoLossError) -> None:
        """A step tells nothing. Several in a row are no accident."""
        self._silent += 1
        if self._silent > 2:
            raise

    def close(self) -> None:
        """Looks away, whatever the step came to."""
        self._looking.close()
        self._recorder = self._heard = None
        self._outputs = {}
