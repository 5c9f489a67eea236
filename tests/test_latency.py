"""Tables of latency, and the steps that suit a machine, on machines whose times are known."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from lightning_slim import Latency, MACs, Magnitude, OneShot, Pruner, Units, find_groups, latency
from lightning_slim.costs import Costs
from lightning_slim.latency import best_steps, measure
from lightning_slim.profile import steady_memory
from lightning_slim.selection import Selection
from lightning_slim.surgery import Example, find_work
from tests.machines import in_packets, steady  # noqa: F401
from tests.surgery.test_blocks import Residual


def three(a: int = 64, b: int = 48) -> nn.Module:
    return nn.Sequential(nn.Linear(20, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 5))


class Levels(nn.Module):
    """Two levels, of which the second has to keep as many units as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 40, 2, batch_first=True), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def steps(network: nn.Module, x: Tensor) -> dict[str, int]:
    groups = find_groups(network, x)
    costs = Costs.of(network, groups, find_work(network, {"": Example((x,), samples=len(x))}))
    return best_steps(network, groups, {"": Example((x,))}, costs)


@pytest.mark.parametrize(
    ("widths", "packet", "expected"),
    [
        ((64, 48), 16, {"0": 16, "2": 16}),
        ((64, 48), 8, {"0": 8, "2": 8}),
        ((16, 12), 4, {"0": 4, "2": 4}),
        ((64, 48), 2, {"0": 1, "2": 1}),  # 30 units in 15 packets of 2: nothing to gain
        ((64, 48), 1, {"0": 1, "2": 1}),  # whatever a width costs, it costs as its neighbours do
        ((64, 48), 64, {"0": 1, "2": 1}),  # no width is cheaper than another
        ((3, 3), 16, {"0": 1, "2": 1}),
    ],
)
def test_a_group_is_cut_in_the_packets_of_the_machine(
    widths: tuple[int, int], packet: int, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_times", in_packets(**{"0": packet, "2": packet}))
    assert steps(three(*widths), torch.zeros(2, 20)) == expected


def test_steps_leave_a_pack_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Levels(), torch.zeros(2, 5, 4)
    names = [group.name for group in find_groups(network, x)]
    monkeypatch.setattr(latency, "_times", in_packets(**{name.rpartition(".")[2]: 8 for name in names}))
    assert steps(network, x) == dict.fromkeys(names, 8)


def prepared(round_to: int | str, network: nn.Module, **kwargs) -> Pruner:
    selection = Selection(round_to=round_to)  # type: ignore[arg-type]
    pruner = Pruner(network, Magnitude(), kwargs.pop("budget", Units(0.6)), OneShot(0.5), selection=selection, **kwargs)
    pruner.prepare(torch.randn(2, 20))
    return pruner


def test_auto_rounds_to_what_was_measured_whatever_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_times", in_packets(**{"0": 16, "2": 16}))
    for budget in (Units(0.6), MACs(0.4)):
        pruner = prepared("auto", three(), budget=budget, compensate="none")
        assert pruner.costs.steps == {"0": 16, "2": 16}
        event = pruner.step(0.5)
        assert event is not None
        assert {name: units % pruner.costs.steps[name] for name, units in event.widths.items()} == {"0": 0, "2": 0}
    again = Costs.from_state(pruner.costs.to_state())
    assert again.steps == pruner.costs.steps


def test_auto_on_this_machine() -> None:
    pruner = prepared("auto", three(), compensate="none")
    assert set(pruner.costs.steps) == {"0", "2"}
    assert set(pruner.costs.steps.values()) <= {1, 2, 4, 8, 16}
    assert not pruner.costs.table


@pytest.mark.usefixtures("steady")
def test_a_width_that_takes_longer_than_a_larger_one_counts_as_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = three(8, 8), torch.zeros(2, 20)
    groups = find_groups(network, x)
    costs = Costs.of(network, groups, find_work(network, {"": Example((x,), samples=2)}))
    rows = [{"0": units, "2": 8} for units in (8, 6, 4, 2)]
    monkeypatch.setattr(
        latency, "_times", lambda *_: [dict.fromkeys(("0", "2", "4"), ms) for ms in (3.0, 4.0, 2.0, 2.5)]
    )
    table = measure(network, groups, {"": Example((x,))}, costs, rows)
    assert table["2"] == [(0.25, 2.0), (0.5, 2.0), (0.75, 3.0), (1.0, 3.0)]
    assert table["4"] == [(1.0, 3.0)]  # it reads another group


def test_widths_are_no_finer_than_the_table() -> None:
    network = nn.Sequential(nn.Linear(20, 700), nn.ReLU(), nn.Linear(700, 100), nn.ReLU(), nn.Linear(100, 31))
    network.extend([nn.ReLU(), nn.Linear(31, 5)])
    pruner = prepared(1, network, budget=Latency(0.9), compensate="none")
    assert pruner.costs.steps == {"0": 16, "2": 4, "4": 1}  # of 700 / 16, 100 / 16 and 31 / 16
    assert prepared(2, network, budget=Latency(0.9), compensate="none").costs.steps == {"0": 2, "2": 2, "4": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc hands memory back")
def test_memory_stays_while_times_are_measured() -> None:
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(2**24)  # 64 MiB: more than glibc ever keeps by itself
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if (before := faults()) < 5000:
        pytest.skip("pages are large here, or memory stays anyway")
    with steady_memory():
        faults()
        assert faults() < before / 5


def test_blocks_are_whole_while_the_table_is_measured() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Residual(8) for _ in range(3)))
    network.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    pruner = Pruner(network, Magnitude(), Latency(0.9), OneShot(0.5), granularity="both", compensate="none")
    pruner.prepare(torch.randn(16, 3, 8, 8))
    assert {"1.c1", "2.c2", "3.c1"} <= pruner.costs.table.keys()
    assert all(entries == sorted(entries) for entries in pruner.costs.table.values())
