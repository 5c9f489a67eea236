"""Batch norms that measure their statistics anew in the epoch of a cut: state of the run like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_slim import Magnitude, OneShot, Prune, Units
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import images, same

X, Y = images(7, 32)


class Counted(Lit):
    """Its batches depend on the step alone, so that any step can be resumed."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        at = 8 * (self.global_step % 4)
        return F.cross_entropy(self.net(X[at : at + 8]), Y[at : at + 8])


def prune() -> Prune:
    return Prune(Magnitude(), Units(0.5), OneShot(0.5), record_every_n_steps=2, print_report=False)


def momenta(module: pl.LightningModule) -> set[float | None]:
    return {layer.momentum for layer in module.modules() if isinstance(layer, _BatchNorm)}


def test_it_resumes_at_every_step(tmp_path: Path) -> None:
    whole, seen = Counted(), []
    watch = LambdaCallback(on_train_batch_start=lambda *_: seen.append(momenta(whole)))
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, prune(), watch, saver, max_epochs=4).fit(whole, loader())
    assert seen == [{0.1}] * 8 + [{None}] * 4 + [{0.1}] * 4  # the cut is at step 8
    for step in (7, 8, 9, 10, 11, 12):
        again = Counted()
        run = trainer(tmp_path, prune(), max_epochs=3)
        run.fit(again, loader(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        end = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"]
        assert same(end, again.state_dict()), step
        assert momenta(again) == {0.1}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_breaks_off_leaves_momentum_and_a_checkpoint_that_resumes(tmp_path: Path, error: Any) -> None:
    def stop(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 10 and armed.pop("once", False):
            raise error("stop")

    armed = {"once": True}
    lit, callback = Counted(), prune()
    saver, settings = OnExceptionCheckpoint(tmp_path, "exception"), {"max_epochs": 4, "enable_checkpointing": True}
    run = trainer(tmp_path, callback, LambdaCallback(on_train_batch_start=stop), saver, **settings)
    with pytest.raises((error, SystemExit)):
        run.fit(lit, loader())
    assert momenta(lit) == {0.1}
    (path,) = tmp_path.glob("exception*.ckpt")
    again = Counted()
    trainer(tmp_path, prune(), max_epochs=4).fit(again, loader(), ckpt_path=str(path))
    assert again.net.c1.out_channels < 8
    assert momenta(again) == {0.1}
