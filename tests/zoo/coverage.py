"""Writes docs/coverage.md: what is cut of every architecture, what stays whole, and why.

python -m tests.zoo.coverage
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_slim.profile import count_macs
from lightning_slim.surgery import Example, find_blocks
from lightning_slim.surgery.verify import vet_blocks
from tests.zoo.networks import ZOO
from tests.zoo.test_zoo import KNOWN_BUGS, build, new_pruner

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

INTRODUCTION = """\
# What is cut of which network

Well-known architectures at tiny widths, written in plain torch ([tests/zoo](../tests/zoo)); those marked
*transformers*, *torchvision* or *timm* are that library's own classes at small sizes, and are left out where it is not
installed. Of each, half of the units that can go are cut (`Units(0.5)`), so what is left of the MACs depends on what
stays whole. MACs are counted, for one sample, before and after; seconds are those of `Pruner.prepare` on one thread.
*Left whole* says how many layers stay for which reason: those that make an output always do. *Blocks* is how many
residual blocks could go as well (`granularity="both"`). Written by
`python -m tests.zoo.coverage`, and [tested](../tests/zoo/test_zoo.py); where the tests know of a bug, there is a †.

| architecture | groups | units | blocks | left whole | MACs | after | ratio | seconds |
|---|---:|---:|---:|---|---:|---:|---:|---:|
"""

# What a reason says -> in short; the first that is found counts.
SHORT = {
    "an input or an output": "at an input or output",
    "an index mapping went astray": "(all) channels could not be followed",
    r"and (\w+) is not understood": r"at \1, not understood",
    "is under spectral norm": "under spectral norm",
    "is parametrized": "parametrized",
    "is tied": "tied",
    "could not be followed|cannot follow": "channels could not be followed",
    r"it has \d+ units": "too few units",
    "the network fails without them.*(shape '|unflatten)": "view of fixed sizes",
    "the network fails without them.*pixel_shuffle": "pixel shuffle",
    "the network fails without them": "the network fails without",
    "the outputs change": "the outputs would change",
    "must keep as many units": "beside a layer that stays",
}


def short(reason: str) -> str:
    """A reason in a few words."""
    found = (match.expand(words) for pattern, words in SHORT.items() if (match := re.search(pattern, reason)))
    return next(found, reason)


def summary(left_whole: Mapping[str, str]) -> str:
    """How many layers stay for which reason."""
    return ", ".join(f"{count} {words}" for words, count in Counter(map(short, left_whole.values())).items())


def row(name: str) -> str:
    """One architecture: prepared, cut, and counted."""
    network, example = build(name)
    before = sum(count_macs(network, *example[:2]).values())
    blocks = blocks_of(network, example)
    pruner = new_pruner(network)
    begin = time.perf_counter()
    with suppress(ValueError):  # nothing can be removed
        pruner.prepare(example)
    seconds = time.perf_counter() - begin
    units = sum(pruner.widths.values())
    if pruner.prepared:
        pruner.step(0.5)
    after = sum(count_macs(network, *example[:2]).values())
    samples = len(next(leaf for leaf in tree_leaves(tuple(example)) if isinstance(leaf, Tensor)))
    marked = f"{name} †" if any(f"[{name}" in test for test in KNOWN_BUGS) else name
    macs = f"{before // samples:,} | {after // samples:,} | {after / before:.2f}"
    left = summary(pruner.left_whole)
    return f"| {marked} | {len(pruner.groups)} | {units} | {blocks} | {left} | {macs} | {seconds:.2f} |\n"


def blocks_of(network: nn.Module, example: Example) -> int:
    """How many residual blocks can go."""
    groups = find_blocks(network, example)
    return sum(group.size for group in groups) - len(vet_blocks(network, groups, {"": example}))


def main() -> None:
    """One row for each architecture; those of libraries are left out where these are not installed."""
    torch.set_num_threads(1)
    rows = []
    for name in ZOO:
        with suppress(pytest.skip.Exception):
            rows.append(row(name))
    PAGE.write_text(INTRODUCTION + "".join(rows))


if __name__ == "__main__":
    main()
