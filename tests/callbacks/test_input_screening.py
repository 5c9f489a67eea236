"""Inputs that tell of the target stay, others go, and everything follows: optimizer, checkpoints, averages, pruning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from sklearn.feature_selection import f_classif, f_regression
from statsmodels.stats.multitest import multipletests
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slim import (
    GrangerPrune,
    InputScreening,
    Linear,
    NoEffectWarning,
    ScreeningEvent,
    Units,
    load_from_checkpoint,
)
from lightning_slim.surgery import selections
from lightning_slim.surgery.inputs import InputError
from tests.callbacks.runs import trainer
from tests.callbacks.screened import Classifier, Fit, Forecaster, Perceptron, Recurrent, batches, digits, series
from tests.networks import same, same_optimizer_state
from tests.statistics.worlds import auc


def mask(event: ScreeningEvent) -> Tensor:
    return torch.tensor([name in event.kept for name in event.adjusted_p])


def screened(callback: InputScreening, lit: Fit, data: TensorDataset, folder: Path, **kwargs: Any) -> ScreeningEvent:
    trainer(folder, callback, **{"max_epochs": 2, **kwargs}).fit(lit, batches(data))
    assert callback.event is not None
    return callback.event


# --- what is chosen ---


def test_causes_and_their_copies_stay_and_echoes_and_noise_go(tmp_path: Path) -> None:
    data, roles = series()
    lit, callback = Forecaster(), InputScreening()
    event = screened(callback, lit, data, tmp_path)
    useful = torch.zeros(40).bool()
    useful[roles["causal"]] = useful[roles["copy"]] = True
    assert event.test == "granger"
    assert auc(torch.tensor(list(event.effect.values())), useful) >= 0.97
    kept = mask(event)
    assert kept[useful].float().mean() >= 0.9
    assert not kept[roles["echo"]].any()
    assert kept[roles["noise"]].sum() <= 1
    assert lit.net.gru.input_size == lit.net.gru.weight_ih_l0.shape[1] == kept.sum()
    assert (tmp_path / "inputs.md").read_text().count("| yes |") == kept.sum()


def test_pixels_stay_and_noise_goes_by_the_p_values_of_others(tmp_path: Path) -> None:
    data, roles = digits()
    lit, callback = Classifier(), InputScreening()
    event = screened(callback, lit, data, tmp_path)
    kept = mask(event)
    assert kept[roles["real"]].float().mean() >= 0.9
    assert kept[roles["noise"]].float().mean() <= 0.05
    x, y = (part.numpy() for part in data.tensors)
    p, moves = np.ones(96), x.std(0) > 0
    p[moves] = f_classif(x[:, moves].astype(float), y)[1]
    rejected, adjusted, *_ = multipletests(p, 0.05, "fdr_bh")
    np.testing.assert_allclose(list(event.adjusted_p.values()), adjusted, rtol=1e-6, atol=1e-300)
    assert kept.tolist() == rejected.tolist()


@pytest.mark.parametrize("labels", ["numbers", "several"])
def test_numbers_and_several_labels_are_correlated(tmp_path: Path, labels: str) -> None:
    x = torch.randn(200, 5)
    y = torch.stack([x[:, 1] + torch.randn(200), x[:, 3] ** 3 + torch.randn(200)], 1)
    y = y if labels == "numbers" else (y > 0).float()
    lit = Fit(lambda: nn.Linear(5, 2))
    event = screened(InputScreening(names=["a", "b", "c", "d", "e"], alpha=0.001), lit, TensorDataset(x, y), tmp_path)
    assert (event.test, event.kept) == ("correlation", ["b", "d"])
    p = np.minimum(2 * np.min([f_regression(x.double().numpy(), column.double().numpy())[1] for column in y.T], 0), 1)
    expected = multipletests(p, method="fdr_bh")[1]
    np.testing.assert_allclose(list(event.adjusted_p.values()), expected, rtol=1e-6)
    assert selections(lit) == {"net": (-1, [1, 3])}


def test_pixels_of_a_series_are_tested_one_by_one(tmp_path: Path) -> None:
    """The class moves one feature at one step only."""
    x, y = torch.randn(256, 6, 9), torch.randint(0, 3, (256,))
    x[:, 4, 7] += y
    lit = Fit(lambda: nn.Sequential(nn.Conv1d(6, 4, 3), nn.Flatten(), nn.Linear(28, 3)))
    event = screened(InputScreening(alpha=0.001), lit, TensorDataset(x, y), tmp_path)
    assert (event.test, event.kept) == ("anova", ["4"])
    p = 9 * f_classif(x[:, 4].double().numpy(), y.numpy())[1].min()
    assert event.adjusted_p["4"] == pytest.approx(min(6 * p, 1), rel=1e-6)


def test_targets_after_the_last_step_are_explained_by_the_last_steps(tmp_path: Path) -> None:
    x = torch.randn(512, 8, 10)
    y = x[:, -1, 2:3] + x[:, -2, 5:6] + x[:, -4, 6:7] + torch.randn(512, 1)  # the last one is beyond two lags
    lit = Fit(lambda: nn.Sequential(nn.Flatten(), nn.Linear(80, 1)))
    event = screened(InputScreening(alpha=1e-4), lit, TensorDataset(x, y), tmp_path)
    assert (event.test, event.kept) == ("granger", ["2", "5"])
    assert lit.net[1].in_features == 16
    assert selections(lit)["net.1"][1][:4] == [2, 5, 12, 15]


def test_the_targets_own_past_stays(tmp_path: Path) -> None:
    data, _ = series()
    x, y = data.tensors
    past = torch.cat([torch.randn(len(y), 1), y[:, :-1]], 1)
    own = torch.cat([x, past[..., None], torch.ones_like(past)[..., None]], -1)
    lit = Fit(lambda: Recurrent(42))
    event = screened(InputScreening(), lit, TensorDataset(own, y), tmp_path)
    assert "40" in event.kept
    assert "41" in event.removed  # it never changes


def test_nothing_to_find_leaves_the_layer_whole_with_a_warning(tmp_path: Path) -> None:
    x, y = torch.randn(256, 20), torch.randint(0, 3, (256,))
    lit, callback = Fit(lambda: Perceptron(20, classes=3)), InputScreening(alpha=0.01)
    with pytest.warns(NoEffectWarning, match="No input tells of the target"):
        event = screened(callback, lit, TensorDataset(x, y), tmp_path)
    assert (event.significant, event.removed) == (0, [])
    assert lit.net[1].in_features == 20
    assert not selections(lit)


def test_what_is_protected_and_enough_of_the_best_stay(tmp_path: Path) -> None:
    data, roles = digits()
    noise = roles["noise"].nonzero().flatten().tolist()
    names = [f"pixel {i}" for i in range(96)]
    callback = InputScreening(names=names, protect=[noise[0], f"pixel {noise[1]}"], min_inputs=70, batches=4)
    event = screened(callback, Classifier(), data, tmp_path)
    assert {f"pixel {noise[0]}", f"pixel {noise[1]}"} <= set(event.kept)
    assert len(event.kept) == 70 > event.significant
    best = sorted(set(names) - {f"pixel {noise[0]}", f"pixel {noise[1]}"}, key=lambda name: -event.effect[name])
    assert set(best[:60]) <= set(event.kept)


class Towers(nn.Module):
    """A layer of its own for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 3)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return sum(tower(x[:, i : i + 1]) for i, tower in enumerate(self.towers))


def test_no_layer_loses_all_of_its_inputs(tmp_path: Path) -> None:
    x = torch.randn(256, 4)
    data = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 0] > 1))
    lit = Fit(Towers)
    event = screened(InputScreening(), lit, data, tmp_path)
    assert event.kept == ["0", "1", "2", "3"]
    assert event.significant < 4
    assert all(tower[0].in_features == 1 for tower in lit.net.towers)


# --- what the cut does ---


def test_biases_take_the_mean_of_what_is_gone(tmp_path: Path) -> None:
    """Noise around 3 is added to what every hidden unit hears; it is no longer, but 3 still is."""
    data, _ = digits()

    class Keep(InputScreening):
        def _decide(self, *args: Any) -> None:
            self.before = copy.deepcopy(args[1].net)
            super()._decide(*args)
            self.after = copy.deepcopy(args[1].net)

    lit, callback = Fit(lambda: nn.Sequential(nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, 10))), Keep()
    kept = mask(screened(callback, lit, data, tmp_path))
    x = data.tensors[0].clone()
    assert callback.after[0].in_features == kept.sum()
    expected = callback.before(torch.where(kept, x, x[64:].mean(0)))  # the first batch shows what reads the inputs
    torch.testing.assert_close(callback.after(x), expected, rtol=1e-4, atol=1e-5)


def test_the_optimizer_goes_on_as_that_of_a_smaller_layer(tmp_path: Path) -> None:
    """From the cut on, the run equals one of a smaller network, made by hand, on data without those inputs."""
    data, _ = digits()

    class Split(InputScreening):
        def _decide(self, trainer: Any, pl_module: Any) -> None:
            self.net = copy.deepcopy(pl_module.net)
            self.state = copy.deepcopy(trainer.optimizers[0].state_dict())
            super()._decide(trainer, pl_module)

    callback = Split(batches=10, compensate="none")
    lit = Fit(lambda: nn.Sequential(nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, 10)))
    at = mask(screened(callback, lit, data, tmp_path, max_epochs=1)).nonzero().flatten()
    small = callback.net
    small[0].weight = nn.Parameter(small[0].weight[:, at].detach())
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2, amsgrad=True)
    optimizer.load_state_dict(
        callback.state
        | {"state": {i: {k: cut(v, at) for k, v in s.items()} for i, s in callback.state["state"].items()}}
    )
    for x, y in list(batches(data))[10:]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(small(x[:, at]), y).backward()
        optimizer.step()
    assert same(small.state_dict(), lit.net.state_dict())


def cut(value: Any, at: Tensor) -> Any:
    return value[:, at] if isinstance(value, Tensor) and value.shape[-1:] == (96,) else value


KINDS = {"series": (Forecaster, series), "digits": (Classifier, digits)}


@pytest.mark.parametrize("kind", KINDS)
def test_stop_anywhere_and_resume_into_a_fresh_dense_model(tmp_path: Path, kind: str) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Any, Any, Any]:
        lit, callback = KINDS[kind][0](), InputScreening()
        saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fit = trainer(folder, callback, saved, max_epochs=3)
        fit.fit(lit, batches(KINDS[kind][1]()[0], 128), ckpt_path=ckpt_path)
        return lit, fit, callback

    straight, fit, callback = run(tmp_path / "straight")
    for epoch in (0, 1):  # before the cut, and after it
        lit, again, other = run(tmp_path / f"{epoch}", tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), lit.state_dict()), epoch
        assert same_optimizer_state(fit.optimizers[0].state_dict(), again.optimizers[0].state_dict())
        assert other.event == callback.event
        assert selections(lit) == selections(straight) != {}


def test_checkpoints_load_everywhere(tmp_path: Path) -> None:
    data, _ = series()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    lit, callback = Forecaster(), InputScreening()
    fit = trainer(tmp_path, callback, every, max_epochs=2)
    fit.fit(lit, batches(data))
    x = data.tensors[0][:4]
    expected = lit.eval().net(x)
    loaded = load_from_checkpoint(Forecaster, tmp_path / "epoch=1.ckpt", weights_only=True).eval()
    assert torch.equal(loaded.net(x), expected)
    slim = fit.test(lit, batches(data), verbose=False)
    dense = fit.test(lit, batches(data), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert lit.net.gru.input_size == 40  # grown back
    assert not selections(lit)
    alone = trainer(tmp_path).test(Forecaster(), batches(data), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert dense == alone
    assert slim == fit.test(lit, batches(data), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    fresh = trainer(tmp_path / "b", InputScreening())
    assert slim == fresh.test(Forecaster(), batches(data), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)


def test_averages_are_cut_in_step_and_resume_bitwise(tmp_path: Path) -> None:
    """Averages average buffers, too: indices of what is kept are none."""
    data, _ = series()

    def run(folder: Path, ckpt_path: Path | None = None) -> Forecaster:
        saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        lit = Forecaster()
        fit = trainer(folder, InputScreening(), EMAWeightAveraging(decay=0.9), saved, max_epochs=3)
        fit.fit(lit, batches(data), ckpt_path=ckpt_path)
        return lit

    straight = run(tmp_path / "straight")
    assert straight.net.gru.input_size == len(selections(straight)["net.gru"][1]) < 40
    for epoch in (0, 1):
        resumed = run(tmp_path / f"{epoch}", tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch


@pytest.mark.parametrize("first", [pytest.param("screening", marks=pytest.mark.slow), "pruning"])
def test_units_are_pruned_beside_it(tmp_path: Path, first: str) -> None:
    data, _ = series()

    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Any, ...]:
        pruning = GrangerPrune(Units(0.5), Linear(0.2, 0.7), lags=0, record_every_n_steps=1, print_report=not ckpt_path)
        callbacks = [InputScreening(), pruning]
        saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        lit = Forecaster()
        fit = trainer(folder, *(callbacks if first == "screening" else callbacks[::-1]), saved, max_epochs=5)
        fit.fit(lit, batches(data), ckpt_path=ckpt_path)
        return lit, *callbacks

    lit, screening, pruning = run(tmp_path / "straight")
    assert lit.net.gru.input_size == len(screening.event.kept) < 40
    assert lit.net.gru.hidden_size == 6
    assert pruning.pruner.costs.parameters < sum(p.numel() for p in Forecaster().parameters())  # of what was left then
    assert (tmp_path / "straight" / "report.md").exists()
    for epoch in (0, 1):
        resumed, *_ = run(tmp_path / f"{epoch}", tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(lit.state_dict(), resumed.state_dict()), epoch
    slim = load_from_checkpoint(Forecaster, tmp_path / "straight" / "epoch=4.ckpt").eval()
    assert torch.equal(slim.net(data.tensors[0]), lit.eval().net(data.tensors[0]))


def test_training_on_chooses_no_more(tmp_path: Path) -> None:
    data, _ = series()
    lit, callback = Forecaster(), InputScreening()
    fit = trainer(tmp_path, callback, max_epochs=2)
    fit.fit(lit, batches(data))
    event = callback.event
    fit.fit_loop.max_epochs = 3
    fit.fit(lit, batches(data))
    assert callback.event is event
    other = Forecaster()
    assert screened(callback, other, data, tmp_path).kept == event.kept
    assert other.net.gru.input_size == len(event.kept)


# --- what is refused ---


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](x + self[0](x))


def refused(tmp_path: Path, error: type[Exception], match: str, data: TensorDataset, **arguments: Any) -> None:
    lit = Fit(lambda: Perceptron(6, classes=3))
    state = copy.deepcopy(lit.state_dict())
    with pytest.raises(error, match=match):
        trainer(tmp_path, InputScreening(**arguments), max_epochs=1, limit_train_batches=8).fit(lit, batches(data, 16))
    assert [tensor.shape for tensor in state.values()] == [tensor.shape for tensor in lit.state_dict().values()]


X, Y = torch.randn(128, 6), torch.arange(128) % 3

BAD = {
    "too short a run": ({"batches": None}, MisconfigurationException, "one of 8: set `batches`"),
    "no such item": ({"target": "label"}, MisconfigurationException, r"a tensor at 'label' of a batch, got NoneType"),
    "the target for inputs": ({"inputs": 1, "target": 1}, ValueError, "Expected inputs of a floating type"),
    "names": ({"names": ["a", "b"]}, ValueError, "got 2 names for inputs of shape"),
    "protect": ({"protect": ["a"]}, ValueError, "numbers from 0 to 5, in `protect`, got 'a'"),
    "min_inputs": ({"min_inputs": 7}, ValueError, "`min_inputs` of at most 6"),
    "granger": ({"method": "granger"}, ValueError, 'use method="correlation"'),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said(tmp_path: Path, case: str) -> None:
    arguments, error, match = BAD[case]
    refused(tmp_path, error, match, TensorDataset(X, Y), **{"batches": 3, **arguments})


def test_a_target_of_numbers_has_no_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected one class for every item"):
        trainer(tmp_path, InputScreening(method="anova", batches=2), max_epochs=1).fit(
            Fit(lambda: nn.Linear(6, 1)), batches(TensorDataset(X, X[:, :1]), 16)
        )


def test_a_network_that_hands_its_inputs_on_is_refused(tmp_path: Path) -> None:
    lit = Fit(lambda: Residual(nn.Linear(6, 6), nn.Linear(6, 3)))
    with pytest.raises(InputError, match=r"got net\.1 \(Linear\), too"):
        trainer(tmp_path, InputScreening(batches=2), max_epochs=1).fit(lit, batches(TensorDataset(X, Y), 16))
    assert lit.net[0].in_features == 6


@pytest.mark.parametrize(
    "arguments", [{"alpha": 0.0}, {"method": "F"}, {"batches": 1}, {"lags": 0}, {"compensate": "least_squares"}]
)
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected `"):
        InputScreening(**arguments)


# --- from YAML ---


def test_it_goes_through_yaml(tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    written = {
        "class_path": "lightning_slim.InputScreening",
        "init_args": {
            "alpha": 0.01,
            "names": ["a", "b"],
            "protect": [0, "b"],
            "inputs": "x",
            "target": 2,
            "batches": 8,
        },
    }
    config = {
        "trainer": {"callbacks": [written], "logger": False, "accelerator": "cpu", "default_root_dir": str(tmp_path)},
        "model": {"class_path": "tests.callbacks.screened.Forecaster"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(run=False, args=["--config", str(path)], save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, InputScreening)]
    assert (callback.alpha, callback.names, callback.protect) == (0.01, ("a", "b"), (0, "b"))
    assert (callback.inputs, callback.target, callback.batches) == ("x", 2, 8)


def test_a_run_with_accumulation_that_is_over_before_inputs_are_chosen(tmp_path: Path) -> None:
    """8 steps of accumulated batches are 8 batches or more."""
    accumulate = GradientAccumulationScheduler({0: 1, 1: 4})
    limits = {"max_epochs": 9, "max_steps": 8, "limit_train_batches": 8}
    with pytest.raises(MisconfigurationException, match="after 8 batches, got one of 8: set `batches`"):
        trainer(tmp_path, InputScreening(), accumulate, **limits).fit(
            Fit(lambda: Perceptron(6, classes=3)), batches(TensorDataset(X, Y), 16)
        )
    limits["max_steps"] = 9
    callback = InputScreening()
    trainer(tmp_path, callback, accumulate, **limits).fit(
        Fit(lambda: Perceptron(6, classes=3)), batches(TensorDataset(X, Y), 16)
    )
    assert callback.event is not None


def test_a_smoke_test_forgets_its_evidence_and_puts_inputs_back(tmp_path: Path) -> None:
    data, lit, callback = (
        TensorDataset(X, Y),
        Fit(lambda: Perceptron(6, classes=3)),
        InputScreening(batches=2, alpha=0.99),
    )
    before = [tensor.shape for tensor in lit.state_dict().values()]
    trainer(tmp_path, callback, fast_dev_run=4).fit(lit, batches(data, 16))
    assert callback.event is not None
    assert [tensor.shape for tensor in lit.state_dict().values()] == before
    trainer(tmp_path, callback, max_epochs=2).fit(lit, batches(data, 16))
    assert callback.event is not None
    assert callback.event.step == 2
