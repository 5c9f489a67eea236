"""Whole blocks go while a Trainer trains; checkpoints of any depth load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_slim import Granger, Linear, Prune, Score, Taylor, Units, load_from_checkpoint
from lightning_slim.surgery import dropped
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import images, same, same_optimizer_state
from tests.surgery.test_blocks import Residual


class Deep(Lit):
    """Five residual blocks of convolutions instead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 8, 3, padding=1), *(Residual(8) for _ in range(5))]
        self.net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def both(score: Score) -> Prune:
    """Cuts blocks and units at the start of epochs 2 and 4."""
    schedule = Linear(start=0.0, end=4 / 6)
    return Prune(score, Units(0.5), schedule, recovery_epochs=2, record_every_n_steps=3, granularity="both")


def run(folder: Path, score: Score, *others: pl.Callback, ckpt_path: Path | None = None) -> tuple[Deep, Any, Prune]:
    callback = both(score)
    every_epoch = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    deep = Deep()
    fit = trainer(folder, callback, every_epoch, *others)
    fit.fit(deep, loader(), loader(), ckpt_path=ckpt_path)
    return deep, fit, callback


@pytest.mark.parametrize("score", [pytest.param(Granger(0), marks=pytest.mark.slow), Taylor()])
def test_stop_after_any_epoch_and_resume_into_a_fresh_deep_model(tmp_path: Path, score: Score) -> None:
    straight, trained, callback = run(tmp_path / "straight", score)
    assert len(callback.history.events) == 2
    assert 0 < len(dropped(straight)) < 5
    assert callback.history.events[-1].params == sum(p.numel() for p in straight.parameters())
    for epoch in range(5):
        checkpoint = tmp_path / "straight" / f"epoch={epoch}.ckpt"
        resumed, fit, again = run(tmp_path / f"resumed{epoch}", score, ckpt_path=checkpoint)
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
        assert again.history.to_json() == callback.history.to_json()


def test_averages_lose_the_same_blocks(tmp_path: Path) -> None:
    straight, _, _ = run(tmp_path / "straight", Granger(0), EMAWeightAveraging(decay=0.9))
    resumed, _, _ = run(
        tmp_path / "resumed",
        Granger(0),
        EMAWeightAveraging(decay=0.9),
        ckpt_path=tmp_path / "straight" / "epoch=3.ckpt",
    )
    assert dropped(straight)
    assert same(straight.state_dict(), resumed.state_dict())


def test_checkpoints_of_any_depth_load_into_any_model(tmp_path: Path) -> None:
    deep, fit, _ = run(tmp_path, Granger(0))
    gone, slim = dropped(deep), fit.test(deep, loader(), ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False)
    dense = fit.test(deep, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert not dropped(deep)  # grown back
    alone = trainer(tmp_path / "alone").test(Deep(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert dense == alone
    assert slim == fit.test(deep, loader(), ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False)
    loaded = load_from_checkpoint(Deep, tmp_path / "epoch=5.ckpt").eval()
    assert dropped(loaded) == gone == dropped(deep)
    x = images(1)[0]
    assert torch.equal(loaded.net(x), deep.eval().net(x))


def test_the_report_compares_with_all_blocks(tmp_path: Path) -> None:
    deep, _, callback = run(tmp_path, Granger(0))
    report = callback.report({})
    assert report.dense.params == sum(p.numel() for p in Deep().parameters())
    assert report.slim.params == sum(p.numel() for p in deep.parameters())
    assert report.slim.macs == callback.history.events[-1].macs
