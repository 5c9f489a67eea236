"""Levels that wander: the test of inputs is spurious there, and a run is told before anything is cut."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import InputScreening
from lightning_slim.input_evidence import InputEvidence, choose
from lightning_slim.statistics.random_walks import unit_roots
from tests.callbacks.runs import trainer
from tests.callbacks.screened import Fit, Recurrent

INPUTS, LENGTH = 20, 32


class Last(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, -1]


def windows(seed: int, persistence: float, target_series: bool = False) -> tuple[Tensor, Tensor]:
    """Windows, in any order, of independent first-order autoregressions; the target is one more, after each."""
    generator = torch.Generator().manual_seed(seed)
    noise, series = torch.randn(4000, INPUTS + 1, generator=generator), torch.zeros(4000, INPUTS + 1)
    for t in range(1, 4000):
        series[t] = persistence * series[t - 1] + noise[t]
    series = (series - series.mean(0)) / series.std(0)
    ends = torch.arange(LENGTH, 4000, LENGTH)[torch.randperm(124, generator=generator)].tolist()
    x = torch.stack([series[end - LENGTH : end, :INPUTS] for end in ends])
    own = series[:, INPUTS]
    return x, torch.stack([own[end - LENGTH + 1 : end + 1] if target_series else own[end] for end in ends])


def discoveries(seed: int, persistence: float, difference: bool) -> int:
    evidence = InputEvidence("granger", axis=2, lags=2, overlap=1.0, difference=difference)
    x, y = windows(seed, persistence)
    for batch, target in zip(x.split(31), y.split(31), strict=True):
        evidence.update(batch, target)
    return choose(evidence.result(), 0.05, 1, torch.zeros(INPUTS, dtype=torch.bool), []).significant


def test_false_discoveries_on_walks() -> None:
    """Of levels most are 'significant', which is why there is a warning; of differences hardly any, as promised."""
    seeds = range(20)
    assert sum(discoveries(seed, 1.0, difference=False) for seed in seeds) > 100
    runs_with_any = sum(discoveries(seed, 1.0, difference=True) > 0 for seed in seeds)
    assert runs_with_any <= 4  # at 5 %, more than four of twenty has a probability of 0.003


def test_differences_find_what_drives_the_changes_of_a_level() -> None:
    x, _ = windows(0, 1.0)
    evidence = InputEvidence("granger", axis=2, lags=2, overlap=1.0, difference=True)
    evidence.update(x, x[:, -1, 3] - x[:, -2, 3] + 0.01 * torch.randn(len(x)))
    choice = choose(evidence.result(), 0.05, 1, torch.zeros(INPUTS, dtype=torch.bool), [])
    assert choice.keep.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(("persistence", "warned"), [(1.0, True), (0.9, False), (0.0, False)])
def test_a_run_warns_of_walks_before_it_cuts(tmp_path: Path, persistence: float, warned: bool) -> None:
    lit, data = Fit(lambda: Last(INPUTS)), DataLoader(TensorDataset(*windows(1, persistence)), batch_size=31)
    callback = InputScreening(print_report=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, max_epochs=2).fit(lit, data)
    found = [str(warning.message) for warning in told if "random walks" in str(warning.message)]
    assert bool(found) == warned
    assert all("difference=True" in message and "of 20 inputs" in message for message in found)


def test_a_run_can_choose_by_differences(tmp_path: Path) -> None:
    lit, data = Fit(lambda: Last(INPUTS)), DataLoader(TensorDataset(*windows(3, 1.0)), batch_size=31)
    callback = InputScreening(print_report=False, difference=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random walks")
        trainer(tmp_path, callback, max_epochs=2).fit(lit, data)
    assert callback.event is not None
    assert callback.event.significant <= 1


def test_the_statistic_is_that_of_dickey_and_fuller() -> None:
    """One regression by least squares, of a series whole and in windows that share their ends."""
    torch.manual_seed(0)
    series = torch.randn(500).double().cumsum(0) * 0.3 + torch.randn(500).double()
    design = torch.stack([torch.ones(499).double(), series[:-1]], 1)
    found = torch.linalg.lstsq(design, series.diff()).solution
    residual = series.diff() - design @ found
    t = found[1] / (residual.square().sum() / 497 * torch.linalg.inv(design.T @ design)[1, 1]).sqrt()
    evidence = InputEvidence("granger", axis=2, lags=1, overlap=1.0)
    evidence.update(series.view(1, -1, 1), torch.zeros(1, 1).double())
    assert evidence.steps is not None
    limit = float((t / -2.86) ** 2)  # the overlap at which it stands at the critical value
    assert limit > 1
    assert unit_roots(evidence.steps, limit * 0.999).tolist() == [False]
    assert unit_roots(evidence.steps, limit * 1.001).tolist() == [True]
