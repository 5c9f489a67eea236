"""Sensitivity of real modules: equal to explicit cuts and to sums by hand, and neither model nor run notices."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_slim import (
    Ablation,
    BatchNormScale,
    Combined,
    Granger,
    Linear,
    Magnitude,
    OneShot,
    Prune,
    Pruner,
    Score,
    Screening,
    Sensitivity,
    SensitivityTable,
    Taylor,
    Units,
    sensitivity,
)
from lightning_slim.callbacks.look import Still
from lightning_slim.selection import Selection
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.test_depth import Deep
from tests.networks import images, same

CPU = {"accelerator": "cpu"}
FEW = (0.25, 0.5)


class Planted(pl.LightningModule):
    """Eight units; with x = 1 each adds the product of its two weights to the output. The last four add nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False))
        size = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.5, 0.5, 0.5])
        self.net[0].weight.data = size[:, None].clone()
        self.net[2].weight.data = (size * (size > 0.5))[None].clone()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def ones() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)


def test_units_that_add_nothing_cost_nothing_and_others_what_they_add() -> None:
    found = sensitivity(
        Planted(), fractions=(0.25, 0.5, 0.625, 0.75, 0.9), train_dataloaders=ones(), val_dataloaders=ones(), **CPU
    )
    # squares of 9 + 4 + 2.25 + 1, without the 1, without the 2.25; two units always stay
    losses = {0.25: 16.25**2, 0.5: 16.25**2, 0.625: 15.25**2, 0.75: 13.0**2, 0.9: 13.0**2}
    assert found.whole == {"val_loss": 16.25**2}
    assert {f: m["val_loss"] for f, m in found.curves["net.0"].metrics.items()} == losses
    assert found.curves["net.0"].gone == {0.25: 2, 0.5: 4, 0.625: 5, 0.75: 6, 0.9: 6}
    assert set(found.left_whole) == {"net.2"}


def test_every_cell_is_the_validation_of_an_explicit_cut(tmp_path: Path) -> None:
    module = Lit()
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    found = sensitivity(module, fractions=FEW, train_dataloaders=loader(), val_dataloaders=loader(), **CPU)
    names = list(found.curves)
    assert names == ["net.c1", "net.c2", "net.up", "net.fc1"]
    for name in names:
        for fraction, gone in found.curves[name].gone.items():
            slim = copy.deepcopy(module)
            whole = {other: 1.0 for other in names if other != name}
            budget = Units(absolute=sum(curve.units for curve in found.curves.values()) - gone)
            selection = Selection(keep_at_least=whole)
            pruner = Pruner(slim, Magnitude(), budget, OneShot(0.5), selection=selection, compensate="none")
            pruner.prepare(networks={"net": images(7)[0]})
            pruner.step(0.5)
            assert pruner.widths[name] == found.curves[name].units - gone
            (expected,) = trainer(tmp_path).validate(slim, loader(), verbose=False)
            assert found.curves[name].metrics[fraction] == pytest.approx(expected)


def test_blocks_are_groups_too() -> None:
    data = {"train_dataloaders": loader(), "val_dataloaders": loader()}
    found = sensitivity(Deep(), fractions=(0.3, 0.4, 0.7), granularity="layers", **data, **CPU)
    (curve,) = found.curves.values()
    assert curve.gone == {fraction: int(fraction * curve.units + 1e-9) for fraction in (0.3, 0.4, 0.7)}
    assert curve.metrics[0.7] != found.whole


class Digits(pl.LightningDataModule):
    """Counts what is asked of it, and cannot be used after its teardown."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.data: Any = None

    def setup(self, stage: str) -> None:
        self.asked.append(str(stage.value))
        self.data = TensorDataset(*images(7, 32))

    def teardown(self, stage: str) -> None:
        self.data = None

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] * 2, batch[1]]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=8, shuffle=True)

    val_dataloader = train_dataloader


def test_model_data_and_random_numbers_are_left_as_they_are(tmp_path: Path) -> None:
    module, data = Lit().eval(), Digits()
    module.net.b1.train()
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    tensors = [id(p) for p in module.parameters()]
    state = torch.get_rng_state()
    first = sensitivity(module, data, Taylor(), FEW, record_batches=3, **CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(module.state_dict(), before)
    assert [m.training for m in module.modules()] == modes
    assert [id(p) for p in module.parameters()] == tensors
    assert all(p.grad is None for p in module.parameters())
    assert data.asked == ["fit", "validate"]  # the list is shared, all else is not
    assert data.data is None
    assert data.trainer is None
    torch.rand(3)
    assert sensitivity(module, data, Taylor(), FEW, record_batches=3, **CPU) == first
    # what the data module makes of a batch on its way is heard: twice the images
    doubled = DataLoader(TensorDataset(images(7, 32)[0] * 2, images(7, 32)[1]), batch_size=8)
    (expected,) = trainer(tmp_path).validate(module, doubled, verbose=False)
    assert first.whole["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


@pytest.mark.parametrize("score", [Granger(), Taylor(), Screening(), Ablation(), BatchNormScale()], ids=str)
def test_scores_get_their_evidence_while_no_weight_moves(score: Score) -> None:
    module = Lit()
    found = sensitivity(
        module,
        score=score,
        fractions=(0.5,),
        record_batches=4,
        train_dataloaders=loader(),
        val_dataloaders=loader(),
        **CPU,
    )
    assert found.whole["val_loss"] == sensitivity(
        module, fractions=(0.5,), train_dataloaders=loader(), val_dataloaders=loader(), **CPU
    ).whole["val_loss"]  # fmt: skip
    assert all(curve.metrics[0.5] != found.whole for curve in found.curves.values())


class PrunesItself(Lit):
    def configure_callbacks(self) -> list[pl.Callback]:
        return [Prune(Magnitude(), Units(0.5), OneShot(0.0), print_report=False)]


def test_copies_bring_no_callbacks() -> None:
    data = {"train_dataloaders": loader(), "val_dataloaders": loader()}
    settings = {"fractions": FEW, "record_batches": 8, **CPU}
    assert sensitivity(PrunesItself(), **data, **settings) == sensitivity(Lit(), **data, **settings)


class Twice(Lit):
    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("kind", [Lit, Twice])
def test_batches_pass_and_no_weight_moves(kind: type[Lit], settings: dict[str, Any], tmp_path: Path) -> None:
    if kind is Twice and "gradient_clip_val" in settings:
        return
    module = kind()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = trainer(tmp_path, Still(6), **settings)
    run.fit(module, loader())
    assert run.global_step == 6  # four batches an epoch
    assert same(dict(module.named_parameters()), before)
    assert int(module.net.b1.num_batches_tracked) == 6


def test_floors_hold_in_a_run(tmp_path: Path) -> None:
    module = Lit()
    found = sensitivity(module, train_dataloaders=loader(), val_dataloaders=loader(), **CPU)
    floors = found.keep_at_least("val_loss", 0.005, "min")
    assert floors["net.up"] == 1.0  # a tenth of it costs 0.012
    assert floors["net.c1"] == 0.1
    prune = Prune(Magnitude(), Units(0.7), OneShot(0.5), keep_at_least=floors, print_report=False)
    trainer(tmp_path, prune, max_epochs=2).fit(module, loader())
    sizes = {name: curve.units for name, curve in found.curves.items()}
    assert all(prune.pruner.widths[name] >= floors[name] * sizes[name] - 1e-9 for name in sizes)
    assert sum(prune.pruner.widths.values()) <= 0.7 * sum(sizes.values())
    assert prune.pruner.widths["net.c1"] < 0.7 * sizes["net.c1"]


# --- while a model trains ---


class Counting(Lit):
    """With dropout, batch norm, metrics and random numbers in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(5)
        self.accuracy = MulticlassAccuracy(5)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.norm(self.drop(self.net(batch[0]))), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.norm(self.net(batch[0] + 0.1 * torch.randn_like(batch[0])))
        self.accuracy(logits, batch[1])
        self.log_dict({"val_loss": F.cross_entropy(logits, batch[1]), "val_acc": self.accuracy})


def shuffled() -> DataLoader:
    return DataLoader(TensorDataset(*images(7, 32)), batch_size=8, shuffle=True)


@pytest.mark.parametrize("score", [None, Combined([Taylor(), Granger(), Ablation()])], ids=str)
def test_the_run_does_not_notice(score: Score | None, tmp_path: Path) -> None:
    runs = []
    callback = Sensitivity(2, FEW, score, record_every_n_steps=2)
    for callbacks in ([], [callback]):
        pl.seed_everything(0, verbose=False)
        module = Counting()
        run = trainer(tmp_path, *callbacks, max_epochs=4)
        run.fit(module, shuffled(), shuffled())
        runs.append((module.state_dict(), run.optimizers[0].state_dict(), run.callback_metrics))
    ours = {name: value for name, value in runs[1][2].items() if name.startswith("slim/")}
    assert same(runs[0][0], runs[1][0])
    assert str(runs[0][1]) == str(runs[1][1])
    assert {name: float(v) for name, v in runs[1][2].items() if name not in ours} == {
        name: float(v) for name, v in runs[0][2].items()
    }
    assert callback.table is not None
    curve = callback.table.curves["net.c1"]
    mean = sum(m["val_acc"] for m in curve.metrics.values()) / 2
    assert float(ours["slim/sensitivity/val_acc/net.c1"]) == pytest.approx(mean)
    assert len(ours) == 2 * len(callback.table.curves)


def test_the_table_is_that_of_the_model_as_it_is_then(tmp_path: Path) -> None:
    callback, module, data = Sensitivity(1, FEW), Lit(), Digits()
    trainer(tmp_path, callback, max_epochs=1).fit(module, data)
    assert data.asked == ["fit"]
    assert callback.table == sensitivity(module, Digits(), fractions=FEW, **CPU)


def test_beside_a_pruning_callback_it_goes_by_what_that_one_left(tmp_path: Path) -> None:
    runs = []
    beside = Sensitivity(2, FEW)
    for callbacks in ([], [beside]):
        module, prune = Lit(), Prune(Taylor(), Units(0.5), OneShot(0.25), print_report=False)
        trainer(tmp_path, prune, *callbacks, max_epochs=4).fit(module, loader(), loader())
        runs.append(module.state_dict())
    assert same(*runs)
    assert beside.table is not None
    assert {name: curve.units for name, curve in beside.table.curves.items()} == prune.pruner.widths
    assert prune.pruner.widths["net.up"] == 8  # of 16


def test_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    def run(folder: str, ckpt_path: Path | None = None) -> SensitivityTable | None:
        every_epoch = pl.callbacks.ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        callback = Sensitivity(2, FEW, Granger())
        trainer(tmp_path, callback, every_epoch, max_epochs=4).fit(Lit(), loader(), loader(), ckpt_path=ckpt_path)
        return callback.table

    whole = run("whole")
    assert whole is not None
    assert run("resumed", tmp_path / "whole" / "epoch=2.ckpt") == whole


def test_it_goes_through_yaml_and_pickle(tmp_path: Path) -> None:
    arguments = {"every_n_epochs": 3, "fractions": [0.2, 0.4], "score": {"class_path": "lightning_slim.Taylor"}}
    callbacks = [{"class_path": "lightning_slim.Sensitivity", "init_args": {**arguments, "skip": ["net.c1"]}}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "logger": False, "accelerator": "cpu"}}))
    cli = LightningCLI(Lit, run=False, args=["--config", str(path)], save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, Sensitivity))
    again = pickle.loads(pickle.dumps(callback))
    trainer(tmp_path, again, max_epochs=3).fit(Lit(), loader(), loader())
    assert again.table is not None
    assert list(again.table.curves) == ["net.c2", "net.up", "net.fc1"]
    assert again.score == Taylor()
    assert again.table.curves["net.up"].gone == {0.2: 3, 0.4: 6}


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Expected a run with validation"):
        trainer(tmp_path, Sensitivity()).fit(Lit(), loader())
    pair = [Sensitivity(score=Taylor()), Prune(Magnitude(), Units(0.5), Linear(0.2, 0.5))]
    with pytest.raises(MisconfigurationException, match="Expected no `score` beside a pruning callback"):
        trainer(tmp_path, *pair).fit(Lit(), loader(), loader())
    with pytest.raises(ValueError, match="Expected `fractions` that rise between 0 and 1"):
        sensitivity(Lit(), fractions=(0.5, 0.2))
    with pytest.raises(ValueError, match="Expected `every_n_epochs`"):
        Sensitivity(0)
    with pytest.raises(ValueError, match="Expected `record_batches` that are enough for Granger"):
        sensitivity(Lit(), score=Granger(), record_batches=0, train_dataloaders=loader(), **CPU)


def test_modules_of_the_other_import_name() -> None:
    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    found = sensitivity(Other(), fractions=FEW, train_dataloaders=ones(), val_dataloaders=ones(), **CPU)
    assert list(found.curves) == ["net.0"]
