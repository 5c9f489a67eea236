"""What is significant, where there is no signal, and what happens then."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from statsmodels.stats.multitest import multipletests
from torch import Tensor, nn

from lightning_slim import (
    Granger,
    Magnitude,
    NoEffectWarning,
    OneShot,
    Pruner,
    RandomGates,
    Screening,
    Significant,
    Taylor,
    Units,
)
from lightning_slim.guards import Guard, no_signal, significant
from lightning_slim.scores import Calibration, Evidence, Reading, Score
from lightning_slim.scores.granger import Exchanged, WithTargets
from lightning_slim.selection import Selection
from lightning_slim.statistics import Moments


def calibration(**changes) -> Calibration:
    shares = torch.linspace(0.2, 1.0, 8, dtype=torch.float64)
    return Calibration(1000.0, 8, 8, 1.0, shares, 0.1 * shares, 1.0)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"rows": 9.0}, r"9 rows are too few for 8 columns \(lower `record_every_n_steps`\)"),
        ({"live": 1}, "7 of 8 units are constant"),
        ({"variance": 0.0}, "what they should predict is constant"),
        (
            {"by_chance": torch.ones(8, dtype=torch.float64)},
            "the best 4 units explain 54.3% .* 100.0% of what they cannot know",
        ),
    ],
)
def test_where_there_is_no_signal_numbers_say_why(changes, reason: str) -> None:
    found = no_signal(calibration(**changes), columns=8)
    assert re.fullmatch(reason, found)


def test_significance_is_that_of_statsmodels_over_all_groups() -> None:
    p = np.random.default_rng(0).uniform(size=40) ** 4
    found = significant({"a": torch.tensor(p[:15]).log(), "b": torch.tensor(p[15:]).log()}, 0.05)
    expected = multipletests(p, 0.05, "fdr_bh")[0]
    assert torch.cat(list(found.values())).tolist() == expected.tolist()
    assert [len(mask) for mask in found.values()] == [15, 25]


def network_with_copies() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    with torch.no_grad():
        network[0].weight[9:], network[0].bias[9:] = network[0].weight[:3], network[0].bias[:3]
        network[0].weight[4] = 0.0
    return network


def recorded(network: nn.Module, score: Score, x: Tensor, y: Tensor | None = None, **kwargs) -> Pruner:
    pruner = Pruner(network, score, kwargs.pop("budget", Units(0.5)), OneShot(0.5), **kwargs)
    pruner.prepare(x[:2])
    if pruner.recorder.experiments:
        pruner.recorder.experiment(lambda: F.cross_entropy(network(x), y, reduction="none"))
    with pruner.recording():
        network(x)
    pruner.recorder.hear(labels=y)
    return pruner


def test_until_nothing_insignificant_is_left_the_function_stays_the_same() -> None:
    network, x = network_with_copies(), torch.randn(400, 6, dtype=torch.float64)
    before = network(x)
    pruner = recorded(network, Granger(0), x, budget=Significant())
    event = pruner.step(0.5)
    assert event is not None
    assert event.widths == {"0": 8}
    assert event.calibration["0"]["significant"] == 8
    torch.testing.assert_close(network(x), before, atol=1e-2, rtol=0)  # the ridge of the fold


def test_nothing_more_goes_once_all_is_significant() -> None:
    network, x = network_with_copies(), torch.randn(400, 6, dtype=torch.float64)
    pruner = recorded(network, Granger(0), x, budget=Significant())
    pruner.step(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pruner.recording():
            network(x)
        assert pruner.step(1.0) is None
    assert pruner.widths == {"0": 8}


@pytest.mark.parametrize("score", [Screening(), RandomGates()], ids=str)
def test_significant_units_stay_whatever_the_budget(score: Score) -> None:
    """Ten of twelve units hear noise only; all twelve are read, the two loudest by far are noise."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        network[0].weight.copy_(3 * torch.eye(12))
        network[2].weight[:, :2] = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, -2.0]])
        network[2].weight[:, 2:] = 0.05
        network[2].weight[:, 4:6] = 8.0  # the same for all classes: no effect on the loss
    x = torch.randn(3000, 12, dtype=torch.float64)
    y = torch.stack([x[:, 0], x[:, 1], -x[:, 0] - x[:, 1]], 1).argmax(1)
    pruner = recorded(network, score, x, y, budget=Units(0.17), protect_significant=0.01)
    event = pruner.step(0.5)
    assert event is not None
    assert set(event.removed["0"]).isdisjoint({0, 1})


@pytest.mark.slow
@pytest.mark.parametrize(("target", "least", "most"), [("losses", 0.03, 0.07), ("labels", 0.0, 0.05)])
def test_the_size_of_entering_is_right_where_there_is_nothing_to_find(target: Any, least: float, most: float) -> None:
    """The first unit to enter is the best of all, so it is tested alone: one unit, targets that mean nothing.

    Several targets are pooled as if they were one, which makes the test conservative.
    """
    generator = torch.Generator().manual_seed(0)
    score, log_p = Granger(0, target), []
    for _ in range(400):
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        pruner = Pruner(network, score, Units(0.5), OneShot(0.5))
        pruner.prepare(torch.randn(2, 4))
        with pruner.recording():
            network(torch.randn(200, 4, generator=generator))
        losses, labels = torch.randn(200, generator=generator), torch.randint(3, (200,), generator=generator)
        pruner.recorder.hear(labels=labels, losses=losses)
        moments = next(iter(pruner.recorder.gathered.values()))["0"][0]
        moments.keep(torch.tensor([0]))
        (test,) = pruner.recorder.gathered
        reading = Reading(Moments(1), torch.ones(1, 2), told={test: moments})
        log_p.append(float(score(Evidence(torch.ones(1, 1), (reading,))).log_p))
    assert least <= np.mean(np.exp(log_p) < 0.05) <= most


def test_what_is_explained_by_chance_is_that_of_other_items() -> None:
    """Against an explicit regression of another item's pre-activations on the units."""
    network, x = network_with_copies(), torch.randn(60, 6, dtype=torch.float64)
    pruner = recorded(network, Granger(0), x)
    hidden = network[:2](x).detach()
    y = hidden.roll(1, 0) @ network[2].weight.detach().T
    centred, targets = hidden - hidden.mean(0), y - y.mean(0)
    left = targets - centred @ torch.linalg.lstsq(centred, targets, driver="gelsd").solution
    expected = 1 - float(left.square().sum() / targets.square().sum())
    found = pruner.score(pruner._evidence(pruner.groups[0])).calibration
    assert float(found.by_chance[-1]) == pytest.approx(expected, rel=1e-3)
    assert float(found.explained[-1]) == pytest.approx(1.0, abs=1e-4)
    assert Exchanged() in pruner.recorder.gathered


def test_f_to_enter_is_that_of_a_regression_with_one_more_regressor() -> None:
    torch.manual_seed(1)
    x, noise = torch.randn(80, 3, dtype=torch.float64), torch.randn(80, 1, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [0.4], [0.1]], dtype=torch.float64) + noise
    witness = WithTargets("losses", 0)
    told = {witness: witness.add(None, witness.hold(x[:, None]).double(), y[:, 0])}
    log_p = Granger(0, "losses")(Evidence(torch.ones(3, 1), (Reading(Moments(3), torch.ones(3, 1), told=told),))).log_p
    design, rss = np.ones((80, 1)), [float((y - y.mean()).square().sum())]
    for unit in range(3):
        design = np.column_stack([design, x[:, unit].numpy()])
        rss.append(np.linalg.lstsq(design, y.numpy()[:, 0], rcond=None)[1][0])
    for k in range(3):
        f = (rss[k] - rss[k + 1]) / (rss[k + 1] / (80 - k - 2))
        assert float(log_p[k]) == pytest.approx(stats.f.logsf(f, 1, 80 - k - 2), rel=1e-3)


def quiet() -> tuple[nn.Sequential, Tensor]:
    """No unit ever says anything."""
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        network[0].bias.fill_(-100.0)
    return network, torch.randn(50, 4)


def test_without_a_signal_the_fallback_scores() -> None:
    network, x = quiet()
    largest = network[0].weight.norm(dim=1).square() + network[2].weight.norm(dim=0).square() + 100.0**2
    pruner = recorded(network, Granger(0), x, guard=Guard(Magnitude()), compensate="none")
    with pytest.warns(NoEffectWarning, match=r"No signal in 0: 8 of 8 units are constant; Magnitude scores it instead"):
        event = pruner.step(0.5)
    assert event is not None
    assert set(event.removed["0"]) == set(largest.argsort()[:4].tolist())


@pytest.mark.parametrize("fallback", [Taylor(), Screening()], ids=str)
def test_what_a_fallback_needs_is_recorded_too(fallback: Score) -> None:
    """Gradients, or what the step knows: `Granger` itself needs neither."""
    network, x = quiet()
    network[0].weight.data[:, 0] = torch.linspace(-3, 3, 8)
    y = torch.arange(50) % 2
    pruner = recorded(network, Granger(0), x, y, guard=Guard(fallback), compensate="none")
    assert pruner.witnessed.needs_gradients == fallback.needs_gradients
    F.cross_entropy(network(x), y).backward()
    pruner.recorder.observe_gradients(network.parameters())
    assert pruner.recorder.ready
    with pytest.warns(NoEffectWarning, match=f"{type(fallback).__name__} scores it instead"):
        event = pruner.step(0.5)
    assert event is not None
    assert event.widths == {"0": 4}


def test_across_layers_a_fallback_goes_by_its_own_importance() -> None:
    """The curve of what greedily chosen units explain is in another order than the fallback's."""
    network, x = quiet()
    network[0].weight.data[[1, 6]] *= 10.0
    pruner = recorded(
        network, Granger(0), x, guard=Guard(Magnitude()), compensate="none", selection=Selection("global")
    )
    with pytest.warns(NoEffectWarning, match="Magnitude scores it instead"):
        scores = pruner._score()
    assert pruner._steepness(scores) == {}
    assert {1, 6} <= set(pruner.plan(0.5)["0"].nonzero().flatten().tolist())


def test_without_a_signal_and_a_fallback_the_model_stays_whole() -> None:
    network, x = quiet()
    pruner = recorded(network, Granger(0), x, guard=Guard(None))
    with pytest.warns(NoEffectWarning) as caught:
        assert pruner.step(0.5) is None
    assert any("8 of 8 units are constant; it stays whole" in str(warning.message) for warning in caught)
    assert network[0].out_features == 8


@pytest.mark.parametrize("kwargs", [{"budget": Significant()}, {"protect_significant": 0.05}])
def test_a_score_without_p_values_cannot_protect(kwargs) -> None:
    with pytest.raises(ValueError, match="Expected a score with p-values to find significant units, got Magnitude"):
        Pruner(nn.Linear(2, 2), Magnitude(), **kwargs)


def test_a_level_outside_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="`protect_significant` between 0 and 1, got 5"):
        Pruner(nn.Linear(2, 2), Granger(), protect_significant=5)


def test_chance_stays_small_while_the_weights_change() -> None:
    network, x = network_with_copies(), torch.randn(60, 6, dtype=torch.float64)
    pruner = Pruner(network, Granger(0), Units(0.5), OneShot(0.5), guard=Guard(None))
    pruner.prepare(x[:2])
    for _ in range(40):
        with torch.no_grad():
            network[0].weight.normal_()
            with pruner.recording():
                network(torch.randn(60, 6, dtype=torch.float64))
    found = pruner.score(pruner._evidence(pruner.groups[0])).calibration
    assert float(found.by_chance[-1]) < 0.05
    assert no_signal(found, 12) == ""


def test_too_few_rows_name_the_argument_that_makes_columns_of_the_past() -> None:
    assert no_signal(calibration(rows=9.0), columns=24).endswith("24 columns (lower `record_every_n_steps` and `lags`)")
