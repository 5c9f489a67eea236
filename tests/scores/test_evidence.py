"""Scores that look at more than moments and weights equal what scikit-learn, numpy or a hand find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.feature_selection import f_classif, f_regression
from torch import Tensor, nn

from lightning_slim import (
    Ablation,
    ActivationFrequency,
    BivariateGranger,
    Granger,
    Magnitude,
    OneShot,
    Pruner,
    RandomGates,
    Screening,
    Taylor,
    Units,
)
from lightning_slim.scores import Evidence, Reading, Score
from lightning_slim.scores.base import reduced
from lightning_slim.scores.bivariate_granger import Sequences
from lightning_slim.statistics import JointMoments, Moments, PanelDesign, PanelGranger, Regression, leave_one_out


def classifier() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return network, torch.randn(120, 6, dtype=torch.float64), torch.randint(3, (120,))


def evidence(network: nn.Module, score: Score, x: Tensor, **known: Tensor) -> Evidence:
    pruner = Pruner(network, score, Units(0.5), OneShot(0.5))
    pruner.prepare(x[:2])
    with pruner.recording():
        network(x)
    pruner.recorder.hear(**known)
    return pruner._evidence(pruner.groups[0])


def test_screening_is_the_f_test_of_scikit_learn() -> None:
    network, x, y = classifier()
    found = Screening()(evidence(network, Screening(), x, labels=y))
    hidden = network[:2](x).detach()
    f, p = f_classif(hidden.numpy(), y.numpy())
    np.testing.assert_allclose(found.log_p.exp(), p, rtol=1e-8)
    between = f * 2 / (f * 2 + 117) * hidden.var(0, correction=0).numpy()
    expected = np.sqrt(between) * network[2].weight.detach().norm(dim=0).numpy()
    np.testing.assert_allclose(found.importance, expected, rtol=1e-6)


def test_screening_of_pixels_takes_their_mean() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    x, y = torch.randn(40, 3, 8, 8), torch.randint(2, (40,))
    found = Screening(times="nothing")(evidence(network, Screening(), x, labels=y))
    _, p = f_classif(network[:2](x).detach().mean((2, 3)).double().numpy(), y.numpy())
    np.testing.assert_allclose(found.log_p.exp(), p, rtol=1e-4)


@pytest.mark.parametrize("several", [False, True])
def test_screening_of_real_targets_and_several_labels_is_by_correlation(several: bool) -> None:
    network, x, _ = classifier()
    y = x[:, :2].sign().add(1).div(2).long() if several else x[:, :2]
    found = Screening(times="nothing")(evidence(network, Screening(), x, labels=y))
    hidden = network[:2](x).detach().numpy()
    tests = [f_regression(hidden, y[:, k].double().numpy()) for k in range(2)]
    np.testing.assert_allclose(found.log_p.exp(), np.minimum(2 * np.min([p for _, p in tests], 0), 1), rtol=1e-8)
    np.testing.assert_allclose(found.importance, np.mean([f / (f + 118) for f, _ in tests], 0), rtol=1e-8)


def test_rows_without_a_class_are_left_out() -> None:
    network, x, y = classifier()
    some = y.masked_fill(torch.arange(120) % 3 == 0, -100)
    found = Screening()(evidence(network, Screening(), x, labels=some))
    _, p = f_classif(network[:2](x).detach().numpy()[some >= 0], y.numpy()[some >= 0])
    np.testing.assert_allclose(found.log_p.exp(), p, rtol=1e-8)


def test_more_classes_may_come_later() -> None:
    network, x, y = classifier()
    pruner = Pruner(network, Screening(), Units(0.5), OneShot(0.5))
    pruner.prepare(x[:2])
    pruner.recorder.memory = 1.0
    for part, labels in ((x[:60], y[:60]), (x[60:], y[60:] + 30)):
        with pruner.recording():
            network(part)
        pruner.recorder.hear(labels=labels)
    _, p = f_classif(network[:2](x).detach().numpy(), torch.cat([y[:60], y[60:] + 30]).numpy())
    np.testing.assert_allclose(Screening()(pruner._evidence(pruner.groups[0])).log_p.exp(), p, rtol=1e-8)


def test_series_of_classes_and_missing_labels_are_refused() -> None:
    network, x, y = classifier()
    with pytest.raises(ValueError, match=r"Expected one class for each item, got torch\.int64 of shape"):
        evidence(network, Screening(), x, labels=torch.stack([y, y], 1))
    with pytest.raises(ValueError, match="Expected labels for each of the 120 items that arrive at a layer, got 7"):
        evidence(network, Screening(), x, labels=y[:7])
    with pytest.raises(ValueError, match="Expected labels of the step that was recorded, got none: ByClass"):
        evidence(network, Screening(), x)


def test_connections_are_screened_by_weight_spread_and_effect() -> None:
    network, x, y = classifier()
    (reading,) = evidence(network, Screening(), x, labels=y).readings
    hidden = network[:2](x).detach()
    f, _ = f_classif(hidden.numpy(), y.numpy())
    eta = np.sqrt(f * 2 / (f * 2 + 117))
    expected = eta[:, None] * hidden.std(0, correction=0).numpy()[:, None] * network[2].weight.detach().abs().T.numpy()
    np.testing.assert_allclose(Screening().connections(reading), expected, rtol=1e-6)


def test_activation_frequency_counts_what_is_not_zero() -> None:
    network, x, _ = classifier()
    found = ActivationFrequency()(evidence(network, ActivationFrequency(), x)).importance
    torch.testing.assert_close(found, (network[:2](x) != 0).double().mean(0))


def test_ablation_is_what_the_loss_is_more_without_the_unit() -> None:
    network, x, y = classifier()
    pruner = Pruner(network, Ablation(), Units(0.5), OneShot(0.5))
    pruner.prepare(x[:2])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pruner.recorder.experiment(lambda: F.cross_entropy(network(x), y, reduction="none"))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    hidden = network[:2](x).detach()
    expected = []
    for unit in range(8):
        gate = (torch.arange(8) != unit).double()
        more = F.cross_entropy(network[2](hidden * gate), y) - F.cross_entropy(network[2](hidden), y)
        expected.append(more.item())
    found = pruner.score(pruner._evidence(pruner.groups[0])).importance
    np.testing.assert_allclose(found, np.clip(expected, 0, None), rtol=1e-9, atol=1e-12)


def test_random_gates_find_additive_effects() -> None:
    """Where the loss is a sum over units, the effect of a gate is exact, and the regression must find it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        network[2].weight.copy_(torch.tensor([[1.0, 2.0, 0.0, 0.5, -1.0, 0.0]]))
    x = torch.randn(4000, 4, dtype=torch.float64)
    pruner = Pruner(network, RandomGates(), Units(0.5), OneShot(0.5))
    pruner.prepare(x[:2])
    pruner.recorder.experiment(lambda: -network(x)[:, 0])
    found = pruner.score(pruner._evidence(pruner.groups[0]))
    effects = (network[:2](x).detach().mean(0) * network[2].weight.detach()[0]).clamp_min(0)
    torch.testing.assert_close(found.importance, effects, atol=0.03, rtol=0.05)
    assert (found.log_p[[0, 1, 3]] < -20).all()
    assert (found.log_p[[2, 4, 5]] > -5).all()


def test_what_is_lost_without_each_unit_is_that_of_explicit_refits() -> None:
    x = torch.randn(100, 6, dtype=torch.float64)
    x[:, 3] = x[:, 0] + 0.1 * x[:, 3]
    y = x @ torch.randn(6, 2, dtype=torch.float64) + torch.randn(100, 2, dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)

    def rss(columns: Tensor) -> float:
        return float((y - columns @ torch.linalg.lstsq(columns, y).solution).square().sum())

    found = leave_one_out([Regression(x.T @ x / 100, x.T @ y / 100, float(y.square().sum()) / 100)], 3)
    expected = []
    for unit in range(3):
        rest = [c for c in range(6) if c // 2 != unit]
        expected.append((rss(x[:, rest]) - rss(x)) / float(y.square().sum()))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_joint_moments_are_numpys_covariances() -> None:
    x, y = torch.randn(50, 4) + 100, torch.randn(50, 2) - 7
    joint = JointMoments(2, 2, width=2)
    for rows in (slice(0, 20), slice(20, 50)):
        joint.update(x[rows], y[rows])
    expected = np.cov(torch.cat([x, y], 1).double().numpy().T, bias=True)
    gram, cross, variance = joint.result()
    np.testing.assert_allclose(gram, expected[:4, :4], atol=1e-10)
    np.testing.assert_allclose(cross, expected[:4, 4:], atol=1e-10)
    assert variance == pytest.approx(np.trace(expected[4:, 4:]))


def test_bivariate_granger_is_that_of_the_panel() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(30, 12, 3).cumsum(1)
    y = network(x).detach()
    found = BivariateGranger(2)(evidence(network, BivariateGranger(2), x, outputs=y))
    panel = PanelGranger(5, 2, PanelDesign(2))
    panel.update(network[:2](x).detach(), y)
    torch.testing.assert_close(found.importance, panel.result().geweke.mean(0).clamp_min(0))
    assert Sequences(2) in BivariateGranger(2).witnesses


@pytest.mark.parametrize("target", ["labels", "outputs", "losses"])
def test_granger_finds_what_a_target_depends_on(target: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(6))
        network[0].bias.zero_()
    x = torch.randn(500, 6)
    known = {"labels": (x[:, 4] > 0).long(), "outputs": x[:, [4]], "losses": x[:, 4]}[target]
    score = Granger(0, target)
    found = score(evidence(network, score, x, **{target: known}))
    assert int(found.importance.argmax()) == 4
    assert int((found.log_p < np.log(1e-10)).sum()) == 1


def test_coupled_tensors_are_reduced_by_hand() -> None:
    given = Evidence(torch.tensor([[3.0, 4.0, 2.0], [0.0, 1.0, 5.0]]), fans=(2, 1))
    for how, expected in (("mean", [3.5, 3.0]), ("max", [5.0, 5.0]), ("sum", [7.0, 6.0])):
        assert Magnitude(reduction=how)(given).importance.tolist() == pytest.approx(expected)
        assert reduced([torch.tensor([5.0, 1.0]), torch.tensor([2.0, 5.0])], how).tolist() == pytest.approx(expected)
    assert Magnitude()(given).importance.tolist() == pytest.approx([29**0.5, 26**0.5])


def test_taylor_by_weights_is_the_recorded_sensitivity() -> None:
    given = Evidence(torch.ones(2, 1), effects={"sensitivity": torch.tensor([0.25, 0.5])})
    assert Taylor("weights")(given).importance.tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Granger, "lags", -1),
        (Granger, "target", "loss"),
        (Granger, "form", "bivariate"),
        (Screening, "statistic", "f"),
        (Screening, "times", "w"),
        (Magnitude, "reduction", "median"),
        (Taylor, "of", "unit"),
        (BivariateGranger, "lags", 0),
        (BivariateGranger, "axis", "steps"),
        (ActivationFrequency, "reduction", "min"),
    ],
)
def test_bad_arguments_are_refused(kind: type[Score], name: str, value: object) -> None:
    score = kind()
    object.__setattr__(score, name, value)  # the types are checked while tests run, and would be refused first
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        score.__post_init__()


def test_a_reading_of_the_moments_only_is_said_to_lack_the_rest() -> None:
    with pytest.raises(ValueError, match="Expected what ByClass gathers of units where they arrive, got nothing"):
        Screening()(Evidence(torch.ones(2, 1), (Reading(Moments(2), torch.ones(2, 1)),)))
