"""Pruning after training: a phase of fine-tuning at a lower rate, of which schedulers and checkpoints know nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_slim import Linear, Magnitude, NoEffectWarning, OneShot, Prune, Taylor, Units, WeightPrune
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import same, same_optimizer_state


def cut(**kwargs: Any) -> Prune:
    settings: dict[str, Any] = {"budget": Units(0.5), "when": "end", "finetune": 0.5, "print_report": False}
    return Prune(Taylor(), **{**settings, "schedule": OneShot(0.0), "record_every_n_steps": 2, **kwargs})


def masked(**kwargs: Any) -> WeightPrune:
    settings: dict[str, Any] = {"sparsity": 0.75, "when": "end", "finetune": 0.5, "update_every": 0.5}
    return WeightPrune(**{**settings, "schedule": Linear(0.0, 2 / 3), **kwargs})


class Plain(Lit):
    """Stochastic gradient descent: the rate of each step can be read off it. No scheduler."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OneCycle(Lit):
    """A scheduler with a rate at most, and two groups of parameters."""

    def configure_optimizers(self) -> Any:
        head = [*self.net.fc2.parameters()]
        others = [p for p in self.parameters() if all(p is not q for q in head)]
        optimizer = torch.optim.SGD([{"params": others}, {"params": head}], lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.2, 0.4], total_steps=24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rates(pl.Callback):
    """The rate of every group: within each step, and when each batch ends."""

    def __init__(self) -> None:
        self.within: list[list[float]] = []
        self.between: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.within.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.between.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def rates(folder: Path, lit: Lit, *callbacks: pl.Callback, **kwargs: Any) -> Rates:
    seen = Rates()
    trainer(folder, *callbacks, seen, **kwargs).fit(lit, loader())
    return seen


@pytest.mark.parametrize("make", [cut, masked])
@pytest.mark.parametrize("finetune", [0.5, "3 epochs", "12 steps"])
def test_the_rate_is_constant_from_the_phase_on(tmp_path: Path, make: Any, finetune: float | str) -> None:
    """Six epochs of four steps: the last twelve are taken at a tenth of 0.1."""
    seen = rates(tmp_path, Plain(), make(finetune=finetune))
    assert [lr for (lr,) in seen.within] == pytest.approx([0.1] * 12 + [0.01] * 12)
    assert seen.between == [[0.1]] * 24


def test_schedulers_go_on_as_if_nothing_was(tmp_path: Path) -> None:
    """The base is the scheduler's `max_lr`; a cosine's, the rate that it started from."""
    plain, seen = rates(tmp_path, OneCycle()), rates(tmp_path, OneCycle(), cut(finetune_lr=0.25))
    assert seen.between == plain.between
    assert seen.within[:12] == plain.within[:12]
    assert seen.within[12:] == [[0.05, 0.1]] * 12
    plain, seen = rates(tmp_path, Lit()), rates(tmp_path, Lit(), masked())
    assert seen.between == plain.between
    assert [lr for (lr,) in seen.within[12:]] == pytest.approx([1e-3] * 12)


def test_a_step_is_that_of_the_lower_rate(tmp_path: Path) -> None:
    """One step of SGD changes a weight by the rate times its gradient."""

    class Step(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.expected = pl_module.net.fc2.bias.detach() - 0.01 * pl_module.net.fc2.bias.grad

    lit, step = Plain(), Step()
    trainer(tmp_path, cut(), step).fit(lit, loader())
    torch.testing.assert_close(lit.net.fc2.bias.detach(), step.expected)


def test_one_shot_goes_when_the_phase_begins_and_a_schedule_is_squeezed_into_it(tmp_path: Path) -> None:
    callback = cut()
    trainer(tmp_path, callback).fit(Lit(), loader())
    assert [(event.step, event.progress) for event in callback.history.events] == [(12, 0.5)]
    assert callback.pruner.widths == {"net.c1": 4, "net.c2": 3, "net.up": 8, "net.fc1": 10}
    callback = cut(schedule=Linear(0.0, 2 / 3), recovery_epochs=0.5, recovery_steps=2)
    trainer(tmp_path, callback).fit(Lit(), loader())
    assert [event.step for event in callback.history.events] == [14, 16, 18, 20]  # four steps of recovery are left
    assert [event.asked for event in callback.history.events] == pytest.approx([1 - k / 8 for k in (1, 2, 3, 4)])


def test_masks_reach_what_is_asked_for_in_the_phase(tmp_path: Path) -> None:
    lit, callback = Lit(), masked()
    trainer(tmp_path, callback).fit(lit, loader())
    assert [event.step for event in callback.events] == [14, 16, 18, 20]
    for name, mask in callback.masker.masks.items():
        assert int((lit.get_parameter(name) == 0).sum()) == round(0.75 * mask.numel())


def test_a_phase_may_begin_within_an_epoch(tmp_path: Path) -> None:
    callback = cut(finetune="10 steps")
    seen = rates(tmp_path, Plain(), callback)
    assert [event.step for event in callback.history.events] == [14]
    assert [lr for (lr,) in seen.within] == pytest.approx([0.1] * 14 + [0.01] * 10)


@pytest.mark.parametrize("lit", [OneCycle, *(pytest.param(lit, marks=pytest.mark.slow) for lit in (Lit, Plain))])
@pytest.mark.parametrize("make", [cut, masked])
def test_stop_after_any_epoch_and_resume_bitwise(tmp_path: Path, make: Any, lit: type[Lit]) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Lit, Any]:
        module = lit()
        every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fit = trainer(folder, make(), every)
        fit.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return module, fit

    straight, trained = run(tmp_path)
    for epoch in (1, 2, 4):  # before the phase, right before it, and in it
        checkpoint = tmp_path / f"epoch={epoch}.ckpt"
        for group in torch.load(checkpoint)["optimizer_states"][0]["param_groups"]:
            assert not any("fine" in key for key in group)
        resumed, fit = run(tmp_path / f"{epoch}", checkpoint)
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())


def test_a_rate_that_the_module_changes_itself_is_remembered_as_it_was(tmp_path: Path) -> None:
    """Without a scheduler, the base is the rate of the run's beginning, also after a resume."""

    class Decays(Plain):
        def on_train_epoch_end(self) -> None:
            self.optimizers().param_groups[0]["lr"] *= 0.5  # type: ignore[union-attr]

    seen = rates(tmp_path, Decays(), masked(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    assert [lr for (lr,) in seen.within[12:]] == pytest.approx([0.01] * 12)
    again = Rates()
    fit = trainer(tmp_path / "again", masked(), again)
    fit.fit(Decays(), loader(), ckpt_path=tmp_path / "epoch=3.ckpt")
    assert again.within == seen.within[16:]


@pytest.mark.parametrize("make", [cut, masked])
def test_manual_optimisation_with_two_optimizers(tmp_path: Path, make: Any) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.rates: list[tuple[float, float]] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                before = optimizer.param_groups[0]["params"][0].detach().clone()
                optimizer.step()
                now = optimizer.param_groups[0]["params"][0]
                moved = ((before - now.detach()) / now.grad).flatten()
                self.rates.append((optimizer.param_groups[0]["lr"], float(moved[now.grad.abs().flatten().argmax()])))

        def configure_optimizers(self) -> Any:
            head = [*self.net.fc2.parameters()]
            others = [p for p in self.parameters() if all(p is not q for q in head)]
            return torch.optim.SGD(others, 0.1), torch.optim.SGD(head, 0.2)

    lit = Manual()
    trainer(tmp_path, make()).fit(lit, loader())
    assert lit.rates[::2] == [(0.1, pytest.approx(0.1 if step < 12 else 0.01, rel=1e-2)) for step in range(24)]
    assert lit.rates[1::2] == [(0.2, pytest.approx(0.2 if step < 12 else 0.02, rel=1e-2)) for step in range(24)]


def test_both_callbacks_end_a_run_together(tmp_path: Path) -> None:
    for pair in ([cut(), masked()], [masked(), cut()]):
        seen = rates(tmp_path, Plain(), *pair)
        assert [lr for (lr,) in seen.within] == pytest.approx([0.1] * 12 + [0.01] * 12)
        assert seen.between == [[0.1]] * 24


def test_the_rate_is_logged_in_the_phase_and_monitors_see_the_schedulers(tmp_path: Path) -> None:
    callback, logger = cut(), CSVLogger(tmp_path)
    fit = trainer(tmp_path, callback, LearningRateMonitor("epoch"), logger=logger)
    fit.fit(Lit(), loader())
    assert float(fit.callback_metrics["slim/finetune_lr"]) == pytest.approx(1e-3)
    lines = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]
    column = lines[0].index("slim/finetune_lr")
    assert sum(line[column] != "" for line in lines[1:]) == 3
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], 1e-2), 6)
    monitored = [float(line[lines[0].index("lr-AdamW")]) for line in lines[1:] if line[lines[0].index("lr-AdamW")]]
    for lr in monitored:
        assert lr == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
        cosine.optimizer.step()
        cosine.step()
    assert len(monitored) == 6


def test_an_error_within_a_step_puts_the_rate_back(tmp_path: Path) -> None:
    class Breaks(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step == 20:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    fit = trainer(tmp_path, masked())
    with pytest.raises(RuntimeError, match="broken"):
        fit.fit(Breaks(), loader())
    (group,) = fit.optimizers[0].param_groups
    assert group["lr"] == 0.1
    assert not any("fine" in key for key in group)


@pytest.mark.parametrize("make", [cut, masked])
@pytest.mark.parametrize("finetune", [0.5, "3 epochs"])
def test_fast_dev_run(tmp_path: Path, make: Any, finetune: float | str) -> None:
    trainer(tmp_path, make(finetune=finetune), fast_dev_run=True, max_epochs=None).fit(Lit(), loader(), loader())


def test_a_run_that_stops_before_the_phase_says_so(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(NoEffectWarning, match="Pruning is not finished"):
        trainer(tmp_path, cut(), Stop()).fit(Lit(), loader(), loader())
    with pytest.warns(NoEffectWarning, match="Masking is not finished"):
        trainer(tmp_path, masked(), Stop()).fit(Lit(), loader(), loader())


# --- refused ---


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"finetune": 0.0}, r"Expected `finetune` to be a fraction of the run in \(0, 1\], epochs or steps, got 0.0"),
        ({"finetune": 1.5}, r"fraction of the run in \(0, 1\]"),
        ({"finetune": "3 hours"}, "got '3 hours'"),
        ({"finetune_lr": 0.0}, "Expected `finetune_lr` above 0"),
    ],
)
@pytest.mark.parametrize("make", [cut, masked])
def test_bad_arguments(make: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_a_phase_longer_than_the_run(tmp_path: Path) -> None:
    message = "Expected `finetune` within a run of 6 epochs of 4 steps, got 7 epochs"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, cut(finetune="7 epochs")).fit(Lit(), loader())


def test_a_schedule_that_leaves_no_recovery(tmp_path: Path) -> None:
    message = r"ends by 0\.67 of the fine-tuning, the last point at which units can be removed \(3 epochs, 1 apart\)"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, Prune(Magnitude(), when="end", finetune=0.5, schedule=OneShot(0.9))).fit(Lit(), loader())
