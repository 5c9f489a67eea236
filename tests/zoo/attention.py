"""Transformers, mixers, and convolutional networks in their manner."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim.surgery import Example
from tests.zoo.blocks import Builder, Residual, classifier, image


class ConvNeXtBlock(nn.Module):
    """Depthwise, layer norm over permuted channels, two linear layers, a layer scale (Liu et al., 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(h)))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Two stages with a strided convolution between them."""
    stages = [ConvNeXtBlock(8), ConvNeXtBlock(8), nn.Conv2d(8, 12, 2, 2), ConvNeXtBlock(12)]
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *stages, classifier(12))


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(h.transpose(1, 2).reshape(n, t, c))


class HeadedAttention(nn.Module):
    """The same as timm writes it: the width of the heads is the layer's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(n, t, self.attn_dim))


class MultiHead(nn.Module):
    """torch's own attention as self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def mlp(width: int, hidden: int) -> nn.Module:
    """The two linear layers of a transformer block."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def block(width: int, attention: nn.Module) -> nn.Module:
    """Norms first: attention and MLP, each with a residual."""
    first = Residual(nn.Sequential(nn.LayerNorm(width), attention))
    return nn.Sequential(first, Residual(nn.Sequential(nn.LayerNorm(width), mlp(width, 2 * width))))


class ViT(nn.Module):
    """Patches, a class token, positions, blocks (Dosovitskiy et al., 2021)."""

    def __init__(self, width: int, blocks: nn.Module) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, width, 8, 8), blocks
        self.token = nn.Parameter(torch.randn(1, 1, width) / 10)
        self.positions = nn.Parameter(torch.randn(1, 17, width) / 10)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowAttention(nn.Module):
    """Attention within windows of 4x4, shifted by a roll in every other block (Liu et al., 2021)."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.shift, self.attention = shift, Attention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        x = self.attention(x).view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2))


class Merge(nn.Module):
    """Four neighbouring pixels become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    """Two stages of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        first = [block(12, WindowAttention(12, 4, shift)) for shift in (0, 2)]
        self.stages = nn.Sequential(*first, Merge(12), block(24, WindowAttention(24, 4, 0)))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class MixerBlock(nn.Module):
    """An MLP over tokens, then one over channels (Tolstikhin et al., 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = mlp(tokens, 20), mlp(width, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches and two mixer blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 12, 8, 8), nn.Sequential(MixerBlock(16, 12), MixerBlock(16, 12))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


def encoder(norm_first: bool) -> nn.Module:
    """torch's own encoder between two linear layers."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
    return nn.Sequential(
        nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )


class Translator(nn.Module):
    """torch's own decoder over an encoded sequence (Vaswani et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(50, 16), nn.Embedding(50, 16)
        encoder, decoder = (
            kind(16, 4, 32, batch_first=True) for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        )
        self.encoder = nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False)
        self.decoder, self.head = nn.TransformerDecoder(decoder, 2), nn.Linear(16, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.decoder(self.target(target), self.encoder(self.source(source)), tgt_mask=mask))


class GPT(nn.Module):
    """Causal blocks over tokens and positions; the head may be tied to the tokens."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 16), nn.Embedding(12, 16)
        self.blocks = nn.Sequential(*[block(16, Attention(16, 4, causal=True)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.tokens.weight if tied else self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h)))


class CCT(nn.Module):
    """A convolutional tokenizer, an encoder, a pooling by attention over the sequence (Hassani et al., 2021)."""

    def __init__(self) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 10, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(10, 16, 3, 1, 1), nn.ReLU()]
        self.tokenizer = nn.Sequential(*stem, nn.MaxPool2d(3, 4, 1), nn.Flatten(2))
        self.blocks, self.norm = block(16, Attention(16, 4)), nn.LayerNorm(16)
        self.pool, self.head = nn.Linear(16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokenizer(x).transpose(1, 2)))
        weights = self.pool(x).softmax(1)
        return self.head((weights.transpose(1, 2) @ x).squeeze(1))


def tokens() -> Example:
    """Two sentences of twelve tokens."""
    return Example((torch.randint(0, 50, (2, 12)),))


ATTENTION: dict[str, Builder] = {
    "ConvNeXt": lambda: (convnext(), image()),
    "Swin": lambda: (Swin(), image()),
    "MLP-Mixer": lambda: (Mixer(), image()),
    "ViT, fused qkv": lambda: (ViT(16, nn.Sequential(*[block(16, Attention(16, 4)) for _ in range(2)])), image()),
    "ViT, heads of a width": lambda: (ViT(16, block(16, HeadedAttention(16, 4))), image()),
    "ViT, MultiheadAttention": lambda: (ViT(16, block(16, MultiHead(16, 4))), image()),
    "TransformerEncoder, norm first": lambda: (encoder(True), Example((torch.randn(2, 7, 6),))),
    "TransformerEncoder, norm last": lambda: (encoder(False), Example((torch.randn(2, 7, 6),))),
    "encoder and decoder": lambda: (
        Translator(),
        Example((torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 7)))),
    ),
    "GPT": lambda: (GPT(tied=False), tokens()),
    "GPT, tied": lambda: (GPT(tied=True), tokens()),
    "CCT": lambda: (CCT(), image()),
}
