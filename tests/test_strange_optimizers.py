"""Optimizers from outside: flat states, states of no known shape, and averages that stand for weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_slim import Magnitude, OneShot, Prune, Pruner, Units, WeightPrune
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import same


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, whose momentum is stored flat, and every `stride`-th entry of the first weights beside it."""

    def __init__(self, params: Any, lr: float = 1e-2, flat: bool = True, stride: int = 0) -> None:
        super().__init__(params, {"lr": lr, "flat": flat, "stride": stride})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["s"] = torch.zeros(p.numel()) if group["flat"] else torch.zeros_like(p)
                    if group["stride"]:
                        state["p0"] = p.flatten()[:: group["stride"]].clone()
                state["s"].mul_(0.9).add_(p.grad.reshape(state["s"].shape))
                p.sub_(group["lr"] * state["s"].view(p.shape))
        return loss


class Kept(Lit):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs

    def configure_optimizers(self) -> Momentum:
        return Momentum(self.parameters(), **self.kwargs)


def prune(**kwargs: Any) -> Prune:
    return Prune(Magnitude(), Units(0.5), OneShot(0.5), print_report=False, record_every_n_steps=2, **kwargs)


def test_flat_states_are_followed_as_shaped_ones_are(tmp_path: Path) -> None:
    ends = []
    for flat in (True, False):
        lit = Kept(flat=flat)
        trainer(tmp_path, prune(), WeightPrune(0.5), max_epochs=4).fit(lit, loader())
        ends.append(lit.state_dict())
    assert ends[0]["net.c1.weight"].shape[0] < 8
    assert same(*ends)


def test_a_state_of_no_known_shape_is_told_in_the_first_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, prune())
    with pytest.raises(ValueError, match=r'state of net\.\S+ in Momentum.*got \{\'p0\'.*unknown="reset"'):
        run.fit(Kept(stride=3), loader())
    assert run.global_step == 1


def test_such_a_state_can_begin_anew(tmp_path: Path) -> None:
    lit, callback = Kept(stride=3), prune(unknown="reset")
    run = trainer(tmp_path, callback)
    run.fit(lit, loader())
    assert lit.net.c1.out_channels < 8
    assert all(run.optimizers[0].state[p]["p0"].numel() == -(-p.numel() // 3) for p in lit.parameters())


@pytest.mark.parametrize(("key", "flat"), [("z", False), ("p0", True)])
def test_what_stands_for_weights_is_folded_as_they_are(key: str, flat: bool) -> None:
    """An iterate that equals the weights plus a constant equals them so behind a cut and its compensation, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    pruner = Pruner(net, Magnitude(), Units(0.5), OneShot(0.5))
    pruner.prepare(torch.randn(8, 4))
    with pruner.recorder.recording():
        net(torch.randn(256, 4)).square().sum().backward()
    pruner.recorder.hear()
    optimizer.step()
    bias = net[4].bias.clone()
    for p in net.parameters():
        optimizer.state[p][key] = p.detach().clone().flatten() if flat else p.detach().clone()
    momentum = optimizer.state[net[4].bias]["momentum_buffer"].clone()
    pruner.step(0.5, [optimizer])
    assert not torch.equal(bias, net[4].bias)  # something was folded
    for p in net.parameters():
        torch.testing.assert_close(optimizer.state[p][key], p.detach().flatten() if flat else p.detach())
    assert torch.equal(optimizer.state[net[4].bias]["momentum_buffer"], momentum)


def test_states_stay_where_the_cut_is_refused() -> None:
    """All states are made before the first is put in place, iterates too."""
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = Momentum(net.parameters(), stride=3)
    net(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    for p in net.parameters():
        optimizer.state[p]["z"] = p.detach().clone()
    before: list[dict[str, Tensor]] = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in net.parameters()]
    pruner = Pruner(net, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(torch.randn(8, 4))
    with pytest.raises(ValueError, match="unknown"):
        pruner.step(0.5, [optimizer])
    for p, state in zip(net.parameters(), before, strict=True):
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
