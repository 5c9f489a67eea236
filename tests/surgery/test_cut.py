"""A cut model equals the model whose removed units are zeroed, and nothing else of it changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import find_groups, remove_units
from lightning_slim.surgery import resize_to, restore
from lightning_slim.units import Plan, UnitGroup, named_tensors
from tests.networks import Mixed, images, mixed_plan, same, without_weight_norm


class Net(nn.Module):
    """Layers by name and a forward written in one line."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self._modules.update(layers)
        self.call = forward

    def forward(self, *x: Tensor) -> Tensor:
        return self.call(self, *x)


def conv(*widths: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(*widths, 3, padding=1, **kwargs)


NETWORKS = {
    "Conv1d": lambda: (
        Net(
            lambda s, x: s.o(F.relu(s.b(F.relu(s.a(x)))).mean(2)),
            a=nn.Conv1d(5, 6, 3),
            b=nn.Conv1d(6, 7, 3),
            o=nn.Linear(7, 2),
        ),
        torch.randn(4, 5, 9),
    ),
    "Conv2d": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(x))), a=conv(3, 8), b=conv(8, 2)),
        torch.randn(2, 3, 6, 6),
    ),
    "grouped": lambda: (
        Net(
            lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x))))),
            a=conv(3, 8),
            b=conv(8, 12, groups=2),
            c=conv(12, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "depthwise": lambda: (
        Net(lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x))))), a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 2)),
        torch.randn(2, 3, 6, 6),
    ),
    "depthwise, four filters a channel": lambda: (
        Net(lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x))))), a=conv(3, 4), b=conv(4, 16, groups=4), c=conv(16, 2)),
        torch.randn(2, 3, 6, 6),
    ),
    "ConvTranspose": lambda: (
        Net(
            lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x))))),
            a=conv(3, 8),
            b=nn.ConvTranspose2d(8, 6, 2, 2),
            c=conv(6, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "ConvTranspose, grouped": lambda: (
        Net(
            lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x))))),
            a=conv(3, 8),
            b=nn.ConvTranspose2d(8, 6, 2, 2, groups=2),
            c=conv(6, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "Linear": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Linear(5, 9), b=nn.Linear(9, 2)),
        torch.randn(3, 5),
    ),
    "BatchNorm": lambda: (
        Net(lambda s, x: s.c(F.relu(s.b(s.a(x)))), a=conv(3, 8, bias=False), b=nn.BatchNorm2d(8), c=conv(8, 2)),
        torch.randn(2, 3, 6, 6),
    ),
    "InstanceNorm": lambda: (
        Net(
            lambda s, x: s.c(F.relu(s.b(s.a(x)))),
            a=conv(3, 8),
            b=nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            c=conv(8, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "PReLU": lambda: (
        Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(3, 8), b=nn.PReLU(8), c=conv(8, 2)),
        torch.randn(2, 3, 6, 6),
    ),
    "PReLU, shared": lambda: (
        Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(3, 8), b=nn.PReLU(), c=conv(8, 2)),
        torch.randn(2, 3, 6, 6),
    ),
    "Embedding": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(s.e(x)))), e=nn.Embedding(11, 8), a=nn.Linear(8, 6), b=nn.Linear(6, 3)),
        torch.randint(0, 11, (2, 5)),
    ),
    "residual add": lambda: (
        Net(
            lambda s, x: (lambda h: s.o(F.relu(h + s.c(F.relu(s.b(h)))).mean((2, 3))))(F.relu(s.a(x))),
            a=conv(3, 8),
            b=conv(8, 6),
            c=conv(6, 8),
            o=nn.Linear(8, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "concat": lambda: (
        Net(
            lambda s, x: s.c(F.relu(torch.cat([s.a(x), s.b(x)], 1))),
            a=conv(3, 4),
            b=conv(3, 6),
            c=conv(10, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "flatten": lambda: (
        Net(lambda s, x: s.o(F.relu(s.a(x)).flatten(1)), a=conv(3, 8), o=nn.Linear(8 * 36, 2)),
        torch.randn(2, 3, 6, 6),
    ),
    "concat, then flatten": lambda: (
        Net(
            lambda s, x: s.o(F.relu(torch.cat([s.a(x), s.b(x)], 1)).flatten(1)),
            a=conv(3, 4),
            b=conv(3, 6),
            o=nn.Linear(10 * 36, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "concat of a concat, then flatten": lambda: (
        Net(
            lambda s, x: s.o(torch.cat([h := torch.cat([x, s.a(x)], 1), s.b(h)], 1).flatten(1)),
            a=conv(3, 4),
            b=conv(7, 5),
            o=nn.Linear(12 * 36, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "gate (chunk)": lambda: (
        Net(
            lambda s, x: (lambda u, v: s.b(u * torch.sigmoid(v)))(*s.a(x).chunk(2, 1)),
            a=nn.Linear(5, 16),
            b=nn.Linear(8, 2),
        ),
        torch.randn(3, 5),
    ),
    "heads and MLP of attention blocks": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False),
        torch.randn(2, 5, 16),
    ),
}


def some(groups: list[UnitGroup]) -> Plan:
    """Removes every third unit of every group (of a group of two, none)."""
    return Plan({group.name: torch.arange(group.size) % 3 != 2 for group in groups})


@torch.no_grad()
def zeroed(model: nn.Module, groups: list[UnitGroup], plan: Plan) -> nn.Module:
    """A copy in which nothing reads the removed units, with ordinary weights."""
    copied = without_weight_norm(copy.deepcopy(model))
    tensors = named_tensors(copied)
    for group in groups:
        for span in (span for span in group.spans if span.role == "in"):
            name = span.tensor.replace("parametrizations.weight.original1", "weight").replace("weight_v", "weight")
            tensors[name].movedim(span.axis, 0)[span.index[~plan[group.name]].flatten()] = 0
    return copied


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cut_network_equals_the_zeroed_one(name: str) -> None:
    network, x = NETWORKS[name]()
    network.eval()
    groups = find_groups(network, x)
    plan = some(groups)
    reference = zeroed(network, groups, plan)
    before = sum(p.numel() for p in network.parameters())
    remove_units(network, groups, plan)
    assert sum(p.numel() for p in network.parameters()) < before
    torch.testing.assert_close(network(x), reference(x), rtol=0, atol=1e-5)


def test_layer_norm_has_the_right_shapes_and_gradients() -> None:
    network, x = Mixed(), images(0)[0]
    groups = find_groups(network, x)
    remove_units(network, groups, mixed_plan(groups))
    network(x).sum().backward()
    assert network.ln.normalized_shape == (17,)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())


def test_attributes_follow_the_shapes() -> None:
    network = Mixed()
    groups = find_groups(network, images(0)[0])
    remove_units(network, groups, mixed_plan(groups))
    assert (network.c1.out_channels, network.b1.num_features, network.c2.in_channels) == (5, 5, 5)
    assert (
        network.dw.groups,
        network.dw.in_channels,
        network.pr.num_parameters,
        network.g2.num_channels,
    ) == (8, 8, 8, 8)
    assert (
        network.up.in_channels,
        network.up.out_channels,
        network.fc1.in_features,
        network.fc1.out_features,
    ) == (8, 11, 176, 17)


def test_everything_about_a_parameter_is_kept() -> None:
    network = Mixed()
    network.c1.weight.requires_grad_(False)
    network.c1.bias.no_decay = True
    seen: list[int] = []
    network.fc1.bias.register_hook(lambda grad: seen.append(len(grad)))
    network.c2.weight.data = network.c2.weight.data.to(memory_format=torch.channels_last)
    network.b1.eval()
    groups = find_groups(network, images(0)[0])
    generator = torch.get_rng_state()
    remove_units(network, groups, mixed_plan(groups))
    assert torch.equal(generator, torch.get_rng_state())
    assert not network.c1.weight.requires_grad
    assert network.c1.bias.no_decay
    assert network.c2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not network.b1.training
    assert network.c1.training
    network(images(0)[0]).sum().backward()
    assert seen == [17]


def test_ties_stay_ties() -> None:
    network = Net(
        lambda s, x: s.d(s.e(x) + F.relu(s.l(s.e(x)))),
        e=nn.Embedding(11, 8),
        l=nn.Linear(8, 8),
        d=nn.Linear(8, 11, bias=False),
    )
    network.d.weight = network.e.weight
    x = torch.randint(0, 11, (2, 5))
    groups = find_groups(network, x)
    remove_units(network, groups, some(groups))
    assert network.d.weight is network.e.weight
    assert network.d.weight.shape == (11, 6)
    assert network(x).shape == (2, 5, 11)


def test_a_failed_cut_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Mixed()
    groups = find_groups(network, images(0)[0])
    plan = mixed_plan(groups)
    before = copy.deepcopy(network.state_dict())
    held = [id(p) for p in network.parameters()]
    plan["fc1"] = torch.zeros(20, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least 2 units of 'fc1'"):
        remove_units(network, groups, plan)
    assert same(before, network.state_dict())
    assert held == [id(p) for p in network.parameters()]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nowhere": torch.ones(3, dtype=torch.bool)}, r"one of \['c1', .*got 'nowhere'"),
        (
            {"c1": torch.ones(3, dtype=torch.bool)},
            r"mask of 8 entries for 'c1', got torch.bool of shape \(3,\)",
        ),
        ({"c1": torch.ones(8)}, "boolean mask"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: dict[str, Tensor], message: str) -> None:
    network = Mixed()
    with pytest.raises(ValueError, match=message):
        remove_units(network, find_groups(network, images(0)[0]), plan)


def test_restore_is_the_inverse() -> None:
    network = Mixed().eval()
    x = images(0)[0]
    before, held = network(x), [id(p) for p in network.parameters()]
    groups = find_groups(network, x)
    restore(network, remove_units(network, groups, mixed_plan(groups)))
    assert torch.equal(before, network(x))
    assert held == [id(p) for p in network.parameters()]


def test_resize_shrinks_and_grows() -> None:
    slim, fresh, x = Mixed(), Mixed(), images(0)[0]
    dense_shapes = {name: tensor.shape for name, tensor in slim.state_dict().items()}
    groups = find_groups(slim, x)
    remove_units(slim, groups, mixed_plan(groups))
    resize_to(fresh, {name: tensor.shape for name, tensor in slim.state_dict().items()})
    fresh.load_state_dict(slim.state_dict())
    assert torch.equal(fresh.eval()(x), slim.eval()(x))
    resize_to(fresh, dense_shapes)
    fresh.load_state_dict(Mixed().state_dict())
    assert fresh(x).shape == (16, 5)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_handle_of_before_a_cut_removes_its_hook_behind_it(register: str) -> None:
    net, heard = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), []
    handle = getattr(net[0].weight, register)(lambda tensor: heard.append(tuple(tensor.shape)))
    groups = find_groups(net, torch.randn(2, 4))
    remove_units(net, groups, {"0": torch.arange(8) < 6})
    net(torch.randn(3, 4)).sum().backward()
    assert heard == [(6, 4)]
    handle.remove()
    net(torch.randn(3, 4)).sum().backward()
    assert heard == [(6, 4)]
