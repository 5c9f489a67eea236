"""Penalties in a Trainer: where they are added, beside what, and what a resumed run makes of it."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from lightning_slim import (
    L1,
    GroupLasso,
    GrowingL2,
    HoyerSquare,
    Linear,
    Magnitude,
    NoEffectWarning,
    NormScaleL1,
    OneShot,
    Prune,
    SparsityRegularization,
    Units,
    find_groups,
)
from lightning_slim.schedules import Schedule
from lightning_slim.units import UnitGroup, rows
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import images, same, same_optimizer_state

AT_ONCE = OneShot(0.0)


class ByHand(Lit):
    """Adds the written formula to the loss: once for each step of the optimizer, from the second batch on."""

    strength, accumulate = 0.0, 1
    groups: list[UnitGroup]

    def on_fit_start(self) -> None:
        self.groups = find_groups(self.net, images(0)[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        first = self.trainer.current_epoch == batch_idx == 0
        if not self.strength or first or (batch_idx + 1) % self.accumulate:
            return loss
        views = [rows(self.net, group, None) for group in self.groups]
        penalty = sum(math.sqrt(v.shape[1]) * (v**2).sum(1).sqrt().sum() for v in views)
        return loss + self.accumulate * self.strength * penalty  # Lightning divides by the number of batches


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_it_equals_the_penalty_in_the_loss_once_a_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"max_epochs": 3, **settings}
    ours, plain, by_hand = ByHand(), ByHand(), ByHand()
    by_hand.strength, by_hand.accumulate = 0.002, settings.get("accumulate_grad_batches", 1)
    callback = SparsityRegularization(GroupLasso(), 0.002, AT_ONCE)
    trainer(tmp_path, callback, **settings).fit(ours, loader())
    trainer(tmp_path, **settings).fit(by_hand, loader())
    trainer(tmp_path, **settings).fit(plain, loader())
    difference = max(
        float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True)
    )
    power = max(float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert difference < 1e-5
    assert power > 30 * 1e-5


class Manual(ByHand):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("proximal", [False, True])
def test_a_module_that_steps_its_optimizer_itself_is_served_as_well(tmp_path: Path, proximal: bool) -> None:
    runs = []
    for kind in (ByHand, Manual):
        lit = kind()
        callback = SparsityRegularization(GroupLasso(), 0.002, AT_ONCE, proximal=proximal)
        trainer(tmp_path, callback, max_epochs=2).fit(lit, loader())
        runs.append(lit.state_dict())
    assert same(*runs)


@pytest.mark.parametrize("penalty", [L1(), GroupLasso(), NormScaleL1()], ids=str)
def test_the_proximal_form_gives_exact_zeros_whatever_is_clipped(tmp_path: Path, penalty: Any) -> None:
    lit = Lit()
    callback = SparsityRegularization(penalty, 10.0, AT_ONCE, proximal=True)
    fit = trainer(tmp_path, callback, max_epochs=12, gradient_clip_val=1e-3)
    fit.fit(lit, loader())
    norms = torch.cat(list(callback.regularizer.norms().values()))
    assert (norms == 0).any()
    assert not fit.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("proximal", [False, True])
def test_zero_strength_changes_nothing(tmp_path: Path, proximal: bool) -> None:
    plain, ours = Lit(), Lit()
    callback = SparsityRegularization(GroupLasso(), 0.0, AT_ONCE, proximal=proximal)
    first, second = trainer(tmp_path), trainer(tmp_path, callback)
    first.fit(plain, loader())
    second.fit(ours, loader())
    assert same(plain.state_dict(), ours.state_dict())
    assert same_optimizer_state(first.optimizers[0].state_dict(), second.optimizers[0].state_dict())


@pytest.mark.parametrize(
    ("proximal", "ours_first"),
    [(False, True), (True, False), *(pytest.param(each, each, marks=pytest.mark.slow) for each in (False, True))],
)
def test_stop_and_resume_beside_a_pruning_callback(tmp_path: Path, proximal: bool, ours_first: bool) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Lit, pl.Trainer, SparsityRegularization]:
        ours = SparsityRegularization(GroupLasso(), 0.01, Linear(0.0, 0.5), proximal=proximal)
        cuts = Prune(Magnitude(), Units(0.5), Linear(0.0, 4 / 6), recovery_epochs=2, print_report=False)
        every_epoch = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        lit = Lit()
        fit = trainer(folder, *([ours, cuts] if ours_first else [cuts, ours]), every_epoch)
        fit.fit(lit, loader(), ckpt_path=ckpt_path)
        return lit, fit, ours

    straight, trained, callback = run(tmp_path / "straight")
    assert {group.name: group.size for group in callback.regularizer.groups}["net.c1"] == 4
    torch.load(tmp_path / "straight" / "epoch=5.ckpt", weights_only=True)
    for epoch in (0, 2, 4):
        resumed, fit, again = run(tmp_path / f"resumed{epoch}", tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
        assert again.regularizer.shrunk() == callback.regularizer.shrunk()


def test_it_logs_how_far_groups_have_shrunk(tmp_path: Path) -> None:
    callback = SparsityRegularization(GroupLasso(), 0.2, AT_ONCE)
    lit = Lit()
    fit = trainer(tmp_path, callback)
    fit.fit(lit, loader())
    logged = fit.callback_metrics
    groups = ["net.c1", "net.c2", "net.up", "net.fc1"]
    assert {name for name in logged if name.startswith("slim/penalty/")} == {f"slim/penalty/{name}" for name in groups}
    assert all(logged[f"slim/penalty/{name}"] < 0.9 for name in groups)
    assert all(0 <= logged[f"slim/near_zero/{name}"] <= 20 for name in groups)
    views = [rows(lit, group, None) for group in callback.regularizer.groups]
    expected = sum(math.sqrt(v.shape[1]) * (v**2).sum(1).sqrt().sum() for v in views)
    assert float(logged["slim/penalty"]) == pytest.approx(float(expected.detach()), rel=1e-5)


PENALTIES = [L1(), GroupLasso(), GrowingL2(0.3), HoyerSquare(), NormScaleL1()]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_it_goes_through_yaml_and_pickle(tmp_path: Path, penalty: Any) -> None:
    arguments = {
        "penalty": {"class_path": f"lightning_slim.{type(penalty).__name__}", "init_args": vars(penalty)},
        "strength": 0.1,
        "schedule": {"class_path": "lightning_slim.Cubic", "init_args": {"start": 0.2}},
    }
    callbacks = [{"class_path": "lightning_slim.SparsityRegularization", "init_args": arguments}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "logger": False, "accelerator": "cpu"}}))
    cli = LightningCLI(Lit, run=False, args=["--config", str(path)], save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, SparsityRegularization))
    assert (callback.penalty, callback.strength, callback.schedule.start) == (penalty, 0.1, 0.2)
    again = pickle.loads(pickle.dumps(callback))
    assert (again.penalty, again.schedule) == (penalty, callback.schedule)
    assert isinstance(again.schedule, Schedule)


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf])
def test_a_strength_that_is_none_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="finite `strength`"):
        SparsityRegularization(GroupLasso(), strength)


@pytest.mark.parametrize("penalty", [GrowingL2(), HoyerSquare()], ids=str)
def test_a_penalty_without_a_proximal_form_is_refused(penalty: Any) -> None:
    with pytest.raises(ValueError, match="closed form"):
        SparsityRegularization(penalty, 1.0, proximal=True)


def test_a_layer_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    callback = SparsityRegularization(GroupLasso(), 1.0, skip=["net.c9"])
    with pytest.raises(MisconfigurationException, match="`skip` to name"):
        trainer(tmp_path, callback).fit(Lit(), loader())


def test_all_that_could_be_pulled_is_skipped(tmp_path: Path) -> None:
    callback = SparsityRegularization(GroupLasso(), 1.0, skip=["net"])
    lit, plain = Lit(), Lit()
    with pytest.warns(NoEffectWarning, match="GroupLasso pulls nothing"):
        trainer(tmp_path, callback, max_epochs=1).fit(lit, loader(), loader())
    trainer(tmp_path, max_epochs=1).fit(plain, loader())
    assert same(lit.state_dict(), plain.state_dict())


def test_a_regularizer_before_a_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no regularizer before"):
        _ = SparsityRegularization(GroupLasso(), 1.0).regularizer


def test_times_may_be_counted_in_epochs(tmp_path: Path) -> None:
    weights = []
    for end in ("2 epochs", 2 / 4):
        module = Lit()
        pull = SparsityRegularization(GroupLasso(), 1e-3, Linear(0.0, end))
        trainer(tmp_path, pull, max_epochs=4).fit(module, loader())
        weights.append(module.state_dict())
    assert same(*weights)
