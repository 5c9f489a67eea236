"""Level of the activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class ActivationMean(Score):
    """Absolute mean of what arrives at the readers: `mean over readers of |mean of the unit|` (Molchanov et al., 2017).

    The size of the constant that would stand for the unit. Behind a ReLU nothing is negative, and it is the mean
    activation of section 2.2 there; where signs cancel, as behind a normalisation, `ActivationStd` says more. Of the
    channels of a head, and of several readers, the mean counts; of a whole block, what it adds to its input.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        return UnitScores(torch.stack([r.mean.abs().mean(1) for r in evidence.heard]).mean(0).cpu())
