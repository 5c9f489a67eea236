"""Every architecture is cut to about half of what can go, and then computes, trains and resumes."""

from __future__ import annotations

import copy
import io
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_slim import Magnitude, OneShot, Pruner, Units, remove_units
from lightning_slim.history import PruningEvent
from lightning_slim.profile import count_macs
from lightning_slim.surgery import Example, resize_to, survey
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.operations.silence import silenced
from lightning_slim.surgery.traced import survey_traced
from lightning_slim.surgery.verify import _unmixed, vet
from lightning_slim.units import Plan, UnitGroup, positions_gone
from tests.networks import same
from tests.surgery.test_cut import zeroed
from tests.zoo.libraries import library
from tests.zoo.networks import ZOO

QUICK = {
    "VGG",
    "MobileNetV3",
    "ShuffleNetV2",
    "ResNet-18",
    "ResNeXt",
    "U-Net",
    "ConvNeXt",
    "ViT, fused qkv",
    "WaveNet",
    "LSTM tagger, both directions",
    "tabular",
    "multi-task",
}

# Sums and products of activations take units in, and no matrix that could be zeroed.
SUMMED = {"DeepFM", "two towers"}

# How far the outputs of the cut network may be from those of the zeroed one, where that is not 1e-5 of the largest.
LOOSE = {"AlexNet": 1e-4}  # its local response norm hears a little of the neighbours, which are others after a cut

# Name of a test -> what is wrong. Once it is mended, the test says so.
KNOWN_BUGS: dict[str, str] = {}


@dataclass(frozen=True)
class Pruned:
    """One architecture before and after its cut.

    Attributes:
        name: of the architecture.
        example: a call of it.
        dense: a copy from before the cut, after one step of training.
        slim: the network that was cut.
        optimizer: of `slim`.
        groups: of `dense`.
        plan: group -> keep mask, of all groups.
        pruner: that made the cut.
        event: the cut.
        learning: parameters that had a gradient before.
    """

    name: str
    example: Example
    dense: nn.Module
    slim: nn.Module
    optimizer: torch.optim.Optimizer
    groups: list[UnitGroup]
    plan: Plan
    pruner: Pruner
    event: PruningEvent
    learning: set[str]


def params(names: Any) -> list[Any]:
    """All but the quick ones are slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def build(name: str) -> tuple[nn.Module, Example]:
    """Always the same weights and inputs."""
    torch.manual_seed(0)
    return ZOO[name]()


def call(network: nn.Module, example: Example) -> list[Tensor]:
    """The floating outputs of one call, with the same noise every time."""
    torch.manual_seed(0)
    leaves = tree_leaves(network(*example.args, **example.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, example: Example) -> set[str]:
    """One step of training; returns the names of the parameters that had a gradient."""
    network.train()
    optimizer.zero_grad()
    torch.stack([output.square().mean() for output in call(network, example)]).sum().backward()
    optimizer.step()
    return {name for name, parameter in network.named_parameters() if parameter.grad is not None}


def new_pruner(network: nn.Module) -> Pruner:
    """Magnitude, half of the units, without compensation: what is cut can be compared with what is zeroed."""
    return Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")


@pytest.fixture(scope="module", params=params(ZOO))
def cut_once(request: pytest.FixtureRequest) -> Pruned:
    """One cut serves all tests of an architecture; they change copies only."""
    network, example = build(request.param)
    optimizer = torch.optim.AdamW(network.parameters())
    learning = train(network, optimizer, example)
    pruner = new_pruner(network)
    pruner.prepare(example)
    dense, groups = copy.deepcopy(network), pruner.groups
    whole = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    plan = Plan({**whole, **pruner.plan(0.5)})
    event = pruner.step(0.5, [optimizer])
    assert event is not None
    return Pruned(request.param, example, dense, network, optimizer, groups, plan, pruner, event, learning)


@pytest.fixture
def pruned(cut_once: Pruned, request: pytest.FixtureRequest) -> Pruned:
    """The cut; known bugs are expected to fail."""
    if request.node.name in KNOWN_BUGS:
        request.applymarker(pytest.mark.xfail(reason=KNOWN_BUGS[request.node.name], strict=True))
    return cut_once


def test_half_of_the_units_go_and_the_parameters_are_counted(pruned: Pruned) -> None:
    assert 0.3 < pruned.event.reached <= 0.5
    assert pruned.event.params == sum(p.numel() for p in pruned.slim.parameters())
    assert pruned.event.params < sum(p.numel() for p in pruned.dense.parameters())


def test_the_macs_that_are_left_are_counted(pruned: Pruned) -> None:
    samples = pruned.pruner.calls[""].samples
    counted = count_macs(pruned.slim, *pruned.pruner.calls[""][:2])
    assert pruned.event.macs == pytest.approx(sum(counted.values()) / samples, rel=0.01)


@pytest.mark.parametrize("training", [False, True])
def test_the_outputs_keep_their_shapes(pruned: Pruned, training: bool) -> None:
    dense, slim = (copy.deepcopy(network).train(training) for network in (pruned.dense, pruned.slim))
    assert [y.shape for y in call(slim, pruned.example)] == [y.shape for y in call(dense, pruned.example)]


def test_training_goes_on_and_all_that_learned_learns(pruned: Pruned) -> None:
    slim, optimizer = copy.deepcopy((pruned.slim, pruned.optimizer))
    before = copy.deepcopy(slim.state_dict())
    assert train(slim, optimizer, pruned.example) == pruned.learning
    assert not same(before, slim.state_dict())
    assert all(bool(p.isfinite().all()) for p in slim.parameters())


@torch.no_grad()
def randomised(network: nn.Module) -> nn.Module:
    """A copy with large weights and statistics, in double precision: near zero, a wrong cut would hardly show."""
    network = copy.deepcopy(network).double().eval()
    for p in network.parameters():
        p.add_(torch.randn_like(p) / (p[0].numel() ** 0.5 if p.ndim > 1 else 5))
    for name, buffer in network.named_buffers():
        buffer.add_(torch.rand_like(buffer) if name.endswith(("running_mean", "running_var")) else 0)
    return network


def mixes(network: nn.Module, group: UnitGroup) -> bool:
    """Whether the units of a group pass a norm over channels."""
    kinds = [layer_kind(network.get_submodule(layer)) for layer in group.layers]
    return any(kind is not None and kind.mixes_channels for kind in kinds)


def unsummed(pruned: Pruned, network: nn.Module, plan: Plan) -> AbstractContextManager[None]:
    """Within, no sum of a network takes in what goes, where zeroed columns do not say all."""
    gone = positions_gone(pruned.groups, plan)
    return silenced(network, gone) if pruned.name in SUMMED else nullcontext()


def zeroed_and_cut(network: nn.Module, groups: list[UnitGroup], plan: Plan) -> tuple[nn.Module, nn.Module]:
    """A copy in which nothing reads the units that go, and one without them."""
    zero, cut = zeroed(network, groups, plan), copy.deepcopy(network)
    for layer in (module for module in zero.modules() if isinstance(module, nn.RNNBase)):
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
    remove_units(cut, groups, plan)
    return zero, cut


def double(example: Example) -> Example:
    """The same call in double precision."""

    def cast(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Example(tuple(map(cast, example.args)), {key: cast(value) for key, value in example.kwargs.items()})


@torch.no_grad()
def assert_equal(one: nn.Module, other: nn.Module, example: Example, tolerance: float = 1e-5) -> None:
    """Their outputs are the same to that fraction of the largest."""
    for a, b in zip(call(one, example), call(other, example), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(a.abs().max()))


@pytest.mark.parametrize("weights", ["trained", "random"])
def test_the_cut_network_equals_the_zeroed_one(pruned: Pruned, weights: str) -> None:
    """Units that pass a norm over channels stay here: without them, the norm's statistics are others."""
    mixing = [group for group in pruned.groups if mixes(pruned.dense, group)]
    packs = {group.pack for group in mixing if group.pack}
    plan = Plan({**pruned.plan})
    for group in pruned.groups:
        if group in mixing or group.pack in packs:
            plan[group.name] = torch.ones_like(plan[group.name])
    network = randomised(pruned.dense) if weights == "random" else copy.deepcopy(pruned.dense).double().eval()
    zero, cut = zeroed_and_cut(network, pruned.groups, plan)
    with unsummed(pruned, zero, plan):
        assert_equal(zero, cut, double(pruned.example), LOOSE.get(pruned.name, 1e-5))


def test_it_does_with_all_units_where_norms_only_scale_and_shift(pruned: Pruned) -> None:
    zero, cut = zeroed_and_cut(randomised(pruned.dense), pruned.groups, pruned.plan)
    with _unmixed(zero), _unmixed(cut), unsummed(pruned, zero, pruned.plan):
        assert_equal(zero, cut, double(pruned.example), LOOSE.get(pruned.name, 1e-5))


def test_a_fresh_network_takes_the_slim_state(pruned: Pruned) -> None:
    fresh, _ = build(pruned.name)
    resize_to(fresh, {name: tensor.shape for name, tensor in pruned.slim.state_dict().items()})
    fresh.load_state_dict(pruned.slim.state_dict())
    slim = copy.deepcopy(pruned.slim).eval()
    assert repr(fresh) == repr(pruned.slim)
    for a, b in zip(call(fresh.eval(), pruned.example), call(slim, pruned.example), strict=True):
        assert torch.equal(a, b)


def test_the_pruner_resumes(pruned: Pruned) -> None:
    file = io.BytesIO()
    torch.save(pruned.pruner.state_dict(), file)
    file.seek(0)
    resumed = new_pruner(copy.deepcopy(pruned.slim))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    (before, shape), (after, other_shape) = tree_flatten(pruned.pruner.state_dict()), tree_flatten(resumed.state_dict())
    assert shape == other_shape
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert resumed.in_step
    original = copy.deepcopy(pruned.pruner)
    original.budget = resumed.budget = Units(0.3)
    assert same(original.plan(1.0), resumed.plan(1.0))


def test_a_broken_library_skips_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("from . import half\nraise RuntimeError('no such operator')")
    (tmp_path / "torchvision" / "half.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"torchvision cannot be imported .*no such operator"):
        library("torchvision")
    assert not any(name.split(".")[0] == "torchvision" for name in sys.modules)


# Where torch-pruning's graph is mistaken, or knows less: its units are others.
OTHERWISE = {"BERT (transformers)", "EDSR", "MLP-Mixer", "WaveNet", "DeepFM", "Maxout"}


@pytest.mark.parametrize("name", params(name for name in ZOO if name not in OTHERWISE))
def test_a_second_opinion_finds_the_same_units(name: str) -> None:
    """Wherever both graphs know a group, they know the same entries of the same tensors; and none is lost."""
    network, example = build(name)
    opinion = survey_traced(network, {"": example})
    own, other = (
        {group.name: entries(group) for group in found.groups} for found in (survey(network, example), opinion)
    )
    assert {name: own[name] for name in own.keys() & other.keys()} == {n: other[n] for n in own.keys() & other.keys()}
    lost = other.keys() - own.keys()
    assert not lost - vet(network, opinion.groups, {"": example}).keys()


def entries(group: UnitGroup) -> dict[tuple[str, int], list[list[int]]]:
    """Tensor and axis -> the positions of every unit."""
    return {(span.tensor, span.axis): [sorted(unit) for unit in span.index.tolist()] for span in group.spans}
