"""What else holds the model follows a cut: averages, compiled graphs, monitors, callbacks of others."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_slim import GrangerPrune, Linear, Magnitude, OneShot, Prune, Units
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.test_resume import prune
from tests.networks import images, same

AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1),
    "WeightAveraging": lambda: WeightAveraging(),
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("ours_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_averages_are_cut_in_step_and_resume_bitwise(tmp_path: Path, name: str, ours_first: bool) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> Lit:
        pair = [prune("granger"), AVERAGES[name]()]
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        lit = Lit()
        fit = trainer(folder, *(pair if ours_first else pair[::-1]), checkpoints)
        fit.fit(lit, loader(), loader(), ckpt_path=ckpt_path)
        assert lit.net.c1.out_channels == 4
        return lit

    straight = run(tmp_path / "straight")
    for epoch in (1, 2, 3):
        resumed = run(tmp_path / f"resumed{epoch}", tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch


def test_an_average_stays_the_average_of_the_units_that_stay(tmp_path: Path) -> None:
    """Without compensation, cutting the average is averaging the cut."""
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            average = trainer.callbacks[0]._average_model.module
            seen.setdefault("before", []).append(average.net.c1.bias.detach().clone())

        def on_structure_change(self, change: Any) -> None:
            seen["keep"] = change.plan["net.c1"]
            seen["at"] = len(seen["before"])

    callback = Prune(Magnitude(), Units(0.5), OneShot(0.5), compensate="none", print_report=False)
    trainer(tmp_path, EMAWeightAveraging(decay=0.9), callback, Look()).fit(Lit(), loader())
    before, after = seen["before"][seen["at"] - 1], seen["before"][seen["at"]]
    assert before.shape == (8,)
    assert after.shape == (4,)
    # The hook runs before Look's own batch start: the first entry of the new shape is the cut average itself.
    moved = (after - before[seen["keep"]]).abs().max()
    assert moved < 0.02


def test_other_callbacks_hear_of_a_cut_and_can_repeat_it(tmp_path: Path) -> None:
    class Teacher(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.copy = Lit()

        def on_structure_change(self, change: Any) -> None:
            change.apply(self.copy)

    teacher, lit = Teacher(), Lit()
    trainer(tmp_path, prune("magnitude"), teacher).fit(lit, loader())
    assert [p.shape for p in teacher.copy.parameters()] == [p.shape for p in lit.parameters()]
    assert teacher.copy.net(images(0)[0]).shape == (16, 5)


@pytest.mark.parametrize(
    "form",
    ["the module", *(pytest.param(form, marks=pytest.mark.slow) for form in ("a submodule", "in place"))],
)
def test_compiled_runs_are_cut_and_equal_eager_ones(tmp_path: Path, form: str) -> None:
    def run(compiled: bool) -> tuple[dict[str, torch.Tensor], Prune]:
        lit: Any = Lit()
        if compiled and form == "a submodule":
            lit.net = torch.compile(lit.net, backend="eager")
        if compiled and form == "in place":
            lit.net.compile(backend="eager")
        callback = GrangerPrune(Units(0.5), Linear(0.0, 4 / 6), record_every_n_steps=3, print_report=True)
        whole = torch.compile(lit, backend="eager") if compiled and form == "the module" else lit
        trainer(tmp_path, callback).fit(whole, loader())
        return {name.replace("_orig_mod.", ""): value for name, value in lit.state_dict().items()}, callback

    eager, _ = run(compiled=False)
    compiled, callback = run(compiled=True)
    assert len(callback.history.events) == 4
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)


def test_monitors_begin_anew_after_a_cut(tmp_path: Path) -> None:
    class Worse(Lit):
        """A validation loss that jumps up at the cut, and never comes back to where it was."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            epoch = self.current_epoch
            self.log("val_loss", torch.tensor(1.0 - 0.1 * epoch if epoch < 3 else 5.0 - 0.1 * epoch))

    def run(folder: str, reset: bool) -> tuple[pl.Trainer, ModelCheckpoint]:
        best = ModelCheckpoint(tmp_path / folder, monitor="val_loss", filename="{epoch}")
        stop = EarlyStopping("val_loss", patience=2)
        callback = Prune(Magnitude(), Units(0.5), OneShot(0.5), reset_monitors=reset, print_report=False)
        fit = trainer(tmp_path, callback, best, stop)
        fit.fit(Worse(), loader(), loader())
        return fit, best

    fit, best = run("reset", reset=True)
    assert fit.current_epoch == 6
    assert best.best_model_path.endswith("epoch=5.ckpt")
    assert (tmp_path / "reset" / "epoch=2.ckpt").exists()
    fit, best = run("kept", reset=False)
    assert fit.current_epoch == 5  # stopped by the jump
    assert best.best_model_path.endswith("epoch=2.ckpt")


def test_only_a_submodule(tmp_path: Path) -> None:
    class Two(Lit):
        def __init__(self) -> None:
            super().__init__()
            backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 10))
            head = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5))
            self.net = nn.Sequential(OrderedDict(backbone=backbone, head=head))  # type: ignore[assignment]

    settings = {"schedule": OneShot(0.5), "compensate": "none", "print_report": False}
    callback = Prune(Magnitude(), Units(0.5), module="net.backbone", **settings)  # type: ignore[arg-type]
    trainer(tmp_path, callback, max_epochs=2).fit(Two(), loader())
    assert callback.pruner.widths == {"net.backbone.1": 6}
    assert any("reaches beyond net.backbone" in reason for reason in callback.pruner.left_whole.values())
    with pytest.raises(ValueError, match="got 'spine'"):
        trainer(tmp_path, Prune(Magnitude(), module="spine")).fit(Two(), loader())


def test_swa_measures_batch_norms_after_a_cut_in_the_last_epoch(tmp_path: Path) -> None:
    """In an epoch of its own: ours must be over by then, or a wrong momentum is remembered."""
    prune = Prune(Magnitude(), Units(0.5), OneShot("3 epochs"), print_report=False)
    swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1)
    lit = Lit()
    trainer(tmp_path, prune, swa, max_epochs=4).fit(lit, loader())
    assert [event.step for event in prune.history.events] == [12]
    assert lit.net.b1.momentum == Lit().net.b1.momentum
    assert int(lit.net.b1.num_batches_tracked) == 4
