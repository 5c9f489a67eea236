"""Tables of what taking units away costs, and charts, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_slim import Plan, SensitivityTable, find_groups
from lightning_slim.chart import line_chart
from lightning_slim.costs import Costs
from lightning_slim.monitor import Metrics, Monitor
from lightning_slim.sensitivity import Curve, take_away

ACCURACY = {"a": (0.9, 0.9, 0.88, 0.5), "b": (0.9, 0.7, 0.89, 0.3), "c": (0.9, 0.95, 0.9, math.nan)}


def table() -> SensitivityTable:
    fractions = (0.2, 0.5, 0.8)
    curves = {
        name: Curve(f"net.{name}", 10, {f: int(10 * f) for f in fractions}, dict(zip(fractions, rows, strict=True)))
        for name, rows in {n: [{"acc": v, "loss": 1 - v} for v in values[1:]] for n, values in ACCURACY.items()}.items()
    }
    return SensitivityTable(fractions, {"acc": 0.9, "loss": 0.1}, curves, {"head": "it is the end"})


@pytest.mark.parametrize(("monitor", "mode"), [("acc", "max"), ("loss", "min")])
def test_drops_ceilings_and_floors_by_hand(monitor: str, mode: str) -> None:
    drops = table().drops(monitor, mode)
    assert drops["a"] == pytest.approx({0.2: 0.0, 0.5: 0.02, 0.8: 0.4})
    assert drops["c"][0.2] == pytest.approx(-0.05)
    assert drops["c"][0.8] == math.inf
    # b is good at 0.5, but was not at 0.2: what is better by chance does not count
    assert table().ceilings(monitor, 0.03, mode) == {"a": 0.5, "b": 0.0, "c": 0.5}
    assert table().ceilings(monitor, 0.5, mode) == {"a": 0.8, "b": 0.5, "c": 0.5}


def test_floors_are_what_ceilings_leave() -> None:
    assert table().keep_at_least("acc", 0.03, "max") == {"net.a": 0.5, "net.b": 1.0, "net.c": 0.5}
    twins = table()
    twins.curves["a"] = Curve("net.b", 10, twins.curves["a"].gone, twins.curves["a"].metrics)
    assert twins.keep_at_least("acc", 0.03, "max") == {"net.b": 1.0, "net.c": 0.5}  # the stricter of one layer


def test_a_metric_that_was_not_logged_is_named_beside_those_that_were() -> None:
    with pytest.raises(ValueError, match=r"Expected `monitor` to name a metric .* got 'f1': it logs acc, loss\."):
        table().keep_at_least("f1", 0.01, "max")
    with pytest.raises(ValueError, match=r"call `self\.log`"):
        Monitor("f1", "max").of({})
    with pytest.raises(ValueError, match="Expected `mode`"):
        Monitor("f1", "most")


def test_it_prints_and_saves() -> None:
    text = str(table())
    assert "| acc | units | 0% | 20% | 50% | 80% |" in text
    assert "| b | 10 | 0.9000 | 0.7000 | 0.8900 | 0.3000 |" in text
    assert "- head: it is the end" in text
    assert "acc" not in table().to_markdown("loss")
    assert json.loads(table().to_json())["curves"]["a"]["metrics"]["0.5"]["acc"] == 0.88


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 6, num_layers=2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def test_groups_of_a_pack_go_together_and_nothing_is_evaluated_twice() -> None:
    lstm = Recurrent()
    groups = find_groups(lstm, torch.randn(2, 4, 3))
    assert {group.pack for group in groups} == {"lstm"}
    tried: list[dict[str, int]] = []

    def evaluate(plan: Plan) -> Metrics:
        tried.append({name: int((~keep).sum()) for name, keep in plan.items()})
        return {"gone": float(plan.removed)}

    importance = {group.name: torch.arange(6.0) for group in groups}
    found = take_away(groups, importance, Costs.of(lstm, groups, []), (0.1, 0.5, 0.6, 0.9), evaluate, {})
    (curve,) = found.curves.values()
    names = [group.name for group in groups]
    # 0.1 is no whole unit, 0.5 and 0.6 are three units of six, and two must stay
    assert tried == [{}, dict.fromkeys(names, 3), dict.fromkeys(names, 4)]
    assert curve.gone == {0.1: 0, 0.5: 3 * len(names), 0.6: 3 * len(names), 0.9: 4 * len(names)}
    assert curve.layer == "lstm"


def points(svg: str) -> list[list[tuple[float, float]]]:
    root = ET.fromstring(svg)
    lines = root.iter("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in lines]


def test_a_chart_puts_values_where_its_axes_say() -> None:
    chart = line_chart({"a": [(0.0, 2.0), (0.5, 4.0), (1.0, 3.0)], "b<": [(0.2, math.nan), (1.0, 2.0)]}, "x", "y")
    # 480 wide from 64, 300 high up from 316; values from 0 to 1, and from 2 to 4
    assert points(chart) == [[(64, 316), (304, 16), (544, 166)], [(544, 316)]]
    assert "b&lt;" in chart
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
    assert labels[:6] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_a_distribution_function_holds_its_value_up_to_the_next_point() -> None:
    chart = line_chart({"a": [(0.0, 0.5), (1.0, 1.0)]}, "x", "y", steps=True)
    assert points(chart) == [[(64, 316), (544, 316), (544, 16)]]


def test_charts_need_points_and_are_svg(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one finite point"):
        line_chart({"a": [(0.0, math.nan)]}, "x", "y")
    with pytest.raises(ValueError, match=r"ends with \.svg"):
        table().plot(tmp_path / "a.png", "acc")
    table().plot(tmp_path / "a.svg", "acc")
    lines = points((tmp_path / "a.svg").read_text())
    assert [len(line) for line in lines] == [4, 4, 3]  # the whole network first; what is not a number is left out
