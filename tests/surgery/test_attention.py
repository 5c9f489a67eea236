"""Whole heads, however attention is written: cut, they equal the network whose output projection does not read them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim import Granger, Magnitude, OneShot, Pruner, Units, find_groups, remove_units
from lightning_slim.surgery import Example, find_work, resize_to, restore
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.layers.multihead import SlimMultiheadAttention, module_by_module
from lightning_slim.surgery.verify import pack_up, vet
from lightning_slim.units import Plan
from tests.surgery.test_cut import Net, zeroed

WIDTH, HEADS = 24, 6


def split(x: Tensor, heads: int) -> Tensor:
    """batch, steps, channels -> batch, heads, steps, width"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Separate(nn.Module):
    """Linear layers of their own; the width of a head is kept, the number of heads follows from the weights."""

    def __init__(self, kv_heads: int = HEADS, output: bool = True) -> None:
        super().__init__()
        self.head_dim, self.shared = WIDTH // HEADS, HEADS // kv_heads
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, kv_heads * self.head_dim) for _ in range(2))
        self.o_proj = nn.Linear(WIDTH, WIDTH) if output else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        q, k, v = (split(y, y.shape[-1] // self.head_dim) for y in (q, k, v))
        k, v = k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)
        h = merge(F.scaled_dot_product_attention(q, k, v))
        return h if self.o_proj is None else self.o_proj(h)


class Fused(nn.Module):
    """One linear layer for all three, heads counted by an attribute, a bias of positions for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, WIDTH // HEADS, WIDTH
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.position_bias = nn.Parameter(torch.randn(HEADS, 5, 5))
        self.register_buffer("scale", torch.rand(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        qkv = self.project(self.qkv, x).reshape(n, t, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (self.scale * (q @ k.transpose(-1, -2)) + self.position_bias).softmax(-1)
        return self.project(self.proj, (weights @ v).transpose(1, 2).reshape(n, t, self.attn_dim))

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x)


class Interleaved(nn.Module):
    """(heads, 3, width) instead of (3, heads, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.head_size, self.num_attention_heads = WIDTH // HEADS, HEADS
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.query_key_value(x).unflatten(-1, (self.num_attention_heads, 3 * self.head_size)).transpose(1, 2)
        return self.dense(merge(F.scaled_dot_product_attention(*h.chunk(3, -1))))


class Pictures(nn.Module):
    """Attention over pixels: the projections are convolutions, the output one stands in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim_head = HEADS, WIDTH // HEADS
        self.to_qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for y in self.to_qkv(x).chunk(3, 1))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))


class Counted(nn.Module):
    """As it is often written: the heads are taken to be as wide together as the input."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.n_embd = HEADS, WIDTH
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (y.view(n, t, self.n_head, c // self.n_head).transpose(1, 2) for y in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(h.transpose(1, 2).contiguous().view(n, t, c))


class Uncalled(Fused):
    """The same, by the weights of its layers without calling these, as torchvision's Swin does."""

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)


def around(attention: nn.Module) -> nn.Module:
    """A linear layer before and one behind, so that the width of the attention can be cut as well."""
    return Net(
        lambda s, x: s.o(F.relu(s.attention(s.i(x)))), i=nn.Linear(7, WIDTH), attention=attention, o=nn.Linear(WIDTH, 3)
    )


def crossed(attention: nn.Module) -> nn.Module:
    """Queries of one sequence, keys and values of another."""
    return Net(
        lambda s, x, y: s.o(F.relu(s.attention(s.i(x), s.m(y)))),
        **{"i": nn.Linear(7, WIDTH), "m": nn.Linear(7, WIDTH), "attention": attention, "o": nn.Linear(WIDTH, 3)},
    )


def torchs(**options: bool) -> nn.Module:
    """torch's own attention as self-attention."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})
    return Net(
        lambda s, x: s.o(F.relu(s.attention(h := s.i(x), h, h)[0])),
        **{"i": nn.Linear(7, WIDTH), "attention": attention, "o": nn.Linear(WIDTH, 3)},
    )


def steps() -> tuple[Tensor]:
    return (torch.randn(4, 5, 7),)


NETWORKS = {
    "separate": lambda: (around(Separate()), steps(), "attention.heads", HEADS),
    "grouped queries": lambda: (around(Separate(kv_heads=3)), steps(), "attention.heads", 3),
    "output projection elsewhere": lambda: (around(Separate(output=False)), steps(), "attention", HEADS),
    "grouped, output elsewhere": lambda: (around(Separate(3, output=False)), steps(), "attention", 3),
    "fused, with biases a head": lambda: (around(Fused()), steps(), "attention.heads", HEADS),
    "fused, by weights alone": lambda: (around(Uncalled()), steps(), "attention.heads", HEADS),
    "interleaved": lambda: (around(Interleaved()), steps(), "attention.heads", HEADS),
    "counted": lambda: (around(Counted()), steps(), "attention.heads", HEADS),
    "cross-attention": lambda: (crossed(Separate()), (*steps(), torch.randn(4, 6, 7)), "attention.heads", HEADS),
    "convolutions": lambda: (
        Net(
            lambda s, x: s.o(F.relu(s.attention(s.i(x)))),
            i=nn.Conv2d(3, WIDTH, 1),
            attention=Pictures(),
            o=nn.Conv2d(WIDTH, 2, 3),
        ),
        (torch.randn(2, 3, 4, 4),),
        "attention.heads",
        HEADS,
    ),
    "torch's": lambda: (torchs(), steps(), "attention.heads", HEADS),
    "torch's, steps first": lambda: (torchs(batch_first=False), steps(), "attention.heads", HEADS),
    "torch's, no bias": lambda: (torchs(bias=False), steps(), "attention.heads", HEADS),
    "torch's, learned keys": lambda: (torchs(add_bias_kv=True), steps(), "attention.heads", HEADS),
    "torch's, a zero key": lambda: (torchs(add_zero_attn=True), steps(), "attention.heads", HEADS),
}


def plan_of(network: nn.Module, inputs: tuple[Tensor, ...]) -> Plan:
    """Every other unit of what is left after the trial; the groups of a pack alike."""
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(Example(inputs))
    return pruner.plan(0.5)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_cut_heads_are_heads_that_are_not_read(name: str) -> None:
    torch.manual_seed(0)
    network, inputs, heads, count = NETWORKS[name]()
    network.double().eval()
    inputs = tuple(x.double() for x in inputs)
    groups = find_groups(network, Example(inputs))
    assert {group.name: group.size for group in groups}[heads] == count
    plan = plan_of(network, inputs)
    assert plan.keys() == {group.name for group in groups}  # nothing is left whole
    zero, cut = zeroed(network, groups, plan), copy.deepcopy(network)
    cuts = remove_units(cut, groups, plan)
    torch.testing.assert_close(cut(*inputs), zero(*inputs), rtol=0, atol=1e-10)
    before = [t.clone() for t in network.state_dict().values()]
    restore(cut, cuts)
    assert all(map(torch.equal, before, cut.state_dict().values()))
    assert torch.equal(cut(*inputs), network(*inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_slim_attention_trains_loads_and_grows_back(name: str) -> None:
    torch.manual_seed(0)
    network, inputs, _, _ = NETWORKS[name]()
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    fresh, dense = copy.deepcopy(network), copy.deepcopy(network).eval()
    groups = find_groups(network, Example(inputs))
    plan = plan_of(network, inputs)
    remove_units(network, groups, plan)
    network.train()(*inputs).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    resize_to(fresh, {key: tensor.shape for key, tensor in network.state_dict().items()})
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(*inputs), network.eval()(*inputs))
    resize_to(fresh, shapes)
    fresh.load_state_dict(dense.state_dict())
    assert torch.equal(fresh(*inputs), dense(*inputs))
    assert torch.equal(copy.deepcopy(network)(*inputs), network(*inputs))


def test_grouped_queries_by_hand() -> None:
    """Without the second of three heads of keys, two heads of queries are gone."""
    attention, x = Separate(kv_heads=3).double(), torch.randn(2, 5, WIDTH).double()
    network = Net(lambda s, x: s.o(s.attention(x)), attention=attention, o=nn.Linear(WIDTH, 3).double())
    q, k, v = (layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k, v = split(q, 6)[:, [0, 1, 4, 5]], split(k, 3)[:, [0, 0, 2, 2]], split(v, 3)[:, [0, 0, 2, 2]]
    rest = [*range(8), *range(16, 24)]
    heads = merge(F.scaled_dot_product_attention(q, k, v))
    expected = network.o(F.linear(heads, attention.o_proj.weight[:, rest], attention.o_proj.bias))
    groups = find_groups(network, torch.randn(2, 5, WIDTH).double())
    remove_units(network, groups, Plan({"attention.heads": torch.tensor([True, False, True])}))
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-12)


ARGUMENTS = {
    "self-attention": {},
    "steps": {"attn_mask": torch.randn(5, 6)},
    "booleans": {"attn_mask": torch.arange(6).expand(5, 6) > 3},
    "heads": {"attn_mask": torch.randn(4 * HEADS, 5, 6)},
    "padding": {"key_padding_mask": torch.arange(6).expand(4, 6) > torch.arange(2, 6)[:, None]},
    "both": {
        "attn_mask": torch.arange(6).expand(5, 6) == 3,
        "key_padding_mask": torch.arange(6).expand(4, 6) > torch.arange(2, 6)[:, None],
    },
    "added padding": {"key_padding_mask": torch.randn(4, 6)},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("name", ARGUMENTS)
@torch.no_grad()
def test_the_slim_class_computes_what_torchs_does(name: str, options: dict[str, bool], need_weights: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).eval()
    theirs.in_proj_weight.mul_(3)
    ours = copy.deepcopy(theirs)
    ours.__class__ = SlimMultiheadAttention
    x, y = torch.randn(4, 5, WIDTH), torch.randn(4, 6, WIDTH)
    arguments = {**ARGUMENTS[name], "need_weights": need_weights}
    (a, weights_a), (b, weights_b) = theirs(x, y, y, **arguments), ours(x, y, y, **arguments)
    torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(weights_b, weights_a, rtol=0, atol=1e-5)
    else:
        assert weights_a is weights_b is None


@pytest.mark.parametrize("average", [True, False])
@torch.no_grad()
def test_the_slim_class_takes_single_sequences_and_steps_first(average: bool) -> None:
    for batch_first in (True, False):
        theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).eval()
        ours = copy.deepcopy(theirs)
        ours.__class__ = SlimMultiheadAttention
        for shape in ((5, WIDTH), (4, 5, WIDTH)):
            x = torch.randn(shape)
            a, b = (each(x, x, x, average_attn_weights=average) for each in (theirs, ours))
            assert [y.shape for y in a] == [y.shape for y in b]
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


def test_a_mask_for_every_head_of_before_is_refused() -> None:
    network, inputs, _, _ = NETWORKS["torch's"]()
    groups = find_groups(network, Example(inputs))
    remove_units(network, groups, Plan({"attention.heads": torch.tensor([True, True, False] * 2)}))
    x = torch.randn(4, 5, WIDTH)
    with pytest.raises(ValueError, match="4 samples times 4 heads, got 24"):
        network.attention(x, x, x, attn_mask=torch.zeros(24, 5, 5))


@torch.no_grad()
def test_cut_encoder_layers_take_padded_batches() -> None:
    """In eval mode torch takes whole encoder layers, and batches with padding, through kernels of its own."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    encoder = nn.Sequential(nn.Linear(7, WIDTH), nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 3))
    groups = find_groups(encoder, torch.randn(2, 5, 7))
    assert encoder[1].use_nested_tensor
    plan = Plan({group.name: torch.arange(group.size) % 3 < 2 for group in groups if "layers.1" in group.name})
    remove_units(encoder, groups, plan)
    assert [type(layer.self_attn) for layer in encoder[1].layers] == [nn.MultiheadAttention, SlimMultiheadAttention]
    x, padding = torch.randn(3, 5, WIDTH), torch.arange(5).expand(3, 5) > torch.arange(2, 5)[:, None]
    out = encoder[1].eval()(x, src_key_padding_mask=padding)
    expected = encoder[1].train()
    for module in expected.modules():
        module.dropout = 0.0 if isinstance(module, nn.MultiheadAttention) else getattr(module, "dropout", None)
    for module in expected.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(out[~padding], expected(x, src_key_padding_mask=padding)[~padding], rtol=0, atol=1e-5)


def test_a_decoder_shares_the_width_of_both_sequences() -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True)
    network = Net(
        lambda s, x, y: s.o(s.decoder(s.i(x), s.m(y))),
        **{"i": nn.Linear(7, WIDTH), "m": nn.Linear(7, WIDTH), "o": nn.Linear(WIDTH, 3)},
        decoder=nn.TransformerDecoder(layer, 2),
    )
    inputs = Example((torch.randn(2, 5, 7), torch.randn(2, 6, 7)))
    groups = find_groups(network, inputs)
    assert vet(network, groups, {"": inputs}) == {}
    sizes = {group.name: group.size for group in groups}
    assert sizes["i"] == WIDTH
    assert sizes["decoder.layers.1.multihead_attn.heads"] == HEADS


def test_heads_that_fill_the_width_shrink_with_it() -> None:
    network, inputs, _, _ = NETWORKS["counted"]()
    groups, calls = find_groups(network, Example(inputs)), {"": Example(inputs)}
    unfit = vet(network, groups, calls)
    assert unfit.keys() == {"attention.heads", "i"}
    assert pack_up(network, groups, unfit, calls) == {"attention.heads": "i", "i": "i"}
    plan = plan_of(network, inputs)
    assert {name: int(keep.sum()) for name, keep in plan.items()} == {
        "attention.heads": 3,
        "i": 12,
        "attention.c_proj": 12,
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_foretold(name: str) -> None:
    network, inputs, _, _ = NETWORKS[name]()
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(Example(inputs))
    event = pruner.step(0.5)
    assert event is not None
    work = find_work(network, pruner.calls)
    assert event.macs == pytest.approx(sum(each.macs for each in work), rel=0.01)


LAST = {
    "separate": lambda: (Net(lambda s, x: s.attention(x), attention=Separate()), "attention.heads"),
    "grouped queries": lambda: (Net(lambda s, x: s.attention(x), attention=Separate(3)), "attention.heads"),
    "output projection elsewhere": lambda: (
        Net(lambda s, x: s.o(s.attention(x)), attention=Separate(output=False), o=nn.Linear(WIDTH, 3)),
        "attention",
    ),
    "torch's": lambda: (
        Net(lambda s, x: s.attention(x, x, x)[0], attention=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)),
        "attention.heads",
    ),
}


@pytest.mark.parametrize("name", LAST)
def test_heads_that_say_the_same_fold_into_one(name: str) -> None:
    """The last head is a copy of the first: Granger lets one of them go first, and the fold loses nothing."""
    torch.manual_seed(0)
    network, group = LAST[name]()
    network.double()
    x = torch.randn(64, 5, WIDTH).double()
    (found,) = find_groups(network, x)
    tensors = dict(network.named_parameters())
    with torch.no_grad():
        for span in (span for span in found.spans if span.role == "out"):
            rows = tensors[span.tensor].movedim(span.axis, 0)
            rows[span.index[-1]] = rows[span.index[0]].clone()
    pruner = Pruner(network, Granger(0), Units((found.size - 1) / found.size), OneShot(0.5))
    pruner.prepare(x)
    with pruner.recording():
        before = network(x).detach()
    plan = pruner.plan(0.5)[group]
    assert int(plan[[0, -1]].sum()) == 1
    pruner.step(0.5)
    torch.testing.assert_close(network(x), before, rtol=0, atol=1e-2 * float(before.abs().max()))


def test_recording_changes_nothing_that_stays() -> None:
    network = NETWORKS["torch's"]()[0]
    with module_by_module(network):
        assert type(network.attention) is SlimMultiheadAttention
    assert type(network.attention) is nn.MultiheadAttention


class Memory(nn.Module):
    """It has queries, keys and values, but nothing says how wide a head is."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


def test_what_does_not_count_its_heads_is_no_attention() -> None:
    assert layer_kind(Memory()) is None
