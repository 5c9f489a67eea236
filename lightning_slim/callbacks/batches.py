"""Items of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


def item_of(batch: Any, which: int | str, remedy: str) -> Tensor:
    """One item of a batch, by its place or its key.

    Args:
        batch: a list, a tuple or a mapping.
        which: its place or its key.
        remedy: what to set if it is not there.

    Raises:
        MisconfigurationException: there is none, or it is no tensor.
    """
    if isinstance(batch, Mapping):
        known = list(batch)
    else:
        known = list(range(len(batch))) if isinstance(batch, list | tuple) else []
    item = batch[which] if which in known else None
    if not isinstance(item, Tensor):
        raise MisconfigurationException(
            f"Expected a tensor at {which!r} of a batch, got {type(item).__name__} in a {type(batch).__name__} "
            f"with {known}: set {remedy}."
        )
    return item
