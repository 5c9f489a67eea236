"""What a user sees of a run: logs, report, both import names; and what is refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from lightning_slim import (
    L1,
    Cubic,
    GrangerPrune,
    InputScreening,
    Linear,
    MACs,
    Magnitude,
    NoEffectWarning,
    OneShot,
    Prune,
    SparsityRegularization,
    Units,
    WeightPrune,
)
from lightning_slim.callbacks.base import SHARDED, refuse_what_cannot_be_cut
from lightning_slim.profile import count_macs
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import Mixed, images


def quick(**kwargs: Any) -> GrangerPrune:
    settings = {"budget": MACs(0.5), "schedule": Linear(0.0, 0.5), "record_every_n_steps": 2, "print_report": False}
    return GrangerPrune(**{**settings, **kwargs})


def test_scalars_reach_tensorboard_at_every_cut_and_epoch(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lit, callback = Lit(), quick()
    trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path)).fit(lit, loader())
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"slim/params", "slim/macs", "slim/asked", "slim/reached", "slim/units/net.c1"} <= tags
    macs = [scalar.value for scalar in board.Scalars("slim/macs")]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] == sum(count_macs(lit.net, (images(0, 1)[0],)).values())
    assert [s.value for s in board.Scalars("slim/macs_left")][-1] <= 0.5
    assert len(macs) == len(callback.history.events) + 6  # every cut and every epoch


@pytest.mark.parametrize("at", ["2 epochs", "8 steps", 2 / 6])
def test_times_in_epochs_and_steps(tmp_path: Path, at: float | str) -> None:
    callback = quick(schedule=OneShot(at))
    trainer(tmp_path, callback).fit(Lit(), loader())  # 6 epochs of 4 steps
    assert [event.step for event in callback.history.events] == [8]


def test_a_time_after_the_run_is_refused(tmp_path: Path) -> None:
    message = "Expected times within a run of 6 epochs of 4 steps"
    fit_fails(tmp_path, quick(schedule=OneShot("25 steps")), message, error=MisconfigurationException)


def test_any_logger_will_do(tmp_path: Path) -> None:
    fit = trainer(tmp_path, quick(), logger=CSVLogger(tmp_path))
    fit.fit(Lit(), loader())
    assert "slim/units/net.fc1" in (Path(fit.log_dir) / "metrics.csv").read_text()  # type: ignore[arg-type]


def test_the_progress_bar_shows_what_is_left(tmp_path: Path) -> None:
    fit = trainer(tmp_path, quick())
    fit.fit(Lit(), loader())
    assert fit.progress_bar_metrics["slim/macs_left"] <= 0.5
    assert fit.progress_bar_metrics["slim/params_left"] < 1


def test_the_report_is_printed_and_saved_when_the_fit_ends(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lit = Lit()
    fit = trainer(tmp_path, quick(print_report=True), logger=CSVLogger(tmp_path))
    fit.fit(lit, loader(), loader())
    assert "CPU latency" in capsys.readouterr().out
    saved = json.loads((Path(fit.log_dir) / "report.json").read_text())  # type: ignore[arg-type]
    assert saved["slim"].keys() == saved["dense"].keys() == {"params", "macs", "bytes", "latency_ms", "metrics"}
    dense = Mixed()
    assert saved["dense"]["params"] == sum(p.numel() for p in dense.parameters())
    assert saved["slim"]["params"] == sum(p.numel() for p in lit.parameters())
    assert saved["dense"]["macs"] == sum(count_macs(dense, (images(0, 1)[0],)).values())
    assert saved["slim"]["macs"] <= 0.5 * saved["dense"]["macs"]
    assert saved["slim"]["metrics"]["val_loss"] == pytest.approx(float(fit.callback_metrics["val_loss"]))
    assert saved["slim"]["bytes"] < saved["dense"]["bytes"]
    assert "| MACs |" in (Path(fit.log_dir) / "report.md").read_text()  # type: ignore[arg-type]
    assert lit.net.c1.out_channels < 8  # the dense twin was made of a copy


class SelfCalling(Lit):
    """Calls `self(x)`, as many modules do, in several pieces."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_module_that_calls_itself(tmp_path: Path) -> None:
    lit, callback = SelfCalling(), quick()
    trainer(tmp_path, callback).fit(lit, loader())
    assert set(callback.pruner.calls) == {""}
    assert callback.pruner.calls[""].args[0].shape == (2, 3, 8, 8)
    assert callback.pruner.calls[""].samples == 2
    assert set(callback.pruner.widths) == {"net.c1", "net.c2", "net.up", "net.fc1"}
    assert callback.history.events[-1].reached <= 0.5


class TorchLightning(pytorch_lightning.LightningModule):
    """A module of the other import name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Mixed()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_pytorch_lightning_is_served_as_well(tmp_path: Path) -> None:
    from lightning_slim import load_from_checkpoint

    lit, callback = TorchLightning(), quick(schedule=Linear(0.0, 0.3))
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path)
    fit = pytorch_lightning.Trainer(max_epochs=6, callbacks=[callback, checkpoints], logger=logger, **settings)
    fit.fit(lit, loader())
    assert callback.history.events[-1].reached <= 0.5
    resumed, again = TorchLightning(), quick(schedule=Linear(0.0, 0.3))
    settings["enable_checkpointing"] = False
    fit = pytorch_lightning.Trainer(max_epochs=6, callbacks=[again], logger=False, **settings)
    fit.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(lit.parameters(), resumed.parameters(), strict=True))
    assert load_from_checkpoint(TorchLightning, tmp_path / "epoch=5.ckpt").net.c1.out_channels < 8


def test_fractions_of_an_epoch_between_cuts(tmp_path: Path) -> None:
    callback = quick(recovery_epochs=0.25, budget=Units(0.5), record_every_n_steps=1)
    trainer(tmp_path, callback, max_epochs=2).fit(Lit(), loader(64, 4))
    assert [event.step % 4 for event in callback.history.events] == [0] * len(callback.history.events)
    assert len(callback.history.events) == 4
    assert callback.history.events[-1].progress == pytest.approx(0.5)


def test_runs_given_in_steps(tmp_path: Path) -> None:
    callback = quick(budget=Units(0.5))
    trainer(tmp_path, callback, max_epochs=-1, max_steps=24).fit(Lit(), loader())
    assert callback.history.events[-1].progress == pytest.approx(0.5)
    assert callback.history.events[-1].reached <= 0.5


# --- refused before training ---


def fit_fails(
    folder: Path, callback: Prune, message: str, lit: Any = None, error: type = ValueError, **kwargs: Any
) -> None:
    lit = lit or Lit()
    shapes = [p.shape for p in lit.parameters()]
    with pytest.raises(error, match=message):
        trainer(folder, callback, **kwargs).fit(lit, loader())
    assert [p.shape for p in lit.parameters()] == shapes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in lit.modules())


def test_an_unknown_layer_in_skip(tmp_path: Path) -> None:
    fit_fails(tmp_path, quick(skip=["net.c9"]), "got 'net.c9': its layers are net, net.c1")


def test_a_schedule_that_ends_after_the_last_cut(tmp_path: Path) -> None:
    fit_fails(tmp_path, quick(schedule=Cubic(0.5, 1.0)), "ends by 0.83 of the run", error=MisconfigurationException)


def test_an_endless_run(tmp_path: Path) -> None:
    fit_fails(tmp_path, quick(), "a run with an end", error=MisconfigurationException, max_epochs=-1)


def test_a_model_with_nothing_to_prune(tmp_path: Path) -> None:
    class Alone(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))  # type: ignore[assignment]

    fit_fails(tmp_path, quick(), "Nothing can be removed from Alone", Alone())


def test_a_budget_out_of_reach(tmp_path: Path) -> None:
    fit_fails(tmp_path, quick(budget=MACs(0.01)), "Ask for at least")


def test_more_lags_than_steps(tmp_path: Path) -> None:
    class Series(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(  # type: ignore[assignment]
                nn.Flatten(2), nn.Conv1d(3, 8, 61), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(16, 5)
            )

    with pytest.warns(NoEffectWarning, match="series of more than 4 time steps for lags=4, got none: no past"):
        trainer(tmp_path, quick(lags=4, record_every_n_steps=1)).fit(Series(), loader(), loader())


def test_a_scripted_network_has_nothing_to_remove(tmp_path: Path) -> None:
    lit = Lit()
    with pytest.warns(DeprecationWarning, match="script"):
        lit.net = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.Linear(9, 5)))  # type: ignore[assignment]
    fit_fails(tmp_path, quick(), "calls modules with parameters, got none in Lit: .* or by scripted modules", lit)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.zeros(2, 12))])
def test_what_lies_around_a_scripted_part_is_cut(tmp_path: Path, make: Any) -> None:
    lit = Lit()
    scripted = make(nn.Sequential(nn.Linear(12, 12), nn.ReLU()))
    lit.net = nn.Sequential(  # type: ignore[assignment]
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
        scripted,
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )
    prune = quick()
    trainer(tmp_path, prune).fit(lit, loader(), loader())
    assert prune.pruner.widths.keys() == {"net.1", "net.5"}
    assert prune.history.events[-1].reached <= 0.5
    assert "net.4.0 is scripted" in prune.pruner.left_whole["net.3"]


@pytest.mark.parametrize("name", sorted(SHARDED))
def test_sharded_strategies(name: str) -> None:
    fake = Mock(strategy=type(name, (), {})(), world_size=2)
    with pytest.raises(MisconfigurationException, match=f"got {name}: its shards cannot be cut"):
        refuse_what_cannot_be_cut(fake, Lit())


def test_several_processes_that_cannot_agree() -> None:
    with pytest.raises(MisconfigurationException, match="got object: ranks would cut differently"):
        refuse_what_cannot_be_cut(Mock(strategy=object(), world_size=2), Lit())


def test_spawned_and_forked_processes() -> None:
    launcher = type("_MultiProcessingLauncher", (), {})()
    with pytest.raises(MisconfigurationException, match="with a spawn or fork launcher"):
        refuse_what_cannot_be_cut(Mock(strategy=Mock(launcher=launcher), world_size=2), Lit())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_a_spawning_run_fails_before_it_trains(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(Exception, match="with a spawn or fork"):  # whatever torch makes of it
        trainer(tmp_path, quick(), strategy=strategy, devices=2).fit(Lit(), loader())


@pytest.mark.parametrize(
    ("several", "message"),
    [
        ((Prune(Magnitude()), GrangerPrune()), "one Prune callback in a Trainer, got Prune and GrangerPrune"),
        ((GrangerPrune(), GrangerPrune()), "one Prune callback in a Trainer, got GrangerPrune and GrangerPrune"),
        ((WeightPrune(), WeightPrune()), "one WeightPrune callback"),
        ((SparsityRegularization(L1(), 0.1), SparsityRegularization(L1(), 0.2)), "one SparsityRegularization callback"),
        ((InputScreening(), InputScreening()), "one InputScreening callback"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_two_callbacks_of_one_kind_are_refused_before_training(
    tmp_path: Path, several: tuple[pl.Callback, ...], message: str
) -> None:
    lit = Lit()
    before = {name: value.clone() for name, value in lit.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=f"^Expected {message}"):
        trainer(tmp_path, *several).fit(lit, loader())
    assert all(torch.equal(before[name], value) for name, value in lit.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"recovery_epochs": 0}, "recovery_epochs"),
        ({"record_every_n_steps": 0}, "record_every_n_steps"),
        ({"scope": "everywhere"}, "scope"),
        ({"round_to": 0}, "round_to"),
        ({"lags": -1}, "lags"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrangerPrune(**kwargs)


def test_early_best_model_and_pruning_together(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    fit = trainer(tmp_path, quick(), best)
    fit.fit(Lit(), loader(), loader())
    assert isinstance(fit, pl.Trainer)
    assert fit.test(dataloaders=loader(), ckpt_path="best", verbose=False)
