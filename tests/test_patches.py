"""Convolutions refitted tap by tap equal explicit least squares on unfolded patches."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_slim import Granger, Linear, Magnitude, OneShot, Pruner, Score, Units, find_groups, remove_units
from lightning_slim.folding import fold_plan
from lightning_slim.patches import MAX_COLUMNS, patches, with_patches
from lightning_slim.recording import Recorder
from lightning_slim.recording.recorder import MIN_ROWS
from lightning_slim.scores import ActivationMean, ActivationStd, MagnitudeTimesStd, Wanda
from lightning_slim.statistics import least_squares_image
from lightning_slim.surgery.compensate import fold
from lightning_slim.units import Plan, renumber
from tests.surgery.test_cut import Net, conv

EVERY = 10**9
SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "zero padding": {"padding": 1},
    "stride": {"padding": 1, "stride": 2},
    "dilation": {"padding": 2, "dilation": 2},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 2, "padding_mode": "reflect", "stride": 2},
    "replicate": {"padding": "same", "padding_mode": "replicate", "dilation": 2},
}
SPACES: dict[type[nn.Module], tuple[int, ...]] = {nn.Conv1d: (11,), nn.Conv2d: (7, 6), nn.Conv3d: (5, 6, 5)}


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """Patches as a convolution with one-hot kernels makes them: rows, channels x taps."""
    probe = copy.deepcopy(layer)
    fan = layer.weight[0].numel()
    probe.weight = nn.Parameter(torch.eye(fan).to(x).view(fan, *layer.weight.shape[1:]))
    probe.bias = None
    return probe(x).detach().movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", SPACES, ids=lambda kind: kind.__name__)
def test_patches_are_what_the_kernel_is_multiplied_with(kind: type[nn.Module], settings: str) -> None:
    layer, x = kind(4, 5, 3, **SETTINGS[settings]), torch.randn(3, 4, *SPACES[kind])
    table = patches(layer, x, torch.arange(4).view(4, 1), EVERY)
    torch.testing.assert_close(table.flatten(1) @ layer.weight.flatten(1).T + layer.bias, _outputs(layer(x)))
    pairs = patches(layer, x, torch.tensor([[3, 0], [1, 2]]), EVERY)  # two units of two channels
    assert torch.equal(pairs.unflatten(2, (2, -1)), table[:, [[3, 0], [1, 2]]])


def _outputs(y: Tensor) -> Tensor:
    return y.detach().movedim(1, -1).flatten(0, -2)


def test_of_many_positions_some_are_taken_and_borders_as_often_as_they_are() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding=1), torch.ones(16, 2, 32, 32)
    table = patches(layer, x, torch.arange(2).view(2, 1), 1024)  # one of 16: a step of 16 would see two columns only
    assert 900 < len(table) <= 1024
    share = table[:, 0].mean(0)  # of positions at which a tap is not on the padding
    torch.testing.assert_close(share, unfolded(layer, x)[:, :9].mean(0), rtol=0, atol=0.01)


class Scaled(nn.Conv2d):
    """A convolution that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "convolution": (lambda: conv(8, 4), True),
    "weight norm": (lambda: weight_norm(conv(8, 4)), True),
    "of one tap": (lambda: nn.Conv2d(8, 4, 1), True),
    "grouped": (lambda: conv(8, 4, groups=2), False),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 3, padding=1), False),
    "of its own": (lambda: Scaled(8, 4, 3, padding=1), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_read_by_patches(name: str) -> None:
    layer, by_patches = LAYERS[name]
    network, x = Net(lambda s, x: s.b(F.relu(s.a(x))), a=conv(3, 8), b=layer()), torch.randn(2, 3, 6, 6)
    group = with_patches(network, find_groups(network, x)[0])
    assert [(reader.patches, reader.joint) for reader in group.readers] == [(by_patches, by_patches)]


def test_too_many_columns_are_read_by_pixels() -> None:
    for kernel, by_patches in ((48, True), (49, False)):  # 96 channels
        network, x = nn.Sequential(nn.Conv1d(2, 96, 1), nn.Conv1d(96, 2, kernel)), torch.randn(1, 2, 60)
        group = with_patches(network, find_groups(network, x)[0])
        assert group.readers[0].patches == by_patches == (96 * kernel <= MAX_COLUMNS)


def recorder_of(network: nn.Module, x: Tensor, lags: int = 0, exact: bool = True) -> Recorder:
    """A recorder of all groups, that heard one batch."""
    groups = find_groups(network, x)
    recorder = Recorder(network, [with_patches(network, group) for group in groups] if exact else groups, lags)
    with torch.inference_mode(), recorder.recording():
        network(x)
    return recorder


def test_taps_are_columns_and_nothing_else_is_their_past() -> None:
    network, x = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 3, 3, padding=1)), torch.randn(4, 2, 12)
    (moments,) = recorder_of(network, x, lags=2).moments["0"]
    table = unfolded(network[2], network[:2](x)).numpy()
    np.testing.assert_allclose(moments.covariance, np.cov(table.T, bias=True), atol=1e-6)
    np.testing.assert_allclose(moments.mean, table.mean(0), atol=1e-6)


def test_rows_are_thinned_out_to_some_for_each_column() -> None:
    network, x = nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 2)), torch.randn(4, 1, 64, 64)
    assert MIN_ROWS * 0.9 < recorder_of(network, x).moments["0"][0].count <= MIN_ROWS


# --- the fold ---


def two_paths(s: Net, x: Tensor) -> Tensor:
    hidden = F.relu(s.a(x))
    return s.b(torch.cat([hidden, hidden.flip(3)], 1))


def chain(s: Net, x: Tensor) -> Tensor:
    return s.b(F.relu(s.a(x)))


REFITTED: dict[str, tuple[Net, Tensor]] = {
    name: (Net(chain, a=kind(2, 6, 3, padding=1), b=kind(6, 4, 3, **SETTINGS[name])), torch.randn(20, 2, *SPACES[kind]))
    for name in SETTINGS
    for kind in (nn.Conv2d,)
} | {
    "1d": (Net(chain, a=nn.Conv1d(2, 6, 3), b=nn.Conv1d(6, 4, 5, padding=2)), torch.randn(50, 2, 20)),
    "3d": (Net(chain, a=nn.Conv3d(2, 6, 1), b=nn.Conv3d(6, 3, 2, padding=1)), torch.randn(8, 2, 4, 4, 4)),
    "a unit of two channels": (
        Net(two_paths, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(12, 4, 3, padding=1)),
        torch.randn(28, 2, 8, 8),
    ),
}
KEEP = torch.tensor([True, False, True, True, False, True])


@pytest.mark.parametrize("name", REFITTED)
def test_the_fold_is_the_refit_by_explicit_least_squares(name: str) -> None:
    network, x = (part.double() for part in copy.deepcopy(REFITTED[name]))
    recorder = recorder_of(network, x)
    weight, bias = network.b.weight.detach().clone(), network.b.bias.detach().clone()
    heard: list[Tensor] = []
    handle = network.b.register_forward_pre_hook(lambda _, args: heard.append(args[0].detach()))
    network(x)
    handle.remove()
    table = unfolded(network.b, heard[0])
    stays = KEEP.repeat(weight.shape[1] // 6).repeat_interleave(weight[0, 0].numel())
    # Rows sqrt(n ridge) [I | 0] beside the centred ones: least squares with the ridge of the fold.
    mean = table.mean(0)
    ridge = 1e-3 * float(table.var(0, correction=0).mean()) * len(table)
    rows = torch.cat([(table - mean)[:, stays], ridge**0.5 * torch.eye(int(stays.sum())).double()])
    lost = (table - mean)[:, ~stays] @ weight.flatten(1)[:, ~stays].T
    found = torch.linalg.lstsq(rows, torch.cat([lost, lost.new_zeros(len(rows) - len(lost), lost.shape[1])])).solution
    expected = weight.flatten(1)[:, stays] + found.T
    plan = Plan({"a": KEEP})
    list(fold_plan([network], recorder.groups, plan, recorder.moments, "exact"))
    remove_units(network, recorder.groups, plan)
    torch.testing.assert_close(network.b.weight.flatten(1), expected, rtol=1e-9, atol=1e-9)
    constant = bias + weight.flatten(1) @ mean - expected @ mean[stays]
    torch.testing.assert_close(network.b.bias, constant, rtol=1e-9, atol=1e-9)


def fold_and_cut(network: nn.Module, x: Tensor, exact: bool) -> None:
    """Unit 2 of `a` goes, with hardly any ridge."""
    recorder = recorder_of(network, x, exact=exact)
    group = next(group for group in recorder.groups if group.name == "a")
    keep = torch.arange(group.size) != 2
    for moments, reader in zip(recorder.moments["a"], group.readers, strict=True):
        columns = keep.repeat_interleave(len(moments.total) // group.size)
        image = least_squares_image(moments, columns.nonzero().flatten(), (~columns).nonzero().flatten(), 1e-12)
        fold(network, reader, keep, image)
    remove_units(network, recorder.groups, Plan({"a": keep}))


DEPENDENT: dict[str, Callable[[], Net]] = {
    "bias": lambda: Net(chain, a=conv(3, 6), b=conv(6, 2)),
    "batch norm": lambda: Net(
        lambda s, x: s.n(chain(s, x)), a=conv(3, 6), b=conv(6, 2, bias=False), n=nn.BatchNorm2d(2)
    ),
    "weight norm": lambda: Net(chain, a=conv(3, 6), b=weight_norm(conv(6, 2))),
    "stride": lambda: Net(chain, a=conv(3, 6), b=conv(6, 2, stride=2)),
    "of one tap": lambda: Net(chain, a=conv(3, 6), b=nn.Conv2d(6, 2, 1, 2, padding=1)),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_linearly_dependent_channel_is_folded_exactly_at_padded_borders_too(name: str) -> None:
    """With a constant channel among the others: it tells the border from the rest, and only patches show that."""
    errors = {}
    for exact in (True, False):
        torch.manual_seed(0)
        network, x = DEPENDENT[name]().double().eval(), torch.randn(16, 3, 8, 8).double()
        with torch.no_grad():
            network.a.bias += 20
            network.a.weight[3], network.a.bias[3] = 0.0, 1.0
            network.a.weight[2] = 0.5 * network.a.weight[0] - 0.25 * network.a.weight[1]
            network.a.bias[2] = 0.5 * network.a.bias[0] - 0.25 * network.a.bias[1] + 3
        before = network(x)
        fold_and_cut(network, x, exact)
        errors[exact] = float((network(x) - before).detach().abs().max())
    assert errors[True] < 1e-6
    assert errors[False] > 0.01


def test_a_channel_that_is_another_one_shifted_by_a_pixel_is_heard_through_it() -> None:
    errors = {}
    for exact in (True, False):
        torch.manual_seed(0)
        network, x = Net(chain, a=conv(3, 6), b=nn.Conv2d(6, 2, 3)).double(), torch.randn(16, 3, 8, 8).double()
        with torch.no_grad():
            network.a.weight[:, :, :, 0] = 0  # nothing to the left: the shifted filter is whole
            network.a.weight[2] = network.a.weight[0].roll(-1, 2)
            network.a.bias[2] = network.a.bias[0]
            network.b.weight[:, 2, :, 0] = 0  # channel 2 at x is channel 0 at x - 1: no tap of 0 reads further left
        before = network(x)
        fold_and_cut(network, x, exact)
        errors[exact] = float((network(x) - before).detach().abs().max())
    assert errors[True] < 1e-6
    assert errors[False] > 0.01


# --- scores ---


def test_selection_is_greedy_over_explicit_least_squares_on_patches() -> None:
    network, x = Net(chain, a=conv(2, 6), b=conv(6, 3, stride=2)).double(), torch.randn(40, 2, 9, 9).double()
    pruner = pruner_of(network, x, Granger(), "exact")
    table = unfolded(network.b, F.relu(network.a(x)))
    table = table - table.mean(0)
    targets = table @ network.b.weight.detach().flatten(1).T

    def left(units: list[int]) -> float:
        columns = torch.cat([table[:, 9 * unit : 9 * unit + 9] for unit in units], 1)
        rest = targets - columns @ torch.linalg.lstsq(columns, targets).solution
        return float(rest.square().sum() / targets.square().sum())

    order: list[int] = []
    importance = torch.zeros(6, dtype=torch.float64)
    unexplained = 1.0
    while len(order) < 6:
        rest = {unit: left([*order, unit]) for unit in range(6) if unit not in order}
        order.append(min(rest, key=rest.__getitem__))
        importance[order[-1]] = unexplained
        unexplained = rest[order[-1]]
    torch.testing.assert_close(pruner._score()["a"].importance, importance, rtol=0, atol=2e-5)


def pruner_of(network: nn.Module, x: Tensor, score: Score, compensate: str) -> Pruner:
    pruner = Pruner(network, score, Units(0.5), OneShot(0.5), compensate=compensate)  # type: ignore[arg-type]
    pruner.prepare(x)
    with pruner.recording(), torch.no_grad():
        network(x)
    return pruner


@pytest.mark.parametrize(
    "score", [ActivationMean(), ActivationStd(), MagnitudeTimesStd(), Wanda()], ids=lambda score: type(score).__name__
)
@pytest.mark.parametrize(("mode", "tolerance"), [("circular", 1e-5), ("zeros", 0.2)])
def test_scores_mean_the_same_of_patches_as_of_pixels(score: Score, mode: str, tolerance: float) -> None:
    """All taps of a circular convolution read all pixels; others differ by borders."""
    network = Net(chain, a=conv(2, 6, padding_mode=mode), b=conv(6, 3, padding_mode=mode))
    x = torch.randn(4, 2, 14, 14)
    by_patches, by_pixels = (
        pruner_of(network, x, score, how)._score()["a"].importance for how in ("exact", "least_squares")
    )
    torch.testing.assert_close(by_patches, by_pixels, rtol=tolerance, atol=0)


# --- cuts, checkpoints ---


def test_a_record_that_followed_a_cut_is_the_record_of_the_slim_network() -> None:
    network, x = Net(chain, a=conv(3, 6), b=conv(6, 2)).double(), torch.randn(8, 3, 8, 8).double()
    recorder, plan = recorder_of(network, x), Plan({"a": KEEP})
    groups = renumber(recorder.groups, plan)
    remove_units(network, recorder.groups, plan)
    recorder.keep(groups, plan)
    afresh = Recorder(network, groups)
    with afresh.recording():
        network(x)
    ours, theirs = (of.moments["a"][0].state_dict() for of in (recorder, afresh))
    assert ours["total"].shape == (4 * 9,)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("score", [Granger(), Magnitude()], ids=["Granger", "Magnitude"])
def test_a_resumed_pruner_goes_on_to_the_bit(score: Score) -> None:
    def run(pruner: Pruner, steps: range) -> None:
        for step in steps:
            with pruner.recording(), torch.no_grad():
                pruner.model(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step)))
            pruner.step(step / 6)

    network = Net(
        lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))).mean((2, 3))), a=conv(3, 8), b=conv(8, 6), c=nn.Linear(6, 2)
    )
    pruner = Pruner(network, score, Units(0.5), Linear(0.0, 1.0), compensate="exact")
    pruner.prepare(torch.randn(2, 3, 8, 8))
    run(pruner, range(4))
    saved = io.BytesIO()
    torch.save(pruner.state_dict(), saved)
    saved.seek(0)
    resumed = Pruner(copy.deepcopy(network), score, Units(0.5), Linear(0.0, 1.0), compensate="exact")
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert resumed.groups[0].readers[0].patches
    for one in (pruner, resumed):
        run(one, range(4, 7))
    assert pruner.history.events[-1].step == 0
    assert network.a.out_channels == 4
    for name, value in network.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert all(
        torch.equal(value, other.state_dict()[key])
        for mine, theirs in zip(pruner.recorder.moments["a"], resumed.recorder.moments["a"], strict=True)
        for key, value in mine.state_dict().items()
        for other in (theirs,)
    )


def test_an_unknown_compensation_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"exact", got .inexact.'):
        Pruner(nn.Linear(2, 2), Magnitude(), compensate="inexact")  # type: ignore[arg-type]
