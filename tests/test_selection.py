"""How many units of each group stay, and which."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from torch import nn

from lightning_slim import Granger, MACs, Magnitude, OneShot, Pruner, Units, find_groups
from lightning_slim.costs import Costs
from lightning_slim.selection import Selection, plan_for, steepness
from lightning_slim.surgery import Example, find_work
from lightning_slim.units import MIN_UNITS
from tests.networks import Mixed, images

ORIGINAL = {"a": 10, "b": 20}
IMPORTANCE = {"a": torch.arange(10.0), "b": torch.arange(20.0) / 10}


def bare(**kwargs) -> Costs:
    """What bounds widths, and nothing else."""
    bounds = {"floors": dict.fromkeys(ORIGINAL, MIN_UNITS), "steps": dict.fromkeys(ORIGINAL, 1), "packs": {}} | kwargs
    return Costs(original=ORIGINAL, parameters=0, work=[], shapes={}, axes={}, **bounds)


def test_local_keeps_the_same_fraction_of_the_original_everywhere() -> None:
    assert Selection().widths(0.7, bare(), ORIGINAL, IMPORTANCE) == {"a": 7, "b": 14}
    shrunk = {"a": 7, "b": 14}
    now = {name: values[: shrunk[name]] for name, values in IMPORTANCE.items()}
    assert Selection().widths(0.5, bare(), shrunk, now) == {"a": 5, "b": 10}  # of 10 and 20: never compounding


def test_global_keeps_the_most_important_wherever_they_are() -> None:
    widths = Selection("global").widths(10 / 30, bare(), ORIGINAL, IMPORTANCE)
    assert widths == {"a": 8, "b": 2}  # a: 2..9; nothing of b but the floor


def test_widths_are_rounded_up_but_not_beyond_the_original() -> None:
    of_8 = bare(steps={"a": 8, "b": 8})
    assert Selection().widths(0.5, of_8, ORIGINAL, IMPORTANCE) == {"a": 8, "b": 16}
    assert Selection().widths(0.9, of_8, ORIGINAL, IMPORTANCE) == {"a": 10, "b": 20}


def test_a_group_may_have_a_floor_and_a_step_of_its_own() -> None:
    floors = {"a": 7, "b": 2}
    assert Selection().widths(0.1, bare(floors=floors), ORIGINAL, IMPORTANCE) == {"a": 7, "b": 2}
    of_their_own = bare(floors=floors, steps={"a": 4, "b": 16})
    assert Selection().widths(0.0, of_their_own, ORIGINAL, IMPORTANCE) == {"a": 8, "b": 16}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_levels_are_nested_and_end_at_the_floor_and_at_now(scope: str) -> None:
    selection = Selection(scope)  # type: ignore[arg-type]
    course = [selection.widths(level / 50, bare(), ORIGINAL, IMPORTANCE) for level in range(51)]
    assert all(a[name] <= b[name] for a, b in pairwise(course) for name in ORIGINAL)
    assert course[0] == {"a": MIN_UNITS, "b": MIN_UNITS}
    assert course[-1] == ORIGINAL


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("budget", [Units(0.5), MACs(0.5), Units(0.9), MACs(0.3)])
def test_a_budget_is_kept_and_nearly_spent(scope: str, budget) -> None:
    network, x = Mixed((16, 24, 32), 40), images(0)[0]
    costs = Costs.of(network, find_groups(network, x), find_work(network, {"": Example((x,), samples=1)}))
    importance = {name: torch.rand(units) for name, units in costs.original.items()}
    widths = Selection(scope).fit(budget.fraction, budget, costs, costs.original, importance)  # type: ignore[arg-type]
    assert budget.fraction * 0.93 < budget.remaining(costs, widths) <= budget.fraction


def bounded(**bounds) -> Pruner:
    torch.manual_seed(0)
    selection = Selection(**bounds)
    pruner = Pruner(Mixed(), Magnitude(), Units(0.5), OneShot(0.5), selection=selection, compensate="none")
    pruner.prepare(images(0)[0][:2])
    return pruner


@pytest.mark.parametrize("scope", ["local", "global"])
def test_layers_have_floors_and_ceilings(scope: str) -> None:
    pruner = bounded(scope=scope, keep_at_least={"c?": 0.75, "c1": 0.8}, keep_at_most={"fc1": 0.2})
    event = pruner.step(0.5)
    assert event is not None
    assert event.widths["c1"] >= 7  # 0.8 of 8, rounded up: the larger of two floors counts
    assert event.widths["c2"] >= 5  # of 6 pairs of channels
    assert event.widths["fc1"] <= 4
    assert event.reached <= 0.5


class Reading(nn.Module):
    """Two levels, which must keep as many units."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 10, 2, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def test_bounds_of_one_group_of_a_pack_are_bounds_of_all() -> None:
    torch.manual_seed(0)
    network = Reading()
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.selection = Selection(keep_at_most={"lstm": 0.3})
    pruner.prepare(torch.randn(2, 5, 4))
    assert set(pruner.costs.ceilings.values()) == {3}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"keep_at_least": {"c1": 1.5}}, r"fractions in \(0, 1\] in `keep_at_least`, got 1.5"),
        ({"keep_at_most": {"nowhere": 0.5}}, "`keep_at_most` to name layers.*got 'nowhere'"),
        ({"keep_at_least": {"c*": 0.5}, "keep_at_most": {"Conv2d": 0.25}}, "`keep_at_most` to leave c1 at least 4"),
    ],
)
def test_bad_bounds_are_refused(bounds: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded(**bounds)


def test_the_most_important_units_stay_and_ties_go_to_the_first() -> None:
    plan = plan_for({"a": 2, "b": 3}, {"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.ones(3)})
    assert plan["a"].tolist() == [False, True, True]
    assert "b" not in plan
    tied = plan_for({"b": 2}, {"b": torch.ones(3)})
    assert tied["b"].tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scope": "everywhere"}, "scope"),
        ({"round_to": 0}, "round_to"),
        ({"round_to": "8"}, "`round_to` of at least 1, or \"auto\", got '8'"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**kwargs)


def test_a_curve_is_as_steep_as_isotonic_regression_says() -> None:
    gains = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 30
    curves = {"a": gains[:20].cumsum(0), "b": gains[20:].cumsum(0)}
    found = steepness(curves, {"a": 1.0, "b": 4.0})
    expected = [
        IsotonicRegression(increasing=False).fit_transform(range(len(part)), part) / cost
        for part, cost in ((gains[:20].numpy(), 1.0), (gains[20:].numpy(), 4.0))
    ]
    np.testing.assert_allclose(
        torch.cat(list(found.values())), np.concatenate(expected) / np.concatenate(expected).mean()
    )


def test_the_budget_is_spent_where_the_curve_is_steepest() -> None:
    """Two groups of one cost: of twelve units, one group needs two and the other all."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    with torch.no_grad():
        network[0].weight[2:] = network[0].weight[:2].repeat(5, 1) + 0.01 * torch.randn(10, 12)
        network[0].bias[2:] = network[0].bias[:2].repeat(5)
        network[2].weight.mul_(3)
    x = torch.randn(500, 12)
    pruner = Pruner(network, Granger(0), Units(0.5), OneShot(0.5), selection=Selection("global"))
    pruner.prepare(x[:2])
    with pruner.recording():
        network(x)
    event = pruner.step(0.5)
    assert event is not None
    assert event.widths["0"] <= 4
    assert event.widths["0"] + event.widths["2"] == 12
