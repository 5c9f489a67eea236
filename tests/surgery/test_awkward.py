"""Networks that break other tools: they are cut right, or left whole, and never crash."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import Magnitude, OneShot, Pruner, Taylor, Units, find_groups, remove_units
from lightning_slim.folding import fold_plan
from lightning_slim.recording import Recorder
from lightning_slim.surgery import Example, survey
from lightning_slim.surgery.example import workable
from lightning_slim.surgery.verify import vet
from lightning_slim.units import Plan
from tests.networks import same
from tests.surgery.test_compensate import depend
from tests.surgery.test_cut import Net, conv, some, zeroed


class Parameters(nn.Module):
    """A user's own layer: x @ weight."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Checked(nn.Module):
    """A bare assertion on a width."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8
        return x


class Norm2d(nn.LayerNorm):
    """A layer norm of the channels of images, as ConvNeXt has them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """Patches beside a token, laid out by a width that the network remembers, as in torchvision's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim = 8
        self.a, self.b = conv(3, 8), nn.Linear(8, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x)).reshape(len(x), self.hidden_dim, -1).transpose(1, 2)
        return self.b(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


def shuffled(x: Tensor, body: nn.Module) -> Tensor:
    """A block of ShuffleNet V2, as torchvision writes it."""
    left, right = x.chunk(2, 1)
    n, c, h, w = (x := torch.cat([left, body(right)], 1)).shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def merged(x: Tensor) -> Tensor:
    """Two by two neighbours of (batch, height, width, channels) side by side, as timm's Swin merges them."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 6, 6)


NETWORKS = {
    "a gate of one channel": lambda: (
        Net(lambda s, x: s.b((h := F.relu(s.a(x))) * torch.sigmoid(s.g(h))), a=conv(3, 8), g=conv(8, 1), b=conv(8, 2)),
        images(),
    ),
    "a mean over channels": lambda: (
        Net(lambda s, x: s.b((h := F.relu(s.a(x))) * s.g(h.mean(1, True))), a=conv(3, 8), g=conv(1, 8), b=conv(8, 2)),
        images(),
    ),
    "padded channels": lambda: (
        Net(lambda s, x: s.b(F.pad(F.relu(s.a(x)), (0, 0, 0, 0, 0, 4))), a=conv(3, 8), b=conv(12, 2)),
        images(),
    ),
    "pixel shuffle": lambda: (Net(lambda s, x: s.b(F.pixel_shuffle(s.a(x), 2)), a=conv(3, 16), b=conv(4, 2)), images()),
    "token mixing": lambda: (
        Net(
            lambda s, x: s.o((h := s.e(x)) + s.b(F.gelu(s.a(h.transpose(1, 2)))).transpose(1, 2)),
            e=nn.Linear(4, 10),
            a=nn.Linear(6, 12),
            b=nn.Linear(12, 6),
            o=nn.Linear(10, 3),
        ),
        torch.randn(2, 6, 4),
    ),
    "a layer of one's own": lambda: (
        Net(lambda s, x: s.b(F.relu(s.m(F.relu(s.a(x))))), a=nn.Linear(4, 8), m=Parameters(8, 6), b=nn.Linear(6, 2)),
        torch.randn(3, 4),
    ),
    "LayerNorm over channels and pixels": lambda: (
        Net(lambda s, x: s.b(s.n(F.relu(s.a(x)))), a=conv(3, 8), n=nn.LayerNorm((8, 6, 6)), b=conv(8, 2)),
        images(),
    ),
    "a norm over time": lambda: (
        Net(lambda s, x: s.b(s.n(F.relu(s.a(x)))), a=nn.Conv1d(3, 8, 1), n=nn.LayerNorm(9), b=nn.Conv1d(8, 2, 1)),
        torch.randn(2, 3, 9),
    ),
    "Bilinear": lambda: (
        Net(
            lambda s, x: s.b(s.m(s.a(x), s.c(x))),
            a=nn.Linear(4, 8),
            c=nn.Linear(4, 6),
            m=nn.Bilinear(8, 6, 5),
            b=nn.Linear(5, 2),
        ),
        torch.randn(3, 4),
    ),
    "top k": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(x)).topk(5, dim=1).values), a=nn.Linear(4, 8), b=nn.Linear(5, 2)),
        torch.randn(3, 4),
    ),
    "an embedding beside an input": lambda: (
        Net(
            lambda s, i, x: s.b(F.relu(s.a(torch.cat([s.e(i), x], 1)))),
            e=nn.Embedding(9, 6),
            a=nn.Linear(10, 8),
            b=nn.Linear(8, 2),
        ),
        (torch.randint(0, 9, (3,)), torch.randn(3, 4)),
    ),
    "dense connections to the input": lambda: (
        Net(lambda s, x: s.b(F.relu(torch.cat([x, F.relu(s.a(x))], 1))), a=conv(3, 8), b=conv(11, 2)),
        images(),
    ),
    "an assertion": lambda: (
        Net(lambda s, x: s.b(s.c(F.relu(s.a(x)))), a=conv(3, 8), c=Checked(), b=conv(8, 2)),
        images(),
    ),
    "transposed and flattened behind a norm": lambda: (
        Net(
            lambda s, x: s.b(F.relu(s.n(s.a(x))).transpose(1, 2).flatten(1)),
            a=nn.Conv1d(5, 8, 3, padding=1),
            n=nn.GroupNorm(1, 8),
            b=nn.Linear(48, 2),
        ),
        torch.randn(2, 5, 6),
    ),
    "shuffled behind a norm": lambda: (
        Net(
            lambda s, x: s.b(F.channel_shuffle(F.relu(s.n(s.a(x))), 2)),
            a=conv(3, 8),
            n=nn.GroupNorm(1, 8),
            b=conv(8, 2),
        ),
        images(),
    ),
    "shuffling blocks": lambda: (
        Net(
            lambda s, x: s.c(shuffled(shuffled(shuffled(F.relu(s.a(x)), s.b), s.d), s.e)),
            a=conv(3, 16),
            b=nn.Sequential(conv(8, 6), nn.ReLU(), conv(6, 8)),
            d=nn.Sequential(conv(8, 6), nn.ReLU(), conv(6, 8)),
            e=nn.Sequential(conv(8, 6), nn.ReLU(), conv(6, 8)),
            c=conv(16, 2),
        ),
        images(),
    ),
    "merged patches": lambda: (
        Net(
            lambda s, x: s.o(s.m(merged(F.relu(s.a(x)).permute(0, 2, 3, 1)))),
            a=conv(3, 8),
            m=nn.Linear(32, 6),
            o=nn.Linear(6, 2),
        ),
        images(),
    ),
    "a norm of images": lambda: (
        Net(lambda s, x: s.b(F.relu(s.n(s.a(x)))), a=conv(3, 8), n=Norm2d(8), b=conv(8, 2)),
        images(),
    ),
    "a width that the network remembers": lambda: (Patches(), images()),
    "maps made by a linear layer": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(x)).view(len(x), -1, 3, 3)), a=nn.Linear(4, 72), b=conv(8, 2)),
        torch.randn(3, 4),
    ),
    "linear layers on steps, flattened": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(x)).flatten(1)), a=nn.Linear(4, 8), b=nn.Linear(48, 2)),
        torch.randn(2, 6, 4),
    ),
    "spectral norm": lambda: (
        Net(
            lambda s, x: s.b(F.relu(s.a(x))),
            a=nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)),
            b=nn.Linear(8, 2),
        ),
        torch.randn(3, 4),
    ),
    "a branch in training only": lambda: (
        Net(
            lambda s, x: (s.b(h := F.relu(s.a(x))), s.aux(h)) if s.training else s.b(h := F.relu(s.a(x))),
            a=nn.Linear(4, 8),
            b=nn.Linear(8, 2),
            aux=nn.Linear(8, 2),
        ),
        torch.randn(3, 4),
    ),
    "the same tensor twice": lambda: (
        Net(lambda s, x: s.b(torch.cat([h := F.relu(s.a(x)), h], 1)), a=conv(3, 8), b=conv(16, 2)),
        images(),
    ),
    "a shared layer": lambda: (
        Net(lambda s, x: s.b(F.relu(s.a(F.relu(s.a(x))))), a=conv(8, 8), b=conv(8, 2)),
        images(8),
    ),
    "a filter pair for each channel": lambda: (
        Net(
            lambda s, x: s.d(F.relu(s.c(F.relu(s.b(F.relu(s.a(x))))))),
            a=conv(3, 8),
            b=conv(8, 16, groups=8),
            c=conv(16, 8),
            d=conv(8, 2),
        ),
        images(),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_cut_right_or_left_whole(name: str) -> None:
    network, x = NETWORKS[name]()
    inputs = x if isinstance(x, tuple) else (x,)
    before, attributes = copy.deepcopy(network.state_dict()), repr(network)
    found = survey(network, Example(inputs))
    unfit = vet(network, found.groups, {"": Example(inputs)})
    assert same(before, network.state_dict())
    assert attributes == repr(network)
    groups = [group for group in found.groups if group.name not in unfit]
    plan = some(groups)
    reference = zeroed(network, groups, plan).eval()
    remove_units(network, groups, plan)
    network.train()(*inputs)
    network.eval()
    if not any(
        words in name for words in ("a mean over", "behind a norm", "a norm of images", "LayerNorm over")
    ):  # its statistics are others
        torch.testing.assert_close(network(*inputs), reference(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("an embedding beside an input", {"e", "a"}),
        ("dense connections to the input", {"a"}),
        ("the same tensor twice", {"a"}),
        ("a filter pair for each channel", {"a", "c"}),
        ("a gate of one channel", {"a"}),
        ("transposed and flattened behind a norm", {"a"}),
        ("shuffled behind a norm", {"a"}),
        ("linear layers on steps, flattened", {"a"}),
        ("a branch in training only", {"a"}),
        ("spectral norm", set()),
        ("shuffling blocks", {"b.0", "d.0", "e.0"}),
        ("merged patches", {"a", "m"}),
        ("a norm of images", {"a"}),
        ("a width that the network remembers", {"a"}),
        ("maps made by a linear layer", {"a"}),
    ],
)
def test_what_can_be_cut_of_it(name: str, cut: set[str]) -> None:
    network, x = NETWORKS[name]()
    inputs = x if isinstance(x, tuple) else (x,)
    groups = find_groups(network, inputs)
    unfit = vet(network, groups, {"": Example(inputs)})
    assert {group.name for group in groups if group.name not in unfit} == cut


def test_readers_that_share_one_weight_are_folded_once() -> None:

    network = Net(
        lambda s, x: s.b(h := F.relu(s.a(x))) + s.c(h), a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=nn.Linear(6, 3)
    )
    network.c.weight = network.b.weight
    depend(network.a.weight, network.a.bias)
    x = torch.randn(200, 4)
    before = network(x)
    pruner = Pruner(network, Magnitude(), Units(5 / 6), OneShot(0.5), verify=False)
    pruner.prepare(x)
    with pruner.recording():
        network(x)
    plan = {"a": torch.tensor([True, True, False, True, True, True])}
    list(fold_plan([network], pruner.groups, Plan(plan), pruner.recorder.moments, "least_squares"))
    remove_units(network, pruner.groups, plan)
    assert network.c.weight is network.b.weight
    torch.testing.assert_close(network(x), before, rtol=1e-2, atol=2e-2)


def test_moments_are_not_computed_in_half_precision() -> None:
    network, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(400, 4)
    exact, half = (Recorder(network, find_groups(network, x)) for _ in range(2))
    with exact.recording():
        network(x)
    with torch.autocast("cpu", torch.bfloat16), half.recording():
        network[1](network[0](x).float())
    hidden = exact.moments["0"][0].covariance
    with torch.autocast("cpu", torch.bfloat16):
        product = half.moments["0"][0].covariance
    reference = torch.cov(network[0](x.bfloat16().float()).T, correction=0).double()
    assert (product - reference).abs().max() < 2e-2 * hidden.abs().max()
    assert half.moments["0"][0].second.dtype == torch.float64


@pytest.mark.parametrize(
    ("network", "call"),
    [
        (nn.TransformerEncoderLayer(8, 2, 16), Example((torch.randn(6, 3, 8), torch.zeros(6, 6)))),
        (nn.Conv2d(5, 2, 3), Example((torch.randn(5, 6, 6),))),
    ],
)
def test_an_example_is_cut_down_only_where_the_network_takes_it_so(network: nn.Module, call: Example) -> None:
    kept = workable(network, call)
    assert [a.shape for a in kept.args] == [a.shape for a in call.args]
    assert kept.samples == 1


def test_an_example_of_a_batch_is_cut_down_to_two_samples_of_the_networks_type() -> None:
    call = workable(nn.Linear(3, 2), Example((torch.randn(7, 3).bfloat16(),)))
    assert call.args[0].shape == (2, 3)
    assert call.args[0].dtype == torch.float32
    assert call.samples == 2


def test_taylor_leaves_what_is_frozen() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    network[0].requires_grad_(False)
    pruner = Pruner(network, Taylor(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(torch.randn(2, 4))
    assert set(pruner.widths) == {"2"}
    assert "frozen" in pruner.left_whole["0"]


def test_series_of_one_step_have_no_past_and_short_ones_are_passed_over() -> None:
    network = Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    recorder = Recorder(network, find_groups(network, torch.randn(2, 1, 4)), lags=1)
    with recorder.recording():
        network(torch.randn(5, 1, 4))
    assert len(recorder.moments["a"][0].total) == 8
    other = Recorder(network, find_groups(network, torch.randn(2, 3, 4)), lags=2)
    with other.recording():
        network(torch.randn(5, 7, 4))
        network(torch.randn(5, 2, 4))
    assert other.moments["a"][0].count == 5 * 5


def test_a_gate_of_one_channel_is_not_coupled_to_the_channels_that_it_scales() -> None:
    """It meets all of them: what is removed of them leaves the gate alone, and the gate itself cannot go."""
    network = Net(
        lambda s, x: (lambda h: s.o((s.g(h).softmax(1).transpose(1, 2) @ h).squeeze(1)))(F.relu(s.a(x))),
        a=nn.Linear(5, 8),
        g=nn.Linear(8, 1),
        o=nn.Linear(8, 3),
    )
    x = torch.randn(2, 6, 5)
    found = survey(network, x)
    assert [(group.name, group.size) for group in found.groups] == [("a", 8)]
    assert {span.tensor for span in found.groups[0].spans} == {"a.weight", "a.bias", "g.weight", "o.weight"}
    assert found.left_whole["g"] == "it has 1 units, and 2 must stay"
    assert vet(network, found.groups, {"": Example((x,))}) == {}
