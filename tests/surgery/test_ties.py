"""Tied tensors: one tensor under several names is cut under all of them, or under none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import Magnitude, OneShot, Pruner, Units, find_groups, migrate, remove_units
from lightning_slim.profile import count_macs
from lightning_slim.surgery import Example, resize_to
from lightning_slim.surgery.groups import survey_networks
from lightning_slim.surgery.ties import tied_names
from lightning_slim.surgery.verify import _unmixed, vet
from lightning_slim.units import UnitGroup, gradients, rows
from tests.networks import same
from tests.surgery.test_cut import Net, zeroed
from tests.surgery.test_recurrent import different


class Recurrent(nn.Module):
    """Embedding, recurrent layers, a decoder tied to the embedding."""

    def __init__(self, kind: str = "LSTM", bias: bool = True, **kwargs: Any) -> None:
        super().__init__()
        width = kwargs.get("proj_size") or 10
        width *= 2 if kwargs.get("bidirectional") else 1
        self.e, self.r = nn.Embedding(17, width), getattr(nn, kind)(width, 10, batch_first=True, **kwargs)
        self.d = nn.Linear(width, 17, bias=bias)
        self.d.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.r(self.e(x))[0])


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


def perceptron() -> Net:
    """Embedding, linear, tanh, decoder tied to the embedding."""
    network = Net(
        lambda s, x: s.d(torch.tanh(s.l(s.e(x)))), e=nn.Embedding(17, 10), l=nn.Linear(10, 10), d=nn.Linear(10, 17)
    )
    network.d.weight = network.e.weight
    return network


def recursive(biases_too: bool) -> Net:
    """Two hidden layers with one weight."""
    network = Net(
        lambda s, x: s.o(torch.tanh(s.b(torch.tanh(s.a(torch.tanh(s.i(x))))))),
        i=nn.Linear(4, 10),
        a=nn.Linear(10, 10),
        b=nn.Linear(10, 10),
        o=nn.Linear(10, 3),
    )
    network.b.weight = network.a.weight
    network.b.bias = network.a.bias if biases_too else network.b.bias
    return network


def normed() -> Net:
    """Two hidden layers with one weight, which is stored as lengths and directions."""
    network = recursive(False)
    network.a.weight, network.b.weight = (nn.Parameter(network.a.weight.detach().clone()) for _ in range(2))
    for layer in (network.a, network.b):
        nn.utils.parametrizations.weight_norm(layer)
    network.b.parametrizations.weight.original0 = network.a.parametrizations.weight.original0
    network.b.parametrizations.weight.original1 = network.a.parametrizations.weight.original1
    return network


def tokens() -> Tensor:
    return torch.randint(0, 17, (3, 6))


# A network, its input, the tied tensors, and the groups that pass the trial.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[str, str], set[str]]] = {
    "LSTM": (Recurrent, tokens, ("e.weight", "d.weight"), {"e"}),
    "LSTM, no bias": (lambda: Recurrent(bias=False), tokens, ("e.weight", "d.weight"), {"e"}),
    "LSTM, two layers": (lambda: Recurrent(num_layers=2), tokens, ("e.weight", "d.weight"), {"e", "r.l0"}),
    "GRU, both directions": (
        lambda: Recurrent("GRU", bidirectional=True),
        tokens,
        ("e.weight", "d.weight"),
        {"e", "e#2"},
    ),
    "LSTM, projections": (lambda: Recurrent(proj_size=6), tokens, ("e.weight", "d.weight"), {"e", "r.cells_l0"}),
    "MLP": (perceptron, tokens, ("e.weight", "d.weight"), {"e"}),
    "transformer": (Transformer, tokens, ("e.weight", "h.weight"), {"e", "up", "q", "v"}),
    "recursive": (lambda: recursive(False), lambda: torch.randn(5, 4), ("a.weight", "b.weight"), {"i"}),
    "recursive, biases too": (lambda: recursive(True), lambda: torch.randn(5, 4), ("a.bias", "b.bias"), {"i"}),
    "recursive, under weight norm": (
        normed,
        lambda: torch.randn(5, 4),
        ("a.parametrizations.weight.original1", "b.parametrizations.weight.original1"),
        {"i"},
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor, list[UnitGroup]]:
    make, x, _, names = NETWORKS[name]
    network, x = make().eval(), x()
    found = find_groups(network, x)
    unfit = vet(network, found, {"": Example((x,))})
    groups = [group for group in found if group.name not in unfit]
    assert {group.name for group in groups} == names
    return network, x, groups


def untied(network: nn.Module) -> nn.Module:
    """A copy in which every name has a tensor of its own."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return copied


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cut_network_equals_the_one_in_which_nothing_reads_the_units(name: str) -> None:
    """Of a tied tensor, only what reads is zeroed: the embedding makes its units as before."""
    network, x, groups = build(name)
    plan = different([group for group in groups if group.name != "q"])  # no matrix reads it, so nothing is zeroed
    reference = zeroed(untied(network), groups, plan)
    remove_units(network, groups, plan)
    with _unmixed(network), _unmixed(reference):
        torch.testing.assert_close(network(x), reference(x), rtol=0, atol=1e-5)


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
def test_the_trial_leaves_everything_as_it_was(name: str) -> None:
    make, x, (one, other), _ = NETWORKS[name]
    network, x = make(), x()
    before, held, outputs = copy.deepcopy(network.state_dict()), [id(p) for p in network.parameters()], network(x)
    vet(network, find_groups(network, x), {"": Example((x,))})
    assert same(before, network.state_dict())
    assert held == [id(p) for p in network.parameters()]
    assert network.get_parameter(one) is network.get_parameter(other)
    assert torch.equal(outputs, network(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_costs_of_tied_layers_are_counted(name: str) -> None:
    network, x, _ = build(name)
    pruner = Pruner(network, Magnitude(), Units(0.6), OneShot(0.5), compensate="none")
    pruner.prepare(x)
    event = pruner.step(0.5)
    assert event is not None
    assert event.params == sum(p.numel() for p in network.parameters())
    assert event.macs == pytest.approx(sum(count_macs(network, (x[:2],)).values()) / 2, rel=0.01)


def test_a_unit_owns_a_column_of_the_embedding_and_all_of_a_hidden_unit_by_hand() -> None:
    (group,) = find_groups(Recurrent(), tokens())
    places = {(span.tensor, span.axis): (span.index[3].tolist(), span.role) for span in group.spans}
    assert places == {
        ("e.weight", 1): ([3], "out"),
        ("r.weight_ih_l0", 1): ([3], "in"),
        ("r.weight_ih_l0", 0): ([3, 13, 23, 33], "out"),
        ("r.weight_hh_l0", 0): ([3, 13, 23, 33], "out"),
        ("r.bias_ih_l0", 0): ([3, 13, 23, 33], "out"),
        ("r.bias_hh_l0", 0): ([3, 13, 23, 33], "out"),
        ("r.weight_hh_l0", 1): ([3], "in"),
        ("d.weight", 1): ([3], "in"),
    }
    assert {reader.span.tensor for reader in group.readers} == {"r.weight_hh_l0", "d.weight", "r.weight_ih_l0"}


def test_a_tied_tensor_weighs_once() -> None:
    network, x = perceptron(), tokens()
    (group,) = find_groups(network, x)
    network(x).square().sum().backward()
    own = torch.cat([network.e.weight.T, network.l.weight, network.l.bias[:, None]], 1)
    slope = torch.cat([network.e.weight.grad.T, network.l.weight.grad, network.l.bias.grad[:, None]], 1)
    both = torch.cat([own, network.l.weight.T], 1)
    for role, weights in (("out", own), (None, both)):
        seen = rows(network, group, role)
        torch.testing.assert_close(seen.square().sum(1), weights.square().sum(1))
        assert seen.shape == weights.shape
    torch.testing.assert_close(gradients(network, group).square().sum(1), slope.square().sum(1))


class Functional(nn.Module):
    """A weight that is used transposed, without a layer of its own, by one more layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.bias = nn.Linear(6, 4), nn.Linear(6, 2), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(F.linear(torch.tanh(self.a(x)), self.a.weight.t(), self.bias)))


def left_whole() -> dict[str, tuple[nn.Module, Tensor, str]]:
    """Networks of which nothing can be cut, and why."""
    to_the_input = Net(lambda s, x: s.o(s.b(F.relu(s.a(x)))), a=nn.Linear(6, 6), b=nn.Linear(6, 6), o=nn.Linear(6, 2))
    to_the_input.b.weight = to_the_input.a.weight
    to_the_output = Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    to_the_output.b.weight = to_the_output.a.weight
    some_units = Net(
        lambda s, x: s.d((y := s.r(s.e(x))[0])[..., :6]) + s.o(y),
        e=nn.Embedding(17, 6),
        r=nn.LSTM(6, 10, num_layers=2, batch_first=True),
        d=nn.Linear(6, 17),
        o=nn.Linear(10, 17),
    )
    some_units.d.weight = some_units.e.weight
    return {
        "the weight that reads the input": (to_the_input, torch.randn(3, 6), "it meets an input"),
        "the weight that makes the output": (to_the_output, torch.randn(3, 6), "it meets an input"),
        "some of a layer's units": (some_units, tokens(), "must keep as many units each"),
    }


@pytest.mark.parametrize("name", left_whole())
def test_what_cannot_be_cut_with_its_tie_is_left_whole_with_the_reason(name: str) -> None:
    network, x, reason = left_whole()[name]
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=f"Nothing can be removed.*{reason}"):
        Pruner(network, Magnitude(), Units(0.5)).prepare(x)
    assert same(before, network.state_dict())


def shared_elsewhere() -> dict[str, tuple[nn.Module, Tensor]]:
    """Ties to what no layer of its own calls, or that is not called, and one between the levels of an LSTM."""
    functional = Net(lambda s, x: F.linear(s.l(s.e(x)), s.e.weight), e=nn.Embedding(17, 8), l=nn.Linear(8, 8))
    heard = Net(
        lambda s, x: s.d(torch.tanh(s.l(h := s.e(x))) * h.sum(-1, True)),
        e=nn.Embedding(17, 8),
        l=nn.Linear(8, 8),
        d=nn.Linear(8, 17),
    )
    heard.d.weight = heard.e.weight
    beside = Net(lambda s, x: s.d(s.e(x)), e=nn.Embedding(17, 8), d=nn.Linear(8, 17), other=nn.Module())
    beside.d.weight = beside.other.weight = beside.e.weight
    levels = Net(lambda s, x: s.o(s.r(x)[0]), r=nn.LSTM(6, 6, num_layers=3), o=nn.Linear(6, 2))
    levels.r.weight_hh_l1 = levels.r.weight_hh_l0
    return {
        "a layer that is not called": (beside, tokens()),
        "two levels of an LSTM": (levels, torch.randn(5, 3, 6)),
        "a transposed weight": (Functional(), torch.randn(3, 6)),
        "a functional decoder": (functional, tokens()),
        "a sum over what is embedded": (heard, tokens()),
    }


@pytest.mark.parametrize("name", shared_elsewhere())
def test_what_shares_a_weight_is_cut_alike(name: str) -> None:
    network, x = shared_elsewhere()[name]
    groups = find_groups(network, x)
    assert vet(network, groups, {"": Example((x,))}) == {}
    held = {name for names in tied_names(network).values() for name in names}
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(x)
    assert pruner.step(0.5) is not None
    assert held == {name for names in tied_names(network).values() for name in names}
    network(x)


def test_what_two_networks_share_is_cut_in_both() -> None:
    two = nn.ModuleDict({"one": perceptron(), "other": perceptron()})
    calls = {name: Example((tokens(),)) for name in two}
    two["first"] = two["one"].e  # a second name of the layer
    assert {group.name for group in survey_networks(two, calls).groups} == {"one.e", "other.e"}
    two["other"].l.weight = two["one"].l.weight
    (group,) = survey_networks(two, calls).groups
    assert {"one.e.weight", "other.e.weight"} < {span.tensor for span in group.spans}
    assert vet(two, [group], calls) == {}
