"""Absolute values of the scales of normalisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.penalties.base import Entries
from lightning_slim.penalties.l1 import L1


@dataclass(frozen=True)
class NormScaleL1(L1):
    """Network slimming: `sum |gamma|` over the scales of each unit's normalisations (Liu et al., 2017).

    Batch, instance, group, layer and RMS norms of torch count; groups that pass none are not penalised. It belongs to
    the score `BatchNormScale`.
    """

    of: ClassVar[Entries] = "scales"
