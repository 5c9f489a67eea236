"""Patterns of zeros: one file each."""

from lightning_slim.masks.patterns.base import Pattern
from lightning_slim.masks.patterns.block import Block
from lightning_slim.masks.patterns.n_of_m import NM
from lightning_slim.masks.patterns.unstructured import Unstructured

__all__ = ["NM", "Block", "Pattern", "Unstructured"]
