"""What every budget and every schedule promises, for every subclass there is."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch import nn

from lightning_slim import (
    AccuracyBudget,
    Annealing,
    Bytes,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Latency,
    Linear,
    MACs,
    Magnitude,
    OneCycle,
    OneShot,
    Params,
    Pruner,
    Significant,
    Stepwise,
    Units,
    find_groups,
    latency,
    remove_units,
)
from lightning_slim.budgets import Budget
from lightning_slim.costs import Costs
from lightning_slim.latency import check_device
from lightning_slim.profile import count_macs, time_side_by_side
from lightning_slim.schedules import Schedule
from lightning_slim.selection import Scope, Selection
from lightning_slim.surgery import Example, find_work
from tests.machines import in_packets
from tests.networks import Mixed, images, mixed_plan
from tests.surgery.test_cut import NETWORKS, some
from tests.variants import variants
from tests.zoo.blocks import classifier, conv_norm
from tests.zoo.residual import basic

SCHEDULES, BUDGETS = Schedule.__subclasses__(), Budget.__subclasses__()
DEFAULTS = {AccuracyBudget: partial(AccuracyBudget, "val_acc")}
CLOSED = [kind for kind in BUDGETS if not kind.open_ended]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_rise_from_0_to_1(kind: type[Schedule]) -> None:
    schedule = kind()
    course = [schedule(i / 100) for i in range(101)]
    assert course == sorted(course)
    assert course[-1] == 1
    assert schedule(schedule.end) == 1
    assert all(schedule(t) == 0 for t in (schedule.start - 0.01, schedule.start / 2) if 0 <= t < schedule.start)


@pytest.mark.parametrize("kind", SCHEDULES + BUDGETS)
def test_they_survive_a_pickle(kind: type) -> None:
    made = DEFAULTS.get(kind, kind)()
    assert pickle.loads(pickle.dumps(made)) == made


def test_schedules_equal_their_papers_formulas() -> None:
    t = 0.3
    assert Linear(0.0, 1.0)(t) == pytest.approx(t)
    # Zhu and Gupta (2017), equation 1, from sparsity 0 to 1
    assert Cubic(0.0, 1.0)(t) == pytest.approx(1 + (0 - 1) * (1 - t) ** 3)
    # Hubens et al. (2022), equation 2, with alpha = 14 and beta = 6
    assert OneCycle(0.0, 1.0)(t) == pytest.approx((1 + math.exp(-14 + 6)) / (1 + math.exp(-14 * t + 6)))
    assert [OneShot(0.5)(t) for t in (0.49, 0.5)] == [0, 1]
    # The authors' fsa.py: m_e = k + (p - k) * max(0, (N - 2e) / (2 e mu + N)), from p = 90 candidates to k = 20
    p, k, n, mu = 90, 20, 300, 100
    for e in (1, 10, 75, 149):
        left = k + (p - k) * max(0, (n - 2 * e) / (2 * e * mu + n))
        assert p - (p - k) * Annealing(0.0, 1.0, mu)(2 * e / n) == pytest.approx(left)
    # fasterai's iterative schedule: s_i + (s_f - s_i) / n * ceil(t n), with n = 3
    assert [Stepwise(0.0, 1.0)(t) for t in (0.3, 0.34, 0.7)] == pytest.approx([1 / 3, 2 / 3, 1])
    # numerical quadrature of what they are the integrals of
    assert Cosine(0.0, 1.0)(t) == pytest.approx(quad(lambda u: math.pi / 2 * math.sin(math.pi * u), 0, t)[0])
    decay = [quad(lambda u: math.exp(-5 * u), 0, end)[0] for end in (t, 1)]
    assert Exponential(0.0, 1.0)(t) == pytest.approx(decay[0] / decay[1])
    assert [Constant(0.5)(t) for t in (0.49, 0.5)] == [0, 1]


def test_times_in_epochs_and_steps_are_fractions_of_the_run() -> None:
    assert Cubic("2 epochs", "350 steps").resolve(10, 50) == Cubic(0.2, 0.7)
    assert OneShot("1 epoch").resolve(4, 7) == OneShot(0.25)
    assert Constant("1.5 epochs").resolve(3, 7) == Constant(0.5)
    assert Stepwise(0.25, "1 step", 5).resolve(2, 1) == Stepwise(0.25, 0.5, 5)


def test_times_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="got '3 weeks'"):
        Linear("3 weeks", 0.7)
    with pytest.raises(ValueError, match=r"resolve\(epochs, steps_per_epoch\)"):
        Linear(0.1, "3 epochs")(0.5)
    with pytest.raises(ValueError, match="Expected times within a run of 2 epochs of 5 steps"):
        Linear(0.1, "3 epochs").resolve(2, 5)
    with pytest.raises(ValueError, match=r"start <= end <= 1 .* got start=0.5, end=0.2"):
        Linear(0.5, "2 steps").resolve(2, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stepwise(steps=0), "`steps` of at least 1"),
        (lambda: Exponential(rate=0.0), "`rate` above 0"),
        (lambda: Annealing(mu=-1.0), "`mu` of at least 0"),
    ],
)
def test_bad_courses_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make", [lambda: Linear(0.6, 0.5), lambda: Cubic(-0.1, 0.5), lambda: OneCycle(0.5, 1.1), lambda: OneShot(2.0)]
)
def test_a_schedule_outside_the_run_is_refused(make) -> None:
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        make()


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, 50])
def test_a_budget_outside_0_and_1_is_refused(kind: type, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\]"):
        kind(fraction)


def test_a_level_of_significance_outside_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="`alpha` between 0 and 1, got 5"):
        Significant(5)


def costs_of(network: nn.Module, x: torch.Tensor) -> Costs:
    """With a table as if every layer took 0.1 ms and as many microseconds as it has thousands of MACs."""
    costs = Costs.of(network, find_groups(network, x), find_work(network, {"": Example((x,), samples=1)}))
    return replace(costs, table={each.layer: [(0.0, 0.1), (1.0, 0.1 + each.macs / 1e6)] for each in costs.work})


def test_latency_is_read_off_the_table() -> None:
    costs = Costs.from_state(costs_of(Mixed(), images(0)[0]).to_state())
    half = {name: units // 2 for name, units in costs.original.items()}
    assert Latency().count(costs, half) == pytest.approx(0.1 * len(costs.table) + costs.macs(half) / 1e6)
    bent = replace(costs, table={"fc2": [(0.25, 2.0), (0.75, 3.0), (1.0, 7.0)]})
    widths = costs.original  # fc2 reads fc1
    assert [bent.milliseconds({**widths, "fc1": units}) for units in (2, 5, 10, 15, 18, 20)] == [2, 2, 2.5, 3, 5.4, 7]


def test_a_latency_budget_goes_by_what_was_measured() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8))
    dense = copy.deepcopy(network)
    pruner = Pruner(network, Magnitude(), Latency(0.5), OneShot(0.5), compensate="none")
    x = torch.rand(128, 64)
    pruner.prepare(x)
    assert pruner.costs.table.keys() == {"0", "2", "4"}
    assert all(entries == sorted(entries) for entries in pruner.costs.table.values())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), dense.parameters(), strict=True))
    event = pruner.step(0.5)
    assert event is not None
    assert 0.45 < event.reached <= 0.5
    with torch.no_grad():
        slim_ms, dense_ms = time_side_by_side([lambda: network(x), lambda: dense(x)], seconds=1)
    assert 0.3 < slim_ms / dense_ms < 0.75  # of a busy machine; benchmarks/bench_latency.py is stricter


def test_a_latency_that_no_width_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Ask for at least Latency\(absolute=[\d.e-]+\)"):
        prepared(Latency(absolute=1e-6))
    costs = Costs.of(Mixed(), [], [])
    with pytest.raises(ValueError, match=r"Expected a model on the CPU.*got meta"):
        check_device(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="Expected a measured table of latencies"):
        Latency().count(costs, {})


@pytest.mark.parametrize("kind", BUDGETS)
def test_budgets_grow_with_the_widths(kind: type) -> None:
    budget = DEFAULTS.get(kind, kind)()
    costs = costs_of(Mixed(), images(0)[0])
    half = {name: units // 2 for name, units in costs.original.items()}
    assert 0 < budget.remaining(costs, half) < budget.remaining(costs, costs.original) == 1


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_budget_is_reached_within_2_percent(kind: type[Budget], absolute: bool, scope: str) -> None:
    torch.manual_seed(0)
    costs = costs_of(Mixed((32, 48, 64), 80), images(0)[0])
    budget = kind(absolute=0.4 * kind().whole(costs)) if absolute else kind(0.4)
    importance = {name: torch.rand(units) for name, units in costs.original.items()}
    widths = Selection(scope).fit(budget.target(costs), budget, costs, costs.original, importance)  # type: ignore[arg-type]
    assert 0.98 * 0.4 <= budget.remaining(costs, widths) <= 0.4 + 1e-9
    assert budget.target(costs) == pytest.approx(0.4)


class Levels(nn.Module):
    """Two levels, which must keep as many units."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 96, 2, batch_first=True), nn.Linear(96, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def residual() -> nn.Module:
    body = (conv_norm(3, 32), basic(32, 32), basic(32, 48, 2), basic(48, 48))
    return nn.Sequential(*body, classifier(48))


def transformer() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(48, 6, 96, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(5, 48), layers, nn.Linear(48, 3)), torch.randn(2, 7, 5)


SIZED = {
    "mixed": lambda: (Mixed((32, 48, 64), 80), images(0)[0]),
    "residual": lambda: (residual(), torch.randn(2, 3, 16, 16)),
    "transformer": transformer,
    "pack": lambda: (Levels(), torch.randn(2, 5, 4)),
}


@pytest.mark.parametrize(
    ("name", "kind", "round_to", "scope"), variants(list(SIZED), CLOSED, [1, 8], get_args(Scope), every=4)
)
def test_of_a_budget_nothing_is_left_that_the_rounding_could_spend(
    name: str, kind: type[Budget], round_to: int, scope: str
) -> None:
    torch.manual_seed(0)
    network, x = SIZED[name]()
    costs = costs_of(network, x)
    macs = {layer: costs.macs_of({layer}, costs.original) / 1e6 for layer in costs.table}
    costs = replace(costs, table={layer: [(0.0, 0.1 * ms), (1.0, ms)] for layer, ms in macs.items()})
    costs = Selection(scope, round_to).bounded(costs, network, find_groups(network, x))  # type: ignore[arg-type]
    budget = kind(0.5)
    importance = {group: torch.rand(units) for group, units in costs.original.items()}
    widths = Selection(scope, round_to).fit(0.5, budget, costs, costs.original, importance)  # type: ignore[arg-type]
    left = budget.remaining(costs, widths)
    assert left <= 0.5 + 1e-9
    assert all(widths[group] in (costs.original[group], -(-widths[group] // round_to) * round_to) for group in widths)
    packs: dict[str, list[str]] = {}
    for group in widths:
        packs.setdefault(costs.packs.get(group, group), []).append(group)
    wider = [
        {**widths, **{group: min(widths[group] + costs.steps[group], costs.original[group]) for group in members}}
        for members in packs.values()
        if widths[members[0]] < costs.original[members[0]]
    ]
    assert left >= 0.98 * 0.5 or all(budget.remaining(costs, more) > 0.5 + 1e-9 for more in wider)


@pytest.mark.parametrize("absolute", [0, -3.0, math.nan])
@pytest.mark.parametrize("kind", CLOSED)
def test_a_figure_that_is_not_above_0_is_refused(kind: type, absolute: float) -> None:
    with pytest.raises(ValueError, match="a figure above 0"):
        kind(absolute=absolute)


def prepared(budget: Budget, **kwargs) -> Pruner:
    torch.manual_seed(0)
    pruner = Pruner(Mixed(), Magnitude(), budget, OneShot(0.5), compensate="none", **kwargs)
    pruner.prepare(images(0)[0][:2])
    return pruner


@pytest.mark.parametrize("kind", CLOSED)
def test_asked_and_reached_are_printed(kind: type[Budget], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_times", in_packets())
    event = prepared(kind(0.62)).step(0.5)
    assert event is not None
    assert event.reached == pytest.approx(0.62, rel=0.02)
    assert f" {100 * event.reached:.1f}% left (62.0% asked)" in str(event)


def test_a_figure_is_what_is_left() -> None:
    pruner = prepared(Params(absolute=4000))
    event = pruner.step(0.5)
    assert event is not None
    assert (
        3800 <= event.params == sum(p.numel() for p in pruner.model.parameters()) <= 4000
    )  # a channel of `up` alone has 370
    dense = sum(p.numel() for p in Mixed().parameters())
    assert (event.asked, event.reached) == (4000 / dense, event.params / dense)


def test_a_figure_that_cannot_be_met_is_refused_with_the_figure_that_can() -> None:
    with pytest.raises(ValueError, match=r"Ask for at least Params\(absolute=\d+\)"):
        prepared(Params(absolute=50))
    with pytest.raises(ValueError, match="Expected a budget below what the model has"):
        prepared(MACs(absolute=1e9))


def test_bytes_are_those_of_the_state_dict() -> None:
    network, x = Mixed(), images(0)[0]
    groups = find_groups(network, x)
    plan = mixed_plan(groups)
    costs = Costs.from_state(Costs.of(network, groups, find_work(network, {"": Example((x,), samples=1)})).to_state())

    def stored() -> int:
        return sum(t.numel() * t.element_size() for t in network.state_dict().values())

    assert Bytes().whole(costs) == stored()
    widths = {group: int(keep.sum()) for group, keep in plan.items()}
    remove_units(network, groups, plan)
    assert Bytes().count(costs, widths) == stored()


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_foretell_the_cut_network(name: str) -> None:
    network, x = NETWORKS[name]()
    groups = find_groups(network, x)
    plan = some(groups)
    costs = Costs.of(network, groups, find_work(network, {"": Example((x,), samples=1)}))
    widths = {group: int(keep.sum()) for group, keep in plan.items()}
    remove_units(network, groups, plan)
    assert costs.params(widths) == sum(p.numel() for p in network.parameters())
    assert costs.macs(widths) == sum(count_macs(network, (x,)).values())


def test_costs_of_the_mixed_network_and_through_a_checkpoint() -> None:
    network, x = Mixed(), images(0)[0]
    groups = find_groups(network, x)
    plan = mixed_plan(groups)
    costs = Costs.from_state(Costs.of(network, groups, find_work(network, {"": Example((x,), samples=1)})).to_state())
    widths = {group: int(keep.sum()) for group, keep in plan.items()}
    remove_units(network, groups, plan)
    assert costs.params(widths) == sum(p.numel() for p in network.parameters())
    assert costs.macs(widths) == sum(count_macs(network, (x,)).values())
    assert Units(0.5).count(costs, widths) == 5 + 4 + 11 + 17
    assert MACs(0.5).count(costs, widths) == costs.macs(widths)


@pytest.mark.parametrize(
    ("layer", "x", "macs"),
    [
        (nn.Linear(3, 5), torch.zeros(2, 3), 2 * 3 * 5),
        (nn.Conv2d(4, 6, 3, padding=1), torch.zeros(1, 4, 5, 5), 25 * 4 * 6 * 9),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.zeros(1, 4, 5, 5), 25 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 2, 2), torch.zeros(1, 4, 5, 5), 25 * 4 * 6 * 4),
        (nn.LSTM(3, 5), torch.zeros(7, 1, 3), 7 * 4 * 5 * (3 + 5)),
    ],
)
def test_macs_by_hand(layer: nn.Module, x: torch.Tensor, macs: int) -> None:
    assert sum(count_macs(layer, (x,)).values()) == macs


def test_macs_are_counted_layer_by_layer() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.randn(3, 4)), nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(F.linear(x, self.weight))

    assert count_macs(Own(), (torch.zeros(2, 4),)) == {"": 24, "inner.0": 30, "inner.1": 20}
