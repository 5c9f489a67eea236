"""Scores before training: numbers worked out by hand, Hessians by torch, and networks in which products overflow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_slim import (
    Global,
    Masker,
    OneShot,
    Pruner,
    SynFlow,
    Units,
    WeightGraSP,
    WeightSaliency,
    WeightSynFlow,
)
from lightning_slim.flows import Flow, GradientFlow, LossGradient, SynapticFlow
from lightning_slim.surgery.example import as_example
from tests.networks import Mixed, images


def effects(flow: Flow, model: nn.Module, x: Tensor, *losses: Callable[[], Tensor]) -> list[dict[str, Tensor]]:
    """`weight * gradient`, by name."""
    names = {p: name for name, p in model.named_parameters()}
    found = flow(model, losses, {"": as_example(x)}, lambda mean: mean)
    return [{names[p]: p.detach() * g for p, g in gradients.items()} for gradients in found]


def linear() -> nn.Sequential:
    """Two layers whose numbers are small enough for pencil and paper."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
        net[1].weight.copy_(torch.tensor([[-4.0, 2.0]]))
    return net


def test_synaptic_flow_by_hand() -> None:
    """Of ones arrive (1 + 2, 3 + 0.5) in the middle, and R = 4 * 3 + 2 * 3.5 = 19; all scores of both layers: 38."""
    net = linear()
    (found,) = effects(SynapticFlow(), net, torch.full((1, 2), 7.0))
    torch.testing.assert_close(found["0.weight"], torch.tensor([[4.0, 8.0], [6.0, 1.0]]) / 38)
    torch.testing.assert_close(found["1.weight"], torch.tensor([[12.0, 7.0]]) / 38)
    assert torch.equal(net[1].weight, torch.tensor([[-4.0, 2.0]]))


def test_synaptic_flow_is_conserved_from_layer_to_layer_and_through_hidden_units() -> None:
    """Theorem 1 of the paper: what comes into a hidden unit goes out of it, so that all layers add up to the same."""
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.ReLU()]
    net = nn.Sequential(*conv, nn.Flatten(), nn.Linear(128, 5, bias=False))
    (found,) = effects(SynapticFlow(), net, torch.randn(2, 3, 8, 8))
    for name in ("0.weight", "2.weight", "5.weight"):
        assert float(found[name].sum()) == pytest.approx(1 / 3, rel=1e-5)
    torch.testing.assert_close(found["0.weight"].sum((1, 2, 3)), found["2.weight"].sum((0, 2, 3)))
    torch.testing.assert_close(found["2.weight"].sum((1, 2, 3)), found["5.weight"].view(5, 8, 16).sum((0, 2)))


def test_synaptic_flow_of_a_deep_network_neither_overflows_nor_vanishes() -> None:
    """R is 1e60 and 1e-60: not a number that float32 has."""
    for scale in (10.0, 0.1):
        net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(60)))
        with torch.no_grad():
            for layer in net:
                layer.weight.fill_(scale / 4)
        (found,) = effects(SynapticFlow(), net, torch.ones(1, 4))
        for scores in found.values():
            torch.testing.assert_close(scores, torch.full((4, 4), 1 / (60 * 16)))


def test_synaptic_flow_leaves_everything_as_it_was() -> None:
    net = Mixed()
    net.b1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    (found,) = effects(SynapticFlow(), net, images(0)[0])
    assert sum(float(scores.abs().sum()) for scores in found.values()) == pytest.approx(1, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (net.training, net.b1.training) == (True, False)
    assert torch.get_default_dtype() == torch.float32
    assert all(p.grad is None for p in net.parameters())


def importance(net: nn.Module, x: Tensor) -> Tensor:
    """What `SynFlow` makes of the hidden units."""
    pruner = Pruner(net, SynFlow(), Units(0.5), OneShot(0.0), compensate="none")
    pruner.prepare(x)
    (gradients,) = SynapticFlow()(net, [], pruner.calls, lambda mean: mean)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    pruner.recorder.observe_flow()
    pruner.step(0.0)
    return torch.tensor(pruner.history.events[0].importance["0"])


def test_units_are_scored_alike_under_weight_norm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    twin = copy.deepcopy(net)
    weight_norm(twin[0])
    plain, normed = importance(net, torch.randn(2, 3)), importance(twin, torch.randn(2, 3))
    torch.testing.assert_close(normed / normed.sum(), plain / plain.sum())


def test_recurrent_layers_and_embeddings_have_a_synaptic_flow() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.out = nn.Embedding(9, 4), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, words: Tensor) -> Tensor:
            first = torch.zeros(1, len(words), 6)
            return self.out(self.rnn(self.embed(words), (first, first))[0][:, -1])

    net = Words()
    (found,) = effects(SynapticFlow(), net, torch.randint(9, (2, 5)))
    assert all((found[name] > 0).any() for name in ("embed.weight", "rnn.weight_ih_l0", "out.weight"))
    assert sum(float(scores.sum()) for scores in found.values()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_outputs_after_a_softmax_are_refused(last: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 4), last)
    with pytest.raises(ValueError, match="SynFlow needs outputs before a softmax"):
        effects(SynapticFlow(), net, torch.ones(1, 3))


def test_snip_is_the_saliency_of_one_batch() -> None:
    """Lee et al. (2019): the derivative by a gate on each weight, at 1."""
    net, x, y = linear(), torch.randn(6, 2), torch.randn(6, 1)
    gates = [torch.ones_like(p, requires_grad=True) for p in net.parameters()]
    hidden = x @ (gates[0] * net[0].weight).T
    expected = torch.autograd.grad(F.mse_loss(hidden @ (gates[1] * net[1].weight).T, y), gates)
    (found,) = effects(LossGradient(), net, x, lambda: F.mse_loss(net(x), y))
    score = WeightSaliency()
    for p, scores, gate in zip(net.parameters(), found.values(), expected, strict=True):
        torch.testing.assert_close(scores, gate)
        torch.testing.assert_close(score(p, scores / p), gate.abs())


def test_gradient_flow_of_a_quadratic_by_hand() -> None:
    """L = (3 u^2 + v^2) / 2 at (2, 1): g = (6, 1), Hg = (18, 1), and u * 18 = 36 is more than v * 1: v goes first.

    Without u the squared norm of the gradient falls from 37 to 1: by twice 36, to first order.
    """
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[2.0, 1.0]]))
    curvature = torch.tensor([3.0, 1.0])
    (found,) = effects(GradientFlow(1.0), net, torch.ones(1, 2), lambda: (curvature * net.weight**2).sum() / 2)
    assert found["weight"].tolist() == [[36.0, 1.0]]


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_gradient_flow_is_that_of_the_hessian(temperature: float) -> None:
    """Of two batches: the mean of their Hessians, times the mean of their gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [(torch.randn(5, 3).double(), torch.randint(3, (5,))) for _ in range(2)]
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [s.numel() for s in shapes.values()])
        tensors = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        outputs = (torch.func.functional_call(net, tensors, (x,)) / temperature for x, _ in batches)
        return torch.stack([F.cross_entropy(o, y) for o, (_, y) in zip(outputs, batches, strict=True)]).mean()

    at = torch.cat([p.detach().flatten() for p in net.parameters()])
    hessian = torch.autograd.functional.hessian(loss, at)
    gradient = torch.autograd.functional.jacobian(loss, at)
    losses = [partial(lambda x, y: F.cross_entropy(net(x), y), *batch) for batch in batches]
    found = effects(GradientFlow(temperature), net, batches[0][0], *losses)
    mean = torch.cat([torch.stack([each[name] for each in found]).mean(0).flatten() for name in shapes])
    torch.testing.assert_close(mean, at * (hessian @ gradient))
    assert (mean < 0).any()
    assert (mean > 0).any()


@pytest.mark.parametrize("layer", ["attention", "LSTM", "GRU"])
def test_gradient_flow_reaches_layers_with_fused_kernels(layer: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            recurrent = layer != "attention"
            self.core = getattr(nn, layer)(8, 8) if recurrent else nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (self.core(x) if layer != "attention" else self.core(x, x, x, need_weights=False))[0]

    net, x = Net(), torch.randn(5, 3, 8)
    (found,) = effects(GradientFlow(1.0), net, x, lambda: net(x).square().mean())
    assert all(scores.isfinite().all() for scores in found.values())
    assert all((scores != 0).any() for scores in found.values() if scores.ndim > 1)


@pytest.mark.parametrize("make", [GradientFlow, WeightGraSP])
def test_a_temperature_of_zero_is_refused(make: type) -> None:
    with pytest.raises(ValueError, match="`temperature` above 0"):
        make(0.0)


def test_signed_scores_remove_what_hinders_first() -> None:
    net = linear()
    masker = Masker(net, 0.5, score=WeightGraSP(), distribution=Global(0.0), schedule=OneShot(0.0))
    masker.prepare()
    net[0].weight.grad = torch.tensor([[1.0, 1.0], [-1.0, 2.0]])  # scores 1, -2, -3, 1
    net[1].weight.grad = torch.tensor([[1.0, 1.0]])  # -4, 2
    masker.observe(torch.optim.SGD(net.parameters(), 0.1))
    masker.update(0.0)
    assert masker.masks["0.weight"].tolist() == [[True, False], [False, True]]
    assert masker.masks["1.weight"].tolist() == [[False, True]]


def test_all_flows_are_averaged_over_ranks() -> None:
    """What `average` returns is what counts: of synaptic flow nothing is asked, all ranks have the same weights."""
    net, x = linear(), torch.randn(4, 2)
    for flow, factor in ((LossGradient(), 2.0), (GradientFlow(1.0), 4.0)):
        calls = {"": as_example(x)}
        (alone,) = flow(net, [lambda: net(x).square().mean()], calls, lambda mean: mean)
        (both,) = flow(net, [lambda: net(x).square().mean()], calls, lambda mean: 2 * mean)
        assert all(torch.allclose(both[p], factor * alone[p]) for p in alone)
    assert WeightSynFlow().flow == SynapticFlow()
