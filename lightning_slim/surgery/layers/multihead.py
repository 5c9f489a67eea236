"""nn.MultiheadAttention: whole heads, and the width of what it reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim.surgery.layers.base import LayerKind, Place, every_channel, present
from lightning_slim.units import Role


class SlimMultiheadAttention(nn.MultiheadAttention):
    """What an `nn.MultiheadAttention` becomes when heads or channels are cut out of it.

    torch's own forward pass wants heads that fill the width of the input exactly. This one computes the same from the
    same tensors, for any number of heads; tensors and arguments are those of `nn.MultiheadAttention`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`.

        Raises:
            ValueError: a mask for every head has as many heads as there were before the cut.
        """
        batched = query.ndim == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = [None] * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)  # type: ignore[assignment]
        q, k, v = (
            F.linear(x, w, b).view(*x.shape[:2], self.num_heads, self.head_dim)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )  # batch, steps, heads, width
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append(
                [bias.view(1, 1, *k.shape[2:]).expand(len(k), -1, -1, -1) for bias in (self.bias_k, self.bias_v)]
            )
        if self.add_zero_attn:
            extra.append([k.new_zeros(len(k), 1, *k.shape[2:])] * 2)
        k, v = (torch.cat([x, *(pair[i] for pair in extra)], 1) for i, x in enumerate((k, v)))
        mask = mask if mask is None else F.pad(mask, (0, len(extra)))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        seen: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            seen = (scores if mask is None else scores + mask).softmax(-1)
            seen = F.dropout(seen, self.dropout, self.training)
            mixed = seen @ v
            seen = seen.mean(1) if average_attn_weights else seen
            seen = seen if batched else seen.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), seen
        return output if self.batch_first else output.transpose(0, 1), seen

    def _mask(self, q: Tensor, k: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        batch, heads = len(q), self.num_heads
        masks = []
        if attention is not None:
            if attention.ndim == 3 and len(attention) != batch * heads:
                raise ValueError(
                    f"Expected a mask of {batch} samples times {heads} heads, got {len(attention)}: pass a mask of "
                    "(steps, steps), which serves all heads, or leave the heads whole."
                )
            masks.append(attention.view(batch, heads, *attention.shape[1:]) if attention.ndim == 3 else attention)
        if padding is not None:
            masks.append(padding.view(batch, 1, 1, k.shape[1]))
        added = [q.new_zeros(m.shape).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(q) for m in masks]
        return sum(added[1:], added[0]) if added else None


@contextmanager
def module_by_module(model: nn.Module) -> Iterator[None]:
    """Attention that was not cut calls its output projection as a module, too, so that hooks see its heads."""
    layers = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    for layer in layers:
        layer.__class__ = SlimMultiheadAttention
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.MultiheadAttention


class MultiheadAttention(LayerKind):
    """in_proj_weight (3 heads width, channels), out_proj.weight (channels, heads width), and biases.

    Where queries, keys and values have weights of their own because their widths differ, it is not understood.
    """

    types = (nn.MultiheadAttention,)
    channel_axis: ClassVar[int | None] = -1
    opaque: ClassVar[bool] = True

    def speaks_for(self, module: nn.Module) -> bool:
        exactly = type(module) in (nn.MultiheadAttention, SlimMultiheadAttention)
        return exactly and module.in_proj_weight is not None

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, nn.MultiheadAttention)
        channels = every_channel(layer.embed_dim)
        if role == "in":
            return [Place("in_proj_weight", 1, channels)]
        return [
            Place(f"out_proj.{place.tensor}", 0, channels)
            for place in present(layer.out_proj, ("weight", "bias"), 0, channels)
        ]

    def inner(self, layer: nn.Module) -> Sequence[tuple[str, Sequence[Place]]]:
        assert isinstance(layer, nn.MultiheadAttention)
        heads, width = layer.num_heads, layer.head_dim
        columns = torch.arange(heads * width).view(heads, width)
        rows = torch.cat([columns + part * heads * width for part in range(3)], 1)
        made = present(layer, ("in_proj_weight", "in_proj_bias"), 0, rows)
        return [
            (
                "heads",
                [*made, *present(layer, ("bias_k", "bias_v"), 2, columns), Place("out_proj.weight", 1, columns, "in")],
            )
        ]

    def mixing(self, layer: nn.Module) -> tuple[str, int]:
        return "in_proj_weight", 0

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.MultiheadAttention)
        rows, layer.embed_dim = layer.in_proj_weight.shape
        layer.kdim = layer.vdim = layer.embed_dim
        layer.num_heads = rows // 3 // layer.head_dim
        as_torch_does = rows == 3 * layer.embed_dim
        layer.__class__ = nn.MultiheadAttention if as_torch_does else SlimMultiheadAttention
        layer._qkv_same_embed_dim = as_torch_does  # torch's fused path for whole encoder layers asks for this


class TransformerEncoder(LayerKind):
    """The stack turns padded batches into nested ones if its first layer could take them; here another may not."""

    types = (nn.TransformerEncoder,)

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        return []

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.TransformerEncoder)
        weights = [m.in_proj_weight for m in layer.modules() if isinstance(m, nn.MultiheadAttention)]
        if any(weight is not None and weight.shape[0] != 3 * weight.shape[1] for weight in weights):
            layer.use_nested_tensor = False
