"""Random structures at a budget, and how they are told about."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_slim import Exploration, MACs, Params, Units, find_groups
from lightning_slim.budgets import Budget
from lightning_slim.costs import Costs
from lightning_slim.explore import Structure, draw_widths
from lightning_slim.monitor import Monitor
from lightning_slim.selection import Selection
from lightning_slim.surgery import Example, find_work


def costs_of(*widths: int, round_to: int = 1) -> Costs:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    groups = find_groups(net, torch.randn(2, widths[0]))
    costs = Costs.of(net, groups, find_work(net, {"": Example((torch.randn(1, widths[0]),))}))
    return Selection(round_to=round_to).bounded(costs, net, groups)


def importance(costs: Costs) -> dict[str, torch.Tensor]:
    return {name: torch.rand(units) for name, units in costs.original.items()}


@pytest.mark.parametrize("budget", [MACs(0.3), Params(0.5), Units(absolute=90)])
@pytest.mark.parametrize("round_to", [1, 2])
def test_all_draws_meet_the_budget_within_two_percent(budget: Budget, round_to: int) -> None:
    costs, generator = costs_of(20, 64, 64, 64, 5, round_to=round_to), torch.Generator().manual_seed(0)
    drawn = [draw_widths(budget, costs, importance(costs), generator) for _ in range(30)]
    for widths in drawn:
        assert 0.98 * budget.target(costs) <= budget.remaining(costs, widths) <= budget.target(costs) + 1e-9
        assert all(2 <= width <= 64 and width % round_to == 0 for width in widths.values())
    assert len({tuple(widths.values()) for widths in drawn}) > 20
    fractions = torch.tensor([list(widths.values()) for widths in drawn]) / 64
    assert fractions.std(0).min() > 0.15  # all groups are drawn, and widely: a uniform one has 0.29


def test_fractions_are_scaled_alike() -> None:
    costs, generator = costs_of(4, 400, 400, 2), torch.Generator().manual_seed(3)
    first, second = torch.rand(2, generator=torch.Generator().manual_seed(3)).tolist()
    widths = list(draw_widths(Units(0.25), costs, importance(costs), generator).values())
    # 200 units in all, in the proportion of the two numbers that were drawn
    assert widths[0] == pytest.approx(200 * first / (first + second), abs=1.5)
    assert sum(widths) == 200


def test_floors_and_ceilings_hold() -> None:
    costs = costs_of(20, 64, 64, 64, 5)
    costs.floors["0"] = 40
    costs.ceilings["2"] = 30
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        widths = draw_widths(MACs(0.4), costs, importance(costs), generator)
        assert widths["0"] >= 40
        assert widths["2"] <= 30


def test_a_budget_that_no_draw_meets_is_refused() -> None:
    costs = costs_of(4, 8, 2, round_to=4)
    with pytest.raises(ValueError, match=r"Expected structures within 2% of MACs.* got 50\.0% .*lower `round_to`"):
        draw_widths(MACs(0.6), costs, importance(costs), torch.Generator())


def structure(before: float, after: float) -> Structure:
    return Structure({"a": 3, "b": 4}, 0.5, 100, 2000, {"acc": before}, {"acc": after})


def exploration(mode: str = "max") -> Exploration:
    drawn = [structure(0.3, 0.6), structure(0.2, 0.9), structure(0.4, 0.7), structure(0.1, math.nan)]
    return Exploration(Monitor("acc", mode), {"acc": 0.95}, structure(0.5, 0.7), drawn, nn.Identity())


def test_the_percentile_and_the_best_by_hand() -> None:
    assert exploration().percentile == 2.5 / 4  # better than 0.6 and what is not a number, equal to one
    assert exploration().best_structure.after == {"acc": 0.9}
    assert exploration("min").percentile == 2.5 / 4
    assert exploration("min").best_structure.after == {"acc": 0.6}


def test_it_prints_and_saves(tmp_path: Path) -> None:
    text = str(exploration())
    assert "| reference | 50.0% | 100 | 2,000 | 0.5000 | 0.7000 | 3, 4 |" in text
    assert text.index("| drawn 1 | 50.0% | 100 | 2,000 | 0.2000 | 0.9000 |") < text.index("| drawn 2 |")
    assert "acc of the dense network: 0.9500. The reference is better than 62% of 4 drawn structures." in text
    assert len(json.loads(exploration().to_json())["drawn"]) == 4
    exploration().plot(tmp_path / "a.svg")
    root = ET.parse(tmp_path / "a.svg")
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 4
