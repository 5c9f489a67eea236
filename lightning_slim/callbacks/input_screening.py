"""Chooses the inputs of a network while a Trainer trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_slim.arguments import check_arguments
from lightning_slim.callbacks.base import SlimCallback
from lightning_slim.callbacks.batches import item_of
from lightning_slim.callbacks.clock import epochs_in_run, has_end
from lightning_slim.callbacks.companions import (
    agree_on_shapes,
    all_that_changes,
    copies,
    follow,
    gathered,
    reset_monitors,
    tell,
)
from lightning_slim.callbacks.pace import batches_per_epoch
from lightning_slim.callbacks.telling import warned_of_files
from lightning_slim.capture import capture_calls
from lightning_slim.checkpoint import remember_cut
from lightning_slim.history import ScreeningEvent
from lightning_slim.input_evidence import Method
from lightning_slim.input_screener import InputScreener
from lightning_slim.payload import opened, sealed
from lightning_slim.pruner import NoEffectWarning
from lightning_slim.surgery import Example
from lightning_slim.transaction import all_or_nothing


class InputScreening(SlimCallback):
    """Keeps the inputs that tell of the target, under control of false discoveries, and cuts the layers that read them.

    Evidence is gathered from the first training batches; at the start of the next one the inputs are chosen, once. The
    data stay as they are: the layers that read them pass over what was removed.

    - Series with a target series, or with a target after their last step: does the input tell of the target what the
      target's own past does not (`PanelGranger`, calibrated on wrongly paired items)?
    - Classes: does the input's mean differ between them (`Anova`)?
    - Other numbers, or several labels an item: are they correlated (`Correlation`)?

    A pruning callback beside it waits until the inputs are chosen, and its budget counts from then.

    Args:
        alpha: share of false discoveries among the inputs that stay that is allowed (Benjamini and Hochberg).
        method: `"granger"`, `"anova"`, `"correlation"`; `"auto"`: by the shapes and types of the first batch.
        batches: how many batches are looked at; the first epoch, if None, and never more than that.
        lags: of series: present and past steps of each input, and past steps of the target.
        overlap: of series: how many windows hold the same step (length of a window over stride, where they overlap).
        min_inputs: so many inputs stay at least.
        protect: inputs that stay, by name or number.
        names: of the inputs, in the order of the features.
        inputs: which item of a batch are the inputs: its place, or its key.
        target: which item is the target.
        compensate: `"mean"`: biases take what the removed inputs are on average; `"none"`: nothing does.
        reset_monitors: whether ModelCheckpoint and EarlyStopping begin anew after the cut.
        print_report: whether to save the table of all inputs as `inputs.md` when the fit ends.
        difference: of series: whether their first differences are tested. Levels that wander, such as prices, correlate
            though nothing connects them; where some look so and are tested as they are, a warning names them.
    """

    workers = ("_screener",)

    def __init__(
        self,
        alpha: float = 0.05,
        method: Method = "auto",
        batches: int | None = None,
        lags: int = 2,
        overlap: float = 1.0,
        min_inputs: int = 1,
        protect: Sequence[int | str] = (),
        names: Sequence[str] = (),
        inputs: int | str = 0,
        target: int | str = 1,
        compensate: Literal["mean", "none"] = "mean",
        reset_monitors: bool = True,
        print_report: bool = True,
        difference: bool = False,
    ) -> None:
        check_arguments(InputScreening, locals())
        if not 0 < alpha < 1:
            raise ValueError(f"Expected `alpha` between 0 and 1, got {alpha}.")
        if batches is not None and batches < 2:
            raise ValueError(
                f"Expected `batches` of at least 2, got {batches}: the first one shows what reads the inputs."
            )
        if lags < 1 or overlap < 1 or min_inputs < 1:
            raise ValueError(
                f"Expected `lags`, `overlap` and `min_inputs` of at least 1, got {lags}, {overlap} and {min_inputs}."
            )
        self.alpha, self.method, self.batches, self.lags, self.overlap = alpha, method, batches, lags, overlap
        self.min_inputs, self.protect, self.names = min_inputs, tuple(protect), tuple(names)
        self.inputs, self.target, self.compensate = inputs, target, compensate
        self.reset_monitors, self.print_report, self.difference = reset_monitors, print_report, difference
        self._screener: InputScreener | None = None
        self._seen = 0  # batches
        self._calls: dict[str, Example] = {}
        self._watching = ExitStack()

    @property
    def screener(self) -> InputScreener:
        """What does the work; there is one once a fit was set up."""
        if self._screener is None:
            raise RuntimeError("Expected a fit to be under way or over: there is no screener before.")
        return self._screener

    @property
    def event(self) -> ScreeningEvent | None:
        """The choice, with the names of all inputs and their p-values; None before it was made."""
        return None if self._screener is None else self._screener.event

    @property
    def undecided(self) -> bool:
        """Whether the structure of the model is still going to change by this callback; others wait for that."""
        return self.event is None

    # --- set up, save, resume ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._screener is None or self._screener.model is not pl_module:
            self._seen = 0
            self._screener = InputScreener(
                pl_module,
                method=self.method,
                alpha=self.alpha,
                lags=self.lags,
                overlap=self.overlap,
                min_inputs=self.min_inputs,
                protect=self.protect,
                names=self.names,
                compensate=self.compensate,
                difference=self.difference,
            )

    def state_dict(self) -> dict[str, Any]:
        screener = self.screener.state_dict() if self._screener is not None else {}
        return sealed({"seen": self._seen, "screener": screener})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = opened(state_dict, type(self).__name__)
        self._seen = state_dict["seen"]
        self.screener.load_state_dict(state_dict["screener"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.screener.agree = partial(trainer.strategy.broadcast, src=0)
        self.screener.gather = partial(gathered, trainer.strategy)
        self.screener.reduce = partial(_reduce, trainer.strategy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = min(self.batches or math.inf, trainer.num_training_batches)
        run = epochs_in_run(trainer) * batches_per_epoch(trainer) if has_end(trainer) else math.inf
        if self.undecided and run - 1e-9 <= first and math.isfinite(run) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"Expected a run that goes on when inputs are chosen, after {first} batches, got one of {run:g}: "
                "set `batches` to fewer, or train longer."
            )

    # --- train ---

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watching.close()  # a module that returns -1 from this hook skips the end of the batch
        if self.undecided and self._seen and (batch_idx == 0 or self._seen == self.batches):
            self._decide(trainer, pl_module)
        if self.undecided:
            if not self.screener.calls:
                self._calls = self._watching.enter_context(capture_calls(pl_module))
            self._watching.enter_context(self.screener.observing())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watching.close()
        if self.undecided:
            inputs, target = (item_of(batch, which, "`inputs` and `target`") for which in (self.inputs, self.target))
            if self.screener.found is None:
                self.screener.find(self._calls, inputs, target)
            elif self._calls:  # a resumed run: what was found is in the checkpoint, examples are not
                self.screener.calls = self._calls
            self._calls = {}
            self.screener.update(inputs, target)
            self._seen += 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._watching.close()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.event is not None:
            pl_module.log_dict(_scalars(self.event))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watching.close()
        folder = trainer.log_dir or trainer.default_root_dir  # asked of all ranks: they agree on it
        if self.print_report and trainer.is_global_zero and self.event is not None:
            with warned_of_files():
                Path(folder).mkdir(parents=True, exist_ok=True)
                (Path(folder) / "inputs.md").write_text(self.event.to_markdown())

    # --- details ---

    def _decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.about_to_change(trainer, pl_module)
        if walks := self.screener.unit_roots:
            rank_zero_warn(
                f"{len(walks)} of {len(self.screener.names)} inputs look like random walks (no unit root is refused: "
                f"{', '.join(walks[:5])}{', ...' if len(walks) > 5 else ''}). Unless every window is of a series of "
                "its own, the test finds such levels significant though nothing connects them with the target: choose "
                "by `InputScreening(difference=True)`, or feed the network stationary series, such as differences."
            )
        with all_or_nothing(*all_that_changes(trainer, pl_module)):
            event = self.screener.step(trainer.optimizers, copies(trainer), trainer.global_step)
            change = self.screener.last_change
            if change is not None:
                remember_cut(pl_module, self.screener.cut_tensors)
                agree_on_shapes(trainer.strategy, pl_module)
                follow(trainer, pl_module, change)
                if self.reset_monitors:
                    reset_monitors(trainer)
        if not event.significant:
            rank_zero_warn(
                f"No input tells of the target at a false discovery rate of {self.alpha:g} ({event.test}, least p "
                f"{min(event.adjusted_p.values()):.2g}): all {len(event.kept)} inputs stay. Perhaps there were too few "
                "batches, or `inputs` and `target` are not what they should be.",
                category=NoEffectWarning,
            )
        rank_zero_info(f"slim: epoch {trainer.current_epoch}, {event}")
        for logger in trainer.loggers:
            logger.log_metrics(_scalars(event), step=trainer.global_step)
        if change is not None:
            tell(trainer, change)


def _reduce(strategy: Any, value: Tensor, how: str) -> Tensor:
    """The sum, or the largest, of all ranks."""
    reduced: Tensor = strategy.reduce(value.clone(), reduce_op=how)  # in place
    return reduced


def _scalars(event: ScreeningEvent) -> dict[str, float]:
    return {"slim/inputs": len(event.kept), "slim/inputs_left": len(event.kept) / len(event.adjusted_p)}
