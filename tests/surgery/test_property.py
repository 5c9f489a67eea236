"""Random architectures hold the same laws as those written by hand."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves

from lightning_slim import migrate, remove_units
from lightning_slim.surgery import Example, resize_to, survey
from lightning_slim.surgery.verify import vet
from lightning_slim.units import Plan
from tests.networks import same
from tests.surgery.random_networks import Program
from tests.surgery.test_cut import zeroed

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "25"))  # `make test-all` asks for more

PROGRAMS = 5 * EXAMPLES if "PROPERTY_EXAMPLES" in os.environ else EXAMPLES

BLOCKS = (
    "plain", "residual", "bottleneck", "concat", "split", "grouped", "depthwise", "squeeze", "pool", "gate", "up",
    "attention", "fused attention",
)  # fmt: skip


class FusedAttention(nn.Module):
    """One layer for queries, keys and values, and one behind the heads."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


class Block(nn.Module):
    """One block on images; `out` is its number of channels."""

    def __init__(self, kind: str, width: int, new: int, norm: bool) -> None:
        super().__init__()
        self.kind, self.out = kind, width

        def conv(a: int, b: int, k: int = 3, **kwargs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(a, b, k, padding=k // 2, **kwargs), nn.BatchNorm2d(b) if norm else nn.Identity()
            )

        if kind in ("plain", "concat", "pool", "split", "up"):
            self.a = nn.ConvTranspose2d(width, new, 2, 2) if kind == "up" else conv(width, new)
            self.out = {"concat": width + new, "split": new // 2}.get(kind, new)
        if kind in ("residual", "bottleneck"):
            self.a, self.b = conv(width, new, 1 if kind == "bottleneck" else 3), conv(new, width)
        if kind == "grouped":
            self.a, self.b = conv(width, 8), conv(8, new - new % 4, groups=4)
            self.out = new - new % 4
        if kind == "depthwise":
            self.a, self.b = conv(width, width, groups=width), conv(width, new, 1)
            self.out = new
        if kind == "squeeze":
            self.a, self.b = conv(width, new, 1), conv(new, width, 1)
        if kind == "gate":
            self.a, self.b = conv(width, new), conv(width, new)
            self.out = new
        if kind == "attention":
            self.a, self.b = nn.Linear(width, 2 * new), nn.Linear(2 * new, width)
            self.heads = nn.MultiheadAttention(2 * new, 4, batch_first=True)
        if kind == "fused attention":
            self.a = FusedAttention(width, new, 3)

    def forward(self, x: Tensor) -> Tensor:
        if "attention" in self.kind:
            y = self.a(x.flatten(2).transpose(1, 2))
            if self.kind == "attention":
                y = self.b(self.heads(y, y, y, need_weights=False)[0])
            return x + y.transpose(1, 2).reshape(x.shape)
        if self.kind in ("residual", "bottleneck"):
            return F.relu(x + self.b(F.relu(self.a(x))))
        if self.kind in ("grouped", "depthwise"):
            return F.relu(self.b(F.relu(self.a(x))))
        if self.kind == "squeeze":
            return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))
        if self.kind == "gate":
            return torch.tanh(self.a(x)) * torch.sigmoid(self.b(x))
        y = F.relu(self.a(x))
        if self.kind == "concat":
            return torch.cat([x, y], 1)
        if self.kind == "split":
            u, v = y.chunk(2, 1)
            return u + v
        return F.avg_pool2d(y, 2) if self.kind in ("pool", "up") and min(y.shape[2:]) > 1 else y


class Random(nn.Module):
    """A stem, some blocks, and a head: flattened, pooled, or read as a sequence by a recurrent layer."""

    def __init__(self, blocks: list[tuple[str, int]], norm: bool, head: str, weight_normed: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), head
        self.blocks = nn.ModuleList()
        width = 6
        for kind, new in blocks:
            self.blocks.append(Block(kind, width, new, norm))
            width = self.blocks[-1].out  # type: ignore[assignment]
        self.r = nn.GRU(width, 7, bidirectional=True, batch_first=True) if head == "recurrent" else nn.Identity()
        size = {"flatten": 4 * width, "pool": width, "recurrent": 14}[head]
        self.h, self.o = nn.Linear(size, 9), nn.Linear(9, 4)
        for layer in list(self.modules()) if weight_normed else []:
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                weight_norm(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        if self.head == "flatten":
            x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        elif self.head == "pool":
            x = x.mean((2, 3))
        else:
            x = self.r(x.flatten(2).transpose(1, 2))[0].mean(1)
        return self.o(F.relu(self.h(x)))


ARCHITECTURES = st.builds(
    Random,
    st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(4, 12).map(lambda n: n - n % 2)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["flatten", "pool", "recurrent"]),
    st.booleans(),
)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(network=ARCHITECTURES, seed=st.integers(0, 1000))
def test_random_architectures_hold_the_laws(network: Random, seed: int) -> None:
    x = torch.randn(3, 3, 8, 8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(x).square().mean().backward()
    optimizer.step()
    found = survey(network, x)
    untouched = copy.deepcopy(network.state_dict())
    unfit = vet(network, found.groups, {"": Example((x,))})
    assert same(untouched, network.state_dict())
    assert unfit == {}
    groups = found.groups
    generator = torch.Generator().manual_seed(seed)
    sizes = {group.pack or group.name: int(torch.randint(2, group.size, (), generator=generator)) for group in groups}
    masks = {g.name: torch.rand(g.size, generator=generator).argsort() < sizes[g.pack or g.name] for g in groups}
    reference = zeroed(network, groups, Plan(masks)).eval()
    fresh = copy.deepcopy(network)

    migrate(optimizer, remove_units(network, groups, masks))

    network.eval()
    torch.testing.assert_close(network(x), reference(x), rtol=1e-4, atol=1e-5)
    network.train()
    optimizer.zero_grad()
    network(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())
    optimizer.step()
    resize_to(fresh, {name: tensor.shape for name, tensor in network.state_dict().items()})
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(x), network.eval()(x))
    assert "stem" in {group.name for group in groups} | set(found.left_whole)


@pytest.mark.parametrize("part", range(8))
def test_random_programs_are_understood_before_they_are_tried(part: int) -> None:
    """All that is found can be cut: no trial has to refuse it. Nothing crashes, and the cut network trains."""
    for seed in range(part, PROGRAMS, 8):
        torch.manual_seed(seed)
        network = Program(seed)
        x = network.inputs()
        found = survey(network, Example(x))
        told = f"{seed}: {' '.join(network.told)}"
        assert vet(network, found.groups, {"": Example(x)}) == {}, told
        kept = {group.pack or group.name: 2 + seed % max(group.size - 2, 1) for group in found.groups}
        plan = {g.name: torch.randperm(g.size) < max(kept[g.pack or g.name], g.floor) for g in found.groups}
        before = sum(p.numel() for p in network.parameters())
        remove_units(network, found.groups, plan)
        assert sum(p.numel() for p in network.parameters()) < before or not found.groups, told
        outputs = [t for t in tree_leaves(network(*x)) if t.requires_grad]
        torch.stack([t.square().mean() for t in outputs]).sum().backward()
        network.eval()(*x)
