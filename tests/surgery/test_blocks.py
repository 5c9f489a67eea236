"""Whole residual blocks: what is found, taken out, forgotten by the optimizer, counted, scored and put back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import (
    ActivationMean,
    ActivationStd,
    BatchNormScale,
    Combined,
    Fisher,
    GeometricMedian,
    Granger,
    Lamp,
    Linear,
    MACs,
    Magnitude,
    MagnitudeTimesStd,
    OneShot,
    Pruner,
    Random,
    Score,
    Taylor,
    Units,
    Wanda,
    migrate,
    remove_units,
)
from lightning_slim.profile import count_macs
from lightning_slim.surgery import Example, dropped, find_blocks, forget_blocks, grow_back, resize_to, restore
from lightning_slim.surgery.blocks import Dropped
from lightning_slim.surgery.verify import vet_blocks
from lightning_slim.units import MIN_UNITS, Plan, renumber
from tests.networks import same, same_optimizer_state
from tests.variants import variants

WIDTH = 12


class Block(nn.Module):
    """x + MLP(norm(x)), as most transformers have it."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class PostNorm(Block):
    """norm(x + MLP(x)), as BERT has it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Residual(nn.Module):
    """relu(x + two convolutions with batch norms), as ResNet has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.c2, self.n2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))


class Pair(Block):
    """Hands a second tensor on, which others need."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x.mean()


class Alone(Block):
    """A tuple with nothing else in it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return super().forward(x), None


class Stack(nn.Module):
    """Blocks between two linear layers."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(5, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.last(x)


class Again(Stack):
    """Every block twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.last(x)


def stages() -> nn.Module:
    """Two stages of convolutions."""
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *(Residual(8) for _ in range(3))]
    return nn.Sequential(
        *first, nn.Conv2d(8, 12, 2, 2), nn.ReLU(), Residual(12), Residual(12), nn.Flatten(), nn.Linear(192, 4)
    )


X = torch.randn(6, 5)
FOUND: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, list[str]]]] = {
    "norm first": (lambda: Stack(Block(), Block(), Block()), X, {"blocks": ["blocks.0", "blocks.1", "blocks.2"]}),
    "norm last": (lambda: Stack(PostNorm(), PostNorm()), X, {"blocks": ["blocks.0", "blocks.1"]}),
    "of other hidden widths": (lambda: Stack(Block(8), Block(24)), X, {"blocks": ["blocks.0", "blocks.1"]}),
    "of two classes": (lambda: Stack(Block(), PostNorm()), X, {"blocks": ["blocks.0", "blocks.1"]}),
    "a tuple with nothing else": (lambda: Stack(Alone(), Alone()), X, {"blocks": ["blocks.0", "blocks.1"]}),
    "convolutions": (stages, torch.randn(2, 3, 8, 8), {"layers": ["2", "3", "4"], "layers#2": ["7", "8"]}),
    "a second result": (lambda: Stack(Pair(), Pair()), X, {}),
    "called twice": (lambda: Again(Block(), Block()), X, {}),
    "plain layers": (lambda: Stack(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), X, {}),
    "no residual": (lambda: Stack(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(2)]), X, {}),
}


@pytest.mark.parametrize("name", FOUND)
def test_blocks_are_what_hands_its_input_on(name: str) -> None:
    make, x, expected = FOUND[name]
    network = make()
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    assert {group.name: list(group.blocks) for group in find_blocks(network, Example((x,)))} == expected
    assert same(before, network.state_dict())
    assert torch.equal(random, torch.get_rng_state())
    assert network.training


def some(network: nn.Module, x: Tensor) -> tuple[list, Plan]:
    """The groups, and a plan without the second block of the first."""
    groups = find_blocks(network, Example((x,)))
    return groups, Plan({groups[0].name: torch.arange(groups[0].size) != 1})


def test_training_goes_on_as_that_of_the_shallower_network() -> None:
    torch.manual_seed(0)
    network = Stack(Block(), Block(), Block())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, amsgrad=True)

    def train(net: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        net(X).square().mean().backward()
        opt.step()

    train(network, optimizer)
    shallow = copy.deepcopy(network)
    del shallow.blocks[1]
    other = torch.optim.AdamW(shallow.parameters(), lr=1e-2, amsgrad=True)
    kept = [p for name, p in network.named_parameters() if not name.startswith("blocks.1.")]
    for p, q in zip(shallow.parameters(), kept, strict=True):
        other.state[p] = copy.deepcopy(optimizer.state[q])
    groups, plan = some(network, X)
    migrate(optimizer, remove_units(network, groups, plan))
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, kept))
    assert optimizer.state.keys() == set(kept)
    for _ in range(5):
        train(network, optimizer)
        train(shallow, other)
    assert all(map(torch.equal, network.parameters(), shallow.parameters()))


@pytest.mark.parametrize("name", [name for name, (_, _, found) in FOUND.items() if found])
def test_what_was_taken_out_is_put_back_or_forgotten(name: str) -> None:
    make, x, _ = FOUND[name]
    network = make().eval()
    original, state = network(x), copy.deepcopy(network.state_dict())
    groups, plan = some(network, x)
    cuts = remove_units(network, groups, plan)
    inside = dict(_block(network, groups).named_parameters())
    assert {cut.tensor for cut in cuts} == {f"{groups[0].blocks[1]}.{name}" for name in inside}
    assert not torch.equal(network(x), original)
    restore(network, cuts)
    assert same(state, network.state_dict())
    assert torch.equal(network(x), original)

    remove_units(network, groups, plan)
    slim = network(x)
    assert dropped(network) == {groups[0].blocks[1]: groups[0].results}
    forget_blocks(network)
    assert all(p.device.type == "meta" for p in _block(network, groups).parameters())
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), slim)
    assert torch.equal(copy.deepcopy(network)(x), slim)
    grow_back(network, groups[0].blocks[1])
    network.load_state_dict(state)
    assert torch.equal(network(x), original)


def _block(network: nn.Module, groups: list) -> nn.Module:
    dropped_block = network.get_submodule(groups[0].blocks[1])
    assert isinstance(dropped_block, Dropped)
    return dropped_block.block


def test_a_failure_puts_blocks_back() -> None:
    network = Stack(Block(), Block(), Block())
    optimizer = torch.optim.Adam(network.parameters())
    network(X).sum().backward()
    optimizer.step()
    optimizer.state[network.first.weight]["strange"] = torch.zeros(7)
    state, moments = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), granularity="both", compensate="none")
    pruner.prepare(X)
    with pytest.raises(ValueError, match="strange"):
        pruner.step(0.5, [optimizer])
    assert same(state, network.state_dict())
    assert same_optimizer_state(moments, optimizer.state_dict())
    assert not dropped(network)


@pytest.mark.parametrize(
    ("name", "granularity", "score"),
    variants(
        ["norm first", "of other hidden widths", "convolutions"],
        ["layers", "both"],
        [Magnitude(), Taylor(), Random(), Granger(0)],
        every=3,
    ),
)
def test_costs_foretell_what_is_left(name: str, granularity: str, score: object) -> None:
    make, x, _ = FOUND[name]
    network = make()
    pruner = Pruner(network, score, Units(0.5), OneShot(0.5), granularity=granularity)  # type: ignore[arg-type]
    pruner.prepare(x)
    dense = sum(count_macs(network, pruner.calls[""].args).values()) // pruner.calls[""].samples
    with pruner.recording():
        network(x).square().mean().backward()
    pruner.recorder.observe_gradients()
    event = pruner.step(0.5)
    assert event is not None
    assert event.params == sum(p.numel() for p in network.parameters())
    macs = count_macs(network, pruner.calls[""].args)
    assert event.macs == sum(macs.values()) // pruner.calls[""].samples
    assert MACs(0.5).remaining(pruner.costs, pruner.widths) == event.macs / dense  # of the original, with all blocks
    assert dropped(network)
    resumed = Pruner(copy.deepcopy(network), score, Units(0.4), granularity=granularity)  # type: ignore[arg-type]
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.in_step
    assert resumed.costs == pruner.costs
    again = pruner.history.events[-1].widths
    assert again == resumed.widths


@pytest.mark.parametrize(
    "score",
    [ActivationMean(), ActivationStd(), MagnitudeTimesStd(), Wanda(), Lamp(), Fisher(), BatchNormScale(), Combined()],
    ids=lambda s: type(s).__name__,
)
def test_blocks_and_units_are_scored_side_by_side(score: Score) -> None:
    network = Stack(*(Block() for _ in range(4)))
    with torch.no_grad():
        for parameter in network.blocks[2].parameters():
            parameter.mul_(1e-4)
    pruner = Pruner(network, score, Units(0.7), OneShot(0.5), granularity="both", compensate="none")
    pruner.prepare(X)
    with pruner.recording():
        network(X).square().mean().backward()
    pruner.recorder.observe_gradients()
    event = pruner.step(0.5)
    assert event is not None
    assert event.removed["blocks"] == [2]
    assert len(event.removed) > 1
    assert event.params == sum(p.numel() for p in network.parameters())
    assert network(X).isfinite().all()


def test_a_block_that_adds_nothing_goes_first() -> None:
    torch.manual_seed(0)
    network = Stack(*(Block() for _ in range(4)))
    with torch.no_grad():
        network.blocks[2].down.weight.mul_(1e-4)
        network.blocks[2].down.bias.zero_()
    pruner = Pruner(network, Granger(0), Units(0.75), OneShot(0.5), granularity="layers")
    pruner.prepare(X)
    with pruner.recording():
        before = network(X).detach()
    pruner.step(0.5)
    assert pruner.history.events[0].removed == {"blocks": [2]}
    torch.testing.assert_close(network(X), before, rtol=0, atol=1e-3)


def test_blocks_that_cannot_go_are_named() -> None:
    """torch's encoder asks its first layer how it takes batches."""
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 16, batch_first=True)
    network = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(WIDTH, 2))
    calls = {"": Example((torch.randn(2, 4, WIDTH),))}
    groups = find_blocks(network, calls[""])
    assert vet_blocks(network, groups, calls).keys() == {"0.layers.0"}
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), granularity="layers", skip=["0.layers.2"])
    pruner.prepare(calls[""])
    assert pruner.widths == {"0.layers": 1}
    assert "fails without it" in pruner.left_whole["0.layers.0"]
    assert pruner.left_whole["0.layers.2"] == "it is skipped"


def test_a_score_that_compares_weights_leaves_blocks_whole() -> None:
    network = Stack(Block(), Block(), Block())
    with pytest.raises(ValueError, match=r"Nothing can be removed.*blocks.0: its weights do not correspond"):
        Pruner(network, GeometricMedian(), Units(0.5), granularity="layers").prepare(X)
    pruner = Pruner(network, GeometricMedian(), Units(0.5), OneShot(0.5), granularity="both", compensate="none")
    pruner.prepare(X)
    assert not any(group.blocks for group in pruner.groups)
    event = pruner.step(0.5)
    assert event is not None
    assert event.params == sum(p.numel() for p in network.parameters())


def test_without_blocks_the_error_says_so() -> None:
    pruner = Pruner(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), Magnitude(), granularity="layers")
    with pytest.raises(ValueError, match="no residual blocks"):
        pruner.prepare(torch.randn(2, 4))


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match='"units", "layers" or "both", got \'heads\''):
        Pruner(nn.Linear(2, 2), Magnitude(), granularity="heads")  # type: ignore[arg-type]


def test_groups_inside_a_block_go_with_it() -> None:
    from lightning_slim import find_groups

    network = Stack(Block(), Block(), Block())
    groups = [*find_groups(network, X), *find_blocks(network, Example((X,)))]
    plan = Plan({"blocks": torch.tensor([True, False, True]), "blocks.0.up": torch.arange(16) < MIN_UNITS})
    remove_units(network, groups, plan)
    left = {group.name: group for group in renumber(groups, plan)}
    assert left.keys() == {"first", "blocks.0.up", "blocks.2.up", "blocks"}
    assert left["blocks"].blocks == ("blocks.0", "blocks.2")
    assert not any(name.startswith("blocks.1.") for name in left["first"].layers)
    assert network.blocks[0].up.out_features == MIN_UNITS
    assert network(X).shape == (6, 3)


def test_a_copy_with_other_widths_grows_back_to_any_shape() -> None:
    network = Stack(Block(), Block())
    dense = {name: tensor.shape for name, tensor in network.state_dict().items()}
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), granularity="both", compensate="none")
    pruner.prepare(X)
    pruner.step(0.5)
    for path in dropped(network):
        grow_back(network, path)
    resize_to(network, dense)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == dense
    assert network(X).isfinite().all()


@pytest.mark.parametrize("cuts", [1, 4])
def test_a_budget_does_not_compound_over_blocks(cuts: int) -> None:
    """What remains is a fraction of the network with all of its blocks, however many cuts it takes."""
    network = Stack(*(Block() for _ in range(8)))
    dense = sum(count_macs(network, (X,)).values())
    pruner = Pruner(network, Magnitude(), MACs(0.5), Linear(start=0.0, end=1.0), granularity="layers")
    pruner.prepare(X)
    for cut in range(1, cuts + 1):
        event = pruner.step(cut / cuts)
        assert event is None or event.reached <= event.asked
    assert len(pruner.groups[0].blocks) == 4 - 1  # the two linear layers around them stay, and count
    assert pruner.history.events[-1].reached == sum(count_macs(network, (X,)).values()) / dense
    assert pruner.step(1.0) is None


@pytest.mark.parametrize("remaining", [0.8, 0.6, 0.45, 0.3])
def test_units_take_up_what_blocks_leave_of_a_budget(remaining: float) -> None:
    network = Stack(*(Block() for _ in range(4)))
    pruner = Pruner(network, Magnitude(), MACs(remaining), OneShot(0.5), granularity="both", compensate="none")
    pruner.prepare(X)
    event = pruner.step(0.5)
    assert event is not None
    assert remaining - 0.05 < event.reached <= remaining
