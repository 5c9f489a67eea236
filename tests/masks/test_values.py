"""Numbers worked out by hand, and by the formulas of papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_slim.masks import (
    NM,
    Block,
    ErdosRenyiKernel,
    Global,
    Layer,
    WeightLamp,
    WeightMovement,
    WeightSaliency,
    find_last,
    find_weights,
    stacked,
    unstacked,
)


def test_erdos_renyi_kernel_by_hand() -> None:
    """Two layers that both have room: densities are e (3 + 8 + 3 + 3) / 216 and e (16 + 10) / 160, 376 entries."""
    layers = {"conv": Layer((8, 3, 3, 3), torch.rand(216)), "fc": Layer((10, 16), torch.rand(160))}
    # e (17 + 26) = 0.2 * 376 = 75.2, rounded to 75: e = 75 / 43, so 29.65 and 45.35 entries stay.
    assert ErdosRenyiKernel(0.0)(layers, 0.8) == {"conv": 216 - 30, "fc": 160 - 45}


def test_erdos_renyi_kernel_keeps_small_layers_dense() -> None:
    """As in the authors' code: what would be denser than 1 is 1, and e is computed anew for the rest."""
    layers = {
        "small": Layer((4, 4), torch.rand(16)),
        "middle": Layer((20, 20), torch.rand(400)),
        "large": Layer((100, 50), torch.rand(5000)),
    }
    # 0.1 * 5416 = 541.6 -> 542 stay; e = 542 / (8 + 40 + 150) = 2.74 > 2 = 16 / 8, so the small one is dense; then
    # e = (542 - 16) / 190 = 2.768: 110.7 and 415.3.
    removed = ErdosRenyiKernel(0.0)(layers, 0.9)
    assert removed == {"small": 0, "middle": 400 - 111, "large": 5000 - 415}


def test_a_global_threshold_by_hand() -> None:
    layers = {"a": Layer((2, 3), torch.tensor([9.0, 8, 1, 7, 2, 6])), "b": Layer((1, 4), torch.tensor([3.0, 0, 5, 4]))}
    assert Global(0.0)(layers, 0.5) == {"a": 2, "b": 3}  # 0, 1, 2, 3 and 4 go
    assert Global(0.5)(layers, 0.5) == {"a": 3, "b": 2}  # 5 and 4 are protected: 6 goes instead of 4


def test_blocks_by_hand() -> None:
    scores = torch.arange(16.0).view(1, 4, 4)
    assert Block(2, 2).pool(scores).tolist() == [10, 18, 42, 50]
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert Block(2, 2).choose(scores, 3)[0].int().tolist() == expected


def test_tiles_of_outputs_are_dense_products_of_inputs_of_their_own() -> None:
    """Tile-wise sparsity: of the outputs of a tile, each reads the same inputs, and other tiles read others."""
    weight, x = torch.randn(12, 10, dtype=torch.double), torch.randn(10, dtype=torch.double)
    mask = Block(4, 1).choose(stacked(weight.abs()), 18)[0]
    tiles, made = [], []
    for first in range(0, 12, 4):
        reads = mask[first]
        tiles.append(reads.tolist())
        made.append(weight[first : first + 4, reads] @ x[reads])
    torch.testing.assert_close(torch.cat(made), (weight * mask) @ x)
    assert len({tuple(reads) for reads in tiles}) == 3
    assert sum(map(sum, tiles)) == 30 - 18


def test_n_of_m_lies_along_the_inputs_of_a_convolution() -> None:
    conv = nn.Conv2d(8, 6, 3)
    mask = unstacked(NM().choose(stacked(conv.weight.detach().abs()), 216), (6, 8, 3, 3))
    assert (mask.view(6, 2, 4, 3, 3).sum(2) == 2).all()
    kept = conv.weight.abs().view(6, 2, 4, 3, 3).topk(2, 2).values
    assert torch.equal((conv.weight.abs() * mask).view(6, 2, 4, 3, 3).topk(2, 2).values, kept)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_transposed_convolution_is_seen_output_by_output(groups: int) -> None:
    """Row o, column i of a tap is what output o makes of the i-th input of its group, as in the matrix of the layer."""
    layer = nn.ConvTranspose1d(8, 24, 3, groups=groups, bias=False).double()
    stack = stacked(layer.weight.detach(), groups)
    assert stack.shape == (3, 24, 8 // groups)
    for channel in range(8):
        made = layer(F.one_hot(torch.tensor(channel), 8).double()[:, None])  # one step of one channel: (outputs, taps)
        group, column = divmod(channel, 8 // groups)
        rows = torch.arange(24) // (24 // groups) == group
        assert torch.equal(made[rows].detach(), stack[:, rows, column].T)
        assert (made[~rows] == 0).all()
    assert torch.equal(unstacked(stack, tuple(layer.weight.shape), groups), layer.weight)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5), (4, 3, 5, 2), (4, 3, 2, 2, 2)])
def test_stacks_are_undone(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(unstacked(stacked(weight), shape), weight)
    assert stacked(weight).shape[1:] == shape[:2]


def test_saliency_is_what_the_loss_changes_by_to_first_order() -> None:
    weight = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.double)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (x @ w.T).sin().sum()

    (gradient,) = torch.autograd.grad(loss(weight), weight)
    step = 1e-6
    for i in range(12):
        smaller = weight.detach().clone()
        smaller.view(-1)[i] *= 1 - step
        change = abs(float((loss(weight) - loss(smaller)).detach())) / step
        assert float(WeightSaliency()(weight.detach(), gradient).view(-1)[i]) == pytest.approx(change, rel=1e-4)


def test_lamp_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0], [2.0, 1.0, 4.0]])  # squares 0, 1, 1, 4, 9, 16: sums 31, 31, 30, 29, 25, 16
    expected = torch.tensor([[1 / 31, 9 / 25, 0.0], [4 / 29, 1 / 31, 1.0]])
    torch.testing.assert_close(WeightLamp()(weight, weight).float(), expected)
    conv = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    torch.testing.assert_close(WeightLamp()(conv, conv), WeightLamp()(conv.contiguous(), conv))


def test_lamp_under_one_threshold_shares_out_as_in_the_paper() -> None:
    """The authors' way: sort, divide by what is left, one threshold; then the smallest of each layer go."""
    weights = {"a": torch.randn(20, 10), "b": 3 * torch.randn(30, 20), "c": torch.randn(5, 5)}
    pooled = []
    for name, weight in weights.items():
        ascending = weight.flatten().abs().sort().values
        pooled += [(float(ascending[i] ** 2 / (ascending[i:] ** 2).sum()), name) for i in range(len(ascending))]
    expected = dict.fromkeys(weights, 0)
    for _, name in sorted(pooled)[:660]:
        expected[name] += 1
    layers = {n: Layer(tuple(w.shape), WeightLamp()(w, w).flatten().float()) for n, w in weights.items()}
    assert Global(0.0)(layers, 0.8) == expected
    by_magnitude = {n: Layer(tuple(w.shape), w.abs().flatten()) for n, w in weights.items()}
    assert Global(0.0)(by_magnitude, 0.8) != expected


def test_movement_is_what_a_score_learns_by_descent() -> None:
    """Sanh et al.: scores beside weights, as gates, train with the same rate; the mask's derivative counts as 1."""
    weight, scores = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    moved = torch.zeros(3, 4)
    for step in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        gates = torch.ones(3, 4) + scores - scores.detach()  # straight through
        by_weight, by_scores = torch.autograd.grad((x @ (weight * gates).T).tanh().sum(), [weight, scores])
        moved += WeightMovement()(weight.detach(), by_weight)
        with torch.no_grad():
            weight -= 0.1 * by_weight
            scores -= 0.1 * by_scores
    torch.testing.assert_close(0.1 * moved, scores.detach())
    assert (moved < 0).any()


class Net(nn.Module):
    """Every kind of layer there is, two heads, a tie and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.norm, self.conv = nn.LayerNorm(24), nn.Conv1d(24, 8, 3)
        self.frozen, self.fc = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)
        self.words, self.classes = nn.Linear(8, 20), nn.Linear(8, 3)
        self.words.weight = self.embed.weight

    def forward(self, x: torch.Tensor, tied: bool = False) -> torch.Tensor:
        x = self.conv(self.norm(self.rnn(self.embed(x))[0]).transpose(1, 2)).transpose(1, 2)
        x = F.relu(self.fc(self.frozen(x)))
        return self.words(x) if tied else self.classes(x)


def test_weights_are_found_without_biases_and_norms() -> None:
    net = Net()
    rnn = [f"rnn.weight_{a}_l{i}{d}" for i in (0, 1) for d in ("", "_reverse") for a in ("ih", "hh")]
    assert [*find_weights(net)] == ["embed.weight", *rnn, "conv.weight", "fc.weight", "classes.weight"]
    assert [*find_weights(net, skip=["Embedding", "rnn", "cl*"])] == ["conv.weight", "fc.weight"]
    assert [*find_weights(net, module="fc")] == ["fc.weight"]


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_last_layers_are_found_in_the_graph(penalty: float) -> None:
    net, words = Net(), torch.randint(0, 20, (4, 6))
    weights = find_weights(net)
    loss = net(words).square().mean() + penalty * sum(p.square().sum() for p in weights.values())
    assert find_last(loss, weights) == {"classes.weight"}
    assert find_last(loss + net(words, tied=True).mean(), weights) == {"classes.weight", "embed.weight"}


def test_a_recurrent_layer_may_be_last() -> None:
    net = nn.GRU(3, 4)
    weights = find_weights(net)
    assert find_last(net(torch.randn(5, 2, 3))[0].sum(), weights) == weights.keys()


class Attends(nn.Module):
    """Attention of fused projections, one of separate ones, a transposed convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.MultiheadAttention(8, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4)
        self.up, self.head = nn.ConvTranspose1d(8, 6, 2, 2), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        x = x + self.fused(x, x, x, need_weights=False)[0]
        x = x + self.apart(x, key, value)[0]
        return self.head(self.up(x.transpose(1, 2)).transpose(1, 2))


def test_projections_of_attention_and_transposed_convolutions_are_found() -> None:
    net = Attends()
    weights = find_weights(net)
    of_fused = ["fused.in_proj_weight", "fused.out_proj.weight"]
    of_apart = [*(f"apart.{x}_proj_weight" for x in "qkv"), "apart.out_proj.weight"]
    assert [*weights] == [*of_fused, *of_apart, "up.weight", "head.weight"]
    x, key, value = torch.randn(2, 5, 8), torch.randn(2, 7, 6), torch.randn(2, 7, 4)
    assert find_last(net(x, key, value).mean(), weights) == {"head.weight"}
    attended = net.fused(x, x, x)[0].mean()
    assert find_last(attended, weights) == {"fused.out_proj.weight"}
    assert find_last(net.up(x.mT).mean(), weights) == {"up.weight"}


def test_last_layers_are_found_under_autocast() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(torch.randn(2, 3, 5)).float().mean()
    assert find_last(loss, find_weights(net)) == {"4.weight"}
