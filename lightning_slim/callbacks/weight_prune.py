"""Masks of weights while a Trainer trains."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_slim.arguments import check_arguments
from lightning_slim.callbacks.base import SlimCallback
from lightning_slim.callbacks.batches import item_of
from lightning_slim.callbacks.clock import Clock
from lightning_slim.callbacks.companions import copies, reset_monitors
from lightning_slim.callbacks.phases import FineTuning, When, check_when
from lightning_slim.callbacks.probe import Probe
from lightning_slim.history import MaskEvent
from lightning_slim.masker import Masker, sparsity_of
from lightning_slim.masks import Distribution, Pattern, Regrowth, Uniform, Unstructured, WeightMagnitude, WeightScore
from lightning_slim.payload import opened, sealed
from lightning_slim.pruner import NoEffectWarning
from lightning_slim.schedules import Cubic, OneShot, Schedule, Time, in_rounds
from lightning_slim.skipping import Skip
from lightning_slim.surgery import StructureChange


class WeightPrune(SlimCallback):
    """Zeroes weights while the model trains, and keeps them exactly zero: the network gets sparse, not smaller.

    Linear layers, convolutions, recurrent layers, embeddings and the projections of attention are masked, as far as
    they train; never biases and norms, nor the last layers, which are found from the first loss. Weights stay plain
    parameters: a checkpoint's `state_dict` has the keys of a dense one.

    Args:
        sparsity: the fraction of the masked layers' weights that is GONE in the end; None: what the pattern stands
            for, or 0.8.
        pattern: which weights go together: `Unstructured()`, `NM(2, 4)`, `Block(4, 1)`.
        score: how much each weight matters.
        distribution: how the zeros are shared out among layers: `Uniform()`, `ErdosRenyiKernel()`, `Global()`.
        schedule: how much of the removal is done by which fraction of the run.
        update_every: epochs of training between two updates of the masks, fractions allowed (0.25: four an epoch); a
            tenth of the run, where the schedule would not be over otherwise.
        module: dotted name of the only part of the model that is masked, such as `"backbone"`; all of it if empty.
        skip: what stays dense: names of layers, patterns such as `"net.encoder.*"`, types or their names.
        mask_last: whether the last layers are masked, too.
        regrow: once the schedule is done, dynamic sparse training: at every update some weights are exchanged for
            others at the same sparsity, `RigL()` or `SET()`. None: what is gone stays gone.
        seed: of what comes back by chance.
        labels: which item of a batch holds the labels, a number or a key, for scores that ask for them.
        record_every_n_steps: how often scores that look at what weights read do so.
        reset_monitors: whether ModelCheckpoint and EarlyStopping begin anew after each update: what was best before was
            best of a denser model. Files of the old best stay on disk.
        when: `"during"` training, on the schedule; at the `"start"`, before the first step of the optimizer, all of it
            by the first batches; or at the `"end"`, in a phase of fine-tuning into which the schedule is squeezed.
        probe_batches: at the start, how many batches to score by.
        rounds: at the start, in how many rounds weights go, each of which leaves the same fraction of what was left,
            scored anew; None: 100 for `WeightSynFlow`, one for other scores.
        finetune: how long the phase at the end is: a fraction of the run, `"3 epochs"` or `"500 steps"`.
        finetune_lr: in that phase, every step is taken at this factor of the base rate (`max_lr` of a parameter group,
            else `initial_lr`, else its rate when the run began), whatever schedulers say.
    """

    workers = ("_masker",)

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: Pattern = Unstructured(),  # noqa: B008 (frozen)
        score: WeightScore = WeightMagnitude(),  # noqa: B008 (frozen)
        distribution: Distribution = Uniform(),  # noqa: B008 (frozen)
        schedule: Schedule = Cubic(),  # noqa: B008 (frozen)
        update_every: float = 0.25,
        module: str = "",
        skip: Skip = (),
        mask_last: bool = False,
        regrow: Regrowth | None = None,
        seed: int = 0,
        labels: int | str = 1,
        record_every_n_steps: int = 10,
        reset_monitors: bool = True,
        when: When = "during",
        probe_batches: int = 8,
        rounds: int | None = None,
        finetune: Time = 0.3,
        finetune_lr: float = 0.1,
    ) -> None:
        check_arguments(WeightPrune, locals())
        check_when(when, score, score.flow, probe_batches, rounds)
        if regrow is not None and score.flow is not None:
            raise ValueError(f"Expected a score that goes on while the network trains beside {regrow}, got {score}.")
        if record_every_n_steps < 1:
            raise ValueError(f"Expected `record_every_n_steps` of at least 1, got {record_every_n_steps}.")
        self.sparsity = sparsity_of(pattern, sparsity, distribution)
        self.pattern, self.score, self.distribution, self.schedule = pattern, score, distribution, schedule
        self._clock = Clock(update_every, "update_every", "masks are updated")
        self.update_every, self.module, self.skip, self.mask_last = update_every, module, skip, mask_last
        self.regrow, self.seed, self.reset_monitors = regrow, seed, reset_monitors
        self.when, self.probe_batches, self.rounds = when, probe_batches, rounds
        self._tuning = FineTuning(finetune, finetune_lr)
        self.labels, self.record_every_n_steps = labels, record_every_n_steps
        self._masker: Masker | None = None
        self._point = -math.inf  # the last point in time, in epochs, at which an update was decided on
        self._finding = True  # what is last, in the first batch
        self._growing = False  # in a batch that tells which weights train by now
        self._copies_behind = False  # after a cut of the structure
        self._batches = 0
        self._waited = 0  # batches, for something to score by
        self._recording: ExitStack | None = None  # while a batch is recorded

    @property
    def masker(self) -> Masker:
        """What does the work; there is one once a fit was set up."""
        if self._masker is None:
            raise RuntimeError("Expected a fit to be under way or over: there is no masker before.")
        return self._masker

    @property
    def events(self) -> list[MaskEvent]:
        """All updates so far."""
        return self.masker.events

    # --- set up, save, resume ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._tuning.rates = []
        old = self._masker
        anew = old is None or old.model is not pl_module or not old.in_step
        self._finding, self._growing, self._waited = anew, False, 0
        if anew or self.when != "start":
            self._point = -math.inf  # a fit has a time of its own; what is masked stays masked
        if anew:
            self._copies_behind, self._batches = False, 0
            self._masker = Masker(
                pl_module,
                self.sparsity,
                self.pattern,
                self.score,
                self.distribution,
                self.schedule,
                module=self.module,
                skip=self.skip,
                mask_last=self.mask_last,
                regrow=self.regrow,
                seed=self.seed,
            )

    def state_dict(self) -> dict[str, Any]:
        masker = self._masker.state_dict() if self._masker is not None and not self._finding else {}
        own = {"point": self._point, "batches": self._batches, "rates": self._tuning.rates, "masker": masker}
        return sealed(own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = opened(state_dict, type(self).__name__)
        self._point, self._batches = state_dict["point"], state_dict["batches"]
        self._tuning.rates = state_dict["rates"]
        self._finding = not state_dict["masker"]
        if not self._finding:
            self.masker.load_state_dict(state_dict["masker"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.masker.agree = partial(trainer.strategy.broadcast, src=0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "end":
            self._clock = replace(self._clock, origin=self._tuning.attach(trainer))
        if self.when == "start":
            self.masker.schedule = OneShot(0.0)
        else:
            self._clock.check(self.schedule, trainer)
        if not self._finding:
            self.masker.attach(trainer.optimizers)
            self.masker.apply(pl_module)

    # --- train ---

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_recording()  # a module that returns -1 from this hook skips the end of the batch
        if self.when == "start":
            self._mask_at_start(trainer, pl_module)
        if self._tuning.follow(trainer, batch_idx):
            self._clock = replace(self._clock, origin=self._tuning.begins)
        if self.when != "start":
            self.masker.schedule = self._clock.follow(self.schedule, trainer)
        if not self._finding and self._goes_on:
            self._update_if_due(trainer, batch_idx)
            due = self._batches % self.record_every_n_steps == 0
            if self.masker.listens and (due or not self.masker.ready):
                self._recording = ExitStack()
                self._recording.enter_context(self.masker.recording())
        self._batches += 1

    @property
    def _goes_on(self) -> bool:
        """Whether masks change while the network trains."""
        return self.when != "start" or self.regrow is not None

    def _update_if_due(self, trainer: Trainer, batch_idx: int) -> None:
        point = self._clock.due(self.masker.schedule, trainer, batch_idx, self._point)
        # Weights that train by now, such as unfrozen ones, are masked from the end of this batch on.
        self._growing = (point is not None or batch_idx == 0) and self.when != "start" and self.masker.outgrown
        if point is None:
            return
        progress = self._clock.progress(trainer, point)
        if self.masker.schedule(progress) > 0 and not self.masker.agree(self.masker.ready):
            self._waited += 1
            if self._waited <= trainer.num_training_batches:  # what was not used in an epoch never is
                return
        self._waited = 0
        self._update(trainer, progress)
        self._point = point

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._finding or self._growing:  # each of several losses has its own last layers
            self.masker.prepare(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Gradients are whole and unscaled here, and not clipped yet.
        if not self._finding and self._goes_on:
            self.masker.observe(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recording is not None:
            self._stop_recording()
            self._hear(batch)
        if (self._finding or self._growing) and self.masker.prepared:
            if self._finding and (unmasked := self.masker.unmasked):
                names = ", ".join(f"{name} ({entries:,})" for name, entries in unmasked.items())
                rank_zero_info(f"slim: these weights are not masked and do not count in the sparsity: {names}")
            self._finding = self._growing = False
            self.masker.attach(trainer.optimizers)
        if self._copies_behind:
            self._copies_behind = False
            for copied in copies(trainer):
                self.masker.apply(copied)

    def on_structure_change(self, change: StructureChange) -> None:
        """A pruning callback cut the module, its optimizers and its copies."""
        self.masker.follow(change)
        self._copies_behind = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.masker.prepared:
            scalars = self._scalars()
            pl_module.log("slim/sparsity", scalars.pop("slim/sparsity"), prog_bar=True)
            pl_module.log_dict({**scalars, **self._tuning.scalars})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._tuning.close()
        self._stop_recording()
        if self._masker is not None:  # none before `setup`
            self._masker.detach()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tuning.close()
        self._stop_recording()
        self.masker.detach()
        if trainer.fast_dev_run or not self.masker.prepared:  # type: ignore[attr-defined]
            return
        if self.when == "start":
            if self.masker.outgrown:
                rank_zero_warn(
                    "Weights that were frozen at the start, when the masks were chosen, trained later and are dense: "
                    "mask `when='during'` training to include them.",
                    category=NoEffectWarning,
                )
            return
        finished = bool(self.events) and self.events[-1].asked >= self.sparsity and not self.masker.behind
        if not finished and float(self.masker.schedule.end) > self._clock.progress(trainer, self._point) + 1e-9:
            rank_zero_warn(
                f"Masking is not finished: {self.masker.reached:.1%} of the weights are zero, {self.sparsity:.1%} was "
                "asked for. The run stopped before the schedule ended.",
                category=NoEffectWarning,
            )

    # --- details ---

    def _mask_at_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._point >= 0:
            return
        probe = Probe(trainer, pl_module, self.probe_batches)
        calls = probe.calls()
        self.masker.prepare(probe.loss(0))
        rounds = self.rounds or (1 if self.score.flow is None else self.score.flow.rounds)
        for schedule, progress in in_rounds(1 - self.sparsity, rounds):
            self.masker.schedule = schedule
            for _ in probe.gradients(self.score.flow, calls) if self.score.streamed else ():
                for optimizer in trainer.optimizers:
                    self.masker.observe(optimizer)
            for number, batch in enumerate(probe.batches if self.masker.listens else []):
                with self.masker.recording():
                    probe.loss(number)
                self._hear(batch)
            self._update(trainer, progress)
        self.masker.schedule, self._point, self._finding = OneShot(0.0), 0, False
        self.masker.attach(trainer.optimizers)

    def _update(self, trainer: Trainer, progress: float) -> None:
        self.about_to_change(trainer, trainer.lightning_module)
        event = self.masker.update(progress, trainer.optimizers, copies(trainer), trainer.global_step)
        if event is not None:
            if self.reset_monitors:
                reset_monitors(trainer)
            rank_zero_info(f"slim: epoch {trainer.current_epoch}, {event}")
            for logger in trainer.loggers:
                logger.log_metrics(self._scalars(), step=trainer.global_step)

    def _hear(self, batch: Any) -> None:
        """What a recorded batch tells, once it is over."""
        self.masker.hear(item_of(batch, self.labels, "`labels`") if self.masker.needs_labels else None)

    def _stop_recording(self) -> None:
        if self._recording is not None:
            self._recording.close()
            self._recording = None

    def _scalars(self) -> dict[str, float]:
        masks = self.masker.masks.items()
        by_weight = {f"slim/sparsity/{name}": 1 - float(mask.float().mean()) for name, mask in masks}
        return {"slim/sparsity": self.masker.reached, **by_weight}
