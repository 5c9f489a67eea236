"""Which units a network has, and which it must keep."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import find_groups, remove_units
from lightning_slim.surgery import survey
from lightning_slim.units import MIN_UNITS, Plan, from_state, renumber, to_state
from tests.networks import Mixed, images, mixed_plan, same
from tests.surgery.test_cut import NETWORKS, Net, some


def test_finding_groups_changes_nothing() -> None:
    network = Mixed()
    network.c1.requires_grad_(False)
    network.b3.eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    generator = torch.get_rng_state()
    with torch.no_grad():
        find_groups(network, images(0)[0])
    assert same(before, network.state_dict())
    assert modes == [module.training for module in network.modules()]
    assert not network.c1.weight.requires_grad
    assert network.c2.weight.requires_grad
    assert torch.equal(generator, torch.get_rng_state())


def test_frozen_first_layers_do_not_hide_the_others() -> None:
    frozen = Mixed()
    frozen.requires_grad_(False)
    assert [g.name for g in find_groups(frozen, images(0)[0])] == [g.name for g in find_groups(Mixed(), images(0)[0])]


def test_outputs_are_protected_without_being_named() -> None:
    found = survey(Mixed(), images(0)[0])
    assert [group.name for group in found.groups] == ["c1", "c2", "up", "fc1"]
    assert found.left_whole == {"fc2": "it reaches an input or an output of the network"}


def test_channels_added_to_an_input_are_protected() -> None:
    network = Net(lambda s, x: s.o(F.relu(s.h(x + s.a(x)))), a=nn.Linear(5, 5), h=nn.Linear(5, 7), o=nn.Linear(7, 3))
    found = survey(network, torch.randn(4, 5))
    assert [group.name for group in found.groups] == ["h"]
    assert "input" in found.left_whole["a"]


def test_every_output_of_several_is_protected() -> None:
    network = Net(
        lambda s, x: {"a": s.a(F.relu(s.h(x))), "b": [s.b(x)]},
        a=nn.Linear(8, 3),
        b=nn.Linear(5, 4),
        h=nn.Linear(5, 8),
    )
    assert [group.name for group in find_groups(network, torch.randn(4, 5))] == ["h"]


def test_keyword_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, left: Tensor, *, right: Tensor) -> Tensor:
            return self.o(F.relu(self.a(left) + self.b(right)))

    from lightning_slim.surgery import Example

    (group,) = find_groups(Two(), Example((torch.randn(2, 3),), {"right": torch.randn(2, 4)}))
    assert {span.tensor for span in group.spans} == {"a.weight", "a.bias", "b.weight", "b.bias", "o.weight"}


def test_what_is_not_understood_is_left_whole_with_the_reason() -> None:
    attention = nn.MultiheadAttention(16, 4, kdim=8, vdim=8, batch_first=True)  # its weights have three shapes
    network = Net(
        lambda s, x, y: s.o(F.relu(s.h(s.attention(s.a(x), s.b(y), s.b(y))[0]))),
        attention=attention,
        a=nn.Linear(5, 16),
        b=nn.Linear(5, 8),
        h=nn.Linear(16, 7),
        o=nn.Linear(7, 3),
    )
    found = survey(network, (torch.randn(2, 4, 5), torch.randn(2, 6, 5)))
    assert [group.name for group in found.groups] == ["h"]
    assert "attention whose keys or values have a width of their own" in found.left_whole["a"]


def test_a_weight_tied_to_the_output_is_left_whole() -> None:
    network = Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Linear(6, 6, bias=False), b=nn.Linear(6, 6, bias=False))
    network.b.weight = network.a.weight
    found = survey(network, torch.randn(3, 6))
    assert found.groups == []
    assert found.left_whole["a"] == "it meets an input, or another axis of fixed width, in `mm`"


def test_units_behind_a_gate_own_both_halves() -> None:
    network, x = NETWORKS["gate (chunk)"]()
    (group,) = find_groups(network, x)
    weight = next(span for span in group.spans if span.tensor == "a.weight")
    assert weight.index.tolist() == [[i, i + 8] for i in range(8)]


def test_group_norm_members_go_together() -> None:
    group = next(g for g in find_groups(Mixed(), images(0)[0]) if g.name == "c2")
    assert next(s for s in group.spans if s.tensor == "c2.weight").index.tolist() == [[i, i + 6] for i in range(6)]


def test_renumbered_groups_are_those_of_the_cut_network() -> None:
    for name, make in NETWORKS.items():
        network, x = make()
        groups = find_groups(network, x)
        plan = some(groups)
        remove_units(network, groups, plan)
        found = {group.name: group for group in find_groups(network, x)}
        for group in (group for group in renumber(groups, plan) if group.size > MIN_UNITS):
            spans = {(s.tensor, s.axis, s.role): s.index.tolist() for s in group.spans}
            assert spans == {(s.tensor, s.axis, s.role): s.index.tolist() for s in found[group.name].spans}, name


def test_two_cuts_equal_one() -> None:
    once, twice, x = Mixed(), Mixed(), images(0)[0]
    twice.load_state_dict(once.state_dict())
    groups = find_groups(once, x)
    plan = mixed_plan(groups)
    remove_units(once, groups, plan)
    first = Plan({"c1": plan["c1"], "fc1": plan["fc1"]})
    remove_units(twice, groups, first)
    remove_units(twice, renumber(groups, first), {"c2": plan["c2"], "up": plan["up"]})
    assert same(once.state_dict(), twice.state_dict())


def test_groups_survive_a_pickle_free_checkpoint(tmp_path) -> None:
    groups = find_groups(Mixed(), images(0)[0])
    torch.save([to_state(group) for group in groups], tmp_path / "groups.pt")
    loaded = [from_state(state) for state in torch.load(tmp_path / "groups.pt", weights_only=True)]
    network, other = Mixed(), Mixed()
    other.load_state_dict(network.state_dict())
    remove_units(network, groups, mixed_plan(groups))
    remove_units(other, loaded, mixed_plan(loaded))
    assert same(network.state_dict(), other.state_dict())
    assert [[r.layer for r in g.readers] for g in loaded] == [[r.layer for r in g.readers] for g in groups]
