"""All architectures, by name."""

from __future__ import annotations

from tests.zoo.attention import ATTENTION
from tests.zoo.blocks import Builder
from tests.zoo.convolutional import CONVOLUTIONAL
from tests.zoo.huggingface import HUGGINGFACE
from tests.zoo.images import IMAGES
from tests.zoo.libraries import LIBRARIES
from tests.zoo.perceptrons import PERCEPTRONS
from tests.zoo.residual import RESIDUAL
from tests.zoo.sequences import SEQUENCES

ZOO: dict[str, Builder] = {
    **CONVOLUTIONAL,
    **RESIDUAL,
    **IMAGES,
    **ATTENTION,
    **SEQUENCES,
    **PERCEPTRONS,
    **HUGGINGFACE,
    **LIBRARIES,
}
