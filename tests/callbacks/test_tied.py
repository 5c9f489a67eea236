"""A tied language model in the Trainer: cut, resumed and averaged, and tied in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import load_from_checkpoint
from tests.callbacks.runs import trainer
from tests.callbacks.test_resume import prune
from tests.networks import same, same_optimizer_state
from tests.surgery.test_ties import Recurrent


class Words(pl.LightningModule):
    """Next tokens of random sentences, by an LSTM whose decoder is tied to its embedding."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Recurrent(num_layers=layers)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, amsgrad=True)


def sentences() -> DataLoader:
    tokens = torch.randint(0, 17, (32, 7), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(tokens), batch_size=8)


def run(folder: Path, kind: str, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> tuple[Words, pl.Trainer]:
    every_epoch = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    lit = Words(layers=1 if kind == "granger" else 2)  # nothing but the layer itself reads the lower of two
    fit = trainer(folder, prune(kind), *callbacks, every_epoch)
    fit.fit(lit, sentences(), ckpt_path=ckpt_path)
    return lit, fit


@pytest.mark.parametrize("kind", ["magnitude", "taylor"])
def test_it_resumes_bitwise_into_a_fresh_dense_model(tmp_path: Path, kind: str) -> None:
    straight, fit = run(tmp_path, kind)
    assert straight.net.e.weight.shape == (17, 5)
    assert (straight.net.d.in_features, straight.net.r.hidden_size, straight.net.r.input_size) == (5, 5, 5)
    for epoch in (1, 2, 4):
        resumed, again = run(tmp_path / str(epoch), kind, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(fit.optimizers[0].state_dict(), again.optimizers[0].state_dict())
        assert resumed.net.d.weight is resumed.net.e.weight
        held = [id(p) for group in again.optimizers[0].param_groups for p in group["params"]]
        assert held == [id(p) for p in resumed.parameters()]
    loaded = load_from_checkpoint(Words, tmp_path / "epoch=5.ckpt")
    assert loaded.net.d.weight is loaded.net.e.weight
    assert same(loaded.state_dict(), straight.state_dict())


def test_averages_keep_their_ties_and_resume(tmp_path: Path) -> None:
    seen: list[tuple[bool, int]] = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            average = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))._average_model.module.net
            seen.append((average.d.weight is average.e.weight, average.e.weight.shape[1]))

    straight, _ = run(tmp_path, "granger", EMAWeightAveraging(decay=0.9), Look())
    assert all(tied for tied, _ in seen)
    assert [width for _, width in seen] == [10, 10, 7, 7, 5, 5]
    resumed, _ = run(tmp_path / "b", "granger", EMAWeightAveraging(decay=0.9), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert same(straight.state_dict(), resumed.state_dict())
