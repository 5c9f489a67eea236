"""What is read off single operations: units by hand count, all of which pass the trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_slim.surgery import Example, survey
from lightning_slim.surgery.verify import vet


class Net(nn.Module):
    """A function of parts and an input."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def between(run: Callable[[Any, Tensor], Tensor], made: int = 8, read: int = 8, **parts: Any) -> Net:
    """Something between a layer and the next one."""
    return Net(lambda s, x: s.b(run(s, s.a(x))), a=nn.Linear(5, made), b=nn.Linear(read, 3), **parts)


def vector(size: int) -> nn.Parameter:
    return nn.Parameter(1 + 0.2 * torch.randn(size))


def shrunk_in_place(x: Tensor) -> Tensor:
    """A mean over the last axis as `F.adaptive_avg_pool2d` takes it of channels-last images: it sets other strides."""
    images = x[:, :, None, None].repeat(1, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    return F.adaptive_avg_pool2d(images, 1).flatten(1)


def attended(h: Tensor, offsets: Tensor) -> Tensor:
    """Attention with a bias by how far two places lie apart."""
    place, windows = torch.arange(4), h.repeat(2, 1, 1)
    bias = offsets[(place[:, None] - place + 3).view(-1)].view(4, 4, 1).permute(2, 0, 1)
    return (torch.softmax(windows @ windows.mT + bias, -1) @ windows).flatten(0, 1)


NETWORKS: dict[str, tuple[Callable[[], Net], dict[str, int]]] = {
    "a bare scale": (lambda: between(lambda s, h: h * s.v, v=vector(8)), {"a": 8}),
    "a bare matrix": (
        lambda: between(lambda s, h: torch.relu(h @ s.w), read=6, w=nn.Parameter(torch.randn(8, 6))),
        {"a": 8, "w": 6},
    ),
    "einsum": (lambda: between(lambda s, h: torch.einsum("nc,c->nc", h, s.v), v=vector(8)), {"a": 8}),
    "a norm by hand": (lambda: between(lambda s, h: F.normalize(h, dim=-1) * s.v, v=vector(8)), {"a": 8}),
    "a root mean square": (lambda: between(lambda s, h: h * torch.rsqrt(h.square().mean(-1, True) + 0.1)), {"a": 8}),
    "softmax over units": (lambda: between(lambda s, h: h.softmax(-1)), {"a": 8}),
    "the maximum of pairs": (lambda: between(lambda s, h: h.unflatten(-1, (2, -1)).amax(-2), read=4), {"a": 4}),
    "zeros before the steps": (
        lambda: between(
            lambda s, h: s.c(F.pad(h[:, :, None].repeat(1, 1, 3), (2, 0)))[..., -1], read=6, c=nn.Conv1d(8, 6, 3)
        ),
        {"a": 8, "c": 6},
    ),
    "neighbours among channels": (
        lambda: between(lambda s, h: F.local_response_norm(h[:, :, None, None], 5, alpha=1e-4)[:, :, 0, 0]), {"a": 8},
    ),
    "other strides": (lambda: between(lambda s, h: shrunk_in_place(h)), {"a": 8}),
    "a scripted child": (
        lambda: between(lambda s, h: s.m(h), m=torch.jit.script(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))),
        {},
    ),
    "columns beside others": (
        lambda: Net(lambda s, x: s.b(s.c(torch.cat([s.a(x), x], 1)) * torch.cat([s.a(x), x], 1)),
                    a=nn.Linear(5, 8), c=nn.Linear(13, 13), b=nn.Linear(13, 3)),
        {"a": 8},
    ),
    "vmap": (
        lambda: Net(
            lambda s, x: torch.vmap(lambda row: s.b(s.a(row).relu()))(x), a=nn.Linear(5, 8), b=nn.Linear(8, 3)
        ),
        {"a": 8},
    ),
    "a frequency": (lambda: between(lambda s, h: torch.fft.irfft(torch.fft.rfft(h, dim=0), n=4, dim=0)), {"a": 8}),
    "offsets of pairs of places": (
        lambda: between(
            lambda s, h: F.layer_norm(attended(h, s.v).reshape(4, -1), s.w.shape, s.w),
            read=16, v=vector(7), w=vector(16),
        ),
        {"a": 8},
    ),
    "a sparse matrix": (lambda: between(lambda s, h: torch.sparse.mm(torch.eye(4).to_sparse(), h)), {}),
    "sorted": (lambda: between(lambda s, h: h.sort(-1).values), {}),
    "a gradient inside": (
        lambda: between(lambda s, h: torch.autograd.grad(h.square().sum(), h, create_graph=True)[0]), {"a": 8}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Sparse:UserWarning")
def test_the_units_are_those_by_hand(name: str) -> None:
    make, sizes = NETWORKS[name]
    network, x = make(), torch.randn(4, 5)
    found = survey(network, x)
    assert {group.name: group.size for group in found.groups} == sizes
    assert vet(network, found.groups, {"": Example((x,))}) == {}
    assert sizes or "a" in found.left_whole
    assert not any(
        span.tensor.startswith(f"{name}.")
        for group in found.groups
        for span in group.spans
        if span.role == "out"
        for name in found.left_whole
    )


def test_what_cannot_be_recorded_goes_by_the_other_graph() -> None:
    def refuses(net: Any, x: Tensor) -> Tensor:
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("not while anybody looks on")
        return net.b(torch.relu(net.a(x)))  # type: ignore[no-any-return]

    network, x = Net(refuses, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), torch.randn(4, 5)
    with pytest.warns(UserWarning, match=r"could not be recorded \(RuntimeError: not while anybody looks on\)"):
        found = survey(network, x)
    assert [(group.name, group.size, len(group.readers)) for group in found.groups] == [("a", 8, 1)]


def test_what_fails_on_its_own_is_not_hidden() -> None:
    def fails(net: Any, x: Tensor) -> Tensor:
        raise RuntimeError("the network's own")

    with pytest.raises(RuntimeError, match="the network's own"):
        survey(Net(fails, a=nn.Linear(5, 8)), torch.randn(4, 5))
