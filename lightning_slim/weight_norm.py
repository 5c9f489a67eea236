"""Weight normalisation: a layer stores its weight as lengths and directions (Salimans and Kingma, 2016).

`weight = g v / |v|`, with one length `g` for each position of one axis. What a layer computes with is the weight; what
an optimizer and a checkpoint hold are `g` and `v`. Here is the way from one to the other; no other file knows the two
forms that torch has, the parametrization and the older hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook


@dataclass(frozen=True, eq=False)
class WeightNorm:
    """How one layer stores its weight.

    Attributes:
        layer: the layer.
        length: name of `g` within the layer; its shape is 1 along all axes but `dim`.
        direction: name of `v` within the layer; it has the weight's shape, and its own length does not count.
        dim: the axis whose positions have a length each; -1: the whole weight has one.
    """

    layer: nn.Module
    length: str
    direction: str
    dim: int

    @property
    def g(self) -> nn.Parameter:
        """The lengths."""
        return self.layer.get_parameter(self.length)

    @property
    def v(self) -> nn.Parameter:
        """The directions."""
        return self.layer.get_parameter(self.direction)

    def lengths(self, tensor: Tensor) -> Tensor:
        """Norms of a tensor of the weight's shape, in the shape of `g`; not in half precision."""
        return torch.norm_except_dim(_whole(tensor), 2, self.dim)

    def weight(self) -> Tensor:
        """The weight that the layer computes with."""
        return torch._weight_norm(self.v, self.g, self.dim)

    def gradient(self) -> Tensor:
        """The gradient by the weight, from those by `v` (across it) and by `g` (along it)."""
        v, g = _whole(self.v.detach()), _whole(self.g.detach())
        size = self.lengths(v)
        by_v, by_g = (torch.zeros_like(p) if p.grad is None else p.grad for p in (self.v, self.g))
        return by_g * v / size + torch.where(g == 0, 0, size / g) * by_v

    def by_stored(self, by_weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients by `v` and `g`, from that by the weight: the chain rule."""
        v, g = _whole(self.v.detach()), _whole(self.g.detach())
        size, along = self.lengths(v), by_weight * v
        axes = [axis for axis in range(v.ndim) if axis != self.dim]
        by_g = along.sum(axes, keepdim=self.dim >= 0).view_as(g) / size
        return g / size * (by_weight - by_g * v / size), by_g

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Stores another weight: `v` keeps its length and `g` its sign, and what did not change stays to the bit."""
        changed, length = self.lengths(weight - self.weight()) > 0, self.lengths(weight)
        sign = 1 - 2 * (self.g < 0).to(length.dtype)
        v = _whole(weight) * (sign * self.lengths(self.v) / length)
        self.v.copy_(v.where(changed & (length > 0), self.v))
        self.g.copy_((sign * length).where(changed, self.g))

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the weight anew where the layer keeps it as an attribute: the older form does, between two calls."""
        if "weight" in vars(self.layer):
            self.layer.weight = self.weight()


def weight_norm_of(layer: nn.Module) -> WeightNorm | None:
    """The norm that the `weight` of a layer is under; None if there is none, or more than that."""
    if is_parametrized(layer, "weight"):
        steps = layer.parametrizations.weight  # type: ignore[union-attr]
        if len(steps) == 1 and isinstance(steps[0], _WeightNorm):  # type: ignore[arg-type, index]
            stored = "parametrizations.weight.original"
            return WeightNorm(layer, f"{stored}0", f"{stored}1", steps[0].dim)  # type: ignore[index]
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNormHook) and hook.name == "weight":
            return WeightNorm(layer, "weight_g", "weight_v", hook.dim)
    return None


def weight_norms(model: nn.Module) -> dict[str, WeightNorm]:
    """Dotted name of a layer -> the norm that its weight is under."""
    norms = ((name, weight_norm_of(layer)) for name, layer in model.named_modules(remove_duplicate=False))
    return {name: norm for name, norm in norms if norm is not None}


def obstacle(layer: nn.Module) -> str:
    """Why a layer's tensors cannot be cut as they are stored; empty if they can."""
    hooks = (WeightNormHook, SpectralNormHook, BasePruningMethod)
    found: list[object] = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, hooks)]
    if is_parametrized(layer):
        found += [step for steps in layer.parametrizations.values() for step in steps]  # type: ignore[operator]
    if not found:
        computed = "weight" not in {**layer._parameters, **layer._buffers} and hasattr(layer, "weight")
        return "computes its weight of other tensors: replace it, or leave it whole" if computed else ""
    if len(found) == 1 and weight_norm_of(layer) is not None:
        return ""
    if any(isinstance(step, _SpectralNorm | SpectralNormHook) for step in found):
        return "is under spectral norm, which divides by a norm over all rows and columns: remove it, or leave it whole"
    names = ", ".join(type(step).__name__.lstrip("_") for step in found)
    return f"is parametrized ({names}): remove the parametrization, or leave it whole"


def layer_of(tensor: str) -> str:
    """Dotted name of the layer that a stored tensor belongs to.

    >>> layer_of("net.0.bias"), layer_of("net.0.parametrizations.weight.original1"), layer_of("scale")
    ('net.0', 'net.0', '')
    """
    layer, parametrized, _ = f".{tensor}".rpartition(".parametrizations.")
    return layer.removeprefix(".") if parametrized else tensor.rpartition(".")[0]


def is_length(model: nn.Module, tensor: str) -> bool:
    """Whether a stored tensor, given by its dotted name, holds the lengths of a weight."""
    norm, leaf = _holder(model, tensor)
    return norm is not None and leaf == norm.length


def stored(model: nn.Module, tensor: str) -> list[Tensor]:
    """The tensors that make a weight: the one of that name; of a direction, its lengths too."""
    norm, leaf = _holder(model, tensor)
    return [norm.v, norm.g] if norm is not None and leaf == norm.direction else [_plain(model, tensor)]


def weight(model: nn.Module, tensor: str) -> Tensor:
    """The weight that a stored tensor stands for: itself; of a direction, what its layer computes with."""
    norm, leaf = _holder(model, tensor)
    return norm.weight() if norm is not None and leaf == norm.direction else _plain(model, tensor)


def gradient(model: nn.Module, tensor: str) -> Tensor:
    """The gradient by `weight`, entry for entry; zero where there is none."""
    norm, leaf = _holder(model, tensor)
    if norm is not None and leaf == norm.direction:
        return norm.gradient()
    plain = _plain(model, tensor)
    return torch.zeros_like(plain) if plain.grad is None else plain.grad


def by_stored(model: nn.Module, tensor: str, by_weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The tensors that make a weight, as `stored` names them, each with its gradient, given that by the weight."""
    norm, leaf = _holder(model, tensor)
    gradients = norm.by_stored(by_weight) if norm is not None and leaf == norm.direction else (by_weight,)
    return list(zip(stored(model, tensor), gradients, strict=True))


@contextmanager
def editing(model: nn.Module, tensor: str) -> Iterator[Tensor]:
    """The weight that a stored tensor stands for, to be changed in place; what it was made of follows."""
    norm, leaf = _holder(model, tensor)
    if norm is None or leaf != norm.direction:
        yield _plain(model, tensor)
        return
    value = norm.weight().detach()
    yield value
    norm.write(value)


def settle(model: nn.Module) -> None:
    """Computes weights anew that layers keep as attributes: of what is stored now, and with no graph behind them."""
    for norm in weight_norms(model).values():
        norm.refresh()


def _holder(model: nn.Module, tensor: str) -> tuple[WeightNorm | None, str]:
    """The norm of the layer that a tensor belongs to, and the tensor's name within the layer."""
    layer = layer_of(tensor)
    return weight_norm_of(model.get_submodule(layer)), tensor.removeprefix(f"{layer}.")


def _plain(model: nn.Module, tensor: str) -> Tensor:
    owner, _, leaf = tensor.rpartition(".")
    plain: Tensor = getattr(model.get_submodule(owner), leaf)
    return plain


def _whole(tensor: Tensor) -> Tensor:
    """In single precision at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
