"""Stopping and resuming changes nothing, wherever it happens; checkpoints of any width load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slim import (
    Ablation,
    Combined,
    Fisher,
    Granger,
    GrangerPrune,
    Linear,
    Magnitude,
    OneShot,
    Prune,
    Random,
    RandomGates,
    Screening,
    Taylor,
    Units,
    load_from_checkpoint,
)
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import images, same, same_optimizer_state


def prune(kind: str) -> Prune:
    """Cuts at the start of epochs 2 and 4."""
    kwargs: dict[str, Any] = {
        "budget": Units(0.5),
        "schedule": Linear(start=0.0, end=4 / 6),
        "recovery_epochs": 2,
        "record_every_n_steps": 3,
        "print_report": False,
    }
    if kind == "granger":
        return GrangerPrune(lags=0, **kwargs)
    everything = Combined([Screening(), RandomGates(), Ablation(), Granger(0, "losses"), Granger(0, "outputs")])
    scores = {
        "magnitude": Magnitude(),
        "taylor": Taylor(),
        "fisher": Fisher(),
        "random": Random(),
        "evidence": everything,
    }
    return Prune(scores[kind], **kwargs)


def run(folder: Path, kind: str, ckpt_path: Path | None = None, **kwargs: Any) -> tuple[Lit, Any, Prune]:
    every_epoch = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **kwargs)
    lit, callback = Lit(), prune(kind)
    fit = trainer(folder, callback, every_epoch)
    fit.fit(lit, loader(), loader(), ckpt_path=ckpt_path)
    return lit, fit, callback


@pytest.mark.parametrize(
    "kind",
    ["granger", "taylor", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("magnitude", "fisher", "random"))],
)
def test_stop_after_any_epoch_and_resume_into_a_fresh_dense_model(tmp_path: Path, kind: str) -> None:
    straight, trained, callback = run(tmp_path / "straight", kind)
    assert [event.step for event in callback.history.events] == [8, 16]  # four batches an epoch
    assert straight.net.c1.weight.shape[0] == 4
    for epoch in range(5):
        checkpoint = tmp_path / "straight" / f"epoch={epoch}.ckpt"
        resumed, fit, again = run(tmp_path / f"resumed{epoch}", kind, checkpoint)
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
        assert again.history.to_json() == callback.history.to_json()


def test_the_checkpoint_needs_no_pickle(tmp_path: Path) -> None:
    run(tmp_path, "granger")
    checkpoint = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    assert checkpoint["lightning_slim"]["version"] == 1
    assert "net.c1.weight" in checkpoint["lightning_slim"]["tensors"]
    assert "net.fc2.bias" not in checkpoint["lightning_slim"]["tensors"]


def test_a_best_model_from_before_and_from_after_a_cut_is_tested(tmp_path: Path) -> None:
    lit, fit, _ = run(tmp_path, "magnitude", monitor="val_loss")
    slim = fit.test(lit, loader(), ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False)
    dense = fit.test(lit, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert lit.net.c1.weight.shape[0] == lit.net.c1.out_channels == 8  # grown back
    fresh = Lit()
    alone = trainer(tmp_path / "alone").test(fresh, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert dense == alone
    assert slim == fit.test(lit, loader(), ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False)
    assert lit.net.c1.weight.shape[0] == 4
    assert fit.test(lit, loader(), ckpt_path="best", verbose=False)


def test_a_fresh_model_with_the_callback_tests_a_slim_checkpoint(tmp_path: Path) -> None:
    lit, fit, _ = run(tmp_path, "magnitude")
    expected = fit.test(lit, loader(), verbose=False)
    other = trainer(tmp_path / "other", prune("magnitude"))
    assert expected == other.test(Lit(), loader(), ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False)


def test_load_from_checkpoint_needs_no_callback(tmp_path: Path) -> None:
    lit, _, _ = run(tmp_path, "magnitude")
    loaded = load_from_checkpoint(Lit, tmp_path / "epoch=5.ckpt", weights_only=True)
    assert type(loaded) is Lit
    assert same(loaded.state_dict(), lit.state_dict())
    x = images(1)[0]
    assert torch.equal(loaded.eval().net(x), lit.eval().net(x))
    dense = load_from_checkpoint(Lit, tmp_path / "epoch=0.ckpt")
    assert dense.net.c1.out_channels == 8


def test_weights_only_checkpoints_load_too(tmp_path: Path) -> None:
    lit, _, _ = run(tmp_path, "magnitude", save_weights_only=True)
    assert same(load_from_checkpoint(Lit, tmp_path / "epoch=5.ckpt").state_dict(), lit.state_dict())


def test_a_checkpoint_of_another_architecture_fails_as_it_always_did(tmp_path: Path) -> None:
    run(tmp_path, "magnitude")
    other = trainer(tmp_path / "other", prune("magnitude"))
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.c1\.weight"):
        other.test(Lit(width=6), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)


def test_the_schedule_catches_up_where_lightning_skips_the_start_of_an_epoch(tmp_path: Path) -> None:
    """A resume from a checkpoint of an epoch's last batch does not run `on_train_epoch_start`."""
    by_steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    straight, callback = Lit(), prune("magnitude")
    trainer(tmp_path, callback, by_steps).fit(straight, loader())
    resumed, again = Lit(), prune("magnitude")
    trainer(tmp_path / "b", again).fit(resumed, loader(), ckpt_path=tmp_path / "step=8.ckpt")
    assert (
        [event.step for event in again.history.events] == [event.step for event in callback.history.events] == [8, 16]
    )
    assert same(straight.state_dict(), resumed.state_dict())


def test_training_on_in_the_same_process_does_not_compound(tmp_path: Path) -> None:
    lit, callback = Lit(), prune("magnitude")
    fit = trainer(tmp_path, callback)
    fit.fit(lit, loader())
    fit.fit_loop.max_epochs = 8
    fit.fit(lit, loader())
    assert fit.current_epoch == 8
    assert callback.pruner.widths == {"net.c1": 4, "net.c2": 3, "net.up": 8, "net.fc1": 10}
    assert len(callback.history.events) == 2


def test_a_new_model_starts_afresh(tmp_path: Path) -> None:
    callback = prune("magnitude")
    for _ in range(2):
        lit = Lit()
        trainer(tmp_path, callback).fit(lit, loader())
        assert len(callback.history.events) == 2
        assert lit.net.c1.out_channels == 4


def test_one_shot_at_the_very_start_waits_for_evidence(tmp_path: Path) -> None:
    lit = Lit()
    callback = GrangerPrune(Units(0.5), OneShot(0.0), record_every_n_steps=1, print_report=False)
    trainer(tmp_path, callback, max_epochs=1).fit(lit, loader())
    (event,) = callback.history.events
    assert event.step == 2  # batch 0 is traced, batch 1 recorded
