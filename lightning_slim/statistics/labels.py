"""Class labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MIN_CLASSES = 16


def check_labels(labels: Int[Tensor, "rows"], classes: int) -> Int[Tensor, "rows"]:
    """Labels as int64, once all of them are among the classes.

    Raises:
        ValueError: one is not.
    """
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"Expected labels 0 ... {classes - 1}, got {int(labels.min())} ... {int(labels.max())}: leave out rows "
            f"without a class (such as `ignore_index`), or raise `classes`."
        )
    return labels.long()


def classes_in(labels: Int[Tensor, "rows"]) -> int:
    """Room for the classes seen so far, and some more: 16, or a power of two; ranks that saw others agree on it."""
    most = int(labels.max()) + 1 if len(labels) else 0
    return max(MIN_CLASSES, 1 << (most - 1).bit_length()) if most > 0 else MIN_CLASSES


def as_targets(known: Tensor) -> Float[Tensor, "rows targets"]:
    """What is known of each row as numbers: classes one-hot, everything else as it is."""
    if known.ndim == 1 and not known.is_floating_point():
        return F.one_hot(known.long(), classes_in(known)).to(torch.float64)
    return known.to(torch.float64).flatten(1) if known.ndim > 1 else known.to(torch.float64)[:, None]
