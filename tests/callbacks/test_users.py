"""What users do to a run, and what must survive it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from lightning_slim import (
    GrangerPrune,
    GroupLasso,
    Magnitude,
    NoEffectWarning,
    OneShot,
    Prune,
    Pruner,
    SparsityRegularization,
    Taylor,
    Units,
    WeightPrune,
    load_from_checkpoint,
)
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import images, same


def half(**kwargs: Any) -> GrangerPrune:
    settings = {"schedule": OneShot(0.5), "record_every_n_steps": 2, "print_report": False}
    return GrangerPrune(Units(0.5), **{**settings, **kwargs})


@pytest.mark.parametrize("accumulate", [2, 3])
def test_taylor_with_accumulation(tmp_path: Path, accumulate: int) -> None:
    callback = Prune(Taylor(), Units(0.5), OneShot(0.5), compensate="none", print_report=False)
    trainer(tmp_path, callback, accumulate_grad_batches=accumulate).fit(Lit(), loader(64, 4))
    assert len(callback.history.events) == 1


def test_taylor_with_two_optimizers(tmp_path: Path) -> None:
    class Two(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 5))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer, network in zip(self.optimizers(), (self.net, self.other), strict=True):  # type: ignore[arg-type]
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(network(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net.parameters(), 0.01), torch.optim.Adam(self.other.parameters())], []

    callback = Prune(Taylor(), Units(0.5), OneShot(0.5), compensate="none", print_report=False)
    trainer(tmp_path, callback).fit(Two(), loader())
    assert callback.history.events[0].reached <= 0.5
    assert callback.pruner.widths["other.1"] == 5
    assert all(values.count(0.0) == 0 for values in callback.history.events[0].importance.values())


def test_one_batch_an_epoch_is_recorded_in_time(tmp_path: Path) -> None:
    callback = half(record_every_n_steps=10)
    trainer(tmp_path, callback, limit_train_batches=1).fit(Lit(), loader())
    assert len(callback.history.events) == 1


def test_a_run_that_ends_too_early_says_so(tmp_path: Path) -> None:
    stop = EarlyStopping("val_loss", patience=1, stopping_threshold=100.0)
    with pytest.warns(NoEffectWarning, match=r"100.0% remains, 50.0% was asked for.*stopped before the schedule"):
        trainer(tmp_path, half(), stop).fit(Lit(), loader(), loader())


def test_a_smoke_test_run_is_left_alone(tmp_path: Path) -> None:
    trainer(tmp_path, half(), fast_dev_run=True).fit(Lit(), loader())


def test_fine_tuning_without_the_callback_loads_again(tmp_path: Path) -> None:
    lit = Lit()
    trainer(tmp_path, half()).fit(lit, loader())
    plain = trainer(tmp_path / "tune", ModelCheckpoint(tmp_path / "tune", save_last=True), max_epochs=1)
    plain.fit(lit, loader())
    loaded = load_from_checkpoint(Lit, tmp_path / "tune" / "last.ckpt")
    assert same(loaded.state_dict(), lit.state_dict())
    assert loaded.net.c1.out_channels == 4
    more = trainer(tmp_path, half(), ModelCheckpoint(tmp_path / "more", save_top_k=-1, filename="{epoch}"))
    with pytest.warns(UserWarning, match="cut before"):
        more.fit(loaded, loader(), loader())
    again = load_from_checkpoint(Lit, tmp_path / "more" / "epoch=0.ckpt")
    assert again.net.c1.out_channels == 4
    assert load_from_checkpoint(Lit, tmp_path / "more" / "epoch=5.ckpt").net.c1.out_channels == 2


def test_checkpoint_hooks_of_the_user_that_rename_keys(tmp_path: Path) -> None:
    class Renaming(Lit):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {f"old.{key}": value for key, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {k.removeprefix("old."): v for k, v in checkpoint["state_dict"].items()}

    lit = Renaming()
    trainer(tmp_path, half(), ModelCheckpoint(tmp_path, filename="{epoch}")).fit(lit, loader())
    assert same(load_from_checkpoint(Renaming, tmp_path / "epoch=5.ckpt").state_dict(), lit.state_dict())
    other = Renaming()
    trainer(tmp_path / "b", half()).test(other, loader(), ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False)
    assert same(other.state_dict(), lit.state_dict())


def test_lazy_layers(tmp_path: Path) -> None:
    class Lazy(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(12), nn.ReLU(), nn.Linear(12, 5))  # type: ignore[assignment]

        def configure_optimizers(self) -> Any:
            self.net(torch.randn(1, 3, 8, 8))
            return torch.optim.Adam(self.parameters())

    lit = Lazy()
    trainer(tmp_path, half(), ModelCheckpoint(tmp_path, filename="{epoch}")).fit(lit, loader())
    loaded = load_from_checkpoint(Lazy, tmp_path / "epoch=5.ckpt")
    assert same(loaded.state_dict(), lit.state_dict())


def test_an_encoder_and_a_decoder_in_bfloat16(tmp_path: Path) -> None:
    class Pair(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 8))
            self.decoder = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 5))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.decoder(self.encoder(batch[0])), batch[1])

    callback = half(print_report=True)
    trainer(tmp_path, callback, precision="bf16-mixed").fit(Pair(), loader())
    assert callback.pruner.widths == {"encoder.1": 6, "encoder.3": 4, "decoder.0": 5}


def test_a_network_that_is_first_called_later(tmp_path: Path) -> None:
    class Phases(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 5))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            logits = self.net(batch[0])
            return F.cross_entropy(self.probe(logits) if self.current_epoch else logits, batch[1])

    callback = half()
    trainer(tmp_path, callback).fit(Phases(), loader())
    assert callback.pruner.widths["probe.0"] < 9


def test_a_step_that_returns_nothing_at_first(tmp_path: Path) -> None:
    class Late(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
            return None if self.current_epoch == 0 and batch_idx == 0 else super().training_step(batch, batch_idx)

    callback = half()
    trainer(tmp_path, callback).fit(Late(), loader())
    assert len(callback.history.events) == 1


def test_skipped_batches_leave_no_hook_behind(tmp_path: Path) -> None:
    class Skipping(Lit):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:  # type: ignore[override]
            return -1 if batch_idx == 2 else None

    lit = Skipping()
    trainer(tmp_path, half()).fit(lit, loader())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in lit.modules())


def test_an_interrupted_run_can_be_pickled_copied_and_fitted_again(tmp_path: Path) -> None:
    class Fails(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.current_epoch == 1:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    lit, callback = Fails(), half()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, callback).fit(lit, loader())
    lit.trainer = None  # type: ignore[assignment]
    assert same(copy.deepcopy(lit).state_dict(), lit.state_dict())
    lit.__class__ = Lit  # one that pickle can find
    assert same(pickle.loads(pickle.dumps(lit)).state_dict(), lit.state_dict())
    trainer(tmp_path, callback).fit(lit, loader())
    assert len(callback.history.events) == 1
    assert "on_load_checkpoint" not in vars(lit)


def test_a_report_that_cannot_be_made_does_not_fail_the_run(tmp_path: Path) -> None:
    class Stashing(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.last = self.net(batch[0])
            return F.cross_entropy(self.last, batch[1])

    lit = Stashing()
    with pytest.warns(UserWarning, match="report could not be made"):
        trainer(tmp_path, half(print_report=True)).fit(lit, loader(), loader())
    assert lit.net.c1.out_channels == 4


def test_a_changed_mind_about_the_budget_after_an_error(tmp_path: Path) -> None:
    lit, callback = Lit(), half()
    callback.budget = Units(0.01)
    with pytest.raises(ValueError, match="Ask for at least"):
        trainer(tmp_path, callback).fit(lit, loader())
    callback.budget = Units(0.5)
    trainer(tmp_path, callback).fit(lit, loader())
    assert len(callback.history.events) == 1


def test_validating_before_fitting_and_dict_batches(tmp_path: Path) -> None:
    class Dicts(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": F.cross_entropy(self.net(x=batch["x"]), batch["y"])}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(x=batch["x"]), batch["y"]))

    x, y = images(7, 32)
    data = torch.utils.data.DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], batch_size=8)  # type: ignore[arg-type, var-annotated]
    lit, callback = Dicts(), half()
    fit = trainer(tmp_path, callback)
    fit.validate(lit, data, verbose=False)
    fit.fit(lit, data, data)
    assert len(callback.history.events) == 1


def test_a_net_that_was_cut_moves_on_to_another_module(tmp_path: Path) -> None:
    """Its layers know that they were cut: checkpoints of the other module, beside any callback, load."""
    first = Lit()
    trainer(tmp_path, half()).fit(first, loader())
    for callback in (WeightPrune(0.3), SparsityRegularization(GroupLasso(), 1e-3)):
        second = Lit()
        second.net = copy.deepcopy(first.net)
        saved = ModelCheckpoint(tmp_path / type(callback).__name__, save_last=True)
        trainer(tmp_path, callback, saved, max_epochs=1).fit(second, loader(), loader())
        loaded = load_from_checkpoint(Lit, saved.last_model_path)
        assert same(loaded.state_dict(), second.state_dict())
        assert loaded.net.c1.out_channels == 4


def test_a_net_that_a_pruner_cut_without_a_trainer(tmp_path: Path) -> None:
    lit = Lit()
    pruner = Pruner(lit.net, Magnitude(), Units(0.5), OneShot(0.0), compensate="none")
    pruner.prepare(next(iter(loader()))[0])
    pruner.step(0.0)
    saved = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, WeightPrune(0.3), saved, max_epochs=1).fit(lit, loader(), loader())
    assert same(load_from_checkpoint(Lit, saved.last_model_path).state_dict(), lit.state_dict())
