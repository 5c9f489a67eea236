"""Which layers read the inputs is found by changing these; the cut equals the network that reads nothing of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_slim import remove_units
from lightning_slim.surgery import Example, StructureChange, resize_to, restore, selections, set_selections
from lightning_slim.surgery.inputs import InputError, InputUnits, find_entries, find_inputs
from lightning_slim.surgery.verify import compare
from tests.networks import same

FEATURES = 6
KEEP = torch.tensor([True, False, True, True, False, False])


class Wrapped(nn.Module):
    """A network as a function of its layers and its input."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x)


def packed(net: Any, x: Tensor) -> Tensor:
    lengths = torch.arange(len(x)) % 3 + 3
    return net["read"](pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0].data


def flat(axes: tuple[int, int]) -> Callable[[Any, Tensor], Tensor]:
    return lambda net, x: net["read"](x.transpose(*axes).flatten(1))


CNN = {"read": nn.Conv1d(FEATURES, 4, 3), "norm": nn.BatchNorm1d(4)}
READS: dict[str, tuple[Wrapped, int]] = {  # network, axis of the features; inputs are (8, 5, 6) or (8, 6, 5)
    "linear": (Wrapped(lambda n, x: n["out"](n["read"](x).relu()), read=nn.Linear(6, 4), out=nn.Linear(4, 2)), 2),
    "keyword": (Wrapped(lambda n, x: n["read"](input=x), read=nn.Linear(6, 4)), 2),
    "convolution": (Wrapped(lambda n, x: n["norm"](n["read"](x)), **CNN), 1),
    "transposed": (Wrapped(lambda n, x: n["norm"](n["read"](x.mT)), **CNN), 2),
    "GRU, two directions": (
        Wrapped(lambda n, x: n["read"](x)[0], read=nn.GRU(6, 4, 2, batch_first=True, bidirectional=True)),
        2,
    ),
    "LSTM, projected": (Wrapped(lambda n, x: n["read"](x)[0], read=nn.LSTM(6, 4, batch_first=True, proj_size=3)), 2),
    "RNN, packed": (Wrapped(packed, read=nn.RNN(6, 4, batch_first=True)), 2),
    "flattened": (Wrapped(flat((1, 1)), read=nn.Linear(30, 4)), 2),
    "flattened, channels first": (Wrapped(flat((1, 1)), read=nn.Linear(30, 4)), 1),
    "normalised": (Wrapped(lambda n, x: n["read"](n["norm"](x).tanh()), norm=nn.BatchNorm1d(6), read=CNN["read"]), 1),
    "depthwise": (
        Wrapped(lambda n, x: n["read"](n["own"](x)), own=nn.Conv1d(6, 6, 3, groups=6), read=nn.Conv1d(6, 4, 1)),
        1,
    ),
    "weight norm": (Wrapped(lambda n, x: n["read"](x), read=weight_norm(nn.Linear(6, 4))), 2),
    "two readers": (
        Wrapped(
            lambda n, x: n["one"](x[..., :4]) + n["two"](x[..., 1:].flip(-1)), one=nn.Linear(4, 3), two=nn.Linear(5, 3)
        ),
        2,
    ),
    "beside what it made": (
        Wrapped(
            lambda n, x: n["two"](torch.cat([n["one"](x).relu(), x], -1)), one=nn.Linear(6, 4), two=nn.Linear(10, 3)
        ),
        2,
    ),
    "differences": (Wrapped(lambda n, x: n["read"](x.diff(dim=1)), read=nn.Linear(6, 3)), 2),
}


def inputs(axis: int) -> Tensor:
    return torch.randn(8, 5, FEATURES) if axis == 2 else torch.randn(8, FEATURES, 5)


def find(network: nn.Module, x: Tensor, axis: int) -> tuple[InputUnits, dict[str, Example]]:
    calls = {"": Example((x,), {}, len(x))}
    return find_inputs(network, calls, find_entries(calls, x, axis), torch.ones(FEATURES).bool()), calls


@pytest.mark.parametrize("name", READS)
def test_a_cut_equals_the_network_in_which_other_inputs_are_zero(name: str) -> None:
    network, axis = copy.deepcopy(READS[name][0]).eval(), READS[name][1]
    x = inputs(axis)
    state = copy.deepcopy(network.state_dict())
    found, calls = find(network, x, axis)
    plan = found.plan(KEEP)
    assert compare(network, found.groups, plan, calls) == ""
    assert same(network.state_dict(), state)  # neither the search nor the trial leaves a trace
    assert not selections(network)
    zeroed = copy.deepcopy(network)
    for group in found.groups:
        for span in group.spans:
            weight = dict(zeroed.named_parameters())[span.tensor]
            weight.data[:, ~plan[group.name]] = 0
    if name == "weight norm":  # whose lengths are those of all columns
        kept = network.layers["read"].weight[:, KEEP]
        zeroed.layers["read"] = nn.Linear(6, 4)
        zeroed.layers["read"].bias = network.layers["read"].bias
        zeroed.layers["read"].weight = nn.Parameter(torch.zeros(4, 6).index_copy(1, KEEP.nonzero()[:, 0], kept))
    expected = zeroed(x)
    cuts = remove_units(network, found.groups, plan)
    torch.testing.assert_close(network(x), expected)
    other = x.movedim(axis, -1).clone()
    other[..., ~KEEP] += 1
    if name != "normalised":
        assert torch.equal(network(other.movedim(-1, axis)), network(x))
    restore(network, cuts)
    assert same(network.state_dict(), state)
    assert not selections(network)


def test_columns_are_told_by_their_features() -> None:
    found, _ = find(READS["flattened"][0], inputs(2), 2)
    (columns,) = found.features.values()
    assert columns.tolist() == [*range(6)] * 5
    found, _ = find(READS["flattened, channels first"][0], inputs(1), 1)
    assert next(iter(found.features.values())).tolist() == [i for i in range(6) for _ in range(5)]
    found, _ = find(READS["beside what it made"][0], inputs(2), 2)
    assert [at.tolist() for at in found.features.values()] == [[*range(6)], [-1] * 4 + [*range(6)]]


def test_a_feature_that_is_the_same_in_all_items_is_found_too() -> None:
    x = inputs(2)
    x[..., 1] = 0.5
    found, _ = find(READS["linear"][0], x, 2)
    assert next(iter(found.features.values())).tolist() == [*range(6)]


@pytest.mark.parametrize("features", [1, 2, 37])
def test_any_number_of_features_is_told_apart(features: int) -> None:
    x = torch.randn(4, features)
    calls = {"": Example((x,), {}, 4)}
    network = nn.Sequential(nn.Linear(features, 3), nn.ReLU(), nn.Linear(3, 2))
    found = find_inputs(network, calls, find_entries(calls, x, 1), torch.ones(features).bool())
    assert [at.tolist() for at in found.features.values()] == [[*range(features)]]


def test_what_comes_through_a_layer_is_no_input() -> None:
    """A hidden unit that reads one input yet will read all of them."""
    network, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), inputs(2)
    network[0].weight.data = torch.eye(6)
    found, _ = find(network, x, 2)
    assert [group.name for group in found.groups] == ["inputs of 0"]
    assert torch.equal(network[0].weight, torch.eye(6))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.table = nn.Linear(6, 4), nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x) + self.table((x[..., 0].abs() * 2).long().clamp(max=8))


REFUSED = {
    "residual": (
        Wrapped(lambda n, x: n["head"](x + n["mlp"](x)), mlp=nn.Linear(6, 6), head=nn.Linear(6, 2)),
        r"layers\.head \(Linear\)",
    ),
    "layer norm": (
        Wrapped(lambda n, x: n["read"](n["norm"](x)), norm=nn.LayerNorm(6), read=nn.Linear(6, 2)),
        r"layers\.norm \(LayerNorm\)",
    ),
    "embedding": (Tokens(), "an output of Tokens"),
    "autoencoder": (Wrapped(lambda n, x: x - n["mlp"](x), mlp=nn.Linear(6, 6)), "an output of Wrapped"),
    "grouped": (
        Wrapped(lambda n, x: n["read"](x.mT), read=nn.Conv1d(6, 4, 1, groups=2)),
        r"layers\.read \(Conv1d\)",
    ),
    "attention": (
        Wrapped(lambda n, x: n["mix"](x, x, x)[0], mix=nn.MultiheadAttention(6, 2, batch_first=True)),
        r"layers\.mix \(MultiheadAttention\)",
    ),
    "spectral norm": (
        Wrapped(lambda n, x: n["read"](x), read=nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))),
        r"layers\.read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_else_reads_the_inputs_is_named(name: str) -> None:
    network, culprit = REFUSED[name]
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=culprit):
        find(network, inputs(2), 2)
    assert same(network.state_dict(), state)


def test_what_else_reads_protected_inputs_does_no_harm() -> None:
    x = inputs(2)
    calls = {"": Example((x,), {}, 8)}
    removable = torch.arange(6) > 0
    network = Tokens()
    found = find_inputs(network, calls, find_entries(calls, x, 2), removable)
    assert compare(network, found.groups, found.plan(~removable | KEEP), calls) == ""


def test_a_selection_is_copied_pickled_exported_and_taken_back() -> None:
    network, axis = copy.deepcopy(READS["linear"][0]).eval(), 2
    network.function = linear_twice
    x = inputs(axis)
    found, _ = find(network, x, axis)
    whole = copy.deepcopy(network)
    change = StructureChange(found.groups, found.plan(KEEP))
    change.apply(network)
    expected = network(x)
    assert torch.equal(copy.deepcopy(network)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), expected)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    assert selections(network) == {"layers.read": (-1, [0, 2, 3])}
    twin = copy.deepcopy(whole)
    set_selections(twin, selections(network))
    resize_to(twin, {name: tensor.shape for name, tensor in network.state_dict().items()})
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(x), expected)
    resize_to(twin, {name: tensor.shape for name, tensor in whole.state_dict().items()})
    assert not selections(twin)
    twin.load_state_dict(whole.state_dict())
    assert torch.equal(twin(x), whole(x))


def linear_twice(net: Any, x: Tensor) -> Tensor:
    return net["out"](net["read"](x).relu())


def test_inputs_can_be_removed_twice() -> None:
    network, x = copy.deepcopy(READS["linear"][0]).eval(), inputs(2)
    found, _ = find(network, x, 2)
    remove_units(network, found.groups, found.plan(KEEP))
    left, calls = find(network, x, 2)
    assert next(iter(left.features.values())).tolist() == [0, 2, 3]
    plan = left.plan(torch.arange(6) != 2)
    assert compare(network, left.groups, plan, calls) == ""
    assert selections(network) == {"layers.read": (-1, [0, 2, 3])}
    remove_units(network, left.groups, plan)
    assert selections(network) == {"layers.read": (-1, [0, 3])}
