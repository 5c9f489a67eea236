"""What hooks gather equals what can be computed from the activations themselves."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_slim import Combined, Granger, OneShot, Pruner, RandomGates, Screening, Units, find_groups, remove_units
from lightning_slim.recording import Recorder
from lightning_slim.recording.recorder import MIN_ROWS
from lightning_slim.units import Plan, gradients, renumber, rows
from tests.surgery.test_cut import NETWORKS, Net, conv


def mlp() -> tuple[nn.Sequential, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(50, 4)


def test_moments_are_those_of_the_readers_inputs() -> None:
    network, x = mlp()
    recorder = Recorder(network, find_groups(network, x))
    with recorder.recording():
        network(x)
    hidden = network[:2](x).detach().numpy()
    np.testing.assert_allclose(recorder.moments["0"][0].covariance, np.cov(hidden.T, bias=True), atol=1e-6)


def test_pixels_positions_and_chunks_are_rows() -> None:
    network, x = NETWORKS["grouped"]()
    recorder = Recorder(network, find_groups(network, x))
    with recorder.recording():
        network(x)
    hidden = F.relu(network.a(x)).detach()  # 2, 8, 6, 6; unit u owns channels u and u + 4
    table = hidden.unflatten(1, (2, 4)).movedim(2, -1).flatten(0, -2).numpy()
    np.testing.assert_allclose(recorder.moments["a"][0].covariance, np.cov(table.T, bias=True), atol=1e-6)
    assert recorder.moments["a"][0].count == 2 * 2 * 36


def test_a_flattened_unit_is_a_row_for_every_pixel() -> None:
    network, x = NETWORKS["flatten"]()
    recorder = Recorder(network, find_groups(network, x))
    with recorder.recording():
        network(x)
    table = F.relu(network.a(x)).detach().movedim(1, -1).flatten(0, -2).numpy()
    np.testing.assert_allclose(recorder.moments["a"][0].covariance, np.cov(table.T, bias=True), atol=1e-6)


def test_series_are_recorded_with_their_past() -> None:
    network, x = NETWORKS["Conv1d"]()
    recorder = Recorder(network, find_groups(network, x), lags=2)
    with recorder.recording():
        network(x)
    hidden = F.relu(network.a(x)).detach()  # 4, 6, 7
    past = torch.stack([hidden[:, :, 2 - lag : 7 - lag] for lag in range(3)], -1)
    table = past.movedim(1, 2).flatten(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(recorder.moments["a"][0].covariance, np.cov(table.T, bias=True), atol=1e-6)


@pytest.mark.parametrize(("lags", "past"), [(2, 2), (6, 6), (7, 0), (100, 0)])
def test_series_that_are_no_longer_than_the_lags_have_no_past(lags: int, past: int) -> None:
    network, x = NETWORKS["Conv1d"]()  # of 7 steps
    recorder, present = (Recorder(network, find_groups(network, x), lags=each) for each in (lags, 0))
    for each in (recorder, present):
        with each.recording():
            network(x)
    assert (recorder.past, present.past) == (past, 0)
    rows = 4 * (7 - past)
    assert recorder.moments["a"][0].count == rows
    if not past:
        assert torch.equal(recorder.moments["a"][0].second, present.moments["a"][0].second)


def test_large_images_are_thinned_out() -> None:
    network = Net(lambda s, x: s.b(F.relu(s.a(x))), a=conv(3, 4), b=conv(4, 2))
    x = torch.randn(4, 3, 64, 64)
    recorder = Recorder(network, find_groups(network, x[:1]))
    with recorder.recording():
        network(x)
    assert recorder.moments["a"][0].count == MIN_ROWS


@pytest.mark.parametrize("size", [7, 8, 14, 32])
def test_what_is_thinned_out_is_from_everywhere(size: int) -> None:
    """Each unit is one number of the pixel: its row, its column, the item; all pixels alike, up to a hundredth."""
    network = Net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(3, 3, 1, bias=False), b=conv(3, 2))
    with torch.no_grad():
        network.a.weight.copy_(torch.eye(3)[:, :, None, None])
    at = torch.arange(size).float()
    ramps = torch.meshgrid(torch.arange(128).float(), at, at, indexing="ij")
    x = torch.stack([ramp / ramp.max() for ramp in ramps], 1)
    recorder = Recorder(network, find_groups(network, x[:1]))
    with recorder.recording():
        network(x)
    moments = recorder.moments["a"][0]
    np.testing.assert_allclose(moments.mean, x.mean((0, 2, 3)), atol=0.01)
    np.testing.assert_allclose(moments.covariance, np.cov(x.movedim(1, 0).flatten(1), bias=True), atol=0.01)


def test_nothing_is_hooked_outside_of_recording() -> None:
    network, x = mlp()
    recorder = Recorder(network, find_groups(network, x))
    assert not recorder.ready
    with recorder.recording():
        network(x)
    assert recorder.ready
    count = recorder.moments["0"][0].count.clone()
    network(x)
    assert torch.equal(count, recorder.moments["0"][0].count)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_recording_does_not_change_training() -> None:
    network, x = mlp()
    other = copy.deepcopy(network)
    recorder = Recorder(network, find_groups(network, x), effects=("saliency",))
    with recorder.recording():
        network(x).sum().backward()
    recorder.observe_gradients()
    other(x).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(network.parameters(), other.parameters(), strict=True))


def test_saliency_is_the_squared_effect_of_a_gate_on_the_loss() -> None:
    network, x = mlp()
    recorder = Recorder(network, find_groups(network, x), moments=False, effects=("saliency",))
    network(x).square().sum().backward()
    recorder.observe_gradients()
    gate = torch.ones(6, requires_grad=True)  # scales each unit's pre-activation
    network[2](F.relu(network[0](x) * gate)).square().sum().backward()
    torch.testing.assert_close(recorder.mean("saliency", "0"), gate.grad.square(), rtol=1e-4, atol=1e-4)


def test_information_is_the_sum_of_squared_effects_of_single_weights_with_memory() -> None:
    network, x = mlp()
    recorder = Recorder(network, find_groups(network, x), moments=False, effects=("information",), memory=0.5)
    steps = []
    for scale in (1.0, 3.0):
        assert recorder.ready == bool(steps)
        network.zero_grad()
        network(scale * x).square().mean().backward()
        recorder.observe_gradients()
        first = network[0]
        entries = [
            [*(first.weight[unit] * first.weight.grad[unit]), first.bias[unit] * first.bias.grad[unit]]
            for unit in range(6)
        ]
        steps.append(torch.tensor([sum(e.item() ** 2 for e in of_unit) for of_unit in entries]))
    torch.testing.assert_close(recorder.mean("information", "0"), (0.5 * steps[0] + steps[1]) / 1.5)


def test_ranks_agree_on_all_effects() -> None:
    network, x = mlp()
    recorder = Recorder(network, find_groups(network, x), moments=False, effects=("saliency", "information"))
    network(x).sum().backward()
    recorder.observe_gradients()
    saliency, information = recorder.mean("saliency", "0"), recorder.mean("information", "0")
    recorder.synchronise(lambda value: 2 * value)
    torch.testing.assert_close(recorder.mean("saliency", "0"), 2 * saliency)
    torch.testing.assert_close(recorder.mean("information", "0"), 2 * information)


def test_ranks_that_saw_different_levels_agree_on_the_moments_of_all_rows() -> None:
    network, x = mlp()
    groups = find_groups(network, x)
    one, other, both = (Recorder(network, groups) for _ in range(3))
    for recorder, inputs in ((one, x), (other, x + 50), (both, torch.cat([x, x + 50]))):
        with recorder.recording():
            network(inputs)
    far = other.moments["0"][0]

    def average(mine: torch.Tensor) -> torch.Tensor:
        """Over two ranks, of which the other does as the first: pivots come first."""
        if not far_sums:
            mean = (mine + far.pivot) / 2
            far.move_pivots({"pivot": mean})
            far_sums.extend(far.sums.values())
            return mean
        return (mine + far_sums.pop(0)) / 2

    far_sums: list[torch.Tensor] = []
    one.synchronise(average)
    expected = both.moments["0"][0].covariance
    torch.testing.assert_close(one.moments["0"][0].covariance, expected, rtol=1e-5, atol=1e-5)


def said_by(ranks: int, value: Any) -> list[Any]:
    """So many ranks say the same."""
    return [value] * ranks


def test_p_values_count_the_rows_of_all_ranks() -> None:
    """Two ranks that see the same are one that sees it twice."""
    found = []
    for ranks, times in ((2, 1), (1, 2)):
        torch.manual_seed(0)
        network, x = mlp()
        y = torch.randint(3, (50,))
        pruner = Pruner(network, Combined([Screening(), RandomGates(), Granger()]), Units(0.5), OneShot(0.5))
        pruner.prepare(x[:2])
        pruner.recorder.memory = 1.0
        for _ in range(times):
            with pruner.recording():
                network(x)
            pruner.recorder.hear(labels=y)
        pruner.recorder.synchronise(lambda value: value, partial(said_by, ranks))
        evidence = pruner._evidence(pruner.groups[0])
        found.append([Screening()(evidence).log_p, Granger()(evidence).log_p])
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].shape == (6,)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.1, atol=0.1)  # chance was met with half the rows


def test_evidence_follows_a_cut() -> None:
    network, x = mlp()
    groups = find_groups(network, x)
    recorder = Recorder(network, groups, effects=("saliency", "information"))
    with recorder.recording():
        network(x).sum().backward()
    recorder.observe_gradients()
    keep = torch.tensor([True, False, True, True, False, True])
    covariance, saliency = recorder.moments["0"][0].covariance[keep][:, keep], recorder.mean("saliency", "0")[keep]
    information = recorder.mean("information", "0")[keep]
    plan = Plan({"0": keep})
    remove_units(network, groups, plan)
    recorder.keep(renumber(groups, plan), plan)
    torch.testing.assert_close(recorder.moments["0"][0].covariance, covariance)
    assert torch.equal(recorder.mean("saliency", "0"), saliency)
    assert torch.equal(recorder.mean("information", "0"), information)
    with recorder.recording():
        network(x)
    assert len(recorder.moments["0"][0].total) == 4


def test_rows_and_gradients_line_up() -> None:
    network, x = mlp()
    (group,) = find_groups(network, x)
    network(x).sum().backward()
    first, third = network[0], network[2]
    torch.testing.assert_close(rows(network, group), torch.cat([first.weight, first.bias[:, None]], 1))
    torch.testing.assert_close(rows(network, group, "in"), third.weight.T)
    torch.testing.assert_close(gradients(network, group), torch.cat([first.weight.grad, first.bias.grad[:, None]], 1))
