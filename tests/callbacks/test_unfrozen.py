"""Weights that begin to train later: they get masks, or it is said that they have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, LambdaCallback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import NM, Linear, NoEffectWarning, RigL, WeightPrune, WeightSaliency, WeightWanda
from tests.callbacks.runs import trainer
from tests.networks import same

HIDDEN = {"backbone.0.weight", "backbone.2.weight", "head.0.weight"}  # all but the last layer


class Transfer(pl.LightningModule):
    """A backbone that `BackboneFinetuning` freezes at first, and a head; `classes` values for each sample."""

    def __init__(self, inner: int = 16, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, inner), nn.ReLU(), nn.Linear(inner, 16), nn.ReLU())
        self.between = between or nn.Identity()
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.between(self.backbone(batch[0]))), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def data() -> DataLoader:
    torch.manual_seed(1)
    x = torch.randn(64, 8)
    return DataLoader(TensorDataset(x, (x @ torch.randn(8, 3)).argmax(1)), batch_size=8)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"schedule": Linear(0.0, 0.2)},  # over before the backbone trains
        {"schedule": Linear(0.0, 0.2), "regrow": RigL()},
        {"score": WeightWanda(), "record_every_n_steps": 2},
        {"score": WeightSaliency(), "pattern": NM(2, 4), "sparsity": 0.5},
    ],
)
def test_unfrozen_weights_get_masks(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    callback, lit = WeightPrune(**{"sparsity": 0.75, "schedule": Linear(0.1, 0.8), **kwargs}), Transfer()
    trainer(tmp_path, callback, BackboneFinetuning(2, verbose=False), max_epochs=6).fit(lit, data())
    assert callback.masker.masks.keys() == HIDDEN
    zeros = {name: float((lit.get_parameter(name) == 0).float().mean()) for name in HIDDEN}
    assert all(share == pytest.approx(callback.sparsity, abs=0.01) for share in zeros.values()), zeros
    assert callback.masker.reached == pytest.approx(callback.sparsity, abs=0.01)
    assert callback.events[0].weights.keys() == {"head.0.weight"}
    assert bool((lit.head[2].weight != 0).all())


def test_a_run_with_unfrozen_weights_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(*others: pl.Callback, **kwargs: Any) -> dict[str, Tensor]:
        masks, finetuning = WeightPrune(0.75, schedule=Linear(0.1, 0.8)), BackboneFinetuning(2, verbose=False)
        lit = Transfer()
        trainer(tmp_path, masks, finetuning, *others, max_epochs=5).fit(lit, data(), **kwargs)
        return lit.state_dict()

    def thaw(trainer: pl.Trainer, lit: Transfer) -> None:
        """A resumed `BackboneFinetuning` restores its groups of parameters, and leaves the backbone frozen."""
        lit.backbone.requires_grad_(trainer.current_epoch >= 3)

    whole = run(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    for epoch in range(4):
        resumed = run(LambdaCallback(on_train_start=thaw), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"))
        assert same(whole, resumed)


def test_what_does_not_fit_the_pattern_stays_dense(tmp_path: Path) -> None:
    callback = WeightPrune(pattern=NM(2, 4), schedule=Linear(0.1, 0.8))
    with pytest.warns(UserWarning, match=r"backbone.2.weight, which trains by now, stays dense"):
        trainer(tmp_path, callback, BackboneFinetuning(2, verbose=False), max_epochs=6).fit(Transfer(inner=18), data())
    assert callback.masker.masks.keys() == HIDDEN - {"backbone.2.weight"}


def test_masks_of_the_start_say_what_trained_later(tmp_path: Path) -> None:
    callback = WeightPrune(0.5, when="start")
    with pytest.warns(NoEffectWarning, match="frozen at the start"):
        trainer(tmp_path, callback, BackboneFinetuning(1, verbose=False), max_epochs=3).fit(Transfer(), data())


class Gain(nn.Module):
    """A bare matrix beside a cell, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(16))
        self.cell = nn.GRUCell(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x @ self.mix)


def test_what_has_no_mask_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = WeightPrune(0.5)
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback, max_epochs=3).fit(Transfer(between=Gain()), data())
    assert callback.masker.unmasked.keys() == {"between.mix", "between.cell.weight_ih", "between.cell.weight_hh"}
    assert "between.mix (256), between.cell.weight_ih (768)" in caplog.text
