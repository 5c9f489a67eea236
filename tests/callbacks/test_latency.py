"""Budgets of latency, and steps that suit the machine, while a Trainer trains: measured once, in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slim import GrangerPrune, Latency, Linear, MACs, Magnitude, Prune, latency
from lightning_slim.budgets import Budget
from lightning_slim.surgery import dropped
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.test_depth import Deep
from tests.machines import in_packets, steady  # noqa: F401
from tests.networks import same, same_optimizer_state


def run(folder: Path, lit: Lit, callback: Prune, ckpt_path: Path | None = None) -> Any:
    fit = trainer(folder, callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    fit.fit(lit, loader(), loader(), ckpt_path=ckpt_path)
    return fit


def granger(budget: Budget, **kwargs: Any) -> GrangerPrune:
    schedule = Linear(start=0.0, end=4 / 6)
    return GrangerPrune(budget, schedule, recovery_epochs=2, record_every_n_steps=3, print_report=False, **kwargs)


def unused(*_: Any) -> Any:
    raise AssertionError("measured again")


def test_a_resumed_run_goes_by_the_table_of_the_run_that_it_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, callback = Lit(), granger(Latency(0.5), round_to="auto")
    with monkeypatch.context() as patched:
        patched.setattr(latency, "_times", in_packets(c1=2, c2=2, up=2, fc1=2))
        trained = run(tmp_path / "straight", straight, callback)
    assert len(callback.history.events) == 2
    assert 0.4 < callback.history.events[-1].reached <= 0.5
    costs = callback.pruner.costs
    assert costs.table
    assert max(costs.steps.values()) > 1
    assert all(units % costs.steps[name] == 0 for name, units in callback.pruner.widths.items())
    monkeypatch.setattr(latency, "_times", unused)
    for epoch in (0, 2, 4):
        resumed, again = Lit(), granger(Latency(0.5), round_to="auto")
        fit = run(tmp_path / f"resumed{epoch}", resumed, again, tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
        assert again.history.to_json() == callback.history.to_json()
        assert again.pruner.costs.to_state() == costs.to_state()


@pytest.mark.usefixtures("steady")
def test_blocks_and_units_go_under_one_budget_of_latency(tmp_path: Path) -> None:
    deep, callback = Deep(), granger(Latency(0.3), granularity="both")
    run(tmp_path, deep, callback)
    event = callback.history.events[-1]
    assert dropped(deep)
    assert 0.98 * 0.3 <= event.reached <= event.asked == pytest.approx(0.3)


def test_this_machine_is_measured_in_the_first_batch(tmp_path: Path) -> None:
    deep = Deep()
    callback = Prune(Magnitude(), Latency(0.7), Linear(0.0, 0.5), granularity="both", round_to="auto")
    run(tmp_path, deep, callback)
    assert {"net.1.c1", "net.5.c2"} <= callback.pruner.costs.table.keys()
    assert callback.history.events[-1].reached <= 0.7


@pytest.mark.usefixtures("steady")
def test_a_latency_that_no_width_has_is_refused_before_a_weight_is_touched(tmp_path: Path) -> None:
    lit = Lit()
    with pytest.raises(ValueError, match=r"Ask for at least Latency\(absolute=[\d.e-]+\)"):
        run(tmp_path, lit, granger(Latency(absolute=1e-9)))
    assert {name: p.shape for name, p in lit.named_parameters()} == {n: p.shape for n, p in Lit().named_parameters()}


@pytest.mark.usefixtures("steady")
def test_asked_reached_and_steps_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_slim.callbacks.telling.rank_zero_info", said.append)
    run(tmp_path, Lit(), granger(Latency(0.5), round_to="auto"))
    assert "slim: widths will be multiples of what suits this machine: net.c1 1, net.c2 1, net.up 1, net.fc1 1" in said
    cuts = [line for line in said if "units removed" in line]
    assert [f"({asked} asked)" in line for asked, line in zip(("75.0%", "50.0%"), cuts, strict=True)] == [True, True]
    assert all("% left (" in line for line in cuts)


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("budget", [Latency(0.5), Latency(absolute=0.05)])
def test_the_report_measures_the_batch_that_the_budget_goes_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: Latency
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_slim.callbacks.telling.rank_zero_info", said.append)
    callback = granger(budget)
    run(tmp_path, Lit(), callback)
    size = len(next(iter(loader()))[0])
    assert callback.report({}).batch_sizes == (size,)
    assert any(f"(batch of {size})" in line for line in said)


def test_the_report_of_a_resumed_run_measures_its_own_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_times", in_packets(c1=2, c2=2, up=2, fc1=2))
    run(tmp_path, Lit(), granger(Latency(0.5)))
    again = granger(Latency(0.5))
    run(tmp_path / "again", Lit(), again, tmp_path / "epoch=0.ckpt")
    assert again.report({}).batch_sizes == (len(next(iter(loader()))[0]),)


def test_without_such_a_budget_the_report_says_of_how_many_samples_its_latency_is(tmp_path: Path) -> None:
    callback = granger(MACs(0.5))
    run(tmp_path, Lit(), callback)
    assert callback.report({}).rows()[3][0] == "CPU latency (median, batch of 2)"
