"""Batches that are empty or not finite, steps passed over, dead units, one class: runs go on, or say why not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import (
    Granger,
    Linear,
    Magnitude,
    Prune,
    RandomGates,
    Screening,
    Taylor,
    Units,
    WeightMagnitude,
    WeightPrune,
    WeightSaliency,
    WeightScreening,
    WeightWanda,
)
from tests.callbacks.runs import trainer

SCORES = [Granger(), Taylor(), Screening(), Magnitude(), RandomGates()]
WEIGHTS = [WeightMagnitude(), WeightSaliency(), WeightWanda(), WeightScreening()]
KINDS = ["nan gradient", "nan input", "empty", "passed over", "one class", "dead"]


class Odd(pl.LightningModule):
    """A perceptron to which something happens now and then, in the first batch if it can."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        if kind == "dead":
            nn.init.constant_(self.net[0].bias, -1e3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        if self.kind == "one class":
            y = torch.zeros_like(y)
        if self.kind == "empty" and batch_idx in (0, 3):
            return self.net(x[:0]).sum() * 0
        if self.kind == "passed over" and batch_idx in (0, 3):
            return None
        if self.kind == "nan input" and self.global_step == 5:
            return F.cross_entropy(self.net(x * torch.nan), y)
        loss = F.cross_entropy(self.net(x), y)
        return loss * torch.nan if self.kind == "nan gradient" and self.global_step == 5 else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for p in (p for p in self.parameters() if p.grad is not None and not bool(p.grad.isfinite().all())):
            p.grad = torch.zeros_like(p)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def data() -> DataLoader:
    torch.manual_seed(1)
    x = torch.randn(64, 8)
    return DataLoader(TensorDataset(x, (x @ torch.randn(8, 3)).argmax(1)), batch_size=8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
def test_units_go_whatever_happens_once(tmp_path: Path, kind: str, score: Any) -> None:
    lit = Odd(kind)
    prune = Prune(score, Units(0.5), Linear(0.1, 0.7), print_report=False, record_every_n_steps=1)
    trainer(tmp_path, prune, max_epochs=4).fit(lit, data())
    assert (lit.net[0].out_features, lit.net[2].out_features) == (8, 8)
    assert all(bool(p.isfinite().all()) for p in lit.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", WEIGHTS, ids=lambda score: type(score).__name__)
def test_weights_go_whatever_happens_once(tmp_path: Path, kind: str, score: Any) -> None:
    lit, mask = Odd(kind), WeightPrune(0.5, score=score, schedule=Linear(0.1, 0.7), record_every_n_steps=1)
    trainer(tmp_path, mask, max_epochs=4).fit(lit, data())
    assert mask.masker.reached == 0.5


@pytest.mark.parametrize("kind", ["diverges", "never was finite"])
def test_a_run_that_diverges_is_told(tmp_path: Path, kind: str) -> None:
    class Diverges(Odd):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            bad = kind == "never was finite" or self.global_step > 6
            return F.cross_entropy(self.net(batch[0] * torch.nan if bad else batch[0]), batch[1])

    lit = Diverges("")
    prune = Prune(Granger(), Units(0.5), Linear(0.3, 0.7), print_report=False, record_every_n_steps=1)
    with pytest.raises(ValueError, match="Expected finite activations"):
        trainer(tmp_path, prune, max_epochs=4).fit(lit, data())
    assert lit.net[0].out_features == 16


def test_steps_without_a_loss_are_told_where_they_go_on(tmp_path: Path) -> None:
    class Silent(Odd):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean()

    prune = Prune(RandomGates(), Units(0.5), Linear(0.3, 0.7), print_report=False, record_every_n_steps=1)
    with pytest.raises(ValueError, match="heard none"):
        trainer(tmp_path, prune, max_epochs=4).fit(Silent(""), data())


def test_hooks_do_not_pile_up_over_fits(tmp_path: Path) -> None:
    lit = Odd("")

    def hooks() -> list[int]:
        of_modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lit.modules()]
        return of_modules + [len(p._backward_hooks or ()) for p in lit.parameters()]

    for number in range(3):
        prune = Prune(Taylor(), Units(0.8), Linear(0.1, 0.7), print_report=False, record_every_n_steps=1)
        mask = WeightPrune(0.3, score=WeightWanda(), schedule=Linear(0.1, 0.7))
        with pytest.warns(UserWarning, match="cut before") if number else nullcontext():
            trainer(tmp_path, prune, mask, max_epochs=3).fit(lit, data())
        assert sum(hooks()) == 0
