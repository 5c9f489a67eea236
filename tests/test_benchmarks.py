"""What the benchmark of scores reads and prints, on files and results written by hand."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import readers

    return readers


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    return tables


TS = b"# a comment: 1\n@problemName X\n@classLabel true a b\n@data\n1,2,3:4,5,6:b\n\n7,8.5:9,-1e1:a\n"


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_ts_files(readers: ModuleType, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "below").mkdir()
    pack = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix]
    (tmp_path / "below" / f"X_TRAIN.ts{suffix}").write_bytes(pack(TS))
    sequences, labels = readers.read_ts(readers.find(tmp_path, "X_TRAIN.ts"))
    assert labels == ["b", "a"]
    assert [s.tolist() for s in sequences] == [[[1, 4], [2, 5], [3, 6]], [[7, 9], [8.5, -10]]]


def test_idx_files(readers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])))
    assert torch.equal(readers.read_idx(path), torch.tensor([[[1, 2, 3]], [[4, 5, 255]]], dtype=torch.uint8))


def test_csv_files(readers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    path.write_text("date,a,b\n2016-07-01 00:00:00,1.5,2\n2016-07-01 01:00:00,3,-4\n")
    assert readers.read_csv(path).tolist() == [[1.5, 2.0], [3.0, -4.0]]


def test_absent_files_are_named(readers: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ETTh1\.csv"):
        readers.find(tmp_path, "ETTh1.csv")


def test_tables_show_means_and_paired_differences(tables: ModuleType) -> None:
    arm = {"kind": "one-shot", "remaining": 0.3, "compensate": "none", **tables.PLAIN}
    losses = {"A": (0.1, 0.2, 0.3), "B": (0.2, 0.4, 0.3)}  # means 0.2 and 0.3; differences 0.1, 0.2, 0.0
    lines = [
        {"seed": seed, "arm": {**arm, "score": name}, "cut": {"loss": loss}, "end": {"loss": loss}}
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    printed = tables.tables(lines, "A")
    # standard errors: 0.1 / sqrt(3), of the losses of A and B and of the differences
    assert "| A | 0.200 ± 0.058 | 0.200 ± 0.058 |" in printed
    assert "| B | 0.300 ± 0.058 | 0.300 ± 0.058 |" in printed
    assert "| B | +0.100 ± 0.058 | +0.100 ± 0.058 |" in printed
