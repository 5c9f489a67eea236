"""Structural pruning while a Trainer trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch.optim import Optimizer

from lightning_slim.accuracy import AccuracyBudget, Trial, Verdict
from lightning_slim.arguments import check_arguments
from lightning_slim.budgets import Budget, MACs
from lightning_slim.callbacks.accuracy_guard import AccuracyGuard
from lightning_slim.callbacks.base import SlimCallback, metrics_of
from lightning_slim.callbacks.behind import BehindModule
from lightning_slim.callbacks.clock import Clock, epochs_done, epochs_in_run, epochs_with_this, is_over, steps_left
from lightning_slim.callbacks.companions import (
    agree_on_shapes,
    all_that_changes,
    average_again,
    copies,
    follow,
    gathered,
    reset_monitors,
    tell,
    undecided,
)
from lightning_slim.callbacks.gathering import Gathering
from lightning_slim.callbacks.pace import steps_taken
from lightning_slim.callbacks.phases import FineTuning, When, check_when
from lightning_slim.callbacks.probe import Probe
from lightning_slim.callbacks.snapshot import load_models, roll_back, take_snapshot
from lightning_slim.callbacks.telling import (
    announce,
    announce_cut,
    dense_beside_slim,
    log,
    scalars_of,
    warn_if_short,
    warned_of_files,
)
from lightning_slim.candidates import Granularity
from lightning_slim.checkpoint import cut_tensors
from lightning_slim.folding import Compensate
from lightning_slim.guards import Guard
from lightning_slim.history import History, PruningEvent
from lightning_slim.payload import opened, sealed
from lightning_slim.pruner import Pruner, level_of_significance
from lightning_slim.report import Report
from lightning_slim.schedules import Cubic, OneShot, Schedule, Time, in_rounds
from lightning_slim.scores import Score
from lightning_slim.selection import RoundTo, Scope, Selection
from lightning_slim.skipping import Skip, check_module, check_skip
from lightning_slim.surgery import UnknownState, begin_recalibrating, end_recalibrating, pause_momentum
from lightning_slim.transaction import all_or_nothing


class Prune(SlimCallback):
    """Removes channels and neurons while the model trains; the optimizer, schedulers and checkpoints go along.

    The networks that the training step calls are found in the first batch, and with them what can be removed: no
    example input and no output layer has to be named. Cuts happen at the start of a batch, `recovery_epochs` apart.

    Args:
        score: says how important a unit is.
        budget: what may remain in the end, of the original or as a figure; or `AccuracyBudget`: as little as keeps a
            metric, of which a schedule says no more than when the first step is taken.
        schedule: how much of the removal is done by which fraction of the run.
        scope: `"local"`: every group keeps the same fraction; `"global"`: the most important units stay, wherever;
            `"isomorphic"`: the same among groups of the same structure, each class of which keeps the same fraction.
        round_to: widths are rounded up to multiples of this; `"auto"`: of what suits this machine, group by group, as
            measured when the run begins.
        module: dotted name of the only part of the model that may be cut, such as `"backbone"`; all of it if empty.
        skip: what stays whole: names of layers, patterns such as `"net.encoder.*"`, types or their names.
        compensate: `"least_squares"` folds the removed units into those that stay, `"mean"` puts their mean in their
            place, `"none"` drops them. `"exact"` is `"least_squares"`, but at convolutions of one group that are not
            transposed every tap of the kernel is a variable of its own, padding included: what neighbouring pixels know
            of a lost channel is used, by scores of activations as well, and lags are not, for the taps are the past.
            Its moments take `8 (channels taps)²` bytes a reader, in checkpoints, too; readers of more than 4608
            channels times taps (512 x 3 x 3: 170 MB) are folded as by `"least_squares"`. A resumed run keeps the form
            that it was recorded in.
        recalibrate_bn: whether batch norms measure their running statistics anew in the rest of the epoch after a cut.
        verify: whether every group is tried before the first cut, and every cut before it is made.
        recovery_epochs: epochs of training between two cuts, fractions allowed (0.25: four cuts an epoch); a tenth
            of the run, where the schedule would not be over otherwise.
        recovery_steps: so many steps of the optimizer lie between two cuts at least, however short epochs are; None: a
            fortieth of the run's, from 4 to 50.
        unknown: what becomes of an optimizer's state of a shape that is not understood: `"raise"` in the first step, or
            `"reset"` it at each cut.
        record_every_n_steps: how often evidence is recorded.
        reset_monitors: whether ModelCheckpoint and EarlyStopping begin anew after each cut: what was best before was
            best of a larger model. Files of the old best stay on disk.
        seed: of scores that draw.
        granularity: what goes: `"units"` of layers, whole residual blocks (`"layers"`), or both under one budget.
        protect_significant: units that a score with p-values finds significant stay whatever the budget, with at most
            this share of them being so by chance; None protects none.
        keep_at_least: layer -> fraction of its original units that stays whatever the budget, by names, patterns and
            types as for `skip`.
        keep_at_most: the same, for what may stay at most, from the first cut on.
        macs_to_params: bounds of the slim network's multiply-accumulates per parameter, relative to the original's,
            such as (0.8, 1.25); None lets them be.
        labels: which item of a batch holds the labels, a number or a key, for scores that ask for them.
        print_report: whether to print and save the table of dense beside slim when the fit ends.
        when: `"during"` training, on the schedule; at the `"start"`, before the first step of the optimizer, all of it
            by the evidence of the first batches; or at the `"end"`, in a phase of fine-tuning into which the schedule
            is squeezed.
        probe_batches: at the start, how many batches to gather evidence of.
        rounds: at the start, in how many rounds units go, each of which leaves the same fraction of what was left, with
            evidence gathered anew; None: 100 for `SynFlow`, one for other scores.
        finetune: how long the phase at the end is: a fraction of the run, `"3 epochs"` or `"500 steps"`.
        finetune_lr: in that phase, every step is taken at this factor of the base rate (`max_lr` of a parameter group,
            else `initial_lr`, else its rate when the run began), whatever schedulers say.
    """

    workers = ("_pruner", "_guarding")

    def __init__(
        self,
        score: Score,
        budget: Budget = MACs(),  # noqa: B008 (frozen)
        schedule: Schedule = Cubic(),  # noqa: B008 (frozen)
        scope: Scope = "local",
        round_to: RoundTo = 1,
        module: str = "",
        skip: Skip = (),
        compensate: Compensate = "least_squares",
        recalibrate_bn: bool = True,
        verify: bool = True,
        recovery_epochs: float = 1.0,
        record_every_n_steps: int = 10,
        reset_monitors: bool = True,
        seed: int = 0,
        granularity: Granularity = "units",
        protect_significant: float | None = None,
        keep_at_least: Mapping[str, float] | None = None,
        keep_at_most: Mapping[str, float] | None = None,
        macs_to_params: tuple[float, float] | None = None,
        labels: int | str = 1,
        print_report: bool = True,
        when: When = "during",
        probe_batches: int = 8,
        rounds: int | None = None,
        finetune: Time = 0.3,
        finetune_lr: float = 0.1,
        recovery_steps: int | None = None,
        unknown: UnknownState = "raise",
    ) -> None:
        check_arguments(Prune, locals())
        check_when(when, score, score.flow, probe_batches, rounds)
        if budget.monitored and when == "start":
            raise ValueError(f"Expected a run in which steps can be tried, got {budget} at the start: prune during it.")
        level_of_significance(score, budget, protect_significant)
        self.score, self.budget, self.schedule = score, budget, schedule
        self.selection = Selection(scope, round_to, keep_at_least or {}, keep_at_most or {}, macs_to_params)
        self.skip, self.compensate, self.verify, self.seed = skip, compensate, verify, seed
        self.module, self.reset_monitors, self.granularity = module, reset_monitors, granularity
        self.recalibrate_bn, self.unknown = recalibrate_bn, unknown
        if recovery_steps is not None and recovery_steps < 1:
            raise ValueError(f"Expected `recovery_steps` of at least 1, got {recovery_steps}.")
        self.recovery_epochs, self.recovery_steps = recovery_epochs, recovery_steps
        self._clock = Clock(recovery_epochs, "recovery_epochs", "units can be removed")
        self.record_every_n_steps = record_every_n_steps
        self.protect_significant = protect_significant
        self.guard: Guard | None = None
        self.print_report = print_report
        self.when, self.probe_batches, self.rounds = when, probe_batches, rounds
        self._tuning = FineTuning(finetune, finetune_lr)
        self._pruner: Pruner | None = None
        self._guarding: AccuracyGuard | None = None
        self._point = -math.inf  # the last point in time, in epochs, at which a cut was decided on
        self._gathering = Gathering(labels, record_every_n_steps)
        self._momenta: dict[str, float | None] = {}  # of batch norms that measure their statistics anew
        self._behind_module = BehindModule("on_train_epoch_end")
        self._unchecked = True  # whether the optimizers' states can be cut
        self._logged: dict[str, float] = {}  # at the end of the last epoch in which there was anything new

    @property
    def pruner(self) -> Pruner:
        """What does the work; there is one once a fit was set up."""
        if self._pruner is None:
            raise RuntimeError("Expected a fit to be under way or over: there is no pruner before.")
        return self._pruner

    @property
    def history(self) -> History:
        """All cuts so far."""
        return self.pruner.history

    @property
    def trials(self) -> list[Trial]:
        """With `AccuracyBudget`, all steps that were decided on, also those that were rolled back."""
        return [] if self._guarding is None else self._guarding.search.trials

    # --- set up, save, resume ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._tuning.rates, self._logged, self._momenta, self._unchecked = [], {}, {}, True
        if stage == "fit" and self._guarding is not None and self._pruner is not None:
            self._forget_trial(self._guarding, trainer, pl_module)
        old = self._pruner
        anew = old is None or old.model is not pl_module or not old.prepared or not old.in_step
        if anew or self.when != "start":
            self._point = -math.inf  # a fit has a time of its own; what was removed before stays removed, and counts
        if anew:
            self._gathering.begin_anew()
            if stage == "fit" and cut_tensors(pl_module) and not trainer.ckpt_path:
                rank_zero_warn("The module was cut before: the budget counts from what is there now.")
            self._guarding = AccuracyGuard(self.budget) if isinstance(self.budget, AccuracyBudget) else None
            self._pruner = Pruner(
                pl_module,
                self.score,
                self._counted,
                self.schedule,
                selection=self.selection,
                compensate=self.compensate,
                verify=self.verify,
                seed=self.seed,
                granularity=self.granularity,
                guard=self.guard,
                protect_significant=self.protect_significant,
                open_ended=self._guarding is not None,
                unknown=self.unknown,
            )

    def state_dict(self) -> dict[str, Any]:
        own = {
            "point": self._point,
            "gathering": self._gathering.state_dict(),
            "rates": self._tuning.rates,
            "momenta": dict(self._momenta),
        }
        return {
            **sealed(own),
            "pruner": self.pruner.state_dict() if self._pruner is not None else {},
            "guarding": self._guarding.state_dict() if self._guarding is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = opened({k: v for k, v in state_dict.items() if k not in ("pruner", "guarding")}, type(self).__name__)
        self.pruner.load_state_dict(state_dict["pruner"])
        self._point, self._tuning.rates = own["point"], own["rates"]
        self._momenta = dict(own["momenta"])
        self._gathering.load_state_dict(own["gathering"])
        if self._guarding is not None and state_dict["guarding"] is not None:
            self._guarding.load_state_dict(state_dict["guarding"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_skip(pl_module, self.skip)
        check_module(pl_module, self.module)
        self.pruner.skip, self.pruner.module = tuple(self.skip), self.module
        self.pruner.budget = self._counted
        self.pruner.agree = partial(trainer.strategy.broadcast, src=0)
        self.pruner.average = partial(trainer.strategy.reduce, reduce_op="mean")
        self.pruner.gather = partial(gathered, trainer.strategy)
        self.pruner.leads = trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._momenta |= pause_momentum(pl_module, self._momenta)  # resumed in the epoch of a cut
        if self.when == "end":
            self._clock = replace(self._clock, origin=self._tuning.attach(trainer))
        if self.when == "start":
            self.pruner.schedule = OneShot(0.0)
        else:
            self._clock.check(self.schedule, trainer, to_its_end=self._guarding is None)

    # --- train ---

    # Only here, and not at the start of an epoch: a resume from a checkpoint of an epoch's last batch skips that hook.
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._gathering.close()  # a module that returns -1 from this hook skips the end of the batch
        if undecided(trainer):
            return
        if self._tuning.follow(trainer, batch_idx):
            self._clock = replace(self._clock, origin=self._tuning.begins)
        if self.when == "start":
            self._cut_at_start(trainer, pl_module)
        elif self._guarding is not None:
            self._search(self._guarding, trainer, pl_module, batch_idx)
        else:
            self._cut_if_due(trainer, pl_module, batch_idx)
        self._gathering.begin(self.pruner, trainer, pl_module, batch, batch_idx, records=self.when != "start")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._gathering.observe_gradients(self.pruner, trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not undecided(trainer) and self._gathering.end(self.pruner, trainer, outputs, batch):
            announce(self.pruner)
        if self._unchecked and self.pruner.prepared and steps_taken(trainer) > 0:
            self._unchecked = False
            self.pruner.check_states(trainer.optimizers)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()
        end_recalibrating(pl_module, self._momenta)  # but a checkpoint that is saved now remembers

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking and not self.pruner.prepared:
            self._gathering.look_at_validation(pl_module, batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.sanity_checking:
            self._gathering.stop_looking()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._guarding is not None and not trainer.sanity_checking:
            self._guarding.after_validation(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_recalibrating(pl_module)
        if self._guarding is None:
            self._log_epoch(trainer, pl_module)
        else:
            self._behind_module.call(pl_module, partial(self._end_epoch, self._guarding, trainer, pl_module))

    def _end_epoch(self, guard: AccuracyGuard, trainer: Trainer, pl_module: LightningModule) -> None:
        guard.after_epoch(trainer)
        # Not later: averages are put into the module when training ends, and checkpoints are saved behind this.
        if is_over(trainer):
            self._settle(guard, trainer, pl_module, epochs_with_this(trainer), last=True)
        self._log_epoch(trainer, pl_module)

    def _log_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pruner.prepared:
            shown = ("slim/params_left", "slim/macs_left")
            scalars = self._scalars()
            pl_module.log_dict({name: scalars.pop(name) for name in shown}, prog_bar=True)
            if scalars == self._logged:  # they can be monitored already; `log_dict` takes a millisecond for each
                log(trainer, scalars)
            else:
                pl_module.log_dict(scalars)
                self._logged = scalars
            pl_module.log_dict(self._tuning.scalars)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._guarding is not None:
            verdict = self._settle(self._guarding, trainer, pl_module, epochs_done(trainer, 0), last=True)
            if verdict == "roll back":
                average_again(trainer, pl_module, self)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        self._end_recalibrating(pl_module)
        if self.pruner.prepared and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            warn_if_short(self.pruner)
            if self._guarding is not None:
                self._guarding.warn_if_idle()
        folder = trainer.log_dir or trainer.default_root_dir  # asked of all ranks: they agree on it
        if self.print_report and trainer.is_global_zero and self.pruner.prepared and self.pruner.calls:
            try:
                table = self.report(self._metrics(trainer))
            except Exception as error:  # a report must never fail a run that is over
                rank_zero_warn(f"The report could not be made: {type(error).__name__}: {error}")
                return
            Console().print(table)
            with warned_of_files():
                table.save(folder)

    # --- details ---

    def _close(self) -> None:
        self._tuning.close()
        self._gathering.finish()
        self._behind_module.forget()

    def _end_recalibrating(self, pl_module: LightningModule) -> None:
        end_recalibrating(pl_module, self._momenta)
        self._momenta = {}

    @property
    def _counted(self) -> Budget:
        """What the pruner counts in."""
        return self.budget.of if isinstance(self.budget, AccuracyBudget) else self.budget

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        """Of the model as it is: after a run was rolled back, those that were logged last are another's."""
        return (self._guarding and self._guarding.metrics) or metrics_of(trainer)

    def report(self, slim_metrics: dict[str, float], dense_metrics: dict[str, float] | None = None) -> Report:
        """Measures the model as it is now beside the model as it was.

        Args:
            slim_metrics: of the model as it is.
            dense_metrics: of a dense model that was trained the same way, if there is one.
        """
        return dense_beside_slim(self.pruner, slim_metrics, dense_metrics)

    def _cut_if_due(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self.pruner.schedule = self._clock.follow(self.schedule, trainer)
        point = self._clock.due(self.pruner.schedule, trainer, batch_idx, self._point)
        if point is None:
            return
        # The point's own time, not the batch's: a cut that had to wait removes what it would have removed then.
        progress = self._clock.progress(trainer, point)
        if not self.pruner.prepared:
            if self._gathering.refused is not None and self.pruner.schedule(progress) > 0:
                raise self._gathering.refused
            return
        waits = self._recovers(trainer) and (self.pruner.schedule(progress) < 1 or self._has_time(trainer))
        if self.pruner.asks(progress) and (waits or not self.pruner.is_ready()):
            return  # it will be, in a few batches
        self._cut(trainer, pl_module, progress)
        self._point = point

    def _recovers(self, trainer: Trainer) -> bool:
        """Whether the last cut was just before."""
        return 0 <= self._since_cut(trainer) < self._least_steps(trainer)

    def _has_time(self, trainer: Trainer) -> bool:
        """Whether the run will not be over before the network has recovered from the last cut."""
        return steps_left(trainer) > self._least_steps(trainer) - self._since_cut(trainer)

    def _least_steps(self, trainer: Trainer) -> float:
        """Between two cuts."""
        run = steps_taken(trainer) + steps_left(trainer)
        return self.recovery_steps or (min(max(run / 40, 4), 50) if math.isfinite(run) else 4)

    def _since_cut(self, trainer: Trainer) -> int:
        """Steps since the last cut; negative if there was none in this fit."""
        events = self.pruner.history.events
        return steps_taken(trainer) - events[-1].step if events else -1

    def _cut_at_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._point >= 0:
            return
        probe, flow = Probe(trainer, pl_module, self.probe_batches), self.pruner.witnessed.flow
        if not self.pruner.prepared:
            self.pruner.prepare(networks=probe.calls())
            announce(self.pruner)
        rounds = self.rounds or (1 if flow is None else flow.rounds)
        for schedule, progress in in_rounds(self.budget.target(self.pruner.costs), rounds):
            self.pruner.schedule = schedule
            self.pruner.record_anew()
            probe.record(self.pruner.recorder, self._gathering.step, self.pruner.witnessed, self.pruner.current_calls())
            self._cut(trainer, pl_module, progress)
        self.pruner.schedule, self._point = OneShot(0.0), 0

    def _search(self, guard: AccuracyGuard, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Decides on the step that is under trial, and takes the next one."""
        epoch, run = epochs_done(trainer, batch_idx), epochs_in_run(trainer)
        self._settle(guard, trainer, pl_module, epoch)
        if math.isinf(run):
            return
        self.pruner.schedule = self._clock.follow(self.schedule, trainer)
        begun = epoch + 1e-9 >= float(self.pruner.schedule.start) * run
        may = begun and guard.free(run - epoch) and self.pruner.prepared and not self._recovers(trainer)
        if may and self.pruner.is_ready():
            with all_or_nothing(*all_that_changes(trainer, pl_module)):
                before = {**take_snapshot(trainer, pl_module, self), "pruner": copy.deepcopy(self.pruner.state_dict())}
                event = self._cut(trainer, pl_module, epoch / run, guard.search.target)
                guard.begin(before, None if event is None else event.reached, epoch)
            if guard.search.repeats:
                self._settle(guard, trainer, pl_module, epoch)

    def _forget_trial(self, guard: AccuracyGuard, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit broke off while a step was under trial, and another one begins: from the last good state."""
        if guard.snapshot is not None and self.pruner.model is pl_module and self.pruner.in_step:
            load_models(trainer, pl_module, guard.snapshot)
            self.pruner.load_state_dict(guard.snapshot["pruner"])
        guard.forget_trial()

    def _settle(
        self, guard: AccuracyGuard, trainer: Trainer, pl_module: LightningModule, epoch: float, last: bool = False
    ) -> Verdict:
        """Keeps the step under trial, or rolls the run back, if it is time."""
        known = len(self.trials)
        with all_or_nothing(*all_that_changes(trainer, pl_module)):
            verdict, snapshot = guard.decide(trainer, epoch, last)
            if verdict == "wait":
                return verdict
            if verdict == "roll back":
                self._end_recalibrating(pl_module)
                roll_back(trainer, pl_module, self, snapshot)
                self.pruner.load_state_dict(snapshot["pruner"])
                self._gathering.drop_gradients()
        if verdict == "roll back":
            tell(trainer, None)
        for trial in self.trials[known:]:
            rank_zero_info(f"slim: epoch {epoch:g}, {guard.monitor}: {trial}")
        log(trainer, self._scalars())
        return verdict

    def _cut(
        self, trainer: Trainer, pl_module: LightningModule, progress: float, asked: float | None = None
    ) -> PruningEvent | None:
        if asked is None and not self.pruner.asks(progress):
            return None
        self.about_to_change(trainer, pl_module)
        with all_or_nothing(*all_that_changes(trainer, pl_module)):
            event = self.pruner.step(progress, trainer.optimizers, copies(trainer), steps_taken(trainer), asked)
            if event is None:
                return None
            if self.recalibrate_bn and self.when != "start":  # no batch norm has measured anything by then
                self._end_recalibrating(pl_module)
                self._momenta = begin_recalibrating(pl_module)
            agree_on_shapes(trainer.strategy, pl_module)
            follow(trainer, pl_module, self.pruner.last_change)
            if self.reset_monitors:
                reset_monitors(trainer)
        announce_cut(self.pruner, trainer, event)
        log(trainer, self._scalars())
        tell(trainer, self.pruner.last_change)
        return event

    def _scalars(self) -> dict[str, float]:
        rolled_back = float(sum(not trial.kept for trial in self.trials))
        return {**scalars_of(self.pruner), **({"slim/rolled_back": rolled_back} if self._guarding is not None else {})}
