"""Of all variants of a test a few that are quick, in which every value occurs; the others are slow ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def variants(*axes: Sequence[Any], every: int) -> list[Any]:
    """All combinations of some values, for `pytest.mark.parametrize`; about one in `every` is quick."""
    numbered = itertools.product(*(enumerate(axis) for axis in axes))
    return [
        pytest.param(*(value for _, value in each), marks=[pytest.mark.slow] if sum(i for i, _ in each) % every else [])
        for each in numbered
    ]
