"""Scores by what weights read: every kind of layer against explicit loops, scikit-learn, and through cuts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.feature_selection import f_classif, r_regression
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_slim import (
    NM,
    ErdosRenyiKernel,
    Global,
    Masker,
    OneShot,
    Screening,
    WeightScreening,
    WeightWanda,
    find_groups,
    remove_units,
)
from lightning_slim.scores.base import Reading
from lightning_slim.scores.screening import ByClass
from lightning_slim.statistics import Anova, Moments
from lightning_slim.surgery import StructureChange
from lightning_slim.units import Plan
from tests.networks import Mixed, images, same

WANDA = WeightWanda()


def heard(net: nn.Module, *batches: Any, score: Any = WANDA, labels: Any = None, **kwargs: Any) -> Masker:
    """A masker that has heard some forward passes, each a step."""
    masker = Masker(net, **{"sparsity": 0.5, "score": score, "schedule": OneShot(0.0), "mask_last": True, **kwargs})
    masker.prepare()
    for i, batch in enumerate(batches):
        with masker.recording():
            net(*batch) if type(batch) is tuple else net(batch)
        masker.hear(None if labels is None else labels[i])
    return masker


def rms(rows: Tensor) -> Tensor:
    """Of each column, by a loop over rows."""
    total = torch.zeros(rows.shape[1], dtype=torch.double)
    for row in rows.detach().double():
        total += row**2
    return (total / len(rows)).sqrt()


def close(masker: Masker, name: str, expected: Tensor) -> None:
    torch.testing.assert_close(masker._scores(name), expected.float(), rtol=1e-5, atol=1e-8)


def test_a_linear_layer_reads_the_last_axis_of_all_steps() -> None:
    net, first, second = nn.Linear(4, 3), torch.randn(5, 6, 4), torch.randn(2, 6, 4)
    masker = heard(net, first, second)
    close(masker, "weight", net.weight.abs() * rms(torch.cat([first, second]).flatten(0, 1)))
    close(heard(net, first[0, 0]), "weight", heard(net, first[:1, 0])._scores("weight"))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_read_channels_of_their_group(groups: int, transposed: bool, dimensions: int) -> None:
    name = f"Conv{'Transpose' if transposed else ''}{dimensions}d"
    layer = getattr(nn, name)(8, 16 if groups < 8 else 8, 2, groups=groups)
    x = torch.randn(3, 8, *[4, 3, 5][:dimensions]) * torch.arange(1.0, 9).view(8, *[1] * dimensions)
    sizes, expected = rms(x.movedim(1, -1).flatten(0, -2)), torch.empty(layer.weight.shape)
    outputs, share = layer.out_channels // groups, 8 // groups
    for o in range(layer.out_channels):
        for i in range(share):  # output o reads channel i of its group
            channel = o // outputs * share + i
            at = (channel, o % outputs) if transposed else (o, i)
            expected[at] = layer.weight[at].detach().abs() * sizes[channel]
    close(heard(layer, x), "weight", expected)
    unbatched = heard(layer, x[0])
    close(unbatched, "weight", heard(layer, x[:1])._scores("weight"))


@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_weights_read_inputs_and_the_states_before(packed: bool) -> None:
    net, x = nn.GRU(3, 4, num_layers=2), torch.randn(6, 5, 3)  # steps come first
    lengths = torch.tensor([6, 5, 3, 3, 1]) if packed else torch.full((5,), 6)
    levels = [nn.GRU(3, 4), nn.GRU(4, 4)]
    for i, level in enumerate(levels):
        for name, p in level.named_parameters():
            p.data = net.get_parameter(name.replace("l0", f"l{i}")).data
    seen: dict[str, list[Tensor]] = {name: [] for name in ("ih_l0", "hh_l0", "ih_l1", "hh_l1")}
    for item in range(5):
        read = x[: lengths[item], item]
        for i, level in enumerate(levels):
            made, _ = level(read)
            seen[f"ih_l{i}"].append(read)
            seen[f"hh_l{i}"].append(torch.cat([torch.zeros(1, 4), made[:-1]]))
            read = made
    masker = heard(net, pack_padded_sequence(x, lengths) if packed else x)
    for name, rows in seen.items():
        close(masker, f"weight_{name}", net.get_parameter(f"weight_{name}").abs() * rms(torch.cat(rows)))


def test_the_size_of_a_token_is_the_root_of_its_frequency() -> None:
    net, tokens = nn.Embedding(6, 3), torch.tensor([[1, 1, 4], [1, 0, 4], [4, 5, 4], [1, 4, 4]])
    frequency = torch.tensor([1, 4, 0, 0, 6, 1]) / 12
    close(heard(net, tokens[:3], tokens[3:]), "weight", net.weight.abs() * frequency.sqrt()[:, None])
    never = heard(net, tokens, sparsity=0.3, distribution=Global())
    never.update(1.0)
    assert (~never.masks["weight"][[2, 3]]).sum() == 5  # what never comes goes first: round(0.3 * 18) of 6 entries


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("apart", [False, True])
def test_projections_of_attention_read_queries_keys_and_values(batch_first: bool, apart: bool) -> None:
    widths = {"kdim": 6, "vdim": 2} if apart else {}
    net = nn.MultiheadAttention(4, 2, batch_first=batch_first, **widths)
    q, k, v = torch.randn(3, 5, 4), torch.randn(3, 7, widths.get("kdim", 4)), torch.randn(3, 7, widths.get("vdim", 4))
    given = (q, k, v) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))
    masker = heard(net, given)
    sizes = [rms(x.flatten(0, 1)) for x in (q, k, v)]
    if apart:
        for name, size in zip("qkv", sizes, strict=True):
            close(masker, f"{name}_proj_weight", net.get_parameter(f"{name}_proj_weight").abs() * size)
    else:
        rows = torch.stack(sizes).repeat_interleave(4, 0)
        close(masker, "in_proj_weight", net.in_proj_weight.abs() * rows)
    # The output projection reads the heads: with an identity in its place, these are what comes out.
    plain = copy.deepcopy(net)
    plain.out_proj.weight.data, plain.out_proj.bias.data = torch.eye(4), torch.zeros(4)
    heads = plain(*given)[0].flatten(0, 1)
    close(masker, "out_proj.weight", net.out_proj.weight.abs() * rms(heads))
    assert type(net) is nn.MultiheadAttention


def test_a_tied_weight_reads_what_all_its_layers_read() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decode = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.decode.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.embed(x).tanh())

    net, tokens = Tied(), torch.randint(0, 6, (3, 5))
    token, hidden = tokens.flatten().bincount(minlength=6) / 15, rms(net.embed(tokens).tanh().flatten(0, 1))
    expected = net.embed.weight.abs() * (token[:, None] + hidden**2).sqrt()
    masker = heard(net, tokens)
    assert masker.masks.keys() == {"embed.weight"}
    close(masker, "embed.weight", expected)


def test_half_precision_is_summed_in_single() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), 100 + torch.randn(4000, 8)
    masker = Masker(net, 0.5, score=WeightWanda(), mask_last=True)
    masker.prepare()
    with torch.autocast("cpu", torch.bfloat16), masker.recording():
        net(x)
        hidden = net[0](x)
    masker.hear()
    assert hidden.dtype == torch.bfloat16
    close(masker, "0.weight", net[0].weight.abs() * rms(x))
    close(masker, "1.weight", net[1].weight.abs() * rms(hidden))


# --- screening ---


def labelled(shape: tuple[int, ...], classes: int = 3) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, classes, (shape[0],))
    shift = torch.linspace(0, 1, shape[1]).view(-1, *[1] * (len(shape) - 2))
    return torch.randn(shape) + y.view(-1, *[1] * (len(shape) - 1)) * shift, y


def test_connections_are_screened_as_by_scikit_learn() -> None:
    net, (x, y) = nn.Linear(6, 4), labelled((120, 6))
    f, _ = f_classif(x.numpy(), y.numpy())
    eta = np.sqrt(f * 2 / (f * 2 + 117))
    masker = heard(net, x[:50], x[50:], score=WeightScreening(), labels=[y[:50], y[50:]])
    close(masker, "weight", net.weight.detach().abs() * torch.tensor(eta * x.numpy().std(0)))
    moments, anova = Moments(6), Anova(3, 6)
    moments.update(x)
    anova.update(x, y)
    reading = Reading(moments, net.weight.detach().T, told={ByClass("anova"): anova})
    close(masker, "weight", Screening().connections(reading).T)


def test_a_convolution_is_screened_by_the_mean_of_an_item_and_the_spread_of_pixels() -> None:
    net, (x, y) = nn.Conv2d(6, 4, 3), labelled((90, 6, 4, 5))
    f, _ = f_classif(x.mean((2, 3)).numpy(), y.numpy())
    eta, std = np.sqrt(f * 2 / (f * 2 + 87)), x.transpose(0, 1).flatten(1).std(1, correction=0).numpy()
    masker = heard(net, x, score=WeightScreening(), labels=[y])
    close(masker, "weight", net.weight.detach().abs() * torch.tensor(eta * std)[:, None, None])


def test_tokens_are_screened_by_their_share_of_an_item() -> None:
    net, y = nn.Embedding(5, 3), torch.arange(60) % 2
    tokens = torch.randint(0, 4, (60, 7)).where((torch.rand(60, 7) < 0.6) | (y[:, None] == 0), 4)
    shares = F.one_hot(tokens, 5).double().mean(1)
    f, _ = f_classif(shares.numpy(), y.numpy())
    eta, frequency = np.sqrt(f / (f + 58)), shares.mean(0).numpy()
    masker = heard(net, tokens, score=WeightScreening(), labels=[y])
    size = torch.tensor(eta * np.sqrt(frequency * (1 - frequency)))
    close(masker, "weight", net.weight.detach().abs() * size[:, None])


def test_real_targets_are_screened_by_correlation() -> None:
    net, x = nn.Linear(6, 4), torch.randn(80, 6)
    y = x @ torch.randn(6, 2) + torch.randn(80, 2)
    r2 = np.mean([r_regression(x.numpy(), y[:, i].numpy()) ** 2 for i in range(2)], 0)
    masker = heard(net, x, score=WeightScreening(), labels=[y])
    close(masker, "weight", net.weight.detach().abs() * torch.tensor(np.sqrt(r2) * x.numpy().std(0)))


# --- in a masker ---


def digits() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 4)
    )
    return net, torch.randn(24, 4, 6) * torch.tensor([0.1, 10, 1, 3]).view(4, 1), torch.arange(24) % 4


SCORES = [WeightWanda(), WeightScreening()]


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("distribution", [Global(), ErdosRenyiKernel()], ids=str)
def test_the_least_scores_go_in_any_distribution(score: Any, distribution: Any) -> None:
    net, x, y = digits()
    masker = heard(net, x, score=score, labels=[y], distribution=distribution)
    scores = {name: masker._scores(name) for name in masker.masks}
    masker.update(1.0)
    assert masker.reached == 0.5
    for name, mask in masker.masks.items():
        assert scores[name][mask].min() >= scores[name][~mask].max()
    if distribution == Global():
        together = torch.cat([score.flatten() for score in scores.values()])
        threshold = together.kthvalue(len(together) // 2).values
        assert all(torch.equal(mask, scores[name] > threshold) for name, mask in masker.masks.items())


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_2_of_4_along_the_inputs_keeps_what_hears_most(score: Any) -> None:
    net, x, y = digits()
    masker = heard(net, x, score=score, labels=[y], sparsity=None, pattern=NM())
    scores = {name: masker._scores(name) for name in masker.masks}
    masker.update(1.0)
    for name, mask in masker.masks.items():
        kept = mask.view(len(mask), -1, 4, *mask.shape[2:])
        assert (kept.sum(2) == 2).all()
        of_groups = scores[name].view(kept.shape)
        assert torch.equal(kept, of_groups >= of_groups.topk(2, 2).values.amin(2, keepdim=True))


class Attends(nn.Module):
    """Attention, and what recurrent layers make."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 4, batch_first=True)
        self.rnn, self.last = nn.LSTM(8, 6, bidirectional=True, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(self.rnn(x)[0][:, -1])


NETWORKS = {
    "grouped": lambda: (digits()[0], torch.randn(8, 4, 6)),
    "depthwise and transposed": lambda: (Mixed(), images(0, 8)[0]),
    "attention and recurrent": lambda: (Attends(), torch.randint(0, 9, (8, 5))),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("score", SCORES, ids=str)
def test_what_was_heard_of_what_stays_stays(network: str, score: Any) -> None:
    """Entries are numbered, so that those that are left after a cut say which they were."""
    torch.manual_seed(0)
    net, x = NETWORKS[network]()
    groups, y = find_groups(net, x), torch.arange(8) % 3
    masker = heard(net, x, score=score, labels=[y])
    ratios = {name: masker._scores(name) / net.get_parameter(name).detach().abs() for name in masker.masks}
    for weight in masker.weights.values():
        weight.data = torch.arange(1.0, weight.numel() + 1).view(weight.shape)
    plan = Plan({group.name: torch.arange(group.size) % 4 != 1 for group in groups})
    remove_units(net, groups, plan)
    masker.follow(StructureChange(groups, plan))
    assert any(ratios[name].shape != weight.shape for name, weight in masker.weights.items())
    for name, weight in masker.weights.items():
        which = weight.detach().long() - 1
        torch.testing.assert_close(masker._scores(name), weight.detach() * ratios[name].flatten()[which])
    with masker.recording():
        net(x)
    masker.hear(y)
    masker.update(1.0)
    assert masker.reached == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("again", [True, False])
def test_patterns_of_cut_weights_are_chosen_by_what_was_heard(again: bool) -> None:
    """By magnitudes, where nothing was heard since the last update."""
    net, x, _ = digits()
    masker = heard(net, x, sparsity=None, pattern=NM(1, 2))
    masker.update(1.0)
    sizes = torch.ones(8)
    if again:
        with masker.recording():
            net(x)
        sizes = rms(net[:2](x).transpose(1, 2).flatten(0, 1)).float()
    groups = find_groups(net, x)
    plan = Plan({group.name: torch.arange(group.size) % 4 != 1 for group in groups})
    remove_units(net, groups, plan)
    masker.follow(StructureChange(groups, plan))
    mask, weight = masker.masks["2.weight"], net[2].weight.detach()
    assert weight.shape == (6, 3, 3)  # two groups of three channels each
    scores = weight.abs() * sizes[[0, 2, 3, 4, 6, 7]].view(2, 3).repeat_interleave(3, 0)[..., None]
    assert (mask[:, :2].sum(1) == 1).all()
    assert torch.equal(scores[:, :2].amax(1), (scores * mask)[:, :2].amax(1))
    assert mask[:, 2].all()  # the last group is short


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_what_was_heard_is_restored_to_the_bit(score: Any) -> None:
    net, x, y = digits()
    masker = heard(net, x[:10], score=score, labels=[y[:10]])
    other = Masker(net, 0.5, score=score, schedule=OneShot(0.0))
    other.load_state_dict(pickle.loads(pickle.dumps(masker.state_dict())))
    for one in (masker, other):
        with one.recording():
            net(x[10:])
        one.hear(y[10:])
    for name in masker.masks:
        assert torch.equal(masker._scores(name), other._scores(name))
    ours, theirs = (one.state_dict()["inputs"]["0.weight"][0] for one in (masker, other))
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_network_that_is_recorded_computes_the_same_and_keeps_no_hooks() -> None:
    net, x, _ = digits()
    masker = heard(net)
    expected = net(x)
    with masker.recording():
        assert torch.equal(net(x), expected)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_trials_of_others_are_not_heard() -> None:
    net, x, y = digits()
    masker = heard(net, score=WeightScreening())
    with masker.recording():
        net.eval()(x[:2])
        net.train()(x)
        with torch.no_grad():
            net(x[:2])
    masker.hear(y)
    expected = heard(net, x, score=WeightScreening(), labels=[y])
    assert all(torch.equal(masker._scores(name), expected._scores(name)) for name in masker.masks)


def test_what_is_never_used_is_named() -> None:
    net = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    net.forward = lambda x: net["used"](x)  # type: ignore[method-assign]
    masker = heard(net, torch.randn(3, 4))
    assert not masker.ready
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"got nothing to score \['unused\.weight'\] by: leave these layers out"):
        masker.update(1.0)
    assert same(net.state_dict(), before)
    heard(net, torch.randn(3, 4), skip=["unused"]).update(1.0)


def test_missing_labels_and_unseen_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected labels of the step that was recorded, got none"):
        heard(nn.Linear(4, 4), torch.randn(3, 4), score=WeightScreening())
    with pytest.raises(ValueError, match="Expected labels for each of the 3 items that arrive at a layer, got 2"):
        heard(nn.Linear(4, 4), torch.randn(3, 4), score=WeightScreening(), labels=[torch.zeros(2).long()])
    with pytest.raises(ValueError, match=r"got weight_hr_l0, which reads the cells of an LSTM: leave its layer out"):
        heard(nn.LSTM(4, 6, proj_size=3))
