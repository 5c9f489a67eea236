"""Networks for tests, and what a cut leaves of them, written out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_slim.units import Plan, UnitGroup

REMOVED = {"c1": [1, 4, 6], "c2": [0, 3, 6, 9], "up": [2, 3, 15, 7, 8], "fc1": [0, 19, 7]}


class Mixed(nn.Module):
    """Convolution, batch and group norm, PReLU, depthwise, transposed, flatten, linear, layer norm, bare parameter."""

    def __init__(self, widths: tuple[int, int, int] = (8, 12, 16), hidden: int = 20) -> None:
        super().__init__()
        a, b, c = widths
        self.c1, self.b1 = nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a)
        self.c2, self.g2 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(2, b)
        self.pr, self.dw = nn.PReLU(b), nn.Conv2d(b, b, 3, padding=1, groups=b)
        self.up, self.b3 = nn.ConvTranspose2d(b, c, 2, 2), nn.BatchNorm2d(c)
        self.fc1, self.ln = nn.Linear(c * 16, hidden), nn.LayerNorm(hidden)
        self.scale = nn.Parameter(torch.full((1, hidden), 1.1))
        self.fc2 = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b1(self.c1(x)))
        x = F.gelu(self.dw(self.pr(self.g2(self.c2(x)))))
        x = F.adaptive_avg_pool2d(F.relu(self.b3(self.up(x))), 4).flatten(1)
        return self.fc2(F.gelu(self.ln(self.fc1(x))) * self.scale)


def mixed_plan(groups: list[UnitGroup]) -> Plan:
    """The plan that removes the channels in `REMOVED`; c2's go in pairs (group norm of two groups of six)."""
    size = {"c1": 8, "c2": 12, "up": 16, "fc1": 20}
    plan = Plan()
    for group in groups:
        keep = torch.tensor([i not in REMOVED[group.name] for i in range(size[group.name])])
        plan[group.name] = keep[:6] if group.name == "c2" else keep
    return plan


def narrow_by_hand() -> tuple[Mixed, dict[str, tuple[list[int] | None, ...]]]:
    """A freshly built narrow network, and for each tensor which positions of the wide one's axes it takes over."""
    k1 = [0, 2, 3, 5, 7]
    k2 = [1, 2, 4, 5, 7, 8, 10, 11]
    k3 = [0, 1, 4, 5, 6, 9, 10, 11, 12, 13, 14]
    kh = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    flat = [channel * 16 + pixel for channel in k3 for pixel in range(16)]
    keep: dict[str, tuple[list[int] | None, ...]] = {
        "c1.weight": (k1,),
        "c1.bias": (k1,),
        **{f"b1.{name}": (k1,) for name in ("weight", "bias", "running_mean", "running_var")},
        "c2.weight": (k2, k1),
        "g2.weight": (k2,),
        "g2.bias": (k2,),
        "pr.weight": (k2,),
        "dw.weight": (k2,),
        "dw.bias": (k2,),
        "up.weight": (k2, k3),
        "up.bias": (k3,),
        **{f"b3.{name}": (k3,) for name in ("weight", "bias", "running_mean", "running_var")},
        "fc1.weight": (kh, flat),
        "fc1.bias": (kh,),
        "ln.weight": (kh,),
        "ln.bias": (kh,),
        "scale": (None, kh),
        "fc2.weight": (None, kh),
    }
    return Mixed((len(k1), len(k2), len(k3)), len(kh)), keep


def take(tensor: Tensor, keep: tuple[list[int] | None, ...]) -> Tensor:
    """The entries of a tensor at the kept positions of each axis; axes of size 1 (factored moments) stay."""
    for axis, positions in enumerate(keep):
        if positions is not None and axis < tensor.ndim and tensor.shape[axis] > 1:
            tensor = tensor.index_select(axis, torch.tensor(positions))
    return tensor.clone()


def narrow_copy(wide: Mixed) -> Mixed:
    """The narrow network with the wide one's kept weights and running statistics."""
    narrow, keep = narrow_by_hand()
    narrow.load_state_dict({n: take(t, keep[n]) if n in keep else t.clone() for n, t in wide.state_dict().items()})
    return narrow


def narrow_optimizer_state(wide: Mixed, state: dict, names: list[str] | None = None) -> dict:
    """An optimizer's state dict for the wide network, cut by hand."""
    _, keep = narrow_by_hand()
    names = names or [name for name, _ in wide.named_parameters()]
    state = {
        i: {
            key: take(value, keep[names[i]]) if isinstance(value, Tensor) and value.ndim and names[i] in keep else value
            for key, value in entries.items()
        }
        for i, entries in state["state"].items()
    } | {"param_groups": state["param_groups"]}
    groups = state.pop("param_groups")
    return {"state": state, "param_groups": groups}


def without_weight_norm(network: nn.Module) -> nn.Module:
    """The network itself, with ordinary weights; torch's own removal would break the networks it was copied from."""
    for layer in network.modules():
        if is_parametrized(layer, "weight"):
            weight = layer.weight.detach()
            layer.__class__ = layer.__class__.__bases__[0]
            del layer._modules["parametrizations"]
            layer.weight = nn.Parameter(weight)
        elif hasattr(layer, "weight_v"):
            nn.utils.remove_weight_norm(layer)
    return network


def images(seed: int, samples: int = 16) -> tuple[Tensor, Tensor]:
    """A batch of random images and labels for `Mixed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 8, 8, generator=generator), torch.randint(0, 5, (samples,), generator=generator)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_optimizer_state(a: dict, b: dict) -> bool:
    """Whether two optimizer state dicts are equal to the bit."""
    if a["state"].keys() != b["state"].keys():
        return False
    pairs = [(x[key], y[key]) for i, x in a["state"].items() for y in [b["state"][i]] for key in x]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)
