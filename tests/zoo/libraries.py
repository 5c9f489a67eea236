"""Classes of torchvision and timm at small sizes; the libraries are imported when one is built."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from lightning_slim.surgery import Example
from tests.zoo.blocks import Builder, image


def library(name: str) -> ModuleType:
    """A library by name; skips the test where it cannot be imported, whatever the reason.

    A torchvision that was built for another torch fails half-way. What it leaves behind is thrown away: others take the
    presence of a module for that of the library.
    """
    before = set(sys.modules)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # a broken installation raises what it likes
        for module in set(sys.modules) - before:
            if module.split(".")[0] in ("torchvision", "timm"):
                del sys.modules[module]
        pytest.skip(f"{name} cannot be imported ({type(error).__name__}: {error})")


def builder(package: str, model: str, example: Callable[[], Example] = image, **settings: Any) -> Builder:
    """Builds a model by the name of its class or function."""

    def build() -> tuple[nn.Module, Example]:
        return getattr(library(package), model)(**settings), example()

    return build


def torchvision(model: str, size: int = 32, **settings: Any) -> Builder:
    """A model of torchvision, without weights."""
    return builder("torchvision.models", model, lambda: image(size=size), **{"num_classes": 10, **settings})


def timm(model: str, **settings: Any) -> Builder:
    """A model of timm by its name there, without weights."""
    return builder("timm", "create_model", model_name=model, num_classes=10, **settings)


def convnext() -> tuple[nn.Module, Example]:
    """torchvision's ConvNeXt, in two stages."""
    module = library("torchvision.models.convnext")
    blocks = [module.CNBlockConfig(16, 24, 2), module.CNBlockConfig(24, None, 1)]
    return module.ConvNeXt(blocks, stochastic_depth_prob=0.0, num_classes=10), image()


def vgg() -> tuple[nn.Module, Example]:
    """torchvision's VGG-11 with narrow layers: those of its classifier alone have a hundred million weights."""
    module = library("torchvision.models.vgg")
    widths = [8, "M", 16, "M", 24, 24, "M", 32, 32, "M", 32, 32, "M"]
    network = module.VGG(module.make_layers(widths, batch_norm=True), init_weights=False)
    network.classifier = nn.Sequential(
        nn.Linear(32 * 7 * 7, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Linear(64, 10)
    )
    return network, image()


MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32, "num_classes": 10}
VIT = {"patch_size": 8, "num_heads": 4}
SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 1], "num_heads": [4, 4], "window_size": [4, 4]}
TIMM_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (4, 4), "window_size": 4}

LIBRARIES: dict[str, Builder] = {
    "ResNet-18 (torchvision)": torchvision("resnet18"),
    "ResNet-50 (torchvision)": torchvision("resnet50"),
    "ResNeXt-50 (torchvision)": torchvision("resnext50_32x4d"),
    "VGG-11 (torchvision)": vgg,
    "DenseNet (torchvision)": torchvision("DenseNet", growth_rate=8, block_config=(3, 3, 3), num_init_features=16),
    "DenseNet-121 (torchvision)": torchvision("densenet121"),
    "MobileNetV2 (torchvision)": torchvision("mobilenet_v2", width_mult=0.25),
    "MobileNetV3 (torchvision)": torchvision("mobilenet_v3_small", width_mult=0.5),
    "EfficientNet-B0 (torchvision)": torchvision("efficientnet_b0"),
    "GoogLeNet (torchvision)": torchvision("googlenet", aux_logits=False, init_weights=False),
    "ShuffleNetV2 (torchvision)": torchvision("shufflenet_v2_x0_5"),
    "SqueezeNet (torchvision)": torchvision("squeezenet1_1"),
    "RegNetY (torchvision)": torchvision("regnet_y_400mf"),
    "ConvNeXt (torchvision)": convnext,
    "Swin (torchvision)": torchvision("SwinTransformer", **SWIN),
    "ViT (torchvision)": torchvision(
        "VisionTransformer", image_size=32, num_layers=2, hidden_dim=32, mlp_dim=64, **VIT
    ),
    "ResNet-18 (timm)": timm("resnet18", channels=(8, 16, 24, 32)),
    "EfficientNet (timm)": timm("tinynet_e"),
    "ConvNeXt (timm)": timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    "ViT (timm)": timm("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, mlp_ratio=2.0, **VIT),
    "Swin (timm)": timm("swin_tiny_patch4_window7_224", **TIMM_SWIN),
    "Mixer (timm)": builder(
        "timm.models", "MlpMixer", num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=32
    ),
}
