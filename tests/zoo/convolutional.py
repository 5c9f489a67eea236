"""Convolutional classifiers without residual sums, and those for phones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.blocks import Branches, Builder, Residual, SqueezeExcite, classifier, conv_norm, image


def vgg() -> nn.Module:
    """Convolutions with batch norm, a flatten of four pixels, three linear layers."""
    pool = nn.MaxPool2d(2)
    features = [conv_norm(3, 8), pool, conv_norm(8, 12), pool, conv_norm(12, 16), conv_norm(16, 16), pool, pool]
    head = [nn.Linear(64, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 10)]
    return nn.Sequential(*features, nn.Flatten(), *head)


def alexnet() -> nn.Module:
    """Local response normalisation, overlapping pools, two groups in the second convolution."""
    first = [nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(3, 2)]
    second = [nn.Conv2d(8, 16, 5, padding=2, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    third = [nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, *second, *third, nn.Dropout(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 10))


class DenseLayer(nn.Module):
    """Adds a few channels to all that came before (Huang et al., 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


def densenet() -> nn.Module:
    """Two dense blocks with a transition."""
    transition = [nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)]
    blocks = [
        *(DenseLayer(8 + 4 * i, 4) for i in range(3)),
        *transition,
        *(DenseLayer(10 + 4 * i, 4) for i in range(2)),
    ]
    return nn.Sequential(conv_norm(3, 8, 3, 2), *blocks, nn.BatchNorm2d(18), nn.ReLU(), classifier(18))


def inception(inputs: int, a: int, b: int, c: int, d: int) -> nn.Module:
    """1x1, 3x3, 5x5 and a pool, side by side."""
    pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(inputs, d, 1))
    three, five = (nn.Sequential(conv_norm(inputs, 4, 1), conv_norm(4, n, k)) for n, k in ((b, 3), (c, 5)))
    return Branches(conv_norm(inputs, a, 1), three, five, pool)


class GoogLeNet(nn.Module):
    """Two inception modules; the first is followed by an auxiliary head, whose logits are returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = conv_norm(3, 8, 3, 2), inception(8, 4, 6, 4, 4)
        self.second, self.head, self.auxiliary = inception(18, 6, 8, 4, 4), classifier(22), classifier(18)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(self.stem(x))
        return self.head(self.second(x)), self.auxiliary(x)


def fire(inputs: int, squeeze: int, expand: int) -> nn.Module:
    """Squeeze, then expand by 1x1 and 3x3 side by side (Iandola et al., 2016)."""
    one = nn.Sequential(nn.Conv2d(squeeze, expand, 1), nn.ReLU())
    three = nn.Sequential(nn.Conv2d(squeeze, expand, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Conv2d(inputs, squeeze, 1), nn.ReLU(), Branches(one, three))


def squeezenet() -> nn.Module:
    """Fire modules; the classes are the channels of the last convolution."""
    features = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), fire(8, 4, 8), fire(16, 4, 8), nn.MaxPool2d(2), fire(16, 6, 12)]
    return nn.Sequential(
        *features, nn.Dropout(), nn.Conv2d(24, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """Depthwise, then pointwise."""
    return nn.Sequential(conv_norm(inputs, inputs, 3, stride, inputs), conv_norm(inputs, outputs, 1))


def mobilenet_v1() -> nn.Module:
    """Depthwise separable convolutions."""
    return nn.Sequential(
        conv_norm(3, 8, 3, 2), separable(8, 16), separable(16, 24, 2), separable(24, 24), classifier(24)
    )


def inverted(inputs: int, width: int, outputs: int, stride: int, act: type[nn.Module], gate: nn.Module) -> nn.Module:
    """Expand, depthwise, perhaps a gate, project; residual where the shape stays."""
    expand, depthwise = conv_norm(inputs, width, 1, act=act), conv_norm(width, width, 3, stride, width, act=act)
    body = nn.Sequential(expand, depthwise, gate, conv_norm(width, outputs, 1, act=nn.Identity))
    return Residual(body) if inputs == outputs and stride == 1 else body


def mobilenet_v2() -> nn.Module:
    """Inverted residuals with ReLU6."""
    shapes = [(8, 24, 12, 2), (12, 36, 12, 1), (12, 36, 16, 2), (16, 48, 16, 1)]
    blocks = [inverted(*shape, nn.ReLU6, nn.Identity()) for shape in shapes]
    return nn.Sequential(conv_norm(3, 8, act=nn.ReLU6), *blocks, conv_norm(16, 32, 1, act=nn.ReLU6), classifier(32))


def mobilenet_v3() -> nn.Module:
    """Hardswish, and squeeze and excitation with a hard gate."""
    first = inverted(8, 16, 8, 1, nn.ReLU, SqueezeExcite(16, 4, nn.Hardsigmoid))
    second = inverted(8, 24, 12, 2, nn.Hardswish, SqueezeExcite(24, 6, nn.Hardsigmoid))
    third = inverted(12, 36, 12, 1, nn.Hardswish, SqueezeExcite(36, 8, nn.Hardsigmoid))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 32), nn.Hardswish(), nn.Linear(32, 10)]
    return nn.Sequential(conv_norm(3, 8, 3, 2, act=nn.Hardswish), first, second, third, conv_norm(12, 24, 1), *head)


def efficientnet() -> nn.Module:
    """MBConv with SiLU, and squeeze and excitation."""
    shapes = [(8, 8, 8, 1), (8, 24, 12, 2), (12, 36, 12, 1), (12, 36, 16, 2)]
    blocks = [inverted(*shape, nn.SiLU, SqueezeExcite(shape[1], 4)) for shape in shapes]
    return nn.Sequential(conv_norm(3, 8, 3, 2, act=nn.SiLU), *blocks, conv_norm(16, 32, 1, act=nn.SiLU), classifier(32))


class Shuffle(nn.Module):
    """One half of the channels passes by; then both are shuffled (Ma et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        middle = conv_norm(half, half, groups=half, act=nn.Identity)
        self.body = nn.Sequential(conv_norm(half, half, 1), middle, conv_norm(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.body(right)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v2() -> nn.Module:
    """A downsampling pair of branches, then two shuffling blocks."""
    left = nn.Sequential(conv_norm(8, 8, 3, 2, 8, nn.Identity), conv_norm(8, 8, 1))
    right = nn.Sequential(conv_norm(8, 8, 1), conv_norm(8, 8, 3, 2, 8, nn.Identity), conv_norm(8, 8, 1))
    return nn.Sequential(
        conv_norm(3, 8, 3, 2), Branches(left, right), Shuffle(16), Shuffle(16), conv_norm(16, 24, 1), classifier(24)
    )


CONVOLUTIONAL: dict[str, Builder] = {
    "VGG": lambda: (vgg(), image()),
    "AlexNet": lambda: (alexnet(), image()),
    "DenseNet": lambda: (densenet(), image()),
    "GoogLeNet": lambda: (GoogLeNet(), image()),
    "SqueezeNet": lambda: (squeezenet(), image()),
    "MobileNetV1": lambda: (mobilenet_v1(), image()),
    "MobileNetV2": lambda: (mobilenet_v2(), image()),
    "MobileNetV3": lambda: (mobilenet_v3(), image()),
    "EfficientNet": lambda: (efficientnet(), image()),
    "ShuffleNetV2": lambda: (shufflenet_v2(), image()),
}
