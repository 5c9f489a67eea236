"""Penalties that pull units toward zero while a Trainer trains."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_slim.arguments import check_arguments
from lightning_slim.callbacks.base import SlimCallback
from lightning_slim.callbacks.clock import epochs_done, epochs_in_run, in_fractions, is_certain
from lightning_slim.callbacks.companions import decided, undecided
from lightning_slim.callbacks.looking import looked_at
from lightning_slim.capture import capture_calls
from lightning_slim.penalties import Penalty
from lightning_slim.pruner import NoEffectWarning
from lightning_slim.regularizer import Regularizer, as_proximal
from lightning_slim.schedules import Linear, Schedule
from lightning_slim.skipping import Skip
from lightning_slim.surgery import Example, StructureChange


class SparsityRegularization(SlimCallback):
    """Pulls whole units toward zero, so that a pruning callback beside it, or a cut afterwards, takes little away.

    The units are those that `Prune` could remove, found in the first batch; the pull begins behind it. There is no
    second backward pass: penalties have gradients in closed form. Those are added once for each step of an optimizer,
    where gradients are whole: averaged over processes, accumulated and unscaled. With automatic optimization they are
    clipped together with those of the loss; a module that steps its optimizers itself has clipped before.

    With `proximal=True` nothing is added; weights are shrunk behind each step of an optimizer instead, which makes
    whole units exactly zero and which no clipping weakens. Steps that a gradient scaler skips shrink nothing.

    Logs how far each group has shrunk, `slim/penalty/<group>`: the mean norm of its units relative to what the same
    units had at the start; how many are below 1 % of it, `slim/near_zero/<group>`; and the penalty itself,
    `slim/penalty`.

    Args:
        penalty: what is pulled, and how.
        strength: weight of the penalty in the loss, at the end of the schedule. Of `GroupLasso`, `L1` and `NormScaleL1`
            it is about the pull at a single entry, to be compared with gradients; in the proximal form, times the
            learning rate, with entries.
        schedule: which share of the strength is reached by which fraction of the run; from its end on it is all.
        proximal: whether weights are shrunk behind steps: for penalties whose proximal step has a closed form.
        module: dotted name of the only part of the model whose units are pulled; all of it if empty.
        skip: what is left alone: names of layers, patterns such as `"net.encoder.*"`, types or their names.
        verify: whether every group is tried first, so that only units are pulled that can be removed.
    """

    workers = ("_regularizer",)

    def __init__(
        self,
        penalty: Penalty,
        strength: float,
        schedule: Schedule = Linear(),  # noqa: B008 (frozen)
        proximal: bool = False,
        module: str = "",
        skip: Skip = (),
        verify: bool = True,
    ) -> None:
        check_arguments(SparsityRegularization, locals())
        if not (strength >= 0 and math.isfinite(strength)):
            raise ValueError(f"Expected a finite `strength` of at least 0, got {strength}.")
        if proximal:
            as_proximal(penalty)
        self.penalty, self.strength, self.schedule, self.proximal = penalty, strength, schedule, proximal
        self.module, self.skip, self.verify = module, skip, verify
        self._regularizer: Regularizer | None = None
        self._now = 0.0  # strength in this batch
        self._calls: dict[str, Example] = {}
        self._watching = ExitStack()
        self._shrinking = ExitStack()

    @property
    def regularizer(self) -> Regularizer:
        """What does the work; there is one once a fit was set up."""
        if self._regularizer is None:
            raise RuntimeError("Expected a fit to be under way or over: there is no regularizer before.")
        return self._regularizer

    # --- set up, save, resume ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._regularizer is None or self._regularizer.model is not pl_module:
            self._regularizer = Regularizer(pl_module, self.penalty, verify=self.verify)

    def state_dict(self) -> dict[str, Any]:
        return self.regularizer.state_dict() if self._regularizer is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.regularizer.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:  # not before: `configure_model` may make layers
            self.regularizer.confine(self.module, self.skip)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.regularizer.decide = partial(decided, trainer.strategy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_certain(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            in_fractions(self.schedule, trainer)
        self._shrinking.close()
        if self.proximal:
            for optimizer in trainer.optimizers:
                self._shrinking.callback(optimizer.register_step_post_hook(self._shrink).remove)

    def on_structure_change(self, change: StructureChange) -> None:
        """Follows a cut by a callback beside this one."""
        self.regularizer.follow(change)

    # --- train ---

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watching.close()  # a module that returns -1 from this hook skips the end of the batch
        if not self.regularizer.prepared and not undecided(trainer):
            self._calls = self._watching.enter_context(capture_calls(pl_module))
        progress = epochs_done(trainer, batch_idx) / epochs_in_run(trainer)
        self._now = self.strength * in_fractions(self.schedule, trainer, latest=1.0)(min(progress, 1.0))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Gradients are whole and unscaled here, and not clipped yet.
        if self._now > 0 and not self.proximal:
            self.regularizer.add_gradients((p for group in optimizer.param_groups for p in group["params"]), self._now)

    def _shrink(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._now > 0:
            self.regularizer.shrink(optimizer, self._now)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watching.close()
        calls, self._calls = self._calls, {}
        if calls:
            self.regularizer.prepare(looked_at(pl_module, calls, batch, batch_idx))
            if not self.regularizer.groups:
                rank_zero_warn(
                    f"{type(self.penalty).__name__} pulls nothing: all units that it could pull are skipped, or are "
                    "read by layers that are.",
                    category=NoEffectWarning,
                )
            groups = ", ".join(f"{group.name} ({group.size})" for group in self.regularizer.groups)
            rank_zero_info(f"slim: {type(self.penalty).__name__} pulls units of {groups}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.regularizer.prepared:
            pl_module.log_dict({f"slim/penalty/{name}": left for name, left in self.regularizer.shrunk().items()})
            counts = {f"slim/near_zero/{name}": float(n) for name, n in self.regularizer.near_zero().items()}
            pl_module.log_dict({**counts, "slim/penalty": self.regularizer.value()})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._watching.close()
        self._shrinking.close()
