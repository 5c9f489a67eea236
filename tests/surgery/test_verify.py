"""What cannot be cut safely is found out by trying, and left whole with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import Magnitude, NoEffectWarning, OneShot, Pruner, Units, find_groups
from lightning_slim.selection import Selection
from lightning_slim.surgery import Example
from lightning_slim.surgery.verify import vet
from tests.networks import Mixed, images, same
from tests.surgery.test_cut import NETWORKS, Net, conv


def numbered(x: Tensor) -> Tensor:
    """Scales every channel by its number, which another one has when some are gone."""
    return x * torch.arange(1.0, x.shape[1] + 1).view(1, -1, 1, 1)


UNSAFE = {
    "a hard-coded view": (
        lambda: Net(lambda s, x: s.o(F.relu(s.a(x)).view(-1, 8 * 36)), a=conv(3, 8), o=nn.Linear(288, 2)),
        "fails without them",
    ),
    "a factor that goes by the number of the channel": (
        lambda: Net(lambda s, x: s.b(numbered(F.relu(s.a(x)))), a=conv(3, 8), b=conv(8, 2)),
        "outputs change by",
    ),
    "a factor that goes by the number of the channel, behind a zero": (
        lambda: Net(
            lambda s, x: s.d(x) + s.zero * s.b(numbered(F.relu(s.a(x)))), a=conv(3, 8), b=conv(8, 2), d=conv(3, 2)
        ),
        "outputs change by",
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_groups_are_left_whole_with_the_reason(name: str) -> None:
    make, reason = UNSAFE[name]
    network, x = make(), torch.randn(2, 3, 6, 6)
    network.zero = nn.Parameter(torch.zeros(1))
    before = copy.deepcopy(network.state_dict())
    held = [id(p) for p in network.parameters()]
    (group,) = (group for group in find_groups(network, x) if group.name == "a")
    assert reason in vet(network, [group], {"": Example((x,))})["a"]
    assert same(before, network.state_dict())
    assert held == [id(p) for p in network.parameters()]
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    with pytest.raises(ValueError, match=f"a: .*{reason}"):
        pruner.prepare(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_safe_groups_pass(name: str) -> None:
    network, x = NETWORKS[name]()
    assert vet(network, find_groups(network, x), {"": Example((x,))}) == {}


def test_the_mixed_network_passes_and_is_left_as_it_was() -> None:
    network, x = Mixed(), images(0)[0]
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    generator = torch.get_rng_state()
    assert vet(network, find_groups(network, x), {"": Example((x,))}) == {}
    assert same(before, network.state_dict())
    assert modes == [m.training for m in network.modules()]
    assert torch.equal(generator, torch.get_rng_state())
    assert network.c1.out_channels == 8


def test_a_cut_that_differs_is_not_made_and_the_run_goes_on() -> None:
    """A branch that was not taken when the network was traced."""
    network = Net(
        lambda s, x: s.o(s.b(numbered(h) if s.late else h) if (h := F.relu(s.a(x))) is not None else h),
        a=conv(3, 8),
        b=conv(8, 6),
        o=conv(6, 2),
    )
    network.late = False
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(torch.randn(2, 3, 6, 6))
    network.late = True
    before = copy.deepcopy(network.state_dict())
    with pytest.warns(NoEffectWarning, match=r"outputs change.*From now on a stays whole"):
        assert pruner.step(0.5) is None
    assert same(before, network.state_dict())
    event = pruner.step(0.6)
    assert event is not None
    assert event.widths == {"a": 8, "b": 2}  # what a keeps, b must give: as far as it goes
    assert "outputs change" in pruner.left_whole["a"]
    again = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5))
    again.load_state_dict(pruner.state_dict())
    assert again.given_up == {"a"}


def test_verification_can_be_turned_off() -> None:
    network, x = UNSAFE["a factor that goes by the number of the channel"][0](), torch.randn(2, 3, 6, 6)
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none", verify=False)
    pruner.prepare(x)
    assert pruner.step(0.5) is not None


def halves(outputs: int, order: int = 1, axis: int = 1) -> nn.Module:
    """Two layers read a half each of what one layer makes."""
    layer = conv if axis == 1 else nn.Linear
    return Net(
        lambda s, x: (lambda a, b: s.o(F.relu(s.p(a) + s.q(b))))(*F.relu(s.a(x)).chunk(2, axis)[::order]),
        a=layer(3, 2 * outputs),
        p=layer(outputs, 5),
        q=layer(outputs, 5),
        o=layer(5, 2),
    )


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("outputs", [4, 6, 8])
def test_halves_for_different_layers_stay_halves(outputs: int, order: int, axis: int) -> None:
    """Five channels in two chunks are three and two: small groups must not pass because they shrink together."""
    network, x = halves(outputs, order, axis), torch.randn(2, 3, 6, 6) if axis == 1 else torch.randn(2, 7, 3)
    groups, calls = find_groups(network, x), {"": Example((x,))}
    unfit = vet(network, groups, calls)
    assert unfit == {}
    assert {group.name: group.pack for group in groups if group.pack} == {"a": "a", "a#2": "a"}
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), selection=Selection("global"), compensate="none")
    pruner.prepare(x)
    event = pruner.step(0.5)
    assert event is not None
    assert event.widths["a"] == event.widths["a#2"] < outputs


GATES = {
    "glu over channels": (
        lambda: Net(lambda s, x: s.o(F.glu(s.a(x), 1)), a=conv(3, 8), o=conv(4, 3)),
        torch.randn(2, 3, 6, 6),
    ),
    "glu over the last axis": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 3)),
        torch.randn(2, 7, 3),
    ),
    "swiglu": (
        lambda: Net(
            lambda s, x: (lambda a, b: s.o(F.silu(a) * b))(*s.a(x).chunk(2, -1)), a=nn.Linear(5, 8), o=nn.Linear(4, 3)
        ),
        torch.randn(2, 4, 5),
    ),
    "tanh and sigmoid of a series": (
        lambda: Net(
            lambda s, x: (lambda a, b: s.o(a.tanh() * b.sigmoid()))(*s.a(x).chunk(2, 1)),
            a=nn.Conv1d(3, 8, 3),
            o=nn.Conv1d(4, 2, 1),
        ),
        torch.randn(2, 3, 9),
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_a_channel_and_its_gate_are_one_unit(name: str) -> None:
    make, x = GATES[name]
    network = make()
    groups = find_groups(network, x)
    assert [group.size for group in groups] == [4]
    assert vet(network, groups, {"": Example((x,))}) == {}
