"""Zeros stay zero, whatever the optimizer; masks follow cuts; what cannot be masked is refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import (
    NM,
    SET,
    Block,
    ErdosRenyiKernel,
    Global,
    Masker,
    OneShot,
    Pattern,
    Regrowth,
    RigL,
    Uniform,
    Unstructured,
    WeightMovement,
    WeightSaliency,
    find_groups,
    migrate,
    remove_units,
)
from lightning_slim.schedules import Linear
from lightning_slim.surgery import StructureChange
from lightning_slim.units import Plan
from tests.networks import Mixed, images, same

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
}


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 4))


def loss_of(net: nn.Module, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 8, generator=generator)
    return F.cross_entropy(net(x), torch.randint(0, 4, (32,), generator=generator))


def masked(net: nn.Module, optimizers: Any = (), loss: Tensor | None = None, **kwargs: Any) -> Masker:
    """All that is due is zero."""
    masker = Masker(net, schedule=OneShot(0.0), **kwargs)
    masker.prepare(loss_of(net) if loss is None else loss)
    masker.attach(optimizers)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for p in group["params"]:
            p.grad = None
    masker.update(1.0, optimizers)
    return masker


def zeros(net: nn.Module, masker: Masker) -> bool:
    return all(bool((net.get_parameter(name)[~mask] == 0).all()) for name, mask in masker.masks.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_are_exact_after_100_steps(name: str) -> None:
    net = perceptron()
    optimizer = OPTIMIZERS[name](net.parameters())
    for step in range(10):  # momentum, for what is going to be zero too
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
    masker = masked(net, [optimizer], sparsity=0.75)
    for state in optimizer.state.values():
        assert all(bool(v.isfinite().all()) for v in state.values() if isinstance(v, Tensor))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for step in range(100):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        assert zeros(net, masker)
    assert int((net[0].weight == 0).sum()) == 96  # 0.75 * 128, to the entry
    assert int((net[2].weight == 0).sum()) == 144
    assert all(bool((p != before[n]).any()) for n, p in net.named_parameters())  # the rest trains
    for n, mask in masker.masks.items():
        state = optimizer.state[net.get_parameter(n)]
        assert all(bool((v[~mask] == 0).all()) for v in state.values() if isinstance(v, Tensor) and v.ndim)


def test_without_the_masker_momentum_brings_the_weights_back() -> None:
    net = perceptron()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    loss_of(net).backward()
    optimizer.step()
    masker = masked(net, [optimizer])
    masker.detach()
    loss_of(net, 1).backward()
    optimizer.step()
    assert not zeros(net, masker)


def test_steps_that_mixed_precision_skips_leave_the_zeros() -> None:
    net = perceptron()
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    masker, scaler = masked(net, [optimizer]), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        optimizer.zero_grad()
        before = net[0].weight.detach().clone()
        scaler.scale(loss_of(net, step) * (torch.inf if step % 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(net[0].weight, before) == bool(step % 2)  # every other step is skipped
        assert zeros(net, masker)


def test_clipping_sees_only_what_trains() -> None:
    """The norm is that of a network in which the masked weights do not exist: zeros times a parametrized weight."""
    net = perceptron()
    masker = masked(net)
    other = perceptron()
    for name, mask in masker.masks.items():
        nn.utils.prune.custom_from_mask(other.get_submodule(name.removesuffix(".weight")), "weight", mask)
    loss_of(net).backward()
    loss_of(other).backward()
    ours, theirs = (nn.utils.clip_grad_norm_(n.parameters(), 0.1) for n in (net, other))
    torch.testing.assert_close(ours, theirs)
    assert all(bool((p.grad[~masker.masks[n]] == 0).all()) for n, p in net.named_parameters() if n in masker.masks)


def test_the_last_layer_norms_and_biases_stay_dense() -> None:
    net = perceptron()
    masker = masked(net, sparsity=0.9)
    assert masker.masks.keys() == {"0.weight", "2.weight"}
    assert masked(perceptron(), sparsity=0.9, mask_last=True).masks.keys() == {"0.weight", "2.weight", "5.weight"}
    assert masked(perceptron(), sparsity=0.9, skip=["0"]).masks.keys() == {"2.weight"}


def test_updates_lead_to_the_target_and_never_compound() -> None:
    net = perceptron()
    masker = Masker(net, 0.5, schedule=Linear(0.0, 1.0))
    masker.prepare(loss_of(net))
    counts = []
    for tenth in range(11):
        masker.update(tenth / 10)
        counts.append(int((net[0].weight == 0).sum()))
    assert counts == [round(0.05 * tenth * 128) for tenth in range(11)]
    assert masker.update(1.0) is None
    assert masker.reached == pytest.approx(160 / 320)
    assert [sum(event.zeros.values()) for event in masker.events][-1] == 160
    assert len(masker.events) == 10


@pytest.mark.parametrize("distribution", [Uniform(), Global(0.0), ErdosRenyiKernel()], ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 1), Block(2, 4)], ids=str)
def test_the_smallest_weights_go(pattern: Pattern, distribution: Any) -> None:
    net = perceptron()
    before = {n: p.detach().abs().clone() for n, p in net.named_parameters()}
    masker = masked(net, sparsity=0.5, pattern=pattern, distribution=distribution)
    assert sum(int((~mask).sum()) for mask in masker.masks.values()) == 160
    assert zeros(net, masker)
    if distribution == Global(0.0) and pattern == Unstructured():
        together = torch.cat([before[n].flatten() for n in masker.masks])
        threshold = together.kthvalue(160).values
        assert all(torch.equal(mask, before[n] > threshold) for n, mask in masker.masks.items())


def test_2_of_4_is_valid_in_every_group_during_training() -> None:
    net = perceptron()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    masker = masked(net, [optimizer], pattern=NM(), skip=["5"])
    for step in range(20):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
    for i in (0, 2):
        assert ((net[i].weight.view(-1, 4) != 0).sum(1) == 2).all()
    assert masker.reached == 0.5


def test_streamed_scores_are_means_over_steps() -> None:
    net = perceptron()
    optimizer = torch.optim.SGD(net.parameters())
    masker = Masker(net, 0.5, score=WeightSaliency(), schedule=OneShot(0.0))
    masker.prepare(loss_of(net))
    assert not masker.ready
    expected = torch.zeros(16, 8)
    for step in range(3):
        net.zero_grad()
        loss_of(net, step).backward()
        masker.observe(optimizer)
        expected += (net[0].weight * net[0].weight.grad).abs().detach()
    assert masker.ready
    masker.update(1.0)
    assert torch.equal(masker.masks["0.weight"], expected > expected.flatten().kthvalue(64).values)


@pytest.mark.parametrize("score", [WeightSaliency(), WeightMovement()], ids=str)
def test_gradients_that_overflowed_are_not_added_up(score: Any) -> None:
    net = perceptron()
    optimizer = torch.optim.SGD(net.parameters())
    masker = Masker(net, 0.5, score=score, schedule=OneShot(0.0))
    masker.prepare(loss_of(net))
    for scale in (torch.inf, 1.0, torch.nan):
        net.zero_grad()
        (scale * loss_of(net)).backward()
        masker.observe(optimizer)
    net.zero_grad()
    loss_of(net).backward()
    for name, sums in masker.state_dict()["sums"].items():
        weight = net.get_parameter(name)
        assert torch.equal(sums, score(weight, weight.grad))


def test_what_moves_toward_zero_goes_however_large_it_is() -> None:
    """Negative scores; they add up over the whole run, and what is gone stays gone."""
    net = perceptron()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    masker = Masker(net, 0.5, score=WeightMovement(), schedule=Linear(0.0, 1.0))
    masker.prepare(loss_of(net))
    masker.attach([optimizer])
    moved = torch.zeros(16, 8)
    for tenth in range(1, 11):
        optimizer.zero_grad()
        loss_of(net, tenth).backward()
        masker.observe(optimizer)
        moved -= (net[0].weight * net[0].weight.grad).detach()
        optimizer.step()
        before = masker.masks["0.weight"]
        masker.update(tenth / 10, [optimizer])
        stays = moved.masked_fill(~before, -torch.inf)
        expected = stays > stays.flatten().kthvalue(round(6.4 * tenth)).values
        assert torch.equal(masker.masks["0.weight"], expected)
    assert (moved[masker.masks["0.weight"]] < 0).any()
    assert masker.reached == 0.5


def test_what_comes_back_has_not_moved_yet() -> None:
    net = perceptron()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    masker = Masker(net, 0.5, score=WeightMovement(), schedule=OneShot(0.0), regrow=SET(end=1.0))
    masker.prepare(loss_of(net))
    masker.attach([optimizer])
    for step in range(4):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        masker.observe(optimizer)
        optimizer.step()
        masker.update(step / 10, [optimizer])
        assert [int((~mask).sum()) for mask in masker.masks.values()] == [64, 96]
        sums = masker.state_dict()["sums"]
        assert all(bool((sums[n][~mask] == 0).all() and (sums[n][mask] != 0).any()) for n, mask in masker.masks.items())


def test_a_step_zeroes_only_what_its_optimizer_holds() -> None:
    net = perceptron()
    first, second = (torch.optim.SGD(net[i].parameters(), lr=0.1) for i in (0, 2))
    masker = masked(net, [first, second])
    masks = masker.masks
    loss_of(net).backward()
    with torch.no_grad():  # as if both had moved what is gone
        net[0].weight += 1
        net[2].weight += 1
    second.step()
    assert (net[2].weight[~masks["2.weight"]] == 0).all()
    assert (net[0].weight[~masks["0.weight"]] == 1).all()
    first.step()
    assert zeros(net, masker)


def test_copies_are_zeroed_alike() -> None:
    net = perceptron()
    average = copy.deepcopy(net)
    for p in average.parameters():
        p.data += 1
    masker = Masker(net, 0.5, schedule=OneShot(0.0))
    masker.prepare(loss_of(net))
    masker.update(1.0, copies=[average])
    assert zeros(average, masker)
    assert int((average[0].weight == 0).sum()) == 64


def test_a_masked_network_is_copied_and_pickled_after_a_forward_pass() -> None:
    """`torch.nn.utils.prune` cannot be copied then, and a parametrization cannot be pickled."""
    net = perceptron()
    masked(net)
    loss_of(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert same(other.state_dict(), net.state_dict())
        loss_of(other).backward()
        assert other[0].weight.grad.count_nonzero() > net[0].weight.count_nonzero()  # no longer ours
    assert net.state_dict().keys() == perceptron().state_dict().keys()


@pytest.mark.parametrize("sparsity", [0.0, 1.0, 80, -0.5])
def test_a_sparsity_outside_0_and_1_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity in \(0, 1\), the fraction of the weights that goes"):
        Masker(perceptron(), sparsity)


def test_another_sparsity_than_the_patterns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity of 0\.5 in every weight, which NM\(n=2, m=4\) stands for"):
        Masker(perceptron(), 0.8, NM())
    with pytest.raises(ValueError, match="choose another pattern"):
        Masker(perceptron(), None, NM(), distribution=Global())


def test_a_width_that_the_pattern_does_not_divide_is_refused() -> None:
    net = perceptron()
    with pytest.raises(ValueError, match=r"multiple of 3 inputs for 2:3, got 8: pad them, or skip it \(0\.weight"):
        Masker(net, pattern=NM(2, 3)).prepare(loss_of(net))
    with pytest.raises(ValueError, match=r"multiple of 5 outputs and of 1 inputs for 5x1 blocks, got 16 and 8"):
        Masker(net, pattern=Block(5, 1)).prepare(loss_of(net))
    assert same(net.state_dict(), perceptron().state_dict())


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "parametrization", "pruning"])
def test_a_weight_that_is_computed_is_refused_by_name(wrap: str) -> None:
    net = perceptron()
    if wrap == "parametrization":
        nn.utils.parametrize.register_parametrization(net[2], "weight", nn.Identity())
    elif wrap == "pruning":
        nn.utils.prune.l1_unstructured(net[2], "weight", 0.5)
    else:
        getattr(nn.utils.parametrizations, wrap)(net[2])
    with pytest.raises(ValueError, match="Expected plain weights to mask, got 2, which is"):
        Masker(net).prepare()
    Masker(net, skip=["2"]).prepare()


def test_nothing_to_mask_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="Nothing can be masked in Sequential"):
        Masker(net).prepare(loss_of(net))


# --- structural cuts ---


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 2)], ids=str)
def test_masks_are_cut_with_their_layers(pattern: Pattern) -> None:
    net = Mixed()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    masker = Masker(net, 0.5, pattern, schedule=OneShot(0.0), skip=["c1", "dw"])
    masker.prepare(F.cross_entropy(net(images(0)[0]), images(0)[1]))
    masker.attach([optimizer])
    masker.update(1.0, [optimizer])
    net.zero_grad()
    groups = find_groups(net, images(0)[0])
    plan = Plan({g.name: torch.arange(g.size) % 3 != 1 for g in groups if g.name in ("c1", "fc1")})
    before = dict(masker.masks)
    migrate(optimizer, remove_units(net, groups, plan))
    masker.follow(StructureChange(groups, plan))
    rows = torch.arange(20) % 3 != 1
    columns = torch.arange(8) % 3 != 1
    assert masker.masks["c2.weight"].shape == (12, 5, 3, 3)
    if pattern == Unstructured():
        assert torch.equal(masker.masks["fc1.weight"], before["fc1.weight"][rows])
        assert torch.equal(masker.masks["c2.weight"], before["c2.weight"][:, columns])
    elif isinstance(pattern, NM):
        assert ((net.fc1.weight.view(-1, 4) != 0).sum(1) <= 2).all()
        assert (masker.masks["fc1.weight"].view(-1, 4).sum(1) == 2).all()
        assert (masker.masks["c2.weight"][:, :4].sum(1) == 2).all()  # the last group is short
    for step in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(images(step)[0]), images(step)[1]).backward()
        assert all(bool((p.grad[~masker.masks[n]] == 0).all()) for n, p in masker.weights.items())
        optimizer.step()
        assert zeros(net, masker)


class Attends(nn.Module):
    """Attention and a transposed convolution, both of which lose units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.attention = nn.Linear(8, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.last = nn.ConvTranspose1d(16, 12, 2, 2), nn.Conv1d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(F.relu(self.up(x.transpose(1, 2))))


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 4), Block(4, 1)], ids=str)
def test_attention_and_transposed_convolutions_are_masked_and_cut(pattern: Pattern) -> None:
    net, x = Attends(), torch.randn(3, 5, 8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sparsity = pattern.sparsity or 0.5
    masker = Masker(net, sparsity, pattern, schedule=OneShot(0.0))
    masker.prepare(net(x).square().mean())
    masker.attach([optimizer])
    masker.update(1.0, [optimizer])
    names = {"inp.weight", "attention.in_proj_weight", "attention.out_proj.weight", "up.weight"}
    assert masker.masks.keys() == names
    assert all(int((w == 0).sum()) == sparsity * w.numel() for w in masker.weights.values())
    groups = {group.name: group for group in find_groups(net, x)}
    plan = Plan(
        {"attention.heads": torch.tensor([1, 0, 1, 1]) > 0, "inp": torch.arange(16) % 4 > 0, "up": torch.arange(12) > 3}
    )
    before = dict(masker.masks)
    migrate(optimizer, remove_units(net, groups.values(), plan))
    masker.follow(StructureChange([*groups.values()], plan))
    rows = torch.cat([torch.arange(16) // 4 != 1] * 3)
    if pattern == Unstructured():
        assert torch.equal(
            masker.masks["attention.in_proj_weight"], before["attention.in_proj_weight"][rows][:, plan["inp"]]
        )
        assert torch.equal(masker.masks["up.weight"], before["up.weight"][plan["inp"]][:, plan["up"]])
    elif isinstance(pattern, NM):
        assert (masker.masks["up.weight"].view(3, 4, 8, 2).sum(1) == pattern.n).all()  # inputs are the first axis
        assert (masker.masks["attention.in_proj_weight"].view(36, 3, 4).sum(2) == pattern.n).all()
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        assert zeros(net, masker)


def test_a_tied_weight_is_cut_once() -> None:
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 20, bias=False), nn.Linear(20, 3))
    net[3].weight = net[0].weight
    x = torch.randint(0, 20, (2, 5))
    masker = masked(net, loss=net(x).sum(), sparsity=0.5)
    before, (group,) = masker.masks["0.weight"], find_groups(net, x)
    plan = Plan({group.name: torch.arange(8) % 4 != 1})
    remove_units(net, [group], plan)
    masker.follow(StructureChange([group], plan))
    assert torch.equal(masker.masks["0.weight"], before[:, plan[group.name]])
    assert masker.masks["1.weight"].shape == (6, 6)
    assert zeros(net, masker)


def test_the_state_is_restored_to_the_bit() -> None:
    net = perceptron()
    masker = masked(net)
    state = pickle.loads(pickle.dumps(masker.state_dict()))
    other = Masker(copy.deepcopy(net))
    other.load_state_dict(state)
    assert same(other.masks, masker.masks)
    assert (other.events, other.last, other.reached) == (masker.events, masker.last, masker.reached)


# --- regrowth ---


@pytest.mark.parametrize("regrow", [RigL(end=1.0), SET(end=1.0)], ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 1)], ids=str)
def test_exchanges_keep_the_density_to_the_entry(regrow: Regrowth, pattern: Pattern) -> None:
    net = perceptron()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    masker = Masker(net, 0.75, pattern, schedule=OneShot(0.0), regrow=regrow)
    masker.prepare(loss_of(net))
    masker.attach([optimizer])
    for step in range(10):
        event = masker.update(step / 10, [optimizer])
        assert [int((~mask).sum()) for mask in masker.masks.values()] == [96, 144]
        if step:
            shares = [round(regrow.share(step / 10) * n / pattern.piece) * pattern.piece for n in (32, 48)]
            assert (event.regrown if event is not None else 0) == sum(shares)
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        assert zeros(net, masker)


def test_rigl_by_hand() -> None:
    """The smallest of what stays go; what has the largest gradient of all that was zero comes back, as zero."""
    net = perceptron()
    masker = Masker(net, 0.5, schedule=OneShot(0.0), regrow=RigL(fraction=0.25, end=1.0))
    masker.prepare(loss_of(net))
    masker.attach([])
    masker.update(0.0)
    before, weight = masker.masks["0.weight"], net[0].weight.detach().clone()
    dense = copy.deepcopy(net)
    loss_of(dense).backward()
    loss_of(net).backward()
    masker.update(0.5)  # the share is half of 0.25: 8 of 64
    smallest = weight.abs()[before].sort().values[7]
    largest = dense[0].weight.grad.abs()[~before].sort(descending=True).values[7]
    expected = (before & (weight.abs() > smallest)) | (~before & (dense[0].weight.grad.abs() >= largest))
    assert torch.equal(masker.masks["0.weight"], expected)
    assert (net[0].weight[expected & ~before] == 0).all()


def test_a_pattern_of_one_sparsity_cannot_regrow() -> None:
    with pytest.raises(ValueError, match="Expected a pattern of any sparsity to regrow in"):
        Masker(perceptron(), pattern=NM(), regrow=RigL())
    with pytest.raises(ValueError, match=r"Expected `fraction` in \(0, 1\)"):
        SET(1.0)
