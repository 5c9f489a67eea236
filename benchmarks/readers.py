"""Public files as they are handed out, plain or compressed: idx images, `.ts` sequences, `.csv` series."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import torch
from torch import Tensor

OPEN = {".gz": gzip.open, ".xz": lzma.open}


def find(folder: Path, name: str) -> Path:
    """A file anywhere below a folder, as it is or with `.gz` or `.xz` behind its name.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in sorted(folder.rglob(f"{name}*")):
        if path.name in (name, f"{name}.gz", f"{name}.xz"):
            return path
    raise FileNotFoundError(f"Expected {name} (or .gz, .xz) below {folder}, found none: give --data its folder.")


def content(path: Path) -> bytes:
    """What a file holds, decompressed."""
    with OPEN.get(path.suffix, open)(path, "rb") as file:  # type: ignore[operator]
        return bytes(file.read())


def read_idx(path: Path) -> Tensor:
    """An idx file of bytes (LeCun's format): two zeros, the type, the number of dimensions, their sizes, the values."""
    raw = content(path)
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.frombuffer(bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8).view(sizes)


def read_ts(path: Path) -> tuple[list[Tensor], list[str]]:
    """A `.ts` file of the UEA and UCR archives: sequences (steps, dimensions) and their class labels.

    Behind `@data` every line is a sequence: dimensions are split by colons, values by commas, the label comes last.
    """
    lines = content(path).decode().splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().lower() == "@data")
    sequences, labels = [], []
    for line in filter(str.strip, lines[start + 1 :]):
        *dimensions, label = line.split(":")
        sequences.append(torch.tensor([[float(v) for v in values.split(",")] for values in dimensions]).T)
        labels.append(label.strip())
    return sequences, labels


def read_csv(path: Path) -> Tensor:
    """A `.csv` file with a line of names and a first column of dates: (rows, columns)."""
    rows = content(path).decode().splitlines()[1:]
    return torch.tensor([[float(v) for v in row.split(",")[1:]] for row in rows])
