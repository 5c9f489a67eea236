"""How many units of each group stay, and which."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from torch import nn

from lightning_slim import Granger, MACs, Magnitude, OneShot, Params, Pruner, Units, find_groups
from lightning_slim.budgets import Budget
from lightning_slim.costs import Costs
from lightning_slim.isomorphism import classes
from lightning_slim.selection import Scope, Selection, plan_for, steepness
from lightning_slim.surgery import Example, find_work
from lightning_slim.units import MIN_UNITS
from tests.networks import Mixed, images
from tests.surgery.test_blocks import Residual
from tests.zoo.residual import resnet18

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


def test_isomorphic_ranks_the_units_of_a_class_among_each_other() -> None:
    original = {"a": 10, "b": 20, "c": 10, "d": 10}
    classes = {"a": "a", "b": "a", "c": "c", "d": "c"}
    costs = replace(bare(floors=dict.fromkeys(original, 2), steps=dict.fromkeys(original, 1)), original=original)
    importance = {
        **IMPORTANCE,  # of the 15 most important of 30, a has 8 (2..9), b 7 (1.3..1.9): 1.2 is the 16th
        "c": 100 + torch.arange(10.0),  # of the 10 of 20, c has all
        "d": torch.arange(10.0),
    }
    widths = Selection("isomorphic").widths(0.5, replace(costs, classes=classes), original, importance)
    assert widths == {"a": 8, "b": 7, "c": 10, "d": 2}  # the floor
    everywhere = {"a": 8, "b": 2, "c": 10, "d": 8}  # all of c, 2..9 of a and d, and b's floor
    assert Selection("global").widths(0.5, costs, original, importance) == everywhere


def test_the_isomorphic_groups_of_a_resnet() -> None:
    network, x = resnet18(), torch.randn(2, 3, 32, 32)
    found = classes(network, find_groups(network, x))
    inner = {f"{i}.body.0.0" for i in range(1, 9)}  # convolution, norm, and the convolution that reads it
    assert {name for name, first in found.items() if first == "1.body.0.0"} == inner
    # The streams: of the first and the last, other layers write and read than of the two between them.
    assert {first for name, first in found.items() if name not in inner} == {"0.0.0", "3.body.1.0", "7.body.1.0"}
    assert found["5.body.1.0"] == "3.body.1.0"


def test_isomorphic_groups_of_a_transformer_keep_the_same_fraction() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    network = nn.Sequential(nn.Linear(5, 16), layers, nn.Linear(16, 3))
    with torch.no_grad():  # what is loud for its layer is quiet for the network
        network[1].layers[0].linear1.weight[:18] *= 4
        network[1].layers[1].linear1.weight[:6] *= 4
    selection = Selection("isomorphic")
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), selection=selection, compensate="none")
    pruner.prepare(torch.randn(2, 7, 5))
    mlp, heads = (tuple(f"1.layers.{i}.{name}" for i in (0, 1)) for name in ("linear1", "self_attn.heads"))
    assert pruner.costs.classes == {
        "0": "0",
        **dict.fromkeys(mlp, mlp[0]),
        **dict.fromkeys(heads, heads[0]),
    }
    event = pruner.step(0.5)
    assert event is not None
    assert event.widths["0"] == 8  # a class of its own: half of 16
    assert sum(event.widths[name] for name in mlp) == 24  # half of 2 x 24
    assert sum(event.widths[name] for name in heads) == 4  # half of 2 x 4
    assert event.reached == 0.5
    again = Costs.from_state(pruner.costs.to_state())
    assert again.classes == pruner.costs.classes


def test_blocks_are_ranked_among_blocks() -> None:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3, padding=1), *(Residual(8) for _ in range(4)))
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    selection = Selection("isomorphic")
    pruner = Pruner(
        network, Magnitude(), Units(0.5), OneShot(0.5), selection=selection, compensate="none", granularity="both"
    )
    pruner.prepare(torch.randn(2, 3, 8, 8))
    inner = [f"{i}.c1" for i in range(1, 5)]
    assert {name for name, first in pruner.costs.classes.items() if first == "1.c1"} == set(inner)
    assert len(set(pruner.costs.classes.values())) == 3  # the stream, what is within blocks, the blocks


def test_widths_are_rounded_up_but_not_beyond_the_original() -> None:
    of_8 = bare(steps={"a": 8, "b": 8})
    assert Selection().widths(0.5, of_8, ORIGINAL, IMPORTANCE) == {"a": 8, "b": 16}
    assert Selection().widths(0.9, of_8, ORIGINAL, IMPORTANCE) == {"a": 10, "b": 20}


def test_a_group_may_have_a_floor_and_a_step_of_its_own() -> None:
    floors = {"a": 7, "b": 2}
    assert Selection().widths(0.1, bare(floors=floors), ORIGINAL, IMPORTANCE) == {"a": 7, "b": 2}
    of_their_own = bare(floors=floors, steps={"a": 4, "b": 16})
    assert Selection().widths(0.0, of_their_own, ORIGINAL, IMPORTANCE) == {"a": 8, "b": 16}


@pytest.mark.parametrize("scope", get_args(Scope))
def test_levels_are_nested_and_end_at_the_floor_and_at_now(scope: str) -> None:
    selection = Selection(scope)  # type: ignore[arg-type]
    course = [selection.widths(level / 50, bare(), ORIGINAL, IMPORTANCE) for level in range(51)]
    assert all(a[name] <= b[name] for a, b in pairwise(course) for name in ORIGINAL)
    assert course[0] == {"a": MIN_UNITS, "b": MIN_UNITS}
    assert course[-1] == ORIGINAL


@pytest.mark.parametrize("scope", get_args(Scope))
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


@pytest.mark.parametrize("scope", get_args(Scope))
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


def test_the_ratio_of_macs_to_params_by_hand() -> None:
    """A layer's own is its number of positions, whatever its width; a network's goes by which layers shrink."""
    network = nn.Sequential(nn.Conv1d(1, 8, 1, bias=False), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    network.append(nn.Linear(8, 6, bias=False)).append(nn.Linear(6, 2, bias=False))
    x = torch.randn(1, 1, 100)
    groups = find_groups(network, x)
    costs = Costs.of(network, groups, find_work(network, {"": Example((x,), samples=1)}))
    whole = (100 * 8 + 8 * 6 + 6 * 2) / (8 + 8 * 6 + 6 * 2)
    for a, b in ((8, 6), (4, 6), (8, 3), (2, 2)):
        ratio = (100 * a + a * b + b * 2) / (a + a * b + b * 2)
        assert costs.macs_to_params({"0": a, "3": b}) == pytest.approx(ratio / whole)


BOUNDS = (0.97, 1.03)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("budget", [Units(0.4), Params(0.5), MACs(0.5)], ids=lambda budget: type(budget).__name__)
def test_macs_per_parameter_stay_within_bounds(scope: str, budget: Budget) -> None:
    torch.manual_seed(0)
    network, x = Mixed((32, 48, 64), 80), images(0)[0]
    costs = Costs.of(network, find_groups(network, x), find_work(network, {"": Example((x,), samples=16)}))
    loud = {"c1": 3.0, "c2": 2.5, "up": 1.5, "fc1": 1.0}  # so that layers of many positions keep most
    importance = {name: loud[name] * (0.5 + torch.rand(units)) for name, units in costs.original.items()}
    fit = {
        bounds: Selection(scope, macs_to_params=bounds).fit(  # type: ignore[arg-type]
            budget.target(costs), budget, costs, costs.original, importance
        )
        for bounds in (None, BOUNDS)
    }
    without, within = (costs.macs_to_params(widths) for widths in fit.values())
    assert BOUNDS[0] <= within <= BOUNDS[1]
    assert scope == "local" or without > 1.1
    assert 0.95 * budget.target(costs) <= budget.remaining(costs, fit[BOUNDS]) <= budget.target(costs)


def test_wide_bounds_change_nothing_and_close_ones_tilt_within_classes() -> None:
    torch.manual_seed(0)
    network, x = resnet18(), torch.randn(2, 3, 32, 32)
    groups = find_groups(network, x)
    whole = Costs.of(network, groups, find_work(network, {"": Example((x,), samples=2)}))
    importance = {name: torch.rand(units) for name, units in whole.original.items()}

    def ratio(bounds: tuple[float, float] | None) -> float:
        selection = Selection("isomorphic", macs_to_params=bounds)
        costs = selection.bounded(whole, network, groups)
        return costs.macs_to_params(selection.fit(0.5, MACs(0.5), costs, costs.original, importance))

    free = ratio(None)
    assert ratio((0.2, 5.0)) == free
    bound = 1 + (free - 1) / 2
    assert abs(ratio((min(bound, 1.0), max(bound, 1.0))) - 1) < abs(free - 1)


def test_bounds_that_no_width_keeps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"can be kept with Units\(.*got \(0.9999, 1.0001\): the closest is"):
        bounded(macs_to_params=(0.9999, 1.0001))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"macs_to_params": (1.1, 1.3)}, r"the original's 1 between them.*got \(1.1, 1.3\)"),
        ({"macs_to_params": (0.0, 1.3)}, "the original's 1 between them"),
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
        ({"scope": "everywhere"}, '"local", "global" or "isomorphic", got \'everywhere\''),
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


def test_finer_groups_go_where_one_step_of_a_pack_is_more_than_what_is_left_to_go() -> None:
    """Of 84 units one is to go: not a head and its eight channels."""
    original, current = {"heads": 4, "stream": 32, "c": 64}, {"heads": 4, "stream": 32, "c": 48}
    costs = replace(
        bare(), original=original, floors=dict.fromkeys(original, 2), packs={"heads": "p", "stream": "p"},
        steps={"heads": 1, "stream": 8, "c": 1},
    )  # fmt: skip
    importance = {name: torch.rand(units) for name, units in current.items()}
    assert Selection().fit(0.83, Units(), costs, current, importance) == {"heads": 4, "stream": 32, "c": 47}
