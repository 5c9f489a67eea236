"""Penalties that pull whole units toward zero: one file each, rows of units in, a gradient or shrinkage out."""

from lightning_slim.penalties.base import Penalty, Proximal
from lightning_slim.penalties.group_lasso import GroupLasso
from lightning_slim.penalties.growing_l2 import GrowingL2
from lightning_slim.penalties.hoyer_square import HoyerSquare
from lightning_slim.penalties.l1 import L1
from lightning_slim.penalties.norm_scale_l1 import NormScaleL1

__all__ = ["L1", "GroupLasso", "GrowingL2", "HoyerSquare", "NormScaleL1", "Penalty", "Proximal"]
