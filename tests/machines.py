"""Machines whose times are known: what a layer takes, without a clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import pytest

from lightning_slim import latency
from lightning_slim.costs import Costs, Widths
from lightning_slim.units import UnitGroup

Times = Callable[..., list[dict[str, float]]]


def in_packets(**sizes: int) -> Times:
    """Takes 10 ns a layer, and 1 ns for each multiply-accumulate of units that come in full packets only."""

    def times(model: Any, groups: Sequence[UnitGroup], calls: Any, costs: Costs, rows: Sequence[Widths]) -> list:
        def full(widths: Widths) -> Mapping[str, int]:
            size = {name: sizes.get(name.rpartition(".")[2], 1) for name in widths}
            return {name: ceil(units / size[name]) * size[name] for name, units in widths.items()}

        layers = {work.layer for work in costs.work}
        return [{layer: 1e-5 + costs.macs_of({layer}, full(widths)) / 1e6 for layer in layers} for widths in rows]

    return times


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time goes by multiply-accumulates, to the digit."""
    monkeypatch.setattr(latency, "_times", in_packets())
