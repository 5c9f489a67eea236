"""Residual networks for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.blocks import Builder, Residual, SqueezeExcite, classifier, conv_norm, image


def basic(inputs: int, outputs: int, stride: int = 1, extra: nn.Module | None = None) -> nn.Module:
    """Two 3x3 convolutions; a projection where the shape changes."""
    same = inputs == outputs and stride == 1
    body = [conv_norm(inputs, outputs, 3, stride), conv_norm(outputs, outputs, act=nn.Identity)]
    shortcut = None if same else conv_norm(inputs, outputs, 1, stride, act=nn.Identity)
    return Residual(nn.Sequential(*body, extra or nn.Identity()), shortcut, nn.ReLU())


def bottleneck(inputs: int, width: int, outputs: int, stride: int = 1, groups: int = 1, squeeze: int = 0) -> nn.Module:
    """1x1, 3x3 (perhaps grouped, perhaps gated), 1x1."""
    same = inputs == outputs and stride == 1
    gate = SqueezeExcite(width, squeeze) if squeeze else nn.Identity()
    body = [conv_norm(inputs, width, 1), conv_norm(width, width, 3, stride, groups), gate]
    shortcut = None if same else conv_norm(inputs, outputs, 1, stride, act=nn.Identity)
    return Residual(nn.Sequential(*body, conv_norm(width, outputs, 1, act=nn.Identity)), shortcut, nn.ReLU())


def resnet18() -> nn.Module:
    """Four stages of two basic blocks."""
    stem = nn.Sequential(conv_norm(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1))
    stages = [basic(8, 8), basic(8, 8), basic(8, 12, 2), basic(12, 12), basic(12, 16, 2), basic(16, 16)]
    return nn.Sequential(stem, *stages, basic(16, 20, 2), basic(20, 20), classifier(20))


def resnet50() -> nn.Module:
    """Bottlenecks with an expansion of four."""
    stages = [bottleneck(8, 4, 16), bottleneck(16, 4, 16), bottleneck(16, 6, 24, 2), bottleneck(24, 6, 24)]
    return nn.Sequential(conv_norm(3, 8), *stages, bottleneck(24, 8, 32, 2), bottleneck(32, 8, 32), classifier(32))


def resnext() -> nn.Module:
    """Bottlenecks with four groups."""
    stages = [bottleneck(8, 16, 16, 1, 4), bottleneck(16, 16, 16, 1, 4), bottleneck(16, 24, 24, 2, 4)]
    return nn.Sequential(conv_norm(3, 8), *stages, classifier(24))


def regnet_y() -> nn.Module:
    """Bottlenecks without expansion, groups of a fixed width, squeeze and excitation."""
    stages = [bottleneck(8, 8, 8, 2, 2, 2), bottleneck(8, 16, 16, 2, 4, 4), bottleneck(16, 16, 16, 1, 4, 4)]
    return nn.Sequential(conv_norm(3, 8, 3, 2), *stages, classifier(16))


class PreActivation(nn.Module):
    """Norm and activation before the convolutions; a projection shares the first of them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2, self.drop = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.Dropout(0.3)
        self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(h)
        return shortcut + self.conv2(self.drop(torch.relu(self.norm2(self.conv1(h)))))


def wide_resnet() -> nn.Module:
    """Pre-activation blocks with dropout."""
    blocks = [PreActivation(8, 16), PreActivation(16, 16), PreActivation(16, 32, 2), PreActivation(32, 32)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *blocks, nn.BatchNorm2d(32), nn.ReLU(), classifier(32))


def se_resnet() -> nn.Module:
    """Basic blocks with squeeze and excitation."""
    blocks = [basic(8, 8, 1, SqueezeExcite(8, 4)), basic(8, 16, 2, SqueezeExcite(16, 4))]
    return nn.Sequential(conv_norm(3, 8), *blocks, classifier(16))


class CBAM(nn.Module):
    """Channels are gated by their means and maxima, pixels by those over channels (Woo et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels))
        self.pixels = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.shared(x.mean((2, 3))) + self.shared(x.amax((2, 3))))
        x = x * gate[:, :, None, None]
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.pixels(seen))


def cbam() -> nn.Module:
    """Basic blocks with both gates."""
    return nn.Sequential(conv_norm(3, 8), basic(8, 8, 1, CBAM(8)), basic(8, 12, 2, CBAM(12)), classifier(12))


RESIDUAL: dict[str, Builder] = {
    "ResNet-18": lambda: (resnet18(), image()),
    "ResNet-50": lambda: (resnet50(), image()),
    "ResNeXt": lambda: (resnext(), image()),
    "Wide ResNet": lambda: (wide_resnet(), image()),
    "RegNetY": lambda: (regnet_y(), image()),
    "SE-ResNet": lambda: (se_resnet(), image()),
    "CBAM": lambda: (cbam(), image()),
}
