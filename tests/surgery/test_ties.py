"""Tied tensors: one tensor under several names is cut under all of them, or under none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import Magnitude, OneShot, Pruner, Units, find_groups, migrate, remove_units
from lightning_slim.profile import count_macs
from lightning_slim.surgery import Example, resize_to
from lightning_slim.surgery.verify import vet
from lightning_slim.units import UnitGroup
from tests.surgery.test_recurrent import different


class Transformer(nn.Module):
    """A block of attention with one head and an MLP, between an embedding and a head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(17, 12), nn.Embedding(9, 12)
        self.n1, self.n2, self.n3 = (nn.LayerNorm(12) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down, self.h = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 17, bias=False)
        self.h.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x) + self.p(torch.arange(x.shape[1]))
        y = self.n1(h)
        h = h + self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), is_causal=True, scale=0.3))
        return self.h(self.n3(h + self.down(F.gelu(self.up(self.n2(h))))))


def tokens() -> Tensor:
    return torch.randint(0, 17, (3, 6))


# A network, its input, the tied tensors, and the groups that pass the trial.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[str, str], set[str]]] = {
    "transformer": (Transformer, tokens, ("e.weight", "h.weight"), {"e", "up"}),
}


def build(name: str) -> tuple[nn.Module, Tensor, list[UnitGroup]]:
    make, x, _, names = NETWORKS[name]
    network, x = make().eval(), x()
    found = find_groups(network, x)
    unfit = vet(network, found, {"": Example((x,))})
    groups = [group for group in found if group.name not in unfit]
    assert {group.name for group in groups} == names
    return network, x, groups


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_one_tensor_before_and_after_in_model_optimizer_and_copies(name: str) -> None:
    network, x, groups = build(name)
    one, other = NETWORKS[name][2]
    optimizer = torch.optim.AdamW(network.parameters(), amsgrad=True)

    def train() -> None:
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()

    train()
    average = copy.deepcopy(network)
    before = network.get_parameter(one).shape
    plan = different(groups)
    migrate(optimizer, remove_units(network, groups, plan))
    remove_units(average, groups, plan)
    train()
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in network.parameters()]
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in network.parameters())
    for model in (network, average, copy.deepcopy(network)):
        assert model.get_parameter(one) is model.get_parameter(other)
        assert model.get_parameter(one).shape != before


@pytest.mark.parametrize("name", NETWORKS)
def test_all_attributes_follow_and_a_fresh_network_takes_the_state(name: str) -> None:
    network, x, groups = build(name)
    remove_units(network, groups, different(groups))
    fresh, dense = NETWORKS[name][0]().eval(), NETWORKS[name][0]()
    shapes = {key: tensor.shape for key, tensor in fresh.state_dict().items()}
    resize_to(fresh, {key: tensor.shape for key, tensor in network.state_dict().items()})
    fresh.load_state_dict(network.state_dict())
    assert repr(fresh) == repr(network) != repr(dense)
    assert torch.equal(fresh(x), network(x))
    resize_to(network, shapes)
    assert repr(network) == repr(dense)
    assert network.get_parameter(NETWORKS[name][2][0]) is network.get_parameter(NETWORKS[name][2][1])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_costs_of_tied_layers_are_counted(name: str) -> None:
    network, x, _ = build(name)
    pruner = Pruner(network, Magnitude(), Units(0.6), OneShot(0.5), compensate="none")
    pruner.prepare(x)
    event = pruner.step(0.5)
    assert event is not None
    assert event.params == sum(p.numel() for p in network.parameters())
    assert event.macs == pytest.approx(sum(count_macs(network, (x[:2],)).values()) / 2, rel=0.01)
