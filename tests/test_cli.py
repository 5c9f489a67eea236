"""The console script, from YAML: what the demo does, on fewer epochs; and every type that YAML may name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lightning_slim.accuracy import AccuracyBudget
from lightning_slim.budgets import Budget, Params
from lightning_slim.callbacks import GrangerPrune, Prune, WeightPrune
from lightning_slim.cli import main
from lightning_slim.masks import NM, Distribution, Pattern, Regrowth, WeightScore
from lightning_slim.schedules import Linear, Schedule
from lightning_slim.scores import BatchNormScale, Combined, Granger, Score
from lightning_slim.selection import Selection
from tests.masks.test_contract import concrete

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's configuration, made small."""
    monkeypatch.chdir(ROOT)
    demo = yaml.safe_load((ROOT / "configs" / "digits_granger_prune.yaml").read_text())
    demo["model"]["init_args"] = {"channels": 16, "layers": 3}
    demo["trainer"] |= {"max_epochs": 4, "limit_train_batches": 6}
    demo["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "logs")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(demo))
    return path


def test_the_demo_trains_both_models_and_reports(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["fit", "--config", str(config)])
    out = capsys.readouterr().out
    assert "Dense model: test_loss" in out
    assert "tensorboard --logdir" in out
    (path,) = (tmp_path / "logs").rglob("report.json")
    report = json.loads(path.read_text())
    assert report["slim"]["macs"] <= 0.4 * report["dense"]["macs"]
    assert report["dense"]["metrics"].keys() == report["slim"]["metrics"].keys() == {"test_loss", "test_acc"}
    assert path.with_name("report.md").exists()
    runs = list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    assert len({run.parent for run in runs}) == 2  # dense and slim


def test_without_a_baseline_only_the_slim_model_is_trained(config: Path, tmp_path: Path) -> None:
    main(["fit", "--config", str(config), "--baseline", "false"])
    (path,) = (tmp_path / "logs").rglob("report.json")
    report = json.loads(path.read_text())
    assert report["dense"]["metrics"] == {}
    assert "test_acc" in report["slim"]["metrics"]


def test_a_slim_checkpoint_is_tested_from_the_command_line(config: Path, tmp_path: Path, capsys) -> None:
    main(["fit", "--config", str(config), "--baseline", "false"])
    (checkpoint,) = (tmp_path / "logs").rglob("*.ckpt")
    main(["test", "--config", str(config), "--ckpt_path", str(checkpoint)])
    assert "test_acc" in capsys.readouterr().out


REQUIRED = {AccuracyBudget: {"monitor": "val_acc"}}
EVERY = [*Score.__subclasses__(), *Schedule.__subclasses__(), *Budget.__subclasses__()]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_open_choice_goes_through_yaml(kind: type) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Prune, "callback")
    argument = {Score: "score", Schedule: "schedule", Budget: "budget"}[kind.__mro__[1]]
    when = "start" if argument == "score" else "during"
    arguments = {"score": {"class_path": "lightning_slim.RandomGates"}, "when": when} | {
        argument: {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": REQUIRED.get(kind, {})}
    }
    written = yaml.safe_dump({"callback": {"class_path": "lightning_slim.Prune", "init_args": arguments}})
    parsed = parser.parse_string(written)
    again = parser.parse_string(parser.dump(parsed))
    callback = parser.instantiate_classes(again).callback
    assert getattr(callback, argument) == kind(**REQUIRED.get(kind, {}))


OF_WEIGHTS = {
    Regrowth: "regrow",
    Pattern: "pattern",
    Distribution: "distribution",
    WeightScore: "score",
    Schedule: "schedule",
}


@pytest.mark.parametrize("kind", [c for base in OF_WEIGHTS for c in concrete(base)], ids=lambda c: c.__name__)
def test_every_choice_of_masks_goes_through_yaml(kind: type) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(WeightPrune, "callback")
    (argument,) = (argument for base, argument in OF_WEIGHTS.items() if issubclass(kind, base))
    arguments = {argument: {"class_path": f"{kind.__module__}.{kind.__name__}"}, "when": "start"}
    written = yaml.safe_dump({"callback": {"class_path": "lightning_slim.WeightPrune", "init_args": arguments}})
    again = parser.parse_string(parser.dump(parser.parse_string(written)))
    callback = parser.instantiate_classes(again).callback
    assert getattr(callback, argument) == kind()


def test_masks_are_trained_from_the_command_line(config: Path, tmp_path: Path) -> None:
    demo = yaml.safe_load(config.read_text())
    masks = {"pattern": {"class_path": "lightning_slim.NM", "init_args": {"n": 1, "m": 4}}, "skip": ["net.1"]}
    demo["trainer"]["callbacks"] = [{"class_path": "lightning_slim.WeightPrune", "init_args": masks}]
    config.write_text(yaml.safe_dump(demo))
    main(["fit", "--config", str(config), "--baseline", "false"])
    (checkpoint,) = (tmp_path / "logs").rglob("*.ckpt")
    weight = torch.load(checkpoint)["state_dict"]["net.5.weight"]
    assert ((weight.view(16, -1, 4, 3) != 0).sum(2) == NM(1, 4).n).all()


@pytest.mark.parametrize("end", [0.5, "3 epochs", "500 steps"])
def test_times_go_through_yaml(end: float | str) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Prune, "callback")
    schedule = {"class_path": "lightning_slim.Linear", "init_args": {"end": end}}
    arguments = {"score": {"class_path": "lightning_slim.Magnitude"}, "schedule": schedule}
    written = yaml.safe_dump({"callback": {"class_path": "lightning_slim.Prune", "init_args": arguments}})
    again = parser.parse_string(parser.dump(parser.parse_string(written)))
    assert parser.instantiate_classes(again).callback.schedule == Linear(end=end)


@pytest.mark.parametrize("name", ["Prune", "WeightPrune"])
@pytest.mark.parametrize("finetune", [0.2, "3 epochs", "500 steps"])
def test_phases_of_a_run_go_through_yaml(name: str, finetune: float | str) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    kind = {"Prune": Prune, "WeightPrune": WeightPrune}[name]
    parser.add_subclass_arguments(kind, "callback")
    arguments = {"when": "end", "finetune": finetune, "finetune_lr": 0.5, "rounds": 7, "probe_batches": 3}
    arguments |= {"score": {"class_path": "lightning_slim.Magnitude"}} if kind is Prune else {}
    written = yaml.safe_dump({"callback": {"class_path": f"lightning_slim.{name}", "init_args": arguments}})
    callback = parser.instantiate_classes(parser.parse_string(parser.dump(parser.parse_string(written)))).callback
    assert (callback.when, callback.rounds, callback.probe_batches) == ("end", 7, 3)
    assert (callback._tuning.length, callback._tuning.factor) == (finetune, 0.5)


def test_pruning_before_training_from_the_command_line(config: Path, tmp_path: Path) -> None:
    demo = yaml.safe_load(config.read_text())
    score = {"class_path": "lightning_slim.GraSP", "init_args": {"temperature": 100.0}}
    callback = {"score": score, "when": "start", "scope": "global", "compensate": "none"}
    demo["trainer"]["callbacks"] = [{"class_path": "lightning_slim.Prune", "init_args": callback}]
    config.write_text(yaml.safe_dump(demo))
    main(["fit", "--config", str(config), "--baseline", "false"])
    (path,) = (tmp_path / "logs").rglob("report.json")
    report = json.loads(path.read_text())
    assert 0.4 * report["dense"]["macs"] < report["slim"]["macs"] <= 0.5 * report["dense"]["macs"]


def test_figures_and_bounds_go_through_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Prune, "callback")
    text = """
    callback:
      class_path: lightning_slim.Prune
      init_args:
        score: {class_path: lightning_slim.Magnitude}
        budget: {class_path: lightning_slim.Params, init_args: {absolute: 200_000}}
        keep_at_least: {"net.0": 0.5, Conv2d: 0.25}
        keep_at_most: {head.*: 0.75}
    """
    again = parser.parse_string(parser.dump(parser.parse_string(text)))
    callback = parser.instantiate_classes(again).callback
    assert callback.budget == Params(absolute=200_000)
    assert callback.selection.keep_at_least == {"net.0": 0.5, "Conv2d": 0.25}
    assert callback.selection.keep_at_most == {"head.*": 0.75}


def test_a_combination_of_scores_goes_through_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Prune, "callback")
    parts = [
        {"class_path": "lightning_slim.Granger", "init_args": {"lags": 3}},
        {"class_path": "lightning_slim.BatchNormScale"},
    ]
    combined = {"class_path": "lightning_slim.Combined", "init_args": {"scores": parts, "weights": [2.0, 1.0]}}
    written = yaml.safe_dump({"callback": {"class_path": "lightning_slim.Prune", "init_args": {"score": combined}}})
    again = parser.parse_string(parser.dump(parser.parse_string(written)))
    score = parser.instantiate_classes(again).callback.score
    assert score == Combined((Granger(3), BatchNormScale()), (2.0, 1.0))


@pytest.mark.parametrize("round_to", [1, 8, "auto"])
def test_a_selection_goes_through_yaml(round_to: int | str) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GrangerPrune, "callback")
    text = f"callback: {{class_path: lightning_slim.GrangerPrune, init_args: {{round_to: {round_to}, "
    text += "scope: isomorphic, macs_to_params: [0.8, 1.25]}}"
    again = parser.parse_string(parser.dump(parser.parse_string(text)))
    selection = parser.instantiate_classes(again).callback.selection
    assert selection == Selection("isomorphic", round_to, macs_to_params=(0.8, 1.25))


def test_granger_prune_with_its_defaults_goes_through_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GrangerPrune, "callback")
    text = "callback: {class_path: lightning_slim.GrangerPrune, init_args: {skip: [net.0, Conv2d], round_to: 8}}"
    callback = parser.instantiate_classes(parser.parse_string(text)).callback
    assert isinstance(callback, GrangerPrune)
    assert (list(callback.skip), callback.selection.round_to) == (["net.0", "Conv2d"], 8)


def test_the_demos_network_is_causal() -> None:
    from examples.digits import SequenceClassifier

    network = SequenceClassifier(8, 3).net[:-3].eval()
    a, b = torch.randn(2, 1, 1, 64)
    b[:, :, :40] = a[:, :, :40]
    torch.testing.assert_close(network(a)[:, :, :40], network(b)[:, :, :40])
    assert not torch.allclose(network(a)[:, :, 40:], network(b)[:, :, 40:])
