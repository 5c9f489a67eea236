"""Layers under weight norm are cut as if their weights were ordinary ones; other parametrizations are left whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import (
    Granger,
    Linear,
    Magnitude,
    OneShot,
    Prune,
    Pruner,
    Score,
    Taylor,
    Units,
    find_groups,
    load_from_checkpoint,
    migrate,
    remove_units,
    report,
)
from lightning_slim.profile import count_macs
from lightning_slim.surgery import Example, resize_to, restore, survey
from lightning_slim.surgery import cut as cutting
from lightning_slim.surgery.compensate import fold
from lightning_slim.surgery.verify import vet
from lightning_slim.weight_norm import editing
from tests.callbacks.runs import trainer
from tests.networks import same, same_optimizer_state, without_weight_norm
from tests.surgery.test_compensate import depend, fold_and_cut
from tests.surgery.test_cut import NETWORKS, Net, some, zeroed
from tests.variants import variants

FORMS: dict[str, Callable[..., nn.Module]] = {
    "parametrization": parametrizations.weight_norm,
    "hook": nn.utils.weight_norm,
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Embedding)


@torch.no_grad()
def normed(network: nn.Module, form: str, dim: int | None = 0) -> nn.Module:
    """All layers under weight norm: the same weights, with lengths of either sign and directions of any length."""
    for layer in [layer for layer in network.modules() if type(layer) in LAYERS]:
        FORMS[form](layer, dim=dim)
        g, v = stored(layer)
        sign = torch.randn_like(g).sign()
        g.mul_(sign)
        v.mul_(sign * (3 * torch.rand_like(g) + 0.1))
        if form == "hook":  # the graph behind the weight that the layer keeps could not be copied
            layer.weight = layer.weight.detach()
    return network


def stored(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Length and direction."""
    if hasattr(layer, "weight_v"):
        return layer.weight_g, layer.weight_v
    return layer.parametrizations.weight.original0, layer.parametrizations.weight.original1


MORE = {
    "Conv3d": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv3d(2, 6, 2), b=nn.Conv3d(6, 3, 2)),
        torch.randn(2, 2, 4, 4, 4),
    ),
    "ConvTranspose1d": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.ConvTranspose1d(3, 8, 4, 2), b=nn.ConvTranspose1d(8, 2, 4, 2)),
        torch.randn(2, 3, 6),
    ),
    "steps": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Linear(5, 9), b=nn.Linear(9, 2)),
        torch.randn(3, 7, 5),
    ),
}
ALL = {**NETWORKS, **MORE}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_the_cut_network_equals_the_zeroed_one(name: str, form: str) -> None:
    network, x = ALL[name]()
    plain = {group.name: group.size for group in find_groups(network, x)}
    network = normed(network, form).eval()
    groups = find_groups(network, x)
    assert {group.name: group.size for group in groups} == plain
    assert vet(network, groups, {"": Example((x,))}) == {}
    plan = some(groups)
    reference = zeroed(network, groups, plan)
    remove_units(network, groups, plan)
    torch.testing.assert_close(network(x), reference(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [1, None])
@pytest.mark.parametrize("name", ["Conv2d", "grouped", "depthwise", "ConvTranspose", "Linear", "flatten"])
def test_it_does_with_lengths_along_another_axis(name: str, dim: int | None, form: str) -> None:
    network, x = ALL[name]()
    network = normed(network, form, dim).eval()
    groups = find_groups(network, x)
    plan = some(groups)
    reference = zeroed(network, groups, plan)
    remove_units(network, groups, plan)
    torch.testing.assert_close(network(x), reference(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_columns_of_what_stays_by_hand(form: str) -> None:
    network = normed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), form)
    with torch.no_grad():
        for p, value in zip(
            stored(network[1]), ([[26.0], [5.0]], [[3.0, 100.0, 4.0, 12.0], [3, 0, 4, 0]]), strict=True
        ):
            p.copy_(torch.tensor(value))
        stored(network[1])[0][0] = 50.0 * (3**2 + 100**2 + 4**2 + 12**2) ** 0.5
    first = [p.clone() for p in stored(network[0])]
    groups = find_groups(network, torch.randn(2, 3))
    remove_units(network, groups, {"0": torch.tensor([True, False, True, True])})
    for p, before in zip(stored(network[0]), first, strict=True):
        assert torch.equal(p, before[[0, 2, 3]])
    g, v = stored(network[1])
    assert v.tolist() == [[3, 4, 12], [3, 4, 0]]
    torch.testing.assert_close(g, torch.tensor([[50.0 * 13], [5.0]]))


@pytest.mark.parametrize("form", FORMS)
def test_an_output_that_read_only_what_goes_computes_its_bias(form: str) -> None:
    network, x = normed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), form), torch.randn(5, 3)
    with torch.no_grad():
        stored(network[1])[1][0] = torch.tensor([0.0, 7, 0, 0])
    remove_units(network, find_groups(network, x), {"0": torch.tensor([True, False, True, True])})
    assert torch.equal(network(x)[:, 0], network[1].bias[0].expand(5))
    network(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_becomes_zero_has_a_direction_still(form: str) -> None:
    network, x = normed(nn.Sequential(nn.Linear(3, 4)), form), torch.randn(5, 3)
    (name,) = [name for name, p in network.named_parameters() if p is stored(network[0])[1]]
    with editing(network, name) as weight:
        weight[1] = 0
        others = weight[[0, 2, 3]].clone()
    network(x).sum().backward()
    assert torch.equal(network(x)[:, 1], network[0].bias[1].expand(5))
    torch.testing.assert_close(network[0].weight[[0, 2, 3]], others)
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_a_trial_and_a_cut_that_is_undone_leave_everything_as_it_was(form: str) -> None:
    network, x = ALL["grouped"]()
    network = normed(network, form)
    groups = find_groups(network, x)
    before, held = copy.deepcopy(network.state_dict()), [id(p) for p in network.parameters()]
    weights, output, attributes = [layer.weight.clone() for layer in network.children()], network(x), repr(network)

    def assert_unchanged() -> None:
        assert same(before, network.state_dict())
        assert held == [id(p) for p in network.parameters()]
        assert attributes == repr(network)
        assert all(torch.equal(w, layer.weight) for w, layer in zip(weights, network.children(), strict=True))
        assert torch.equal(output, network(x))

    vet(network, groups, {"": Example((x,))})
    assert_unchanged()
    cuts = remove_units(network, groups, some(groups))
    assert not same(before, network.state_dict())
    restore(network, cuts)
    assert_unchanged()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", range(5))
def test_a_cut_that_fails_half_way_leaves_the_model_as_it_was(
    form: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = ALL["Linear"]()
    network = normed(network, form)
    groups, made, like = find_groups(network, x), [], cutting._like
    cuts = remove_units(network, groups, some(groups))
    restore(network, cuts)
    assert len(cuts) == 5  # length, direction and bias of one layer, length and direction of the other
    before, held = copy.deepcopy(network.state_dict()), [id(p) for p in network.parameters()]

    def fail(old: Tensor, value: Tensor) -> Tensor:
        if len(made) == at:
            raise MemoryError
        made.append(value)
        return like(old, value)

    monkeypatch.setattr(cutting, "_like", fail)
    with pytest.raises(MemoryError):
        remove_units(network, groups, some(groups))
    assert same(before, network.state_dict())
    assert held == [id(p) for p in network.parameters()]
    assert network.b.weight.shape == (2, 9)


# --- the optimizer ---

K1, K2 = [0, 2, 3, 5, 7], [1, 2, 4, 5]


class Series(nn.Module):
    """Dense and depthwise convolutions over steps, and a linear layer."""

    def __init__(self, form: str, first: int = 8, second: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, first, 3), nn.Conv1d(first, first, 3, groups=first)
        self.c, self.d = nn.Conv1d(first, second, 3), nn.Linear(second, 4)
        normed(self, form)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean(2))


def series(seed: int, samples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 12, generator=generator), torch.randint(0, 4, (samples,), generator=generator)


def take(name: str, tensor: Tensor) -> Tensor:
    """What stays of a tensor of `Series`, or of its moments, by hand."""
    rows = {"a": K1, "b": K1, "c": K2}.get(name[0])
    columns = {"c": K1, "d": K2}.get(name[0])
    tensor = tensor if rows is None else tensor[rows]
    wide = tensor.ndim > 1 and tensor.shape[1] > 1
    return (tensor[:, columns] if columns is not None and wide else tensor).clone()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        x, y = series(i)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_network_trains_on_as_the_narrow_one_built_by_hand(form: str) -> None:
    wide, narrow = Series(form), Series(form, len(K1), len(K2))
    optimizer, oracle = (torch.optim.AdamW(network.parameters(), lr=1e-2, amsgrad=True) for network in (wide, narrow))
    train(wide, optimizer, range(6))
    state = {name: take(name, tensor) for name, tensor in wide.state_dict().items()}
    for layer in (wide.c, wide.d):  # they lose columns
        name = "c" if layer is wide.c else "d"
        g, v = stored(layer)
        of_g, of_v = (
            ("weight_g", "weight_v") if form == "hook" else [f"parametrizations.weight.original{i}" for i in (0, 1)]
        )
        scale = take(name, g.detach() / v.detach().flatten(1).norm(dim=1).view_as(g))
        state[f"{name}.{of_g}"] = scale * state[f"{name}.{of_v}"].flatten(1).norm(dim=1).view_as(scale)
    narrow.load_state_dict(state)
    names, old = [name for name, _ in wide.named_parameters()], copy.deepcopy(optimizer.state_dict())
    for i, entries in old["state"].items():
        entries.update({key: take(names[i], value) for key, value in entries.items() if key != "step"})
    oracle.load_state_dict(old)
    gradients = {name: take(name, p.grad) for name, p in wide.named_parameters()}

    groups = find_groups(wide, series(0)[0])
    assert [group.name for group in groups] == ["a", "c"]
    plan = {"a": torch.tensor([i in K1 for i in range(8)]), "c": torch.tensor([i in K2 for i in range(6)])}
    cuts = remove_units(wide, groups, plan)
    assert all(cut.new.grad.data_ptr() != cut.old.grad.data_ptr() for cut in cuts)
    migrate(optimizer, cuts)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in wide.named_parameters())
    train(wide, optimizer, range(100, 110))
    train(narrow, oracle, range(100, 110))

    assert repr(wide) == repr(narrow)
    assert same(wide.state_dict(), narrow.state_dict())
    assert same_optimizer_state(optimizer.state_dict(), oracle.state_dict())


# --- scores, folds and costs ---


@pytest.mark.parametrize(
    ("name", "score", "form"),
    variants(
        ["Conv1d", "grouped", "depthwise", "ConvTranspose", "Embedding", "flatten"],
        [Granger(), Magnitude(), Taylor()],
        list(FORMS),
        every=3,
    ),
)
def test_it_is_pruned_as_the_network_with_ordinary_weights(name: str, score: Score, form: str) -> None:
    network, x = ALL[name]()
    network = normed(network, form)
    twins = [network, without_weight_norm(copy.deepcopy(network))]
    events = []
    for twin in twins:
        pruner = Pruner(twin, score, Units(0.5), OneShot(0.5))
        pruner.prepare(x)
        with pruner.recording():
            twin(x).square().sum().backward()
        pruner.recorder.observe_gradients()
        events.append(pruner.step(0.5))
        assert events[-1].params == sum(p.numel() for p in twin.parameters())
        assert events[-1].macs * pruner.calls[""].samples == sum(count_macs(twin, pruner.calls[""].args).values())
    mine, plain = events
    assert mine.removed == plain.removed
    assert mine.macs == plain.macs
    for group, importance in mine.importance.items():
        torch.testing.assert_close(importance, plain.importance[group], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(twins[0](x), twins[1](x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("reader", [nn.Conv2d(6, 2, 3), nn.Linear(6 * 36, 2), nn.ConvTranspose2d(6, 2, 3, 2)], ids=repr)
def test_a_linearly_dependent_channel_is_folded_exactly(reader: nn.Module, dim: int | None, form: str) -> None:
    flat = isinstance(reader, nn.Linear)
    network = Net(
        lambda s, x: s.b(F.relu(s.a(x)).flatten(1) if flat else F.relu(s.a(x))),
        a=nn.Conv2d(3, 6, 3),
        b=copy.deepcopy(reader),
    )
    depend(network.a.weight, network.a.bias)
    with torch.no_grad():
        network.a.bias[2] -= 3 * isinstance(reader, nn.ConvTranspose2d)  # its borders take no constant
    x = torch.randn(8, 3, 8, 8)
    network = normed(network, form, dim).eval()
    before = network(x)
    fold_and_cut(network, x, "a", [2])
    assert network.b.weight.numel() < reader.weight.numel()
    torch.testing.assert_close(network(x), before, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_a_fold_can_be_undone_to_the_bit(dim: int | None, form: str) -> None:
    network = normed(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), form, dim)
    (group,) = find_groups(network, torch.randn(2, 4))
    before, weight = copy.deepcopy(network.state_dict()), network[2].weight.detach().clone()
    keep = torch.tensor([True] * 4 + [False] * 2)
    undo = fold(network, group.readers[0], keep, (torch.full((4, 2), 0.5), torch.ones(2)))
    g, v = stored(network[2])
    folded = torch._weight_norm(v, g, -1 if dim is None else dim)
    torch.testing.assert_close(folded[:, :4], weight[:, :4] + 0.5 * weight[:, 4:].sum(1, keepdim=True))
    undo()
    assert same(before, network.state_dict())


def test_a_fold_of_nothing_changes_no_bit() -> None:
    network = normed(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), "parametrization")
    (group,) = find_groups(network, torch.randn(2, 4))
    before = copy.deepcopy(network.state_dict())
    fold(network, group.readers[0], torch.arange(6) < 4, (torch.zeros(4, 2), torch.zeros(2)))
    assert same(before, network.state_dict())


@pytest.mark.parametrize("skip", ["b", "d", nn.Linear])
@pytest.mark.parametrize("form", FORMS)
def test_layers_are_skipped_by_their_own_names_and_types(skip: Any, form: str) -> None:
    network = Series(form)
    found = []
    for twin in (network, without_weight_norm(copy.deepcopy(network))):
        pruner = Pruner(twin, Magnitude(), Units(0.9), OneShot(0.5), skip=[skip])
        pruner.prepare(series(0)[0])
        found.append((pruner.widths, pruner.left_whole))
    assert found[0] == found[1]
    assert list(found[0][0]) == (["c"] if skip == "b" else ["a"])


@pytest.mark.parametrize("form", FORMS)
def test_a_report_can_be_made_of_it(form: str) -> None:
    dense, slim, (x, _) = Series(form), Series(form, 5, 4), series(0)
    for network in (dense, slim):
        network(x).sum().backward()
    made = report(dense, slim, x)
    assert (made.dense.params, made.slim.params) == tuple(sum(p.numel() for p in n.parameters()) for n in (dense, slim))


# --- checkpoints ---


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_dense_network_takes_the_slim_state(form: str) -> None:
    network, fresh, x = Series(form), Series(form), series(0)[0]
    dense = {name: tensor.shape for name, tensor in network.state_dict().items()}
    groups = find_groups(network, x)
    remove_units(network, groups, some(groups))
    resize_to(fresh, {name: tensor.shape for name, tensor in network.state_dict().items()})
    assert repr(fresh) == repr(network)
    assert [layer.weight.shape for layer in fresh.children()] == [layer.weight.shape for layer in network.children()]
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(x), network(x))
    resize_to(fresh, dense)
    assert repr(fresh) == repr(Series(form))
    assert fresh.c.weight.shape == (6, 8, 3)


class Lit(pl.LightningModule):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = Series(form)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", [pytest.param(Granger(), marks=pytest.mark.slow), Taylor()])
def test_a_run_is_resumed_bitwise_in_a_fresh_dense_model(tmp_path: Path, score: Score, form: str) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Lit, Any, Prune]:
        lit, schedule = Lit(form), Linear(start=0.0, end=4 / 6)
        callback = Prune(score, Units(0.5), schedule, recovery_epochs=2, record_every_n_steps=3)
        fit = trainer(folder, callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
        fit.fit(lit, DataLoader(TensorDataset(*series(7, 32)), batch_size=8), ckpt_path=ckpt_path)
        return lit, fit, callback

    straight, trained, callback = run(tmp_path / "straight")
    assert [event.step for event in callback.history.events] == [8, 16]
    assert callback.history.events[-1].params == sum(p.numel() for p in straight.net.parameters())
    assert (tmp_path / "straight" / "report.md").exists()
    for epoch in range(5):
        resumed, fit, again = run(tmp_path / f"resumed{epoch}", tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
        assert again.history.to_json() == callback.history.to_json()
    loaded = load_from_checkpoint(Lit, tmp_path / "straight" / "epoch=5.ckpt")
    assert torch.equal(loaded.net(series(1)[0]), straight.net(series(1)[0]))


# --- what is left whole ---


class Squared(nn.Linear):
    """Its weight is a property of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.root = self._parameters.pop("weight")

    @property
    def weight(self) -> Tensor:
        return self.root.square()


WHOLE: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "spectral norm": (parametrizations.spectral_norm, "is under spectral norm, which divides by a norm over all"),
    "spectral norm, older form": (nn.utils.spectral_norm, "is under spectral norm"),
    "orthogonal": (parametrizations.orthogonal, "is parametrized (Orthogonal): remove the parametrization"),
    "weight norm of the bias": (
        lambda layer: parametrizations.weight_norm(layer, "bias"),
        "is parametrized (WeightNorm)",
    ),
    "weight norm of the bias, older form": (
        lambda layer: nn.utils.weight_norm(layer, "bias"),
        "is parametrized (WeightNorm)",
    ),
    "spectral norm on weight norm": (
        lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
        "is under spectral norm",
    ),
    "a mask": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "is parametrized (L1Unstructured)"),
    "a property": (lambda layer: Squared(layer.in_features, layer.out_features), "computes its weight of other"),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("layer", ["a", "b"])
def test_other_parametrizations_are_left_whole_with_the_reason(name: str, layer: str) -> None:
    network = Net(lambda s, x: s.c(s.b(F.relu(s.a(x)))), a=nn.Linear(4, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 2))
    parametrize, reason = WHOLE[name]
    setattr(network, layer, parametrize(getattr(network, layer)))
    found = survey(network, torch.randn(3, 4))
    assert {group.name for group in found.groups} == {"a": {"b"}, "b": set()}[layer]
    assert f"{layer} {reason}" in found.left_whole["a"]


def test_a_recurrent_layer_under_weight_norm_is_left_whole() -> None:
    network = Net(lambda s, x: s.b(s.a(x)[0]), a=nn.LSTM(4, 8, batch_first=True), b=nn.Linear(8, 2))
    nn.utils.weight_norm(network.a, "weight_hh_l0")
    assert "a is parametrized (WeightNorm)" in survey(network, torch.randn(3, 5, 4)).left_whole["a"]
