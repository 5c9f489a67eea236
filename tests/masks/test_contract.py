"""What every pattern, distribution and score of weights promises, for every subclass there is."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_slim import Masker, OneShot
from lightning_slim.masks import NM, Block, Distribution, Global, Layer, Pattern, Uniform, Unstructured, WeightScore


def concrete(base: type) -> list[type]:
    """All classes of a kind that can be made."""
    below = [kind for child in base.__subclasses__() for kind in (child, *concrete(child))]
    return [kind for kind in below if not inspect.isabstract(kind)]


PATTERNS = [*(kind() for kind in Pattern.__subclasses__()), NM(1, 4), NM(2, 3), Block(2, 3), Block(8, 6)]
DISTRIBUTIONS, SCORES = Distribution.__subclasses__(), concrete(WeightScore)


def stack(seed: int = 0) -> Tensor:
    return torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.75])
def test_a_mask_has_its_density_to_the_entry(pattern: Pattern, sparsity: float) -> None:
    scores = stack()
    pieces = len(pattern.pool(scores))
    assert pieces * pattern.piece == scores.numel()
    removed = round(sparsity * pieces)
    mask = pattern.choose(scores, removed)
    assert mask.shape == scores.shape
    if pattern.sparsity is None:
        assert int((~mask).sum()) == removed * pattern.piece
    else:  # the same of every group, and never more than the pattern says
        assert isinstance(pattern, NM)
        gone = min(round(sparsity * pattern.m), pattern.m - pattern.n)
        assert ((~mask).view(3, 8, -1, pattern.m).sum(-1) == gone).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_stays_matters_more_than_what_goes(pattern: Pattern) -> None:
    scores = stack()
    mask = pattern.choose(scores, len(pattern.pool(scores)) // 2)
    if isinstance(pattern, NM):
        groups, stays = scores.view(-1, pattern.m), mask.view(-1, pattern.m)
        least = groups.masked_fill(~stays, 2).amin(1)
        assert (least >= groups.masked_fill(stays, -1).amax(1)).all()
    else:
        whole = pattern.pool(mask.float()) > 0
        pooled = pattern.pool(scores)
        assert pooled[whole].min() >= pooled[~whole].max()
        assert torch.equal(pattern.pool(mask.float()), whole * float(pattern.piece))  # pieces are whole


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_more_zeros_hold_those_that_were_fewer(pattern: Pattern) -> None:
    scores, pieces = stack(), len(pattern.pool(stack()))
    before = torch.ones_like(scores, dtype=torch.bool)
    for tenth in range(1, 10):
        mask = pattern.choose(scores, round(tenth / 10 * pieces))
        assert not (mask & ~before).any()
        before = mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_negative_scores_choose_as_positive_ones_do(pattern: Pattern) -> None:
    """All scores of one pattern's pieces shift by the same: the order of pieces, and the mask, stay."""
    scores, pieces = stack().double(), len(pattern.pool(stack()))  # sums of multiples of 2^-24 are exact then
    for tenth in range(10):
        mask = pattern.choose(scores, round(tenth / 10 * pieces))
        assert torch.equal(mask, pattern.choose(scores - 5, round(tenth / 10 * pieces)))


@pytest.mark.parametrize("shift", [0.0, -5.0])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_is_gone_goes_first(pattern: Pattern, shift: float) -> None:
    pieces = len(pattern.pool(stack()))
    before = pattern.choose(stack(1), pieces // 4)  # by other scores than those that count now
    scores = (stack() + shift).masked_fill(~before, -torch.inf)
    pooled = pattern.pool(scores)
    assert int(pooled.isneginf().sum()) == int((~before).sum()) / pattern.piece
    for removed in (pieces // 4, pieces // 3, pieces // 2):
        assert not (pattern.choose(scores, removed) & ~before).any()


def test_a_block_of_which_a_part_is_gone_counts_by_the_rest() -> None:
    scores = torch.tensor([[[-torch.inf, -2.0, -3.0, -4.0, -torch.inf]]])
    assert Block(1, 2).pool(scores).tolist() == [-2.0, -7.0, -torch.inf]  # the last block is short


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equal_scores_still_give_the_density(pattern: Pattern) -> None:
    scores = torch.zeros(3, 8, 12)
    mask = pattern.choose(scores, len(pattern.pool(scores)) // 2)
    assert torch.equal(mask, pattern.choose(scores, len(pattern.pool(scores)) // 2))
    assert 0.25 <= mask.float().mean() <= 0.75


@pytest.mark.parametrize("thing", [*PATTERNS, *(kind() for kind in DISTRIBUTIONS + SCORES)], ids=str)
def test_they_survive_a_pickle(thing: object) -> None:
    assert pickle.loads(pickle.dumps(thing)) == thing


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.97])
def test_zeros_add_up_to_what_is_asked(kind: type[Distribution], sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 3, 3, 3), "b": (32, 8, 3, 3), "c": (50, 64)}
    layers = {n: Layer(s, torch.rand(torch.Size(s).numel(), generator=generator)) for n, s in shapes.items()}
    total = sum(layer.pieces for layer in layers.values())
    removed = kind()(layers, sparsity)
    assert removed.keys() == layers.keys()
    assert all(0 <= removed[name] < layer.pieces for name, layer in layers.items())
    rounding = 0 if kind is not Uniform else len(layers) / 2
    assert abs(sum(removed.values()) - round(sparsity * total)) <= rounding


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_every_score_fills_every_pattern_to_the_entry(kind: type[WeightScore], pattern: Pattern) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(12, 24, 3), nn.Tanh(), nn.ConvTranspose1d(24, 24, 1), nn.Flatten(), nn.Linear(48, 16))
    masker = Masker(net, None if pattern.sparsity else 0.75, pattern, kind(), schedule=OneShot(0.5), mask_last=True)
    masker.prepare()
    with masker.recording():
        net(torch.randn(20, 12, 4)).square().mean().backward()
    masker.hear(torch.arange(20) % 3)
    masker.observe(torch.optim.SGD(net.parameters()))
    masker.update(1.0)
    for name, mask in masker.masks.items():
        assert int((~mask).sum()) == round(masker.sparsity * mask.numel() / pattern.piece) * pattern.piece
        assert torch.equal(net.get_parameter(name) != 0, mask)
        if isinstance(pattern, NM):
            inputs = mask.movedim(0 if name == "2.weight" else 1, -1)  # a transposed one has its inputs first
            assert (inputs.reshape(-1, pattern.m).sum(1) == pattern.n).all()


@pytest.mark.parametrize("kind", SCORES)
def test_scores_are_finite_and_zero_of_a_zero(kind: type[WeightScore]) -> None:
    weight = torch.randn(5, 7).index_fill(0, torch.tensor([2]), 0)
    score = kind()(weight, torch.randn(5, 7))
    assert score.shape == weight.shape
    assert score.isfinite().all()
    assert (score[2] == 0).all()
    assert (kind()(torch.zeros(5, 7), torch.randn(5, 7)) == 0).all()


@pytest.mark.parametrize("make", [lambda: NM(4, 4), lambda: NM(0, 4), lambda: Block(0, 1), lambda: Global(1.0)])
def test_senseless_values_are_refused(make) -> None:
    with pytest.raises(ValueError, match="Expected"):
        make()


def test_a_floor_above_what_stays_is_refused() -> None:
    layers = {"a": Layer((4, 4), torch.rand(16))}
    with pytest.raises(ValueError, match=r"`floor` of at most 0\.2"):
        Global(0.3)(layers, 0.8)


def test_unstructured_is_a_threshold() -> None:
    scores = stack()
    mask = Unstructured().choose(scores, 144)
    assert torch.equal(mask, scores > scores.flatten().kthvalue(144).values)
