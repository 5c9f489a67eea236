"""The oracle: a network cut in mid-run trains on as the narrow one that was built by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from lightning_slim import find_groups, migrate, remove_units
from tests.networks import (
    Mixed,
    images,
    mixed_plan,
    narrow_copy,
    narrow_optimizer_state,
    same,
    same_optimizer_state,
)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def train(network: nn.Module, optimizers: list[Optimizer], steps: range) -> None:
    for i in steps:
        x, y = images(i)
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


def cut(network: Mixed, optimizers: list[Optimizer]) -> None:
    groups = find_groups(network, images(0)[0])
    migrate(optimizers, remove_units(network, groups, mixed_plan(groups)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cut_network_trains_on_as_the_narrow_one_built_by_hand(name: str) -> None:
    wide = Mixed()
    optimizer = OPTIMIZERS[name](wide.parameters())
    train(wide, [optimizer], range(6))
    narrow = narrow_copy(wide)
    oracle = OPTIMIZERS[name](narrow.parameters())
    oracle.load_state_dict(narrow_optimizer_state(wide, copy.deepcopy(optimizer.state_dict())))

    cut(wide, [optimizer])
    train(wide, [optimizer], range(100, 130))
    train(narrow, [oracle], range(100, 130))

    assert same(wide.state_dict(), narrow.state_dict())
    assert same_optimizer_state(optimizer.state_dict(), oracle.state_dict())


def test_muon_and_adamw_side_by_side() -> None:
    def optimizers(network: Mixed) -> list[Optimizer]:
        matrices = [network.fc1.weight, network.fc2.weight]
        others = [p for p in network.parameters() if all(p is not m for m in matrices)]
        return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]

    wide = Mixed()
    both = optimizers(wide)
    train(wide, both, range(6))
    narrow = narrow_copy(wide)
    oracles = optimizers(narrow)
    names = {id(p): name for name, p in wide.named_parameters()}
    for optimizer, oracle in zip(both, oracles, strict=True):
        held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        oracle.load_state_dict(narrow_optimizer_state(wide, copy.deepcopy(optimizer.state_dict()), held))

    cut(wide, both)
    train(wide, both, range(100, 130))
    train(narrow, oracles, range(100, 130))

    assert same(wide.state_dict(), narrow.state_dict())
    assert all(same_optimizer_state(a.state_dict(), b.state_dict()) for a, b in zip(both, oracles, strict=True))


def test_gradients_that_are_being_accumulated_are_cut_with_their_parameter() -> None:
    wide = Mixed()
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    F.cross_entropy(wide(images(0)[0]), images(0)[1]).backward()
    before = wide.c1.weight.grad.clone()
    cut(wide, [optimizer])
    assert torch.equal(wide.c1.weight.grad, before[[0, 2, 3, 5, 7]])


def test_param_groups_and_schedulers_go_on() -> None:
    wide = Mixed()
    optimizer = torch.optim.SGD(
        [{"params": wide.c1.parameters(), "lr": 0.5}, {"params": wide.fc2.parameters()}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    cut(wide, [optimizer])
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]
    assert optimizer.param_groups[0]["params"][0] is wide.c1.weight


def test_lbfgs_starts_anew_with_a_warning() -> None:
    wide = Mixed()
    optimizer = torch.optim.LBFGS(wide.parameters(), max_iter=2)
    x, y = images(0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(wide(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.warns(UserWarning, match="LBFGS"):
        cut(wide, [optimizer])
    assert not optimizer.state
    assert torch.isfinite(optimizer.step(closure))


class Strange(torch.optim.SGD):
    """Keeps a state of a shape that nobody understands."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sketch"] = torch.zeros(7)


def test_a_state_of_unknown_shape_is_an_error_that_changes_nothing() -> None:
    wide = Mixed()
    adam, strange = torch.optim.Adam(wide.parameters()), Strange(wide.parameters(), lr=0.1)
    train(wide, [adam, strange], range(2))
    groups = find_groups(wide, images(0)[0])
    before = copy.deepcopy(adam.state_dict())
    cuts = remove_units(wide, groups, mixed_plan(groups))
    with pytest.raises(ValueError, match=r"sketch.*\(7,\).*reset"):
        migrate([adam, strange], cuts)
    assert same_optimizer_state(before, adam.state_dict())
    migrate([adam, strange], cuts, unknown="reset")
    assert wide.c1.weight not in strange.state
    assert "sketch" in strange.state[wide.fc2.bias]
