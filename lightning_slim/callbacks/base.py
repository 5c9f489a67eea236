"""The one file about what Lightning does when: strategies that cannot be served, checkpoints, resume."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_slim.callbacks.companions import copies, is_ddp
from lightning_slim.checkpoint import cut_tensors, fit_to, load_state, remember_cut, sign, state_of

# By name, so that both `lightning.pytorch` and `pytorch_lightning` are meant, and none of them is imported.
SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy", "XLAFSDPStrategy"}

BEFORE = "_slim_before_smoke_test"  # on a module: its state before it was changed


class SlimCallback(Callback):
    """A callback that changes the structure of the model it is given.

    A smoke test (`fast_dev_run`) leaves nothing behind: what does the work is made for it alone, and a module that it
    changed is put back when it is over.

    Attributes:
        workers: names of the attributes that hold what does the work, None before a fit.
    """

    workers: ClassVar[Sequence[str]] = ()
    _is_set_up = False
    _aside: Mapping[str, Any] | None = None  # those of real fits, from a smoke test on until the next real fit

    @property
    def state_key(self) -> str:
        """Differs between callbacks of one kind until `setup`, which explains the limit better than a Trainer."""
        return super().state_key if self._is_set_up else f"{super().state_key} {id(self)}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_set_up = True
        self._refuse_others(trainer.callbacks)  # type: ignore[attr-defined]
        if stage == "fit":
            self._set_aside(bool(trainer.fast_dev_run))  # type: ignore[attr-defined]
        refuse_what_cannot_be_cut(trainer, pl_module)
        # Lightning calls the module's hook before it loads weights, and the callbacks' hooks after: too late to resize.
        # It looks the hook up on the instance, so that is where it is wrapped. The module's hook for saving also runs
        # for `save_weights_only=True`, the callbacks' does not. After an exception Lightning does not tear down, and a
        # checkpoint may still be written then: the hooks stay, and are replaced here.
        self.teardown(trainer, pl_module, stage)
        load, save = pl_module.on_load_checkpoint, pl_module.on_save_checkpoint
        pl_module.on_load_checkpoint = partial(_resize_and_load, pl_module, load)  # type: ignore[method-assign]
        pl_module.on_save_checkpoint = partial(_save_and_sign, pl_module, save)  # type: ignore[method-assign]

    def _refuse_others(self, callbacks: Sequence[Callback]) -> None:
        kind = next(c for c in type(self).__mro__ if SlimCallback in c.__bases__)
        several = [type(callback).__name__ for callback in callbacks if isinstance(callback, kind)]
        if len(several) > 1:
            raise MisconfigurationException(
                f"Expected one {kind.__name__} callback in a Trainer, got {' and '.join(several)}: they would "
                "interfere with each other. Keep one of them."
            )

        if "ModelPruning" in {c.__name__ for callback in callbacks for c in type(callback).__mro__}:
            raise MisconfigurationException(
                "Expected one tool that prunes, got Lightning's `ModelPruning` beside ours: it puts other tensors in "
                "the place of weights while they train. Leave it out; `WeightPrune` masks weights."
            )

    def _set_aside(self, smoke_test: bool) -> None:
        if smoke_test:
            self._aside = self._aside or {name: getattr(self, name) for name in self.workers}
            vars(self).update(dict.fromkeys(self.workers))
        elif self._aside is not None:
            vars(self).update(self._aside)
            self._aside = None

    def about_to_change(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """To be called before the module is changed: a smoke test puts it back."""
        if trainer.fast_dev_run and BEFORE not in vars(pl_module):  # type: ignore[attr-defined]
            vars(pl_module)[BEFORE] = copy.deepcopy(state_of(pl_module, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (before := vars(pl_module).pop(BEFORE, None)) is not None:
            load_state(pl_module, pl_module, before)
        for hook in ("on_load_checkpoint", "on_save_checkpoint"):
            pl_module.__dict__.pop(hook, None)


# Functions of the module, not of `setup`: a LightningModule that carries them can still be pickled and copied.
def _resize_and_load(pl_module: LightningModule, load: Callable[[Any], None], checkpoint: dict[str, Any]) -> None:
    before = cut_tensors(pl_module)
    # `Trainer.save_checkpoint` behind a fit does not sign: our hooks are gone by then.
    known = {c.state_key for c in pl_module.trainer.callbacks if isinstance(c, SlimCallback)}  # type: ignore[attr-defined]
    ours = bool(known & checkpoint.get("callbacks", {}).keys())
    fit_to(pl_module, checkpoint, everything=ours)
    load(checkpoint)
    fit_to(pl_module, checkpoint, everything=ours)  # the user's hook may have renamed what it found
    for copied in copies(pl_module.trainer):  # averages are loaded later, by their callbacks, but exist already
        remember_cut(copied, before)
        fit_to(copied, checkpoint, everything=ours)


def _save_and_sign(pl_module: LightningModule, save: Callable[[Any], None], checkpoint: dict[str, Any]) -> None:
    sign(pl_module, checkpoint)
    save(checkpoint)


def refuse_what_cannot_be_cut(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raises before training where a cut would break the run.

    Raises:
        MisconfigurationException: sharded parameters, or processes that cannot agree.
    """
    strategy = trainer.strategy
    if SHARDED & {c.__name__ for c in type(strategy).__mro__}:
        raise MisconfigurationException(
            f"Expected a strategy that keeps whole parameters on each device, got {type(strategy).__name__}: "
            "its shards cannot be cut. Prune on one device."
        )
    if type(getattr(strategy, "launcher", None)).__name__ == "_MultiProcessingLauncher":
        raise MisconfigurationException(
            f"Expected processes that were started from outside, got {type(strategy).__name__} with a spawn or fork "
            'launcher: the main process could not load the cut model back when the fit ends. Use strategy="ddp".'
        )
    if trainer.world_size > 1 and not is_ddp(strategy):
        raise MisconfigurationException(
            f"Expected one process or DDPStrategy, got {type(strategy).__name__}: ranks would cut differently. "
            'Use strategy="ddp", or one device.'
        )


def metrics_of(trainer: Trainer) -> dict[str, float]:
    """The metrics that were logged last, without our own."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("slim/")}
