"""Class labels."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor


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
