"""The scales of the norms that units pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_slim import find_groups
from lightning_slim.surgery.layers.norm import norm_scales
from tests.networks import Mixed, images
from tests.surgery.test_cut import Net


def loud(network: nn.Module) -> nn.Module:
    """The same network with its norms' scales drawn, of both signs."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape))
    return network


def scales(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {group.name: norm_scales(network, group) for group in find_groups(network, x)}


def test_every_kind_of_norm_counts_and_units_of_two_channels_have_the_mean() -> None:
    network = loud(Mixed())
    found = scales(network, images(0)[0])
    torch.testing.assert_close(found["c1"], network.b1.weight.detach().abs()[:, None])
    torch.testing.assert_close(found["c2"], network.g2.weight.detach().abs().view(2, 6).mean(0)[:, None])
    torch.testing.assert_close(found["up"], network.b3.weight.detach().abs()[:, None])
    torch.testing.assert_close(found["fc1"], network.ln.weight.detach().abs()[:, None])


def test_a_stream_passes_several_norms_and_some_none() -> None:
    network = loud(
        Net(
            lambda s, x: s.out(s.n2((h := s.a(x)) + s.b(torch.relu(s.c(s.n1(h)))))),
            a=nn.Linear(4, 6),
            n1=nn.LayerNorm(6),
            c=nn.Linear(6, 5),
            b=nn.Linear(5, 6),
            n2=nn.RMSNorm(6),
            out=nn.Linear(6, 2),
        )
    )
    found = scales(network, torch.randn(3, 4))
    expected = torch.stack([network.n1.weight, network.n2.weight], 1).detach().abs()
    stream = next(values for name, values in found.items() if name != "c")
    torch.testing.assert_close(stream.sort(1).values, expected.sort(1).values)
    assert found["c"].shape == (5, 0)


def test_a_norm_without_a_scale_does_not_count() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2))
    assert scales(network, torch.randn(3, 4))["0"].shape == (6, 0)
