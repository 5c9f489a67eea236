"""Scores that want more of a training step than moments and gradients get it, and the run does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_slim import (
    Ablation,
    ActivationFrequency,
    BivariateGranger,
    Combined,
    Granger,
    GrangerPrune,
    Linear,
    OneShot,
    Prune,
    RandomGates,
    Score,
    Screening,
    Significant,
    Taylor,
    Units,
)
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import same
from tests.variants import variants

SCORES = [
    Screening(),
    Granger(0, "labels"),
    Granger(0, "outputs"),
    Granger(0, "losses"),
    ActivationFrequency(),
    Ablation(),
    RandomGates(),
    Taylor("weights"),
    Combined([Screening(), Ablation()]),
]


@pytest.mark.parametrize("score", variants(SCORES, every=2), ids=str)
def test_every_kind_of_evidence_prunes_and_resumes_bitwise(score: Score, tmp_path: Path) -> None:
    def run(folder: str, ckpt_path: Path | None = None) -> tuple[Lit, Prune]:
        every_epoch = pl.callbacks.ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        prune = Prune(score, Units(0.5), Linear(0.2, 0.7), record_every_n_steps=2, print_report=False)
        module = Lit()
        trainer(tmp_path, prune, every_epoch, max_epochs=4).fit(module, loader(), ckpt_path=ckpt_path)
        return module, prune

    whole, prune = run("whole")
    assert prune.history.events[-1].reached <= 0.5
    resumed, again = run("resumed", tmp_path / "whole" / "epoch=1.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert again.history.to_json() == prune.history.to_json()


class Counting(Lit):
    """With dropout, batch norm, a metric and logged values."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(5)
        self.accuracy = MulticlassAccuracy(5)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.norm(self.drop(self.net(batch[0])))
        self.accuracy(logits, batch[1])
        loss = F.cross_entropy(logits, batch[1])
        self.log_dict({"loss": loss, "accuracy": self.accuracy}, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("score", [Ablation(), RandomGates(), Screening(), Granger(0, "losses")], ids=str)
def test_looking_on_changes_nothing(score: Score, tmp_path) -> None:
    runs = []
    for callbacks in ([], [Prune(score, Units(1.0), OneShot(0.5), record_every_n_steps=1, print_report=False)]):
        pl.seed_everything(0, verbose=False)
        module = Counting()
        run = trainer(tmp_path, *callbacks, max_epochs=2)
        run.fit(module, loader())
        runs.append((module.state_dict(), {k: v for k, v in run.logged_metrics.items() if "slim" not in k}))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


class TwoLosses(Lit):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits, torch.zeros_like(logits))


def test_losses_that_add_up_are_heard_also_where_batches_accumulate(tmp_path) -> None:
    prune = Prune(Granger(0, "losses"), Units(0.5), OneShot(0.5), record_every_n_steps=1, print_report=False)
    trainer(tmp_path, prune, max_epochs=2, accumulate_grad_batches=2).fit(TwoLosses(), loader())
    assert prune.history.events[-1].reached <= 0.5


class Manual(Lit):
    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


def test_experiments_are_refused_where_the_module_steps_itself(tmp_path) -> None:
    with pytest.raises(MisconfigurationException, match="Expected automatic optimization"):
        trainer(tmp_path, Prune(Ablation(), Units(0.5), OneShot(0.5)), max_epochs=2).fit(Manual(), loader())


def test_labels_that_are_not_there_are_named(tmp_path) -> None:
    prune = Prune(Screening(), Units(0.5), OneShot(0.5), labels="y")
    with pytest.raises(
        MisconfigurationException,
        match=r"Expected a tensor at 'y' of a batch, got NoneType in a list with \[0, 1\]: set `labels`",
    ):
        trainer(tmp_path, prune, max_epochs=2).fit(Lit(), loader())


def test_outputs_that_are_no_series_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"Expected outputs of \(item, step, target\)"):
        trainer(tmp_path, Prune(BivariateGranger(), Units(0.5), OneShot(0.5)), max_epochs=2).fit(Lit(), loader())


class Forecaster(pl.LightningModule):
    """A GRU that foretells its first input, step by step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.middle, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.gru(x)[0]).relu())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, :-1], batch[0][:, 1:, :1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("score", [BivariateGranger(), Granger(1, "outputs"), Granger(1)], ids=str)
def test_series_are_compared_step_by_step(score: Score, tmp_path) -> None:
    x = torch.randn(32, 12, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    prune = Prune(score, Units(0.5), OneShot(0.5), record_every_n_steps=1, print_report=False)
    trainer(tmp_path, prune, max_epochs=3).fit(Forecaster(), data)
    assert prune.history.events[-1].widths == {"gru": 4, "middle": 3}


def test_each_cut_says_what_was_found_and_what_is_found_where_there_is_nothing(tmp_path) -> None:
    prune = GrangerPrune(Units(0.5), OneShot(0.5), record_every_n_steps=1, print_report=False)
    run = trainer(tmp_path, prune, max_epochs=3)
    run.fit(Lit(), loader())
    told = prune.history.events[-1].calibration
    assert set(told) == set(prune.history.events[-1].widths)
    assert all(0 <= of_group["by_chance"] < of_group["explained"] <= 1 for of_group in told.values())
    assert {"slim/explained", "slim/by_chance", "slim/inflation"} <= set(run.callback_metrics)


def test_nothing_insignificant_is_left(tmp_path) -> None:
    """Three copies and a dead channel go, and no fraction is named."""
    module = Lit(12)
    with torch.no_grad():
        conv = module.net.c1
        conv.weight[-3:], conv.bias[-3:] = conv.weight[:3], conv.bias[:3]
        conv.weight[4], conv.bias[4] = 0.0, -1.0
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    prune = GrangerPrune(Significant(), OneShot(0.5), lags=0, record_every_n_steps=1, print_report=False)
    trainer(tmp_path, prune, max_epochs=2).fit(module, loader())
    assert prune.history.events[-1].widths["net.c1"] <= 8
    gone = prune.history.events[-1].removed["net.c1"]
    assert 4 in gone
    assert all(len({copied, copied - 9} & set(gone)) >= 1 for copied in (9, 10, 11))
