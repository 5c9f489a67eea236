"""The table at the end, and how it is measured."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from lightning_slim import Report, report
from lightning_slim.capture import capture_calls
from lightning_slim.profile import Profile, bytes_on_disk, time_side_by_side
from tests.networks import Mixed, images

DENSE = Profile(200, 1000, 4000, 2.0, {"acc": 0.9})
SLIM = Profile(100, 400, 2200, 1.0, {"acc": 0.875, "loss": 0.5})


def test_the_table_says_what_is_known_and_no_more() -> None:
    rows = {row[0]: row[1:] for row in Report(DENSE, SLIM).rows()}
    assert rows["params"] == ("200", "100", "50.0%")
    assert rows["MACs"] == ("1,000", "400", "40.0%")
    assert rows["CPU latency (median)"] == ("2.000 ms", "1.000 ms", "50.0%")
    assert rows["acc"] == ("0.9000", "0.8750", "-0.0250")
    assert rows["loss"] == ("-", "0.5000", "-")


def test_it_is_saved_as_json_and_markdown(tmp_path) -> None:
    Report(DENSE, SLIM, {"head": "it is skipped"}).save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "report.json").read_text())["left_whole"] == {"head": "it is skipped"}
    assert "- head: it is skipped" in (tmp_path / "new" / "report.md").read_text()
    assert json.loads((tmp_path / "new" / "report.json").read_text())["slim"]["latency_ms"] == 1.0
    assert "| MACs | 1,000 | 400 | 40.0% |" in (tmp_path / "new" / "report.md").read_text()


def test_two_models_are_measured_and_left_as_they_are() -> None:
    dense, slim, x = Mixed((32, 24, 32), 64), Mixed(), images(0, 2)[0]
    generator = torch.get_rng_state()
    table = report(dense, slim, x, slim_metrics={"acc": 0.5})
    assert table.slim.params == sum(p.numel() for p in slim.parameters()) < table.dense.params
    assert table.slim.latency_ms > 0
    assert table.slim.metrics == {"acc": 0.5}
    assert slim.training
    assert torch.equal(generator, torch.get_rng_state())


def test_latency_is_measured_on_another_batch_where_one_is_given_and_its_size_is_said() -> None:
    model = Mixed()
    of_two = report(model, model, images(0, 2)[0])
    assert of_two.batch_sizes == (2,)
    of_many = report(model, model, networks={"": images(0, 2)[0]}, timed=({"": images(0, 64)[0]},) * 2)
    assert of_many.batch_sizes == (64,)
    assert of_many.dense.macs == of_two.dense.macs
    assert of_many.dense.latency_ms > 2 * of_two.dense.latency_ms
    assert "| CPU latency (median, batch of 64) |" in of_many.to_markdown()
    assert json.loads(of_many.to_json())["batch_sizes"] == [64]


def test_bytes_are_those_of_the_file(tmp_path) -> None:
    torch.save(Mixed().state_dict(), tmp_path / "weights.pt")
    assert bytes_on_disk(Mixed()) == pytest.approx((tmp_path / "weights.pt").stat().st_size, rel=0.02)


def test_a_call_that_works_three_times_as_long_takes_longer() -> None:
    def work(n: int):
        def call() -> None:
            until = time.process_time() + n / 1000
            while time.process_time() < until:
                pass

        return call

    one, three = time_side_by_side([work(1), work(3)], rounds=5)
    assert three > 2 * one


def test_outermost_calls_are_captured() -> None:
    model = nn.ModuleDict({"a": Mixed(), "b": nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))})
    with capture_calls(model) as calls:
        model["b"](model["a"](images(0)[0]))
        model["b"](torch.zeros(7, 5))
    assert set(calls) == {"a", "b"}
    assert calls["a"].args[0].shape == (16, 3, 8, 8)
    assert calls["b"].args[0].shape == (16, 5)
    assert not calls["b"].args[0].requires_grad
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_call_that_fails_does_not_confuse_the_capture() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(4, 2)})
    with capture_calls(model) as calls:
        with pytest.raises(RuntimeError):
            model["a"](torch.zeros(2, 9))
        model["b"](torch.zeros(2, 4))
    assert "b" in calls
