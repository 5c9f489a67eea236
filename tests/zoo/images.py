"""Networks whose output is an image or a map, or whose input is a code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slim.surgery import Example
from tests.zoo.blocks import Builder, Residual, conv_norm, image


class UNet(nn.Module):
    """Two levels down and up, with concatenated skips (Ronneberger et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv_norm(3, 8), conv_norm(8, 12), conv_norm(12, 16)
        self.lift2, self.up2 = nn.ConvTranspose2d(16, 12, 2, 2), conv_norm(24, 12)
        self.lift1, self.up1 = nn.ConvTranspose2d(12, 8, 2, 2), conv_norm(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.lift2(self.middle(F.max_pool2d(two, 2)))
        x = self.lift1(self.up2(torch.cat([two, x], 1)))
        return self.head(self.up1(torch.cat([one, x], 1)))


class FCN(nn.Module):
    """Class maps of two depths, upsampled and added (Long et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow, self.deep = conv_norm(3, 8, 3, 2), nn.Sequential(conv_norm(8, 16, 3, 2), conv_norm(16, 16))
        self.score_shallow, self.score_deep = nn.Conv2d(8, 5, 1), nn.Conv2d(16, 5, 1)
        self.up = nn.ConvTranspose2d(5, 5, 4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.shallow(x)
        scores = self.score_shallow(shallow) + self.up(self.score_deep(self.deep(shallow)))
        return F.interpolate(scores, scale_factor=2, mode="bilinear", align_corners=False)


class FPN(nn.Module):
    """Lateral convolutions added to what comes from above; every level is an output (Lin et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv_norm(3, 8, 3, 2), conv_norm(8, 12, 3, 2), conv_norm(12, 16, 3, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(n, 10, 1) for n in (8, 12, 16)])
        self.smooth = nn.ModuleList([nn.Conv2d(10, 6, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2)
        return [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]


def autoencoder() -> nn.Module:
    """Strided convolutions, a code, transposed convolutions."""
    encoder = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(768, 10),
    ]
    decoder = [
        nn.Linear(10, 768),
        nn.ReLU(),
        nn.Unflatten(1, (12, 8, 8)),
        nn.ConvTranspose2d(12, 8, 4, 2, 1),
        nn.ReLU(),
    ]
    return nn.Sequential(*encoder, *decoder, nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid())


class VAE(nn.Module):
    """Mean and log variance of the code are outputs too, so the code stays (Kingma & Welling, 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(16, 4), nn.Linear(16, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(code).view_as(x), mean, log_variance


def generator() -> nn.Module:
    """Transposed convolutions from a code of one pixel (Radford et al., 2016)."""
    first = [nn.ConvTranspose2d(10, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.ConvTranspose2d(16, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    third = [nn.ConvTranspose2d(12, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, *second, *third, nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh())


def discriminator() -> nn.Module:
    """Strided convolutions down to one pixel."""
    act = nn.LeakyReLU(0.2)
    first = [nn.Conv2d(3, 8, 4, 2, 1), act, nn.Conv2d(8, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12), act]
    return nn.Sequential(*first, nn.Conv2d(12, 16, 4, 2, 1), nn.BatchNorm2d(16), act, nn.Conv2d(16, 1, 4), nn.Flatten())


def espcn() -> nn.Module:
    """Channels become pixels at the end (Shi et al., 2016)."""
    body = [nn.Conv2d(1, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 12, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*body, nn.Conv2d(12, 4, 3, padding=1), nn.PixelShuffle(2))


class Scaled(nn.Module):
    """A residual branch times a constant."""

    def __init__(self, body: nn.Module, scale: float) -> None:
        super().__init__()
        self.body, self.scale = body, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.body(x)


def edsr() -> nn.Module:
    """Residual blocks without norms, a long skip, a shuffle in the middle of the tail (Lim et al., 2017)."""

    def conv(inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    blocks = [Residual(Scaled(nn.Sequential(conv(12, 16), nn.ReLU(), conv(16, 12)), 0.1)) for _ in range(2)]
    tail = [conv(12, 48), nn.PixelShuffle(2), conv(12, 3)]
    return nn.Sequential(conv(3, 12), Residual(nn.Sequential(*blocks, conv(12, 12))), *tail)


IMAGES: dict[str, Builder] = {
    "U-Net": lambda: (UNet(), image()),
    "FCN": lambda: (FCN(), image()),
    "FPN": lambda: (FPN(), image()),
    "autoencoder": lambda: (autoencoder(), image()),
    "VAE": lambda: (VAE(), image(1, 8)),
    "DCGAN generator": lambda: (generator(), Example((torch.randn(2, 10, 1, 1),))),
    "DCGAN discriminator": lambda: (discriminator(), image()),
    "ESPCN": lambda: (espcn(), image(1, 16)),
    "EDSR": lambda: (edsr(), image(3, 16)),
}
