"""A fold lets what stays speak for what goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_slim import find_groups, remove_units
from lightning_slim.recording import Recorder
from lightning_slim.statistics import least_squares_image
from lightning_slim.surgery.compensate import fold
from lightning_slim.units import Plan
from tests.surgery.test_cut import Net, conv


def fold_and_cut(network: nn.Module, x: torch.Tensor, name: str, gone: list[int]) -> None:
    groups = find_groups(network, x)
    recorder = Recorder(network, groups)
    network.eval()
    with recorder.recording():
        network(x)
    group = next(group for group in groups if group.name == name)
    keep = torch.tensor([i not in gone for i in range(group.size)])
    for moments, reader in zip(recorder.moments[name], group.readers, strict=True):
        kept, removed = keep.nonzero().flatten(), (~keep).nonzero().flatten()
        fold(network, reader, keep, least_squares_image(moments, kept, removed, 1e-9, reader.offset is not None))
    remove_units(network, groups, Plan({name: keep}))


@torch.no_grad()
def depend(weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Makes channel 2 a combination of 0 and 1, plus a constant, for channels that a ReLU does not clip."""
    bias += 20
    weight[2] = 0.5 * weight[0] - 0.25 * weight[1]
    bias[2] = 0.5 * bias[0] - 0.25 * bias[1] + 3


def test_a_linearly_dependent_unit_is_folded_exactly_into_a_linear_layer() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    depend(network[0].weight, network[0].bias)
    x = torch.randn(200, 4)
    before = network(x)
    fold_and_cut(network, x, "0", [2])
    assert network[2].weight.shape == (3, 5)
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-4)


NETWORKS = {
    "convolution with a bias": lambda: Net(
        lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 2, 3)
    ),
    "convolution before a batch norm": lambda: Net(
        lambda s, x: s.n(s.b(F.relu(s.a(x)))),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(6, 2, 3, bias=False),
        n=nn.BatchNorm2d(2),
    ),
    "flatten": lambda: Net(lambda s, x: s.b(F.relu(s.a(x)).flatten(1)), a=nn.Conv2d(3, 6, 3), b=nn.Linear(6 * 36, 2)),
    "strided convolution": lambda: Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 2, 3, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_linearly_dependent_channel_is_folded_exactly(name: str) -> None:
    network, x = NETWORKS[name](), torch.randn(8, 3, 8, 8)
    depend(network.a.weight, network.a.bias)
    network.eval()
    before = network(x)
    fold_and_cut(network, x, "a", [2])
    torch.testing.assert_close(network(x), before, rtol=1e-3, atol=2e-3)


def test_a_dependent_channel_is_folded_into_a_transposed_convolution_without_a_constant() -> None:
    network = Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 6, 3), b=nn.ConvTranspose2d(6, 2, 3, 2))
    depend(network.a.weight, network.a.bias)
    with torch.no_grad():
        network.a.bias[2] -= 3
    x = torch.randn(8, 3, 8, 8)
    before = network(x)
    fold_and_cut(network, x, "a", [2])
    torch.testing.assert_close(network(x), before, rtol=1e-3, atol=2e-3)


def test_a_grouped_convolution_is_folded_chunk_by_chunk() -> None:
    network = Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3, groups=2))
    for chunk in (slice(0, 4), slice(4, 8)):
        depend(network.a.weight[chunk], network.a.bias[chunk])
    x = torch.randn(8, 3, 8, 8)
    before = network(x)
    # b is the output: give it a reader so that only a's units are asked about
    fold_and_cut(network, x, "a", [2])
    torch.testing.assert_close(network(x), before, rtol=1e-3, atol=2e-3)


def test_a_fold_can_be_undone() -> None:
    network, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(50, 4)
    (group,) = find_groups(network, x)
    before = [p.clone() for p in network.parameters()]
    undo = fold(network, group.readers[0], torch.tensor([True] * 4 + [False] * 2), (torch.ones(4, 2), torch.ones(2)))
    assert not torch.equal(before[3], network[2].bias)
    undo()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_fold_with_one_removed_unit_by_hand() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[2.0, 5.0, 7.0]]))
        network[1].bias.fill_(1.0)
    (group,) = find_groups(network, torch.randn(3, 2))
    fold(
        network,
        group.readers[0],
        torch.tensor([True, False, True]),
        (torch.tensor([[0.5], [2.0]]), torch.tensor([3.0])),
    )
    assert network[1].weight.tolist() == [[2.0 + 0.5 * 5.0, 5.0, 7.0 + 2.0 * 5.0]]
    assert network[1].bias.item() == 1.0 + 3.0 * 5.0


def test_convolutions_share_the_image_over_positions() -> None:
    network = Net(lambda s, x: s.b(s.a(x)), a=conv(1, 3), b=conv(3, 1))
    group = next(g for g in find_groups(network, torch.randn(1, 1, 4, 4)) if g.name == "a")
    weight = network.b.weight.detach().clone()
    fold(
        network,
        group.readers[0],
        torch.tensor([True, False, True]),
        (torch.tensor([[0.5], [0.0]]), torch.tensor([0.0])),
    )
    torch.testing.assert_close(network.b.weight[:, 0], weight[:, 0] + 0.5 * weight[:, 1])
