"""As much goes as a metric allows: steps that cost too much are rolled back to the bit, and the run goes on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from lightning_slim import (
    AccuracyBudget,
    GrangerPrune,
    GroupLasso,
    Linear,
    Magnitude,
    NoEffectWarning,
    OneShot,
    Prune,
    SparsityRegularization,
    Taylor,
    Units,
    WeightPrune,
)
from lightning_slim.cli import main
from lightning_slim.surgery import dropped
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.test_depth import Deep
from tests.networks import same, same_optimizer_state

ROOT = Path(__file__).parents[2]


class Told(Lit):
    """Logs a metric whose values are given, epoch by epoch."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("told", self.values[self.current_epoch])


class ToldDeep(Told, Deep):
    """The same, of residual blocks."""


class WriteDown(pl.Callback):
    """All that a run consists of, at the start of every epoch, after the callbacks before this one."""

    def __init__(self, of: Prune) -> None:
        self.of = of
        self.states: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            others = [c for c in trainer.callbacks if isinstance(c, WeightPrune | SparsityRegularization)]
            averages = [c._average_model for c in trainer.callbacks if hasattr(c, "_average_model")]
            state = {
                "weights": pl_module.state_dict(),
                "averages": [average.state_dict() for average in averages],
                "optimizer": trainer.optimizers[0].state_dict(),
                "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "pruner": self.of.pruner.state_dict(),
                "others": [callback.state_dict() for callback in others],
            }
            self.states.append(copy.deepcopy(state))


def put_back(state: dict[str, Any]) -> dict[str, Any]:
    """All of it but the clock: schedulers and the rates that they write go on."""
    groups = [{key: g[key] for key in g if key != "lr"} for g in state["optimizer"]["param_groups"]]
    state = {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
    del state["schedulers"]
    return state


def equal(a: Any, b: Any) -> bool:
    """Of plain data with tensors in it, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def guard(prune: type[Prune] = GrangerPrune, **kwargs: Any) -> Prune:
    budget = AccuracyBudget("told", **{"of": Units(0.1), "step": 0.5, **kwargs.pop("budget", {})})
    settings = {"schedule": OneShot(0.0), "record_every_n_steps": 5, "print_report": False, **kwargs}
    return prune(budget=budget, **settings)


def fit(folder: Path, callback: Prune, module: Lit, *others: pl.Callback, **kwargs: Any) -> Any:
    run = trainer(folder, callback, *others, **kwargs)
    run.fit(module, loader(), loader(), ckpt_path=kwargs.pop("ckpt_path", None))
    return run


def beside(kind: str) -> list[pl.Callback]:
    schedule = Linear(0.0, 0.5)
    others: dict[str, list[pl.Callback]] = {
        "nothing": [],
        "average": [EMAWeightAveraging(decay=0.9)],
        "masks": [WeightPrune(0.5, schedule=schedule, update_every=1.0)],
        "proximal": [SparsityRegularization(GroupLasso(), 1e-3, schedule, proximal=True)],
    }
    return others[kind]


@pytest.mark.parametrize("kind", ["nothing", "average", "masks", "proximal"])
def test_a_greedy_step_is_rolled_back_to_the_bit(tmp_path: Path, kind: str) -> None:
    """At the start of epoch 1 nine of ten units go; two epochs later all is as it was then, and no step follows."""
    callback = guard(budget={"step": 0.9, "patience": 2, "on_failure": "stop"})
    first, last = WriteDown(callback), WriteDown(callback)
    module = Told([0.9, 0.5, 0.5, 0.9, 0.9, 0.9])
    run = trainer(tmp_path, first, callback, last, *beside(kind))
    run.fit(module, loader(), loader())
    assert [(trial.epoch, trial.value, trial.kept) for trial in callback.trials] == [(3.0, 0.5, False)]
    assert last.states[1]["weights"]["net.c1.weight"].shape[0] < 8
    assert first.states[3]["weights"]["net.c1.weight"].shape[0] < 8
    before, after = put_back(first.states[1]), put_back(last.states[3])
    for part in before:
        assert equal(before[part], after[part]), part
    assert [state["schedulers"][0]["last_epoch"] for state in last.states] == [0, 1, 2, 3, 4, 5]
    assert module.net.c1.weight.shape[0] == module.net.c1.out_channels == 8
    assert not same(before["weights"], module.state_dict())  # it trained on
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert callback.history.events == []


def test_blocks_come_back_with_their_momentum(tmp_path: Path) -> None:
    settings = {"score": Taylor(), "granularity": "both"}
    callback = guard(Prune, budget={"step": 0.6, "patience": 1, "on_failure": "stop"}, **settings)
    first, last = WriteDown(callback), WriteDown(callback)
    module = ToldDeep([0.9, 0.5, 0.9, 0.9, 0.9, 0.9])
    run = trainer(tmp_path, first, callback, last)
    run.fit(module, loader(), loader())
    assert len(last.states[1]["weights"]) < len(first.states[1]["weights"])
    before, after = put_back(first.states[1]), put_back(last.states[2])
    for part in before:
        assert equal(before[part], after[part]), part
    assert not dropped(module)
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


def test_after_a_roll_back_smaller_steps_follow(tmp_path: Path) -> None:
    callback = guard(budget={"patience": 1})
    module = Told([0.9, 0.5, 0.9, 0.9, 0.9, 0.9])
    fit(tmp_path, callback, module)
    lefts = [trial.left for trial in callback.trials]
    assert [trial.kept for trial in callback.trials] == [False, True, True, True, True]
    assert 0.5 >= lefts[0] > 0.4
    assert lefts[1:] == sorted(lefts[1:], reverse=True)
    assert 0.75 >= lefts[1] > 0.7
    assert lefts[-1] == callback.history.events[-1].reached
    assert [event.reached for event in callback.history.events] == lefts[1:]


class Scheduled(Told):
    """The same, of a scheduler that is made for the run."""

    def __init__(self, values: list[float], make: Any) -> None:
        super().__init__(values)
        self.make = make

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": self.make(optimizer, self.trainer)}


def one_cycle(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
    steps = int(trainer.estimated_stepping_batches)
    return {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps), "interval": "step"}


def step_decay(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
    return {"scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])}  # each rate from the last one


@pytest.mark.parametrize("make", [one_cycle, step_decay])
def test_the_rate_goes_on_by_the_clock(tmp_path: Path, make: Any) -> None:
    rates = []
    for values in ([0.9] * 6, [0.9, 0.1, 0.1, 0.1, 0.1, 0.1]):
        callback, module = guard(budget={"patience": 1}), Scheduled(values, make)
        run = fit(tmp_path, callback, module)
        rates.append((run.optimizers[0].param_groups[0]["lr"], run.optimizers[0].param_groups[0]["betas"]))
        assert any(not trial.kept for trial in callback.trials) == (values[1] == 0.1)
    assert rates[0] == rates[1]
    assert rates[0][0] <= 1e-4


def test_a_rate_that_waits_for_a_metric_goes_back(tmp_path: Path) -> None:
    def plateau(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
        waits = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {"scheduler": waits, "monitor": "told"}

    callback = guard(budget={"patience": 2, "on_failure": "stop"})
    run = fit(tmp_path, callback, Scheduled([0.9, 0.5, 0.4, 0.91, 0.92, 0.93], plateau))
    assert [trial.kept for trial in callback.trials] == [False]
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-2


class ToldLate(Lit):
    """Logs in `on_train_epoch_end`, as torchmetrics are."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def on_train_epoch_end(self) -> None:
        self.log("told", self.values[self.current_epoch])


@pytest.mark.parametrize("on_the_instance", [False, True])
def test_a_metric_of_the_end_of_an_epoch_counts_for_it(tmp_path: Path, on_the_instance: bool) -> None:
    values = [0.9, 0.5, 0.9, 0.9, 0.5, 0.9]
    callback, module = guard(budget={"patience": 1}), ToldLate(values)
    if on_the_instance:
        module.on_train_epoch_end = own = module.on_train_epoch_end
    fit(tmp_path, callback, module)
    assert [trial.epoch for trial in callback.trials] == [2, 3, 4, 5, 6]
    assert [trial.value for trial in callback.trials] == pytest.approx(values[1:])
    assert [trial.kept for trial in callback.trials] == [False, True, True, False, True]
    assert vars(module).get("on_train_epoch_end") == (own if on_the_instance else None)


def test_a_hook_that_raises_leaves_the_module_with_its_own(tmp_path: Path) -> None:
    module = ToldLate([0.9])  # one value for six epochs
    with pytest.raises(IndexError):
        fit(tmp_path, guard(), module)
    assert "on_train_epoch_end" not in vars(module)


def test_where_half_a_step_is_the_same_step_it_is_not_tried_again(tmp_path: Path) -> None:
    """Eight channels in steps of four: four may go, or none."""
    least = dict.fromkeys(("net.c2", "net.up", "net.fc1"), 1.0)
    callback = guard(Prune, score=Magnitude(), budget={"patience": 1}, round_to=4, keep_at_least=least)
    module = Told([0.9, 0.5, 0.9, 0.9, 0.9, 0.9])
    fit(tmp_path, callback, module)
    assert [(trial.epoch, trial.left) for trial in callback.trials] == [(2.0, pytest.approx(46 / 50))]
    assert module.net.c1.out_channels == 8
    assert callback.history.events == []


@pytest.mark.parametrize("granularity", ["units", pytest.param("both", marks=pytest.mark.slow)])
def test_stop_after_any_epoch_and_resume(tmp_path: Path, granularity: str) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Any, Any, Prune]:
        settings = {"score": Magnitude(), "granularity": granularity, "recalibrate_bn": False}
        callback = guard(Prune, budget={"patience": 2, "step": 0.3}, **settings)
        module = (Told if granularity == "units" else ToldDeep)([0.9, 0.9, 0.5, 0.4, 0.9, 0.5, 0.4])
        done = trainer(folder, callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), max_epochs=7)
        done.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return module, done, callback

    straight, trained, callback = run(tmp_path / "straight")
    assert [trial.kept for trial in callback.trials] == [True, False, True, False]
    for epoch in range(6):
        resumed, done, again = run(tmp_path / f"resumed{epoch}", tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), done.optimizers[0].state_dict())
        assert again.trials == callback.trials
        assert again.history.to_json() == callback.history.to_json()


def test_what_is_under_trial_when_the_run_ends_is_decided_on(tmp_path: Path) -> None:
    """Metrics that are reported are those of the model that is there, not of the one that was rolled back."""
    callback = guard(budget={"patience": 2})
    module = Told([0.9, 0.8, 0.8])
    fit(tmp_path, callback, module, max_epochs=3)
    assert [(trial.epoch, trial.kept) for trial in callback.trials] == [(3.0, False)]
    assert module.net.c1.weight.shape[0] == 8


def test_the_report_names_the_metrics_of_the_model_that_is_there(tmp_path: Path) -> None:
    callback = guard(budget={"patience": 2}, schedule=OneShot(0.5), print_report=True)
    module = Told([0.7, 0.9, 0.85, 0.8])
    fit(tmp_path, callback, module, max_epochs=4)
    assert [trial.kept for trial in callback.trials] == [False]
    assert "0.9" in (tmp_path / "report.md").read_text()
    assert "0.8" not in [cell.strip() for cell in (tmp_path / "report.md").read_text().split("|")]


def test_a_metric_of_training_may_be_monitored(tmp_path: Path) -> None:
    class Train(Lit):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    budget = AccuracyBudget("train_loss", max_drop=100.0, mode="min", of=Units(0.1), step=0.3, patience=1)
    callback = Prune(Magnitude(), budget, OneShot(0.0), record_every_n_steps=2, print_report=False)
    run = trainer(tmp_path, callback, max_epochs=4)
    run.fit(Train(), loader(), loader())
    assert [trial.epoch for trial in callback.trials] == [2.0, 3.0, 4.0]
    assert all(trial.kept for trial in callback.trials)


def test_without_a_validation_there_is_no_new_value(tmp_path: Path) -> None:
    """Lightning keeps what was logged two epochs ago."""
    callback = guard(budget={"step": 0.5, "patience": 1, "on_failure": "stop"})
    module = Told([0.0, 0.75, 0.0, 0.5, 0.0, 0.5, 0.0, 0.5])
    fit(tmp_path, callback, module, check_val_every_n_epoch=2, max_epochs=8)
    assert [(trial.epoch, trial.value, trial.reference) for trial in callback.trials] == [(4.0, 0.5, 0.75)]


def test_mixed_precision(tmp_path: Path) -> None:
    schedule = OneShot("1 epoch")
    callback = guard(budget={"step": 0.9, "patience": 1, "on_failure": "stop"}, schedule=schedule)
    module = Told([0.9, 0.5, 0.9, 0.9, 0.9, 0.9])
    fit(tmp_path, callback, module, precision="bf16-mixed", accumulate_grad_batches=3, val_check_interval=0.5)
    assert [trial.kept for trial in callback.trials] == [False]
    assert module.net.c1.weight.shape[0] == 8


def test_others_hear_of_a_roll_back(tmp_path: Path) -> None:
    class Listens(pl.Callback):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_structure_change(self, change: Any) -> None:
            self.heard.append("change")

        def on_structure_restored(self) -> None:
            self.heard.append("restored")

    callback = guard(budget={"step": 0.5, "patience": 1, "on_failure": "stop"})
    listens = Listens()
    fit(tmp_path, callback, Told([0.9, 0.5, 0.9]), listens, max_epochs=3)
    assert listens.heard == ["change", "restored"]


@pytest.mark.parametrize("last", [False, True])
def test_monitors_go_back_too(tmp_path: Path, last: bool) -> None:
    """The best of a model that was rolled back is nobody's best."""
    best = ModelCheckpoint(tmp_path, monitor="told", mode="max")
    callback = guard(budget={"step": 0.9, "patience": 1, "on_failure": "stop"}, schedule=OneShot(5 / 6 if last else 0))
    fit(tmp_path, callback, Told([0.95, 0.8, 0.7, 0.75, 0.6, 0.6]), best)
    assert [trial.kept for trial in callback.trials] == [False]
    assert float(best.best_model_score) == pytest.approx(0.95)
    assert torch.load(best.best_model_path, weights_only=True)["state_dict"]["net.c1.weight"].shape[0] == 8


@pytest.mark.parametrize("average_first", [False, True])
def test_a_last_roll_back_leaves_the_average_in_the_module(tmp_path: Path, average_first: bool) -> None:
    average = EMAWeightAveraging(decay=0.9)
    callback = guard(budget={"patience": 1}, schedule=OneShot(5 / 6))
    module = Told([0.9, 0.9, 0.9, 0.9, 0.9, 0.5])
    trainer(tmp_path, *([average, callback] if average_first else [callback, average])).fit(module, loader(), loader())
    assert [trial.kept for trial in callback.trials] == [False]
    assert same(module.state_dict(), average._average_model.module.state_dict())


@pytest.mark.parametrize("begins", [2, 4])
def test_swa_may_begin_during_a_trial_or_end_behind_one(tmp_path: Path, begins: int) -> None:
    """It puts a scheduler of its own in place, and measures batch norms in an epoch of its own."""
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=begins)
    callback = guard(budget={"patience": 2, "on_failure": "stop"}, schedule=OneShot(0.5))
    module = Told([0.9, 0.9, 0.9, 0.5, 0.5, 0.9, 0.9])
    fit(tmp_path, callback, module, swa)
    assert [(trial.epoch, trial.kept) for trial in callback.trials] == [(5.0, False)]
    assert module.net.b1.momentum == Told([]).net.b1.momentum
    assert int(module.net.b1.num_batches_tracked) == 4  # of SWA's epoch, measured anew
    assert module.net.c1.weight.shape[0] == 8


def test_groups_that_were_added_since_then_stay(tmp_path: Path) -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net.c1)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.net.c1, optimizer)

    class Part(Told):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    callback = guard(budget={"patience": 2, "on_failure": "stop"})
    module = Part([0.9, 0.5, 0.5, 0.9, 0.9, 0.9])
    run = fit(tmp_path, callback, module, Unfreeze())
    assert [trial.kept for trial in callback.trials] == [False]
    assert len(run.optimizers[0].param_groups) == 2
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


def test_a_fit_that_broke_off_in_a_trial_is_followed_by_another(tmp_path: Path) -> None:
    """The next one begins with the last good state, and an optimizer of its own."""

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("broken off")

    class Other(Told):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    callback, module = guard(budget={"patience": 3}), Told([0.9, 0.5, 0.5, 0.5, 0.5, 0.5])
    with pytest.raises(RuntimeError, match="broken off"):
        fit(tmp_path, callback, module, Break())
    assert module.net.c1.weight.shape[0] < 8
    module.__class__, module.values = Other, [0.5] * 4
    fit(tmp_path, callback, module, max_epochs=4)
    assert [(trial.epoch, trial.kept) for trial in callback.trials] == [(3.0, False)]
    assert module.net.c1.weight.shape[0] == 8


def test_without_validation_a_monitor_of_it_is_refused(tmp_path: Path) -> None:
    callback = Prune(Magnitude(), AccuracyBudget("val_acc"), print_report=False)
    with pytest.raises(MisconfigurationException, match="log 'val_acc'"):
        trainer(tmp_path, callback).fit(Lit(), loader())


def test_a_monitor_that_is_never_logged(tmp_path: Path) -> None:
    callback = Prune(Magnitude(), AccuracyBudget("val_acc"), print_report=False)
    with pytest.raises(
        MisconfigurationException, match=r"log 'val_acc', which `AccuracyBudget` monitors, got .*'val_loss'"
    ):
        fit(tmp_path, callback, Lit())


def test_a_run_that_tries_nothing_says_so(tmp_path: Path) -> None:
    callback = guard(schedule=OneShot(0.9))
    with pytest.warns(NoEffectWarning, match="No step was tried"):
        fit(tmp_path, callback, Told([0.9] * 6))
    assert callback.trials == []


def test_nothing_more_can_go(tmp_path: Path) -> None:
    callback = guard(Prune, score=Magnitude(), budget={"step": 0.9, "patience": 1})
    module = Told([0.9] * 6)
    fit(tmp_path, callback, module)
    assert module.net.c1.weight.shape[0] == 2
    assert 1 <= len(callback.trials) <= 3


@pytest.mark.slow
def test_the_demos_network_finds_out_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one point of dense, with less than half of the multiply-accumulates, and no ratio named."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs" / "digits_accuracy_budget.yaml").read_text())
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    (path,) = tmp_path.rglob("report.json")
    dense, slim = (json.loads(path.read_text())[which] for which in ("dense", "slim"))
    assert slim["metrics"]["test_acc"] >= dense["metrics"]["test_acc"] - 0.01
    assert slim["macs"] <= 0.5 * dense["macs"]
