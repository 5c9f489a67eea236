"""No NaN leaves anything that the statistics offer, whatever finite numbers come in."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_slim.statistics as statistics
from lightning_slim.statistics import (
    Moments,
    PanelDesign,
    Regression,
    adjusted_log_p,
    adjusted_p,
    backward_elimination,
    chi2_log_sf,
    common_lag_order,
    differences,
    distinct_rows,
    f_log_sf,
    fit_var,
    forward_selection,
    granger_test,
    kruskal_wallis,
    least_squares_image,
    leave_one_out,
    leave_one_out_test,
    merged,
    mutual_information,
    over_rolling_rms,
    quantile_edges,
    ridge_leave_one_out,
    spectral_causality,
    stationarity,
    thinned,
    with_lags,
)
from lightning_slim.statistics.streaming import Accumulator
from tests.statistics.test_bivariate import awkward
from tests.statistics.test_streaming import accumulators

STEPS, UNITS, CLASSES = 60, 12, 4


def labels() -> Tensor:
    return torch.randint(CLASSES, (STEPS,)) * (torch.rand(STEPS) > 0.3)


def moments() -> Moments:
    result = Moments(UNITS)
    for part in awkward(STEPS, UNITS).split(20):
        result.update(part)
    return result


def regression() -> Regression:
    both = moments().covariance
    return Regression(both[:8, :8], both[:8, 8:], float(both.diagonal()[8:].sum()))


def statistic() -> Tensor:
    return torch.cat([10.0 ** torch.randint(-300, 300, (20,)).double(), torch.tensor([0.0, -1.0, torch.inf])])


def p_values() -> Tensor:
    return torch.cat([torch.rand(20).double() ** 40, torch.tensor([0.0, 1.0, 5e-324])])


def table() -> Tensor:
    return torch.poisson(torch.rand(UNITS, 5, CLASSES)) * 10.0 ** torch.randint(0, 9, (UNITS, 1, 1))


FUNCTIONS: dict[Callable[..., Any], Callable[[], Any]] = {
    adjusted_log_p: lambda: adjusted_log_p(p_values().log()),
    adjusted_p: lambda: adjusted_p(p_values()),
    backward_elimination: lambda: backward_elimination([regression()], 4),
    chi2_log_sf: lambda: [chi2_log_sf(statistic(), df) for df in (0, 1, 7, 40, 0.5, 1e8)],
    common_lag_order: lambda: common_lag_order(awkward(STEPS, UNITS), awkward(STEPS, 4), 4),
    differences: lambda: differences(awkward(STEPS, UNITS)),
    distinct_rows: lambda: distinct_rows(torch.arange(3), 10, 2),
    f_log_sf: lambda: [f_log_sf(statistic(), *df) for df in ((0, 3), (1, 1), (7, 1e8), (40, 2), (1.5, 0.5))],
    fit_var: lambda: [fit_var(a[None], b[None], 2) for a, b in pairs()],
    forward_selection: lambda: forward_selection([regression()], 4),
    granger_test: lambda: [
        granger_test(awkward(STEPS, UNITS), awkward(STEPS, 4), 2, robust=how) for how in ("none", "hc3")
    ],
    kruskal_wallis: lambda: kruskal_wallis(awkward(STEPS, UNITS), labels(), CLASSES),
    least_squares_image: lambda: [
        least_squares_image(moments(), torch.arange(5), torch.arange(5, UNITS), intercept=intercept)
        for intercept in (True, False)
    ],
    leave_one_out: lambda: leave_one_out([regression()], 4),
    leave_one_out_test: lambda: leave_one_out_test(awkward(STEPS, UNITS), awkward(STEPS, 2), 2),
    merged: lambda: merged([moments(), moments(), Moments(UNITS)]).result(),
    mutual_information: lambda: mutual_information(table()),
    over_rolling_rms: lambda: over_rolling_rms(awkward(STEPS, UNITS)),
    quantile_edges: lambda: quantile_edges(awkward(STEPS, UNITS), 8),
    ridge_leave_one_out: lambda: ridge_leave_one_out(awkward(STEPS, 40), awkward(STEPS, 2), 2),
    spectral_causality: lambda: [spectral_causality(fit_var(a[None], b[None], 2)) for a, b in pairs()],
    stationarity: lambda: stationarity(awkward(STEPS, 4)),
    thinned: lambda: thinned(awkward(STEPS, UNITS), 7),
    with_lags: lambda: with_lags(awkward(STEPS, UNITS)[None], 2),
}


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    return zip(awkward(STEPS, UNITS).T, awkward(STEPS, UNITS).T, strict=True)


def sequences() -> tuple[Tensor, ...]:
    """Each unit awkward in its own way in all items; targets likewise; some items short, some of one step."""
    units, targets = (torch.stack([awkward(20, number) for _ in range(6)]) for number in (UNITS, 3))
    return units, targets, torch.randint(1, 21, (6,))


ACCUMULATORS: dict[str, tuple[Callable[[type], Accumulator], Callable[[], tuple[Tensor, ...]]]] = {
    "Anova": (lambda kind: kind(CLASSES, UNITS), lambda: (awkward(STEPS, UNITS), labels())),
    "ChiSquare": (lambda kind: kind(CLASSES, UNITS), lambda: (awkward(STEPS, UNITS).abs(), labels())),
    "Correlation": (lambda kind: kind(3, UNITS), lambda: (awkward(STEPS, UNITS), awkward(STEPS, 3))),
    "MultilabelAnova": (lambda kind: kind(3, UNITS), lambda: (awkward(STEPS, UNITS), torch.rand(STEPS, 3) > 0.9)),
    "MutualInformation": (
        lambda kind: kind(quantile_edges(awkward(STEPS, UNITS), 5), CLASSES),
        lambda: (awkward(STEPS, UNITS), labels()),
    ),
    "KruskalWallis": (
        lambda kind: kind(quantile_edges(awkward(STEPS, UNITS), 5), CLASSES),
        lambda: (awkward(STEPS, UNITS), labels()),
    ),
    "Frequency": (lambda kind: kind(UNITS), lambda: (awkward(STEPS, UNITS),)),
    "JointMoments": (lambda kind: kind(UNITS, 3), lambda: (awkward(STEPS, UNITS), awkward(STEPS, 3))),
    "Spread": (lambda kind: kind(UNITS), lambda: (awkward(STEPS, UNITS),)),
    "Moments": (lambda kind: kind(UNITS), lambda: (awkward(STEPS, UNITS),)),
    "PanelGranger": (lambda kind: kind(UNITS, 3, PanelDesign(lags=2)), sequences),
    "ClusteredPanel": (lambda kind: kind(UNITS, 3, PanelDesign(lags=2)), sequences),
    "DumitrescuHurlin": (lambda kind: kind(UNITS, 3), sequences),
}


def numbers(result: Any) -> Iterator[Tensor]:
    """All numbers of a result: tensors, fields and properties, at any depth."""
    if isinstance(result, Tensor | int | float):
        yield torch.as_tensor(result)
    elif dataclasses.is_dataclass(result):
        for name in {*(field.name for field in dataclasses.fields(result)), *properties(result)}:
            yield from numbers(getattr(result, name))
    else:
        for part in result:
            yield from numbers(part)


def properties(result: Any) -> list[str]:
    return [name for name, value in inspect.getmembers(type(result)) if isinstance(value, property) and name[0] != "_"]


def test_every_public_function_and_accumulator_is_asked() -> None:
    public = {value for value in map(statistics.__dict__.get, statistics.__all__) if inspect.isfunction(value)}
    assert public == set(FUNCTIONS)
    assert {kind.__name__ for kind in accumulators()} == set(ACCUMULATORS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_no_nan_leaves_a_function(function: Callable[..., Any], seed: int) -> None:
    torch.manual_seed(seed)
    found = list(numbers(FUNCTIONS[function]()))
    assert found
    assert not any(part.isnan().any() for part in found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", accumulators(), ids=lambda kind: kind.__name__)
def test_no_nan_leaves_an_accumulator(kind: type[Accumulator], seed: int) -> None:
    torch.manual_seed(seed)
    make, batch = ACCUMULATORS[kind.__name__]
    accumulator = make(kind)
    for _ in range(3):
        accumulator.update(*batch())
        assert not any(part.isnan().any() for part in numbers(tuple(accumulator.result())))
    assert not any(tensor.isnan().any() for tensor in accumulator.state_dict().values())
