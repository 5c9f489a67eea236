"""Screening statistics equal scipy's and scikit-learn's, and are defined where those are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.feature_selection import chi2, f_classif, f_regression
from sklearn.metrics import mutual_info_score
from torch import Tensor

from lightning_slim.statistics.anova import Anova
from lightning_slim.statistics.chi_square import ChiSquare
from lightning_slim.statistics.contingency import quantile_edges
from lightning_slim.statistics.correlation import Correlation, MultilabelAnova
from lightning_slim.statistics.information import MutualInformation
from lightning_slim.statistics.kruskal import KruskalWallis, kruskal_wallis
from lightning_slim.statistics.screening import Screening
from lightning_slim.statistics.streaming import Accumulator

ROWS, UNITS, CLASSES = 900, 7, 5


def streamed(accumulator: Accumulator, values: Tensor, labels: Tensor, batch: int = 64) -> Screening:
    for rows, answers in zip(values.split(batch), labels.split(batch), strict=True):
        accumulator.update(rows, answers)
    return Screening(*accumulator.result())


def data(offset: float = 0.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Float64 values that shifting and scaling round exactly alike, and labels that some units know of."""
    labels = torch.randint(CLASSES, (ROWS,))
    values = torch.randn(ROWS, UNITS, dtype=torch.float64) + labels[:, None] * torch.linspace(0, 0.5, UNITS)
    return ((values * 2**20).round() / 2**20 + offset) * scale, labels


def groups(values: Tensor, labels: Tensor) -> list[np.ndarray]:
    return [values[labels == label].numpy() for label in labels.unique()]


def check(got: Screening, statistic: np.ndarray, p_value: np.ndarray, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(got.statistic, statistic, rtol=rtol)
    np.testing.assert_allclose(got.log_p, np.log(p_value), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.p_value, p_value, rtol=1e-6)


def untestable(got: Screening, unit: int = 0) -> None:
    assert got.statistic[..., unit].eq(0).all()
    assert got.effect[..., unit].eq(0).all()
    assert got.p_value[..., unit].eq(1).all()
    assert got.log_p[..., unit].eq(0).all()


# --- analysis of variance


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e7])
@pytest.mark.parametrize("ordered", [False, True])
def test_anova_equals_scipy_beside_large_means_and_at_any_scale(offset: float, scale: float, ordered: bool) -> None:
    values, labels = data(offset, scale)
    if ordered:  # one class after the other: the first batch tells nothing of the mean
        values, labels = values[labels.argsort()], labels.sort().values
    exact = values / scale - offset
    statistic, p_value = stats.f_oneway(*groups(exact, labels))
    check(streamed(Anova(CLASSES, UNITS), values, labels), statistic, p_value, 1e-11 if scale == 1 else 1e-7)


def test_anova_effect_is_eta_squared() -> None:
    values, labels = data()
    means = np.stack([group.mean(0) for group in groups(values, labels)])[labels.numpy()]
    expected = ((means - values.numpy().mean(0)) ** 2).sum(0) / ((values.numpy() - values.numpy().mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(streamed(Anova(CLASSES, UNITS), values, labels).effect, expected, rtol=1e-12)


def test_anova_equals_f_classif_on_many_classes_some_of_them_empty() -> None:
    values, labels = data()
    labels = torch.randint(200, (ROWS,)) * 5
    got = streamed(Anova(1000, UNITS), values, labels)
    check(got, *f_classif(values.numpy(), labels.numpy()))
    assert got.df1.unique().tolist() == [len(labels.unique()) - 1]


@pytest.mark.parametrize("separation", [10.0, 1e3, 1e5])
def test_anova_of_nearly_perfect_separation_keeps_its_digits(separation: float) -> None:
    values, labels = data()
    exact = torch.stack([values[labels == label, 0][:100] for label in range(CLASSES)])  # classes rows
    exact = exact - exact.mean(1, keepdim=True)
    within = exact.square().sum()
    shift = separation * torch.arange(CLASSES, dtype=torch.float64)
    rows, names = (exact + shift[:, None]).flatten()[:, None], torch.arange(CLASSES).repeat_interleave(100)
    expected = (100 * (shift - shift.mean()).square().sum() / (CLASSES - 1)) / (within / (len(rows) - CLASSES))
    got = streamed(Anova(CLASSES, 1), rows, names).statistic
    torch.testing.assert_close(got[0], expected, rtol=1e-13 * separation**2 + 1e-12, atol=0)


def test_anova_of_perfect_separation_is_infinite_as_scipys() -> None:
    labels = torch.randint(3, (60,))
    got = streamed(Anova(3, 2), torch.stack([labels / 7, labels * 1e7 + 0.1], 1).double(), labels)
    assert got.statistic.tolist() == [np.inf, np.inf]
    assert got.p_value.tolist() == [0, 0]
    assert got.effect.tolist() == [1, 1]


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e7 + 0.3, -1e-12])
def test_a_dead_unit_tells_nothing(constant: float) -> None:
    values, labels = data()
    values[:, 0] = constant
    untestable(streamed(Anova(CLASSES, UNITS), values, labels))
    untestable(streamed(Correlation(1, UNITS), values, labels[:, None].double()))
    untestable(streamed(MultilabelAnova(1, UNITS), values, labels[:, None] > 2))
    untestable(streamed(KruskalWallis(quantile_edges(values, 8), CLASSES), values, labels))
    untestable(streamed(MutualInformation(quantile_edges(values, 8), CLASSES), values, labels))
    untestable(kruskal_wallis(values, labels, CLASSES))
    values[:, 0] = 0
    untestable(streamed(ChiSquare(CLASSES, UNITS), values.abs(), labels))


def test_copies_have_the_same_statistic() -> None:
    values, labels = data()
    values[:, 3] = values[:, 1]
    for got in (
        streamed(Anova(CLASSES, UNITS), values, labels),
        streamed(KruskalWallis(quantile_edges(values, 8), CLASSES), values, labels),
        kruskal_wallis(values, labels, CLASSES),
    ):
        torch.testing.assert_close(got.statistic[1], got.statistic[3], rtol=1e-12, atol=0)


def test_one_row_a_class_or_one_class_tells_nothing() -> None:
    values, _ = data()
    for labels in (torch.arange(4), torch.zeros(4, dtype=torch.long)):
        untestable(streamed(Anova(4, UNITS), values[:4], labels))
    untestable(kruskal_wallis(values[:4], torch.zeros(4, dtype=torch.long), 4))
    untestable(streamed(MutualInformation(quantile_edges(values, 8), 4), values[:4], torch.zeros(4, dtype=torch.long)))


def test_room_is_made_for_classes_that_come_later() -> None:
    x, labels = torch.randn(60, 3, dtype=torch.float64), torch.arange(60) // 20
    anova = Anova(classes=1, units=3)
    for part in range(3):
        anova.grow(part + 1)
        anova.update(x[labels == part], labels[labels == part])
    anova.grow(2)  # there are more already
    np.testing.assert_allclose(anova.result().statistic, f_classif(x.numpy(), labels.numpy())[0], rtol=1e-10)


def test_a_class_without_rows_does_not_count() -> None:
    values, labels = data()
    labels[labels == 2] = 3
    check(streamed(Anova(CLASSES + 3, UNITS), values, labels), *f_classif(values.numpy(), labels.numpy()))
    check(streamed(ChiSquare(CLASSES + 3, UNITS), values.abs(), labels), *chi2(values.abs().numpy(), labels.numpy()))
    check(kruskal_wallis(values, labels, CLASSES + 3), *stats.kruskal(*groups(values, labels)))


@pytest.mark.parametrize("bad", [-1, CLASSES])
def test_labels_that_are_no_class_are_refused(bad: int) -> None:
    values, labels = data()
    labels[3] = bad
    edges = quantile_edges(values, 4)
    for accumulator in (Anova(CLASSES, UNITS), ChiSquare(CLASSES, UNITS), KruskalWallis(edges, CLASSES)):
        with pytest.raises(ValueError, match=r"Expected labels 0 \.\.\. 4, got .* leave out rows without a class"):
            accumulator.update(values.abs(), labels)
    with pytest.raises(ValueError, match="raise `classes`"):
        kruskal_wallis(values, labels, CLASSES)


# --- correlation


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e7])
def test_correlation_equals_f_regression(offset: float, scale: float) -> None:
    values, labels = data(offset, scale)
    targets = torch.stack([labels.double(), labels + torch.randn(ROWS, dtype=torch.float64)], 1) * scale + offset
    got = streamed(Correlation(2, UNITS), values, targets)
    for k in range(2):
        exact = values / scale - offset, (targets[:, k] - offset) / scale
        expected = f_regression(exact[0].numpy(), exact[1].numpy())
        loose = 1e-9 if scale == 1 else 1e-4 if offset else 1e-7  # offset + 1e-12 * noise has lost its own digits
        check(Screening(*(part[k] for part in got)), *expected, loose)


def test_correlation_effect_is_r_squared() -> None:
    values, labels = data(10.0)
    expected = [stats.pearsonr(values[:, i], labels).statistic ** 2 for i in range(UNITS)]
    np.testing.assert_allclose(streamed(Correlation(1, UNITS), values, labels[:, None].double()).effect[0], expected)


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_correlation_of_nearly_collinear_units_keeps_its_digits(noise: float) -> None:
    target, other = torch.randn(2, ROWS, dtype=torch.float64)
    x, y = target - target.mean(), other - other.mean()
    y = y - (x @ y) / (x @ x) * x  # exactly uncorrelated: F in closed form
    expected = (x @ x) / (noise**2 * (y @ y)) * (ROWS - 2)
    got = streamed(Correlation(1, 1), (x + noise * y)[:, None] + 3, target[:, None] - 5).statistic[0, 0]
    torch.testing.assert_close(got, expected, rtol=1e-13 / noise**2, atol=0)


def test_correlation_of_a_line_is_infinite_and_of_a_constant_target_zero() -> None:
    values, _ = data()
    got = streamed(Correlation(2, UNITS), values, torch.stack([3 - 2 * values[:, 1], torch.full((ROWS,), 0.1)], 1))
    assert got.statistic[0, 1] == np.inf
    assert got.effect[0, 1] == 1
    assert not got.statistic[1].any()


def test_several_labels_equal_f_classif_label_by_label() -> None:
    values, labels = data(100.0)
    answers = torch.stack([labels > 2, labels % 2 == 0, torch.rand(ROWS) > 0.9, labels < 9], 1)
    got = streamed(MultilabelAnova(4, UNITS), values, answers)
    for k in range(3):
        check(Screening(*(part[k] for part in got)), *f_classif((values - 100).numpy(), answers[:, k].numpy()))
    assert not got.statistic[3].any()  # a label that all rows have


# --- chi-squared


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_chi_square_equals_scikit_learn(scale: float) -> None:
    values, labels = data()
    values = values.relu() * scale
    statistic, p_value = chi2(values.numpy(), labels.numpy())
    got = streamed(ChiSquare(CLASSES, UNITS), values, labels)
    np.testing.assert_allclose(got.statistic, statistic, rtol=1e-10)
    np.testing.assert_allclose(got.p_value, p_value, rtol=1e-6, atol=1e-300)
    np.testing.assert_allclose(got.effect, statistic / values.sum(0), rtol=1e-10)


def test_chi_square_refuses_negative_values() -> None:
    with pytest.raises(ValueError, match=r"not negative, got -0\.5: record behind a ReLU, or use `Anova`"):
        ChiSquare(2, 1).update(torch.tensor([[-0.5]]), torch.tensor([0]))


# --- bins


@pytest.mark.parametrize("bins", [2, 8, 32])
def test_mutual_information_equals_scikit_learn_on_the_same_bins(bins: int) -> None:
    values, labels = data()
    values[:, 1] = values[:, 1].relu()
    edges = quantile_edges(values[:200], bins)
    got = streamed(MutualInformation(edges, CLASSES), values, labels)
    binned = [np.searchsorted(edges[i], values[:, i]) for i in range(UNITS)]
    expected = [mutual_info_score(column, labels) for column in binned]
    np.testing.assert_allclose(got.effect, expected, rtol=1e-10, atol=1e-14)
    G = [
        stats.chi2_contingency(stats.contingency.crosstab(b, labels).count, lambda_=0, correction=False) for b in binned
    ]
    check(got, np.array([g.statistic for g in G]), np.array([g.pvalue for g in G]), 1e-9)


@pytest.mark.parametrize("bins", [2, 8, 32])
def test_binned_kruskal_wallis_is_exact_on_binned_values(bins: int) -> None:
    values, labels = data()
    edges = quantile_edges(values[:200], bins)
    binned = torch.searchsorted(edges, values.T.contiguous()).T
    got = streamed(KruskalWallis(edges, CLASSES), values, labels)
    check(got, *stats.kruskal(*groups(binned, labels)))


def test_binned_kruskal_wallis_approaches_the_exact_one() -> None:
    values, labels = data()
    exact = kruskal_wallis(values, labels, CLASSES)
    binned = streamed(KruskalWallis(quantile_edges(values[:400], 64), CLASSES), values, labels)
    np.testing.assert_allclose(binned.effect, exact.effect, rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("decimals", [0, 1, 9])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_kruskal_wallis_equals_scipy_with_ties(decimals: int, scale: float) -> None:
    values, labels = data()
    values = values.round(decimals=decimals) * scale + 1e-3 * scale
    check(kruskal_wallis(values, labels, CLASSES), *stats.kruskal(*groups(values, labels)))


def test_kruskal_wallis_ranks_in_blocks(monkeypatch) -> None:
    values, labels = data()
    expected = kruskal_wallis(values, labels, CLASSES)
    monkeypatch.setattr("lightning_slim.statistics.kruskal.BLOCK", 2 * ROWS)
    torch.testing.assert_close(kruskal_wallis(values, labels, CLASSES).statistic, expected.statistic)


def test_kruskal_wallis_leaves_out_units_that_are_not_finite() -> None:
    values, labels = data()
    values[5, 0] = torch.nan
    untestable(kruskal_wallis(values, labels, CLASSES))
    check(
        Screening(*(part[1:] for part in kruskal_wallis(values, labels, CLASSES))),
        *stats.kruskal(*groups(values[:, 1:], labels)),
    )


def test_quantile_bins_are_equally_full_and_edges_may_coincide() -> None:
    values, labels = data()
    values[:, 0] = (values[:, 0] > 1).double()
    table = MutualInformation(quantile_edges(values, 9), CLASSES)
    table.update(values, labels)
    assert table.table.sum(2)[1:].unique().tolist() == [ROWS / 9]
    assert (table.table.sum(2)[0] > 0).sum() == 2
    with pytest.raises(ValueError, match="Edges need at least 2 bins and 1 row, got 1 and 900"):
        quantile_edges(values, 1)


def test_one_in_twenty_is_rejected_where_there_is_nothing_to_find() -> None:
    """Under the null hypothesis one p in twenty is below 0.05, whichever the test."""
    values, labels = torch.randn(ROWS, 2000, dtype=torch.float64), torch.randint(CLASSES, (ROWS,))
    edges = quantile_edges(values[:200], 6)
    for got in (
        streamed(ChiSquare(CLASSES, 2000), torch.poisson(torch.full_like(values, 2.0)), labels),
        streamed(Anova(CLASSES, 2000), values, labels),
        streamed(Correlation(1, 2000), values, torch.randn(ROWS, 1)),
        streamed(MultilabelAnova(1, 2000), values, labels[:, None] > 2),
        streamed(MutualInformation(edges, CLASSES), values, labels),
        streamed(KruskalWallis(edges, CLASSES), values, labels),
        kruskal_wallis(values, labels, CLASSES),
    ):
        assert 0.03 <= (got.p_value < 0.05).double().mean() <= 0.07
