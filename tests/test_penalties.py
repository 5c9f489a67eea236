"""What every penalty promises, for every subclass there is; and what a regularizer does with it."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import lightning_slim.penalties
from lightning_slim import L1, GroupLasso, GrowingL2, HoyerSquare, NormScaleL1, Pruner, Regularizer, Units
from lightning_slim.penalties import Penalty, Proximal
from lightning_slim.schedules import OneShot
from lightning_slim.scores import Magnitude
from lightning_slim.surgery.layers.norm import norm_scales
from lightning_slim.units import UnitGroup, gradients, rows
from tests.networks import Mixed, images


def children(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from children(child)


PENALTIES = [kind for kind in children(Penalty) if not inspect.isabstract(kind)]
PROXIMAL = [kind for kind in PENALTIES if issubclass(kind, Proximal)]

# The formulas as they are written, not as they are implemented.
FORMULAS = {
    L1: lambda w: w.abs().sum(),
    NormScaleL1: lambda w: w.abs().sum(),
    GroupLasso: lambda w: math.sqrt(w.shape[1]) * (w**2).sum(1).sqrt().sum(),
    GrowingL2: lambda w: 0.5 * (w**2).sum(1).sort().values[: len(w) // 2].sum(),
    HoyerSquare: lambda w: (w**2).sum(1).sqrt().sum() ** 2 / (w**2).sum(),
}


def test_every_penalty_is_here_and_exported() -> None:
    assert set(PENALTIES) == FORMULAS.keys()
    assert {kind.__name__ for kind in PENALTIES} <= set(lightning_slim.__all__) & set(lightning_slim.penalties.__all__)


@pytest.mark.parametrize("kind", PENALTIES)
def test_gradients_are_those_of_the_written_formula(kind: type[Penalty]) -> None:
    w = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    written = FORMULAS[kind](w)
    torch.testing.assert_close(kind().value(w), written, atol=1e-10, rtol=0)
    torch.testing.assert_close(kind().gradient(w.detach()), torch.autograd.grad(written, w)[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", PENALTIES)
def test_units_at_zero_are_left_there(kind: type[Penalty]) -> None:
    w = torch.randn(4, 3)
    w[1] = 0
    assert not kind().gradient(w)[1].any()
    assert kind().gradient(w).isfinite().all()
    assert not kind().gradient(torch.zeros(4, 3)).any()
    assert kind().value(torch.zeros(4, 3)) == 0


@pytest.mark.parametrize("kind", PENALTIES)
def test_they_survive_a_pickle(kind: type[Penalty]) -> None:
    assert pickle.loads(pickle.dumps(kind())) == kind()


@pytest.mark.parametrize("kind", PROXIMAL)
def test_shrinkage_is_the_proximal_step(kind: type[Proximal]) -> None:
    """Against a general-purpose optimizer, which knows the formula only."""
    w, threshold = torch.randn(3, 2, dtype=torch.float64), 0.3

    def objective(x: Any) -> float:
        x = torch.tensor(x).view(3, 2)
        return float(((x - w) ** 2).sum() / 2 + threshold * FORMULAS[kind](x))

    found = minimize(
        objective, np.full(6, 0.1), method="Powell", options={"xtol": 1e-9, "ftol": 1e-14, "maxiter": 20000}
    )
    shrunk = w * kind().shrinkage(w, threshold)
    assert objective(shrunk.flatten().numpy()) <= found.fun + 1e-9
    np.testing.assert_allclose(shrunk.flatten(), found.x, atol=1e-4)


def test_closed_forms_of_the_proximal_steps() -> None:
    w = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(w * L1().shrinkage(w, 0.35), torch.tensor([[2.65, 3.65], [0.0, 0.05], [0.0, 0.0]]))
    root = math.sqrt(2)  # of the fan: norms 5 and 0.5 lose sqrt(2)
    by_hand = torch.tensor([[3 * (1 - root / 5), 4 * (1 - root / 5)], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(w * GroupLasso().shrinkage(w, 1.0), by_hand)
    assert not (w * GroupLasso().shrinkage(w, 1.0))[1:].any()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_a_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        GrowingL2(fraction)


# --- the regularizer ---


def entries(model: nn.Module, group: UnitGroup, penalty: Penalty) -> Tensor:
    """What counts of each unit, by the package's one view of units."""
    if penalty.of == "scales":
        return norm_scales(model, group)
    return rows(model, group, "out" if penalty.of == "made" else None)


def prepared(model: nn.Module, penalty: Penalty, x: Tensor) -> Regularizer:
    regularizer = Regularizer(model, penalty)
    regularizer.prepare({"": x})
    return regularizer


class Tied(nn.Module):
    """An embedding whose tensor is the decoder's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.decode = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.hidden(self.embed(x))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0])


def normed(parametrized: bool) -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm if parametrized else nn.utils.weight_norm
    return nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), norm(nn.Linear(6, 5), dim=None), nn.ReLU(), nn.Linear(5, 2))


NETWORKS: dict[str, Any] = {
    "mixed": lambda: (Mixed(), images(0)[0]),
    "tied": lambda: (Tied(), torch.randint(11, (4, 5))),
    "recurrent": lambda: (Recurrent(), torch.randn(4, 5, 3)),
    "weight norm": lambda: (normed(True), torch.randn(4, 4)),
}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_arrive_where_autograd_puts_them(kind: type[Penalty], network: str) -> None:
    model, x = NETWORKS[network]()
    if kind is NormScaleL1 and network != "mixed":
        pytest.skip("no normalisation")
    regularizer = prepared(model, kind(), x)
    model.double()
    started = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = started[name].clone()
    regularizer.add_gradients(model.parameters(), 0.7)
    added = {name: p.grad - started[name] for name, p in model.named_parameters()}
    model.zero_grad()
    if kind is NormScaleL1:  # `norm_scales` is detached
        scales = [model.b1.weight, model.g2.weight, model.b3.weight, model.ln.weight]
        written = sum(scale.abs().sum() for scale in scales)
    else:
        written = sum(FORMULAS[kind](entries(model, group, kind())) for group in regularizer.groups)
    (0.7 * written).backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(added[name], expected, atol=1e-10, rtol=0, msg=name)
    assert regularizer.value() == pytest.approx(float(written.detach()))


def test_entries_under_the_older_weight_norm() -> None:
    with pytest.warns(FutureWarning):
        model = normed(False)
    x = torch.randn(4, 4)
    regularizer = prepared(model, GroupLasso(), x)
    regularizer.add_gradients(model.parameters(), 0.7)
    added = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (0.7 * sum(FORMULAS[GroupLasso](rows(model, group, None)) for group in regularizer.groups)).backward()
    for name in added:
        torch.testing.assert_close(added[name], model.get_parameter(name).grad, atol=1e-5, rtol=1e-5)


def test_frozen_and_other_optimizers_parameters_are_passed_over() -> None:
    model, x = NETWORKS["mixed"]()
    model.c1.weight.requires_grad_(False)
    regularizer = prepared(model, GroupLasso(), x)
    regularizer.add_gradients([model.c1.weight, model.c1.bias], 1.0)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["c1.bias"]


@pytest.mark.parametrize("network", NETWORKS)
def test_units_below_the_threshold_are_exactly_zero_and_can_go(network: str) -> None:
    model, x = NETWORKS[network]()
    regularizer = prepared(model, GroupLasso(), x)
    norms = regularizer.norms()
    name = regularizer.groups[0].name
    fan = rows(model, regularizer.groups[0], None).shape[1]
    threshold = 1.0001 * float(norms[name].median()) / math.sqrt(fan)  # whatever the last digit of the median is
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    regularizer.shrink(optimizer, threshold / 0.5)
    assert torch.equal(regularizer.norms()[name] == 0, norms[name] <= norms[name].median())
    expected = int((regularizer.norms()[name] <= 0.01 * norms[name].mean()).sum())
    assert regularizer.near_zero()[name] == expected > 0


def test_shrinking_equals_the_closed_form_with_each_parameters_own_rate() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    regularizer = prepared(net, GroupLasso(), torch.randn(2, 3).double())
    before = rows(net, regularizer.groups[0], None).detach()  # 3 weights, a bias, 2 columns
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.02}]
    regularizer.shrink(torch.optim.SGD(groups, lr=1.0), 1.0)
    norms = before.norm(dim=1, keepdim=True)
    rates = torch.tensor([0.1] * 4 + [0.02] * 2, dtype=torch.float64)
    by_hand = before * (1 - rates * math.sqrt(6) / norms).clamp(min=0)
    torch.testing.assert_close(rows(net, regularizer.groups[0], None).detach(), by_hand, atol=1e-12, rtol=0)


def test_the_groups_follow_a_cut() -> None:
    model, x = NETWORKS["mixed"]()
    regularizer = prepared(model, GroupLasso(), x)
    started = regularizer.norms()
    pruner = Pruner(model, Magnitude(), Units(0.5), OneShot(0.0), compensate="none", skip=["c1"])
    pruner.prepare(x)
    event = pruner.step(0.0)
    regularizer.follow(pruner.last_change)
    norms = regularizer.norms()
    widths = {group.name: group.size for group in regularizer.groups}
    assert widths == {"c1": 8, "c2": 3, "up": 8, "fc1": 10}
    for name, removed in event.removed.items():
        stay = [unit for unit in range(len(started[name])) if unit not in removed]
        left = norms[name].mean() / started[name][stay].mean()  # less than 1: columns of other groups are gone
        assert regularizer.shrunk()[name] == pytest.approx(float(left))
    regularizer.add_gradients(model.parameters(), 1.0)
    again = prepared(copy.deepcopy(model), GroupLasso(), x)
    expected = {group.name: gradients(model, group, None) for group in regularizer.groups}
    again.add_gradients(again.model.parameters(), 1.0)
    # `again` numbers the pairs of c2 anew, in the same order
    for p, q in zip(model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) + q.grad if q.grad is not None else p.grad)
    assert all(gradient.any() for gradient in expected.values())


def test_a_saved_state_is_plain_and_complete() -> None:
    model, x = NETWORKS["mixed"]()
    regularizer = prepared(model, HoyerSquare(), x)
    other = Regularizer(copy.deepcopy(model), HoyerSquare())
    other.load_state_dict(regularizer.state_dict())
    for each in (regularizer, other):
        each.add_gradients(each.model.parameters(), 1.0)
    pairs = zip(model.parameters(), other.model.parameters(), strict=True)
    assert all(p.grad is q.grad is None or torch.equal(p.grad, q.grad) for p, q in pairs)
    assert other.shrunk() == dict.fromkeys(other.shrunk(), 1.0)


def test_nothing_to_pull_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"NormScaleL1 can pull.*0: it passes no normalisation"):
        prepared(net, NormScaleL1(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="`skip` to name"):
        Regularizer(net, L1(), skip=["nothing"])
    regularizer = prepared(net, HoyerSquare(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="closed form"):
        regularizer.shrink(torch.optim.SGD(net.parameters(), lr=1.0), 1.0)
