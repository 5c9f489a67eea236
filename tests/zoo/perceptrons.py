"""Networks of linear layers: coordinates, tables, points, pairs and several tasks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim.surgery import Example
from tests.zoo.blocks import Builder, conv_norm, image


class Sine(nn.Module):
    """sin(30 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def siren() -> nn.Module:
    """Sines between linear layers (Sitzmann et al., 2020)."""
    return nn.Sequential(nn.Linear(2, 16), Sine(), nn.Linear(16, 16), Sine(), nn.Linear(16, 3))


class NeRF(nn.Module):
    """Encoded coordinates, seen again half-way up; density and colour (Mildenhall et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Linear(18, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.high = nn.Sequential(nn.Linear(34, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.density, self.colour = nn.Linear(16, 1), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = (x[..., None] * 2.0 ** torch.arange(3)).flatten(-2)
        encoded = torch.cat([angles.sin(), angles.cos()], -1)
        h = self.high(torch.cat([encoded, self.low(encoded)], -1))
        return self.density(h), self.colour(h)


class Tabular(nn.Module):
    """Embedded categories beside normalised numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embeds, self.norm = nn.ModuleList([nn.Embedding(n, 6) for n in (5, 9)]), nn.BatchNorm1d(4)
        self.layers = nn.Sequential(
            nn.Linear(16, 20), nn.ReLU(), nn.BatchNorm1d(20), nn.Dropout(0.1), nn.Linear(20, 12)
        )
        self.head = nn.Linear(12, 2)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        embedded = [embed(categories[:, i]) for i, embed in enumerate(self.embeds)]
        return self.head(F.relu(self.layers(torch.cat([*embedded, self.norm(numbers)], 1))))


class DeepFM(nn.Module):
    """Factorisation machine and MLP on the same embeddings (Guo et al., 2017)."""

    def __init__(self, fields: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(30, 1), nn.Embedding(30, 8)
        self.deep = nn.Sequential(nn.Linear(8 * fields, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, x: Tensor) -> Tensor:
        v = self.second(x)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True) / 2
        return torch.sigmoid(self.first(x).sum(1) + pairs + self.deep(v.flatten(1)))


class TwoTower(nn.Module):
    """Users and items meet in a dot product."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        self.items = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(-1)


class PointNet(nn.Module):
    """The same MLP for every point, and a maximum over points (Qi et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.Conv1d(3, 12, 1),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Conv1d(12, 20, 1),
            nn.BatchNorm1d(20),
            nn.ReLU(),
        ]
        self.points, self.head = nn.Sequential(*layers), nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).max(2).values)


class HighwayLayer(nn.Module):
    """A gate chooses between the new and the old (Srivastava et al., 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.new, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * F.relu(self.new(x)) + (1 - gate) * x


def highway() -> nn.Module:
    """Two highway layers."""
    return nn.Sequential(nn.Linear(6, 12), HighwayLayer(12), HighwayLayer(12), nn.Linear(12, 3))


def mlp() -> nn.Module:
    """Batch norm between linear layers."""
    first = [nn.Linear(10, 24), nn.BatchNorm1d(24), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


class Maxout(nn.Module):
    """The largest of three pieces (Goodfellow et al., 2013)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pieces = nn.Linear(inputs, 3 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.pieces(x).unflatten(-1, (3, -1)).amax(-2)


class Siamese(nn.Module):
    """One encoder for both images; what they differ in is read."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_norm(1, 8, 3, 2), conv_norm(8, 12, 3, 2), nn.Flatten(), nn.Linear(192, 10))
        self.head = nn.Linear(10, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.encoder(left) - self.encoder(right)).abs())


class MultiTask(nn.Module):
    """A trunk and two heads, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv_norm(3, 8, 3, 2), conv_norm(8, 12, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.label = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))
        self.box = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {"label": self.label(features), "box": self.box(features)}


PERCEPTRONS: dict[str, Builder] = {
    "SIREN": lambda: (siren(), Example((torch.rand(8, 2),))),
    "NeRF": lambda: (NeRF(), Example((torch.rand(8, 3),))),
    "tabular": lambda: (Tabular(), Example((torch.randint(0, 5, (4, 2)), torch.randn(4, 4)))),
    "DeepFM": lambda: (DeepFM(), Example((torch.randint(0, 30, (3, 4)),))),
    "two towers": lambda: (TwoTower(), Example((torch.randint(0, 20, (3,)), torch.randn(3, 5)))),
    "PointNet": lambda: (PointNet(), Example((torch.randn(2, 3, 30),))),
    "Highway": lambda: (highway(), Example((torch.randn(4, 6),))),
    "MLP, batch norm": lambda: (mlp(), Example((torch.randn(4, 10),))),
    "Maxout": lambda: (nn.Sequential(Maxout(6, 10), Maxout(10, 8), nn.Linear(8, 3)), Example((torch.randn(4, 6),))),
    "Siamese": lambda: (Siamese(), Example((torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)))),
    "multi-task": lambda: (MultiTask(), image()),
}
