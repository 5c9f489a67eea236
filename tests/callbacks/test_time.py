"""Schedules fit every run, steps are steps of the optimizer, and fits continue or begin anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_slim import (
    AccuracyBudget,
    Cubic,
    GroupLasso,
    Linear,
    Magnitude,
    NoEffectWarning,
    OneShot,
    Prune,
    SparsityRegularization,
    Units,
    WeightPrune,
)
from lightning_slim.callbacks.pace import Pace
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import images
from tests.variants import variants


def cut(**kwargs: Any) -> Prune:
    return Prune(Magnitude(), **{"budget": Units(0.5), "print_report": False, **kwargs})


def masked(**kwargs: Any) -> WeightPrune:
    return WeightPrune(0.5, **kwargs)


def left(callback: Prune | WeightPrune) -> float:
    """What is left, by the last event, of what a callback counts."""
    if isinstance(callback, Prune):
        return callback.pruner.budget.remaining(callback.pruner.costs, callback.pruner.widths)
    return 1 - callback.masker.reached


def steps(callback: Prune | WeightPrune) -> list[int]:
    return [event.step for event in (callback.history.events if isinstance(callback, Prune) else callback.events)]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Images without a length, of which there is no end if no number is given."""

    def __init__(self, items: int | None = None) -> None:
        self.items = items

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = images(7, 32)
        number = 0
        while self.items is None or number < self.items:
            yield x[number % 32], y[number % 32]
            number += 1


# --- steps ---


def test_steps_follow_accumulation() -> None:
    pace = Pace(9, [(0, 4), (2, 1)])
    assert [pace.epoch(step) for step in (0, 1, 2, 3, 6, 7, 15)] == pytest.approx([0, 4 / 9, 8 / 9, 1, 2, 2 + 1 / 9, 3])
    assert [pace.step(pace.epoch(step)) for step in range(20)] == pytest.approx(list(range(20)))
    assert Pace(9, [(0, 4)], ahead=5).epoch(6) == pytest.approx(4 / 9)


@pytest.mark.parametrize("make", [cut, masked])
@pytest.mark.parametrize("limits", [{"max_epochs": 8}, {"max_epochs": 20, "max_steps": 18}])
def test_accumulation_that_changes(tmp_path: Path, make: Any, limits: dict[str, int]) -> None:
    """2 steps an epoch up to the fourth epoch, 8 from then on."""
    callback = make(schedule=Linear("6 steps", "14 steps"), **_every(make, 1 / 8))
    accumulate = GradientAccumulationScheduler({0: 4, 4: 1})
    trainer(tmp_path, callback, accumulate, **limits).fit(Lit(), loader(64))
    assert steps(callback)[0] in (6, 7)
    assert steps(callback)[-1] in (14, 15)
    assert left(callback) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("make", [cut, masked])
def test_max_steps_before_max_epochs_by_the_default_schedule(tmp_path: Path, make: Any) -> None:
    callback = make()
    accumulate = GradientAccumulationScheduler({0: 4, 4: 1})
    trainer(tmp_path, callback, accumulate, max_epochs=8, max_steps=20).fit(Lit(), loader(64))
    assert left(callback) == pytest.approx(0.5, abs=0.02)


def test_fine_tuning_in_steps(tmp_path: Path) -> None:
    """Of 8 + 16 steps, 2 and 8 an epoch, the last 12."""
    callback = cut(when="end", finetune="12 steps", schedule=OneShot(0.0))
    trainer(tmp_path, callback, GradientAccumulationScheduler({0: 4, 4: 1}), max_epochs=6).fit(Lit(), loader(64))
    assert steps(callback) == [12]


class Adversaries(Lit):
    """Two optimizers, stepped by hand: every batch makes two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, second = self.net.c1.parameters(), [p for n, p in self.net.named_parameters() if "c1" not in n]
        return [torch.optim.AdamW(first, 1e-2), torch.optim.AdamW(second, 1e-2)]


@pytest.mark.parametrize("make", [cut, masked])
@pytest.mark.parametrize("limits", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 32}])
def test_every_optimizer_that_a_module_steps_counts(tmp_path: Path, make: Any, limits: dict[str, int]) -> None:
    by_default = make()
    trainer(tmp_path, by_default, **limits).fit(Adversaries(), loader())
    assert left(by_default) == pytest.approx(0.5, abs=0.02)
    in_steps = make(schedule=OneShot("12 steps"), **_every(make, 0.25))
    trainer(tmp_path, in_steps, **limits).fit(Adversaries(), loader())
    assert steps(in_steps) == [12]


# --- the default schedule fits ---

SHORT = [
    {"max_epochs": 1},
    {"max_epochs": 2},
    {"max_epochs": 3},
    {"max_epochs": -1, "max_steps": 3},
    {"max_epochs": -1, "max_steps": 9},
    {"max_epochs": 100, "max_steps": 5},
    {"max_epochs": 2, "limit_train_batches": 0.5},
    {"max_epochs": 3, "accumulate_grad_batches": 4},
    {"max_epochs": 3, "limit_train_batches": 1},
]


@pytest.mark.parametrize(
    ("settings", "make"),
    variants(SHORT, [cut, masked, lambda: cut(when="end"), lambda: masked(when="end")], every=3),
)
def test_short_runs(tmp_path: Path, make: Callable[[], Any], settings: dict[str, Any]) -> None:
    callback = make()
    trainer(tmp_path, callback, **settings).fit(Lit(), loader())
    assert left(callback) == pytest.approx(0.5, abs=0.02)


def test_a_run_of_two_batches_says_that_it_is_too_short(tmp_path: Path) -> None:
    """The first one shows what can be removed, the second one is evidence."""
    with pytest.warns(NoEffectWarning, match=r"100.0% remains, 50.0% was asked for"):
        trainer(tmp_path, cut(), max_epochs=-1, max_steps=2).fit(Lit(), loader(), loader())


@pytest.mark.parametrize("batches", [True, 2, 8])
@pytest.mark.parametrize("schedule", [Cubic(), OneShot("500 steps"), Linear("5 epochs", 0.9)])
@pytest.mark.parametrize("make", [cut, masked])
def test_smoke_tests_fit_whatever_the_schedule(tmp_path: Path, make: Any, schedule: Any, batches: Any) -> None:
    trainer(tmp_path, make(schedule=schedule), fast_dev_run=batches).fit(Lit(), loader(64), loader())


@pytest.mark.parametrize("make", [cut, masked, lambda: SparsityRegularization(GroupLasso(), 0.01)])
@pytest.mark.parametrize("items", [None, 40])
def test_loaders_without_length(tmp_path: Path, make: Callable[[], Any], items: int | None) -> None:
    callback = make()
    trainer(tmp_path, callback, max_epochs=-1, max_steps=20).fit(Lit(), DataLoader(Stream(items), 8))
    if not isinstance(callback, SparsityRegularization):
        assert left(callback) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("make", [cut, masked])
def test_a_loader_without_length_that_ends_before_all_steps_are_taken(tmp_path: Path, make: Any) -> None:
    callback = make()
    trainer(tmp_path, callback, max_epochs=4, max_steps=1000).fit(Lit(), DataLoader(Stream(40), 8))
    assert left(callback) == pytest.approx(0.5, abs=0.02)


def test_a_search_in_a_loader_without_length(tmp_path: Path) -> None:
    """Its epochs are what lies between two validations."""
    callback = cut(budget=AccuracyBudget("val_loss", 1.0, "min", patience=1))
    settings = {"max_epochs": -1, "max_steps": 24, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer(tmp_path, callback, **settings).fit(Lit(), DataLoader(Stream(), 8), loader())
    assert len(callback.trials) >= 2


def test_a_search_in_a_loader_without_length_that_ends(tmp_path: Path) -> None:
    """Once the first epoch is over, there is a length of epochs."""
    callback = cut(budget=AccuracyBudget("val_loss", 10.0, "min", patience=1))
    trainer(tmp_path, callback, max_epochs=-1, max_steps=40).fit(Lit(), DataLoader(Stream(40), 8), loader())
    assert len(callback.trials) >= 2


def test_a_loader_without_length_and_no_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="`limit_train_batches` or `max_steps`"):
        trainer(tmp_path, cut(), max_epochs=2).fit(Lit(), DataLoader(Stream(40), 8))


@pytest.mark.parametrize("make", [cut, masked])
def test_a_run_of_so_much_time(tmp_path: Path, make: Any) -> None:
    callback = make()
    trainer(tmp_path, callback, max_epochs=-1, max_time={"seconds": 3}).fit(Lit(), loader())
    assert left(callback) == pytest.approx(0.5, abs=0.02)


# --- cuts are steps apart ---


@pytest.mark.parametrize(
    ("epochs", "least"), [(60, 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((280, 7), (2400, 50)))]
)
def test_epochs_of_one_batch(tmp_path: Path, epochs: int, least: int) -> None:
    callback = cut(record_every_n_steps=1)
    trainer(tmp_path, callback, max_epochs=epochs, limit_train_batches=1).fit(Lit(), loader())
    between = torch.tensor(steps(callback)).diff()
    assert len(between) > 3
    assert int(between.min()) == least
    assert left(callback) <= 0.5


def test_a_search_in_epochs_of_one_batch(tmp_path: Path) -> None:
    callback = cut(budget=AccuracyBudget("val_loss", 10.0, "min", patience=1), recovery_steps=6)
    trainer(tmp_path, callback, max_epochs=30, limit_train_batches=1).fit(Lit(), loader(), loader())
    between = torch.tensor(steps(callback)).diff()
    assert len(between) >= 2
    assert int(between.min()) >= 6


def test_no_steps_between_cuts() -> None:
    with pytest.raises(ValueError, match="`recovery_steps` of at least 1, got 0"):
        cut(recovery_steps=0)


# --- fit after fit ---


@pytest.mark.parametrize(("make", "batches"), variants([cut, masked], [True, 8], every=2))
def test_a_smoke_test_leaves_nothing_behind(tmp_path: Path, make: Any, batches: Any) -> None:
    lit, callback = Lit(), make()
    trainer(tmp_path, callback, fast_dev_run=batches).fit(lit, loader(64), loader())
    assert lit.net.c1.out_channels == 8
    assert int((lit.net.c1.weight == 0).sum()) == 0
    trainer(tmp_path, callback, max_epochs=10).fit(lit, loader(), loader())
    assert left(callback) == pytest.approx(0.5, abs=0.02)
    fresh = make()
    trainer(tmp_path, fresh, max_epochs=10).fit(Lit(), loader(), loader())
    assert steps(callback) == steps(fresh)


def test_a_smoke_test_between_two_fits(tmp_path: Path) -> None:
    lit, callback = Lit(), cut(schedule=Linear(0.0, 0.6))
    trainer(tmp_path, callback, max_epochs=5, max_steps=12).fit(lit, loader())
    pruner, width = callback.pruner, lit.net.c1.out_channels
    trainer(tmp_path, callback, fast_dev_run=8).fit(lit, loader(64))
    assert lit.net.c1.out_channels == width
    trainer(tmp_path, callback, max_epochs=20).fit(lit, loader())
    assert callback.pruner is pruner
    assert left(callback) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("make", [cut, masked])
def test_a_fit_that_was_stopped_goes_on_with_a_new_trainer(tmp_path: Path, make: Any) -> None:
    lit, callback = Lit(), make()
    stop = EarlyStopping("val_loss", stopping_threshold=100.0)
    trainer(tmp_path, callback, stop, max_epochs=12).fit(lit, loader(), loader())
    before = left(callback)
    assert before > 0.5
    trainer(tmp_path, callback, max_epochs=3).fit(lit, loader(), loader())
    assert left(callback) == pytest.approx(0.5, abs=0.02)


def test_training_on_after_the_budget_was_reached_warns_of_nothing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for make in (cut, masked):
        lit, callback = Lit(), make()
        for epochs in (6, 1):
            trainer(tmp_path, callback, max_epochs=epochs).fit(lit, loader())
        assert len(set(steps(callback))) == len(steps(callback))
    assert not [warning for warning in recwarn if "not finished" in str(warning.message)]


@pytest.mark.parametrize("make", [cut, masked, lambda: cut(when="end"), lambda: masked(when="end")])
def test_the_same_trainer_trains_on(tmp_path: Path, make: Any) -> None:
    lit, callback = Lit(), make()
    fit = trainer(tmp_path, callback, max_epochs=20, limit_train_batches=4, max_steps=1)
    fit.fit(lit, loader())
    fit.fit_loop.epoch_loop.max_steps = -1
    fit.fit_loop.max_epochs = 6
    fit.fit(lit, loader())
    assert left(callback) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("epochs", "make"),
    variants([1, 3, 5], [cut, masked, lambda: cut(when="end"), lambda: masked(when="end")], every=3),
)
def test_more_epochs_after_a_resume(tmp_path: Path, make: Any, epochs: int) -> None:
    """Points of the longer run lie elsewhere than those of the shorter one."""
    saved = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, make(), saved, max_epochs=epochs, max_steps=epochs * 4 - 1).fit(Lit(), loader())
    callback = make()
    resumed = trainer(tmp_path, callback, max_epochs=epochs + 4)
    resumed.fit(Lit(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert left(callback) == pytest.approx(0.5, abs=0.02)


def test_a_search_goes_on_with_a_new_trainer(tmp_path: Path) -> None:
    lit, callback = Lit(), cut(budget=AccuracyBudget("val_loss", 10.0, "min", patience=1))
    trainer(tmp_path, callback, max_epochs=4).fit(lit, loader(), loader())
    first = len(callback.trials)
    trainer(tmp_path, callback, max_epochs=4).fit(lit, loader(), loader())
    assert len(callback.trials) > first > 0
    assert all(trial.kept for trial in callback.trials)


# --- layers that `configure_model` makes ---


class Late(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        self.net = self.net or nn.Sequential(  # type: ignore[assignment]
            nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize(
    "make",
    [cut, masked, lambda **kwargs: SparsityRegularization(GroupLasso(), 0.01, **kwargs)],
    ids=["cut", "mask", "pull"],
)
def test_names_of_layers_that_are_made_late(tmp_path: Path, make: Any) -> None:
    trainer(tmp_path, make(module="net", skip=["net.1"]), max_epochs=2).fit(Late(), loader())
    with pytest.raises(ValueError if make is masked else Exception, match="`skip` to name"):
        trainer(tmp_path, make(skip=["net.9"]), max_epochs=2).fit(Late(), loader())


def _every(make: Any, epochs: float) -> dict[str, float]:
    return (
        {"recovery_epochs": epochs, "recovery_steps": 1, "record_every_n_steps": 1}
        if make is cut
        else {"update_every": epochs}
    )


def test_steps_behind_lightnings_back_are_batches(tmp_path: Path) -> None:
    """As sharpness-aware training takes them: `trainer.global_step` stays 0."""

    class Raw(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    callback = cut()
    run = trainer(tmp_path, callback)
    run.fit(Raw(), loader())
    assert run.global_step == 0
    assert steps(callback)[:3] == [4, 8, 12]
    assert left(callback) <= 0.5
