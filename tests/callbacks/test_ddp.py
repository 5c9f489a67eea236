"""Two processes cut in step: after every batch their weights and optimizer states are equal to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif
from statsmodels.stats.multitest import multipletests

from tests.callbacks.screened import digits
from tests.networks import same

SCRIPT = Path(__file__).with_name("ddp_run.py")


def run(folder: Path, *args: str) -> list[list[dict[str, Any]]]:
    """What each of the two ranks wrote down."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *args], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    states = zip(a["state"], b["state"], strict=True)
    return same(a["weights"], b["weights"]) and all(torch.equal(x, y) for x, y in states)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("granger", "plain"),
        pytest.param("taylor", "unused", marks=pytest.mark.slow),
        pytest.param("granger", "static", marks=pytest.mark.slow),
        pytest.param("magnitude", "views", marks=pytest.mark.slow),
        pytest.param("evidence", "plain", marks=pytest.mark.slow),
    ],
)
def test_ranks_stay_equal(tmp_path: Path, kind: str, strategy: str) -> None:
    """Elsewhere the reducer goes on watching dead tensors: it raises, or, with `find_unused_parameters`, ranks drift
    apart without a word (by 1.7e-2 in three steps).
    """
    first, second = run(tmp_path, kind, strategy)
    assert len(first) == len(second) == 24
    assert (tmp_path / "report.md").exists()  # made by rank 0 alone, at a place that all agree on
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0]["weights"]["net.c1.weight"].shape[0] == 8
    assert first[-1]["weights"]["net.c1.weight"].shape[0] == 4
    last, before = first[-1]["weights"], first[-3]["weights"]
    assert all(not torch.equal(last[name], before[name]) for name in last)  # all of it still trains


@pytest.mark.slow
def test_ranks_are_equal_after_a_resume_too(tmp_path: Path) -> None:
    straight, _ = run(tmp_path / "straight", "granger", "plain")
    first, second = run(tmp_path / "resumed", "granger", "plain", str(tmp_path / "straight" / "epoch=2.ckpt"))
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-1]["weights"]["net.c1.weight"].shape == straight[-1]["weights"]["net.c1.weight"].shape


@pytest.mark.slow
def test_ranks_go_by_what_the_first_one_measured(tmp_path: Path) -> None:
    first, second = run(tmp_path, "latency", "plain")  # the second would raise if it measured
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-1]["weights"]["net.c2.weight"].shape < first[0]["weights"]["net.c2.weight"].shape


def test_ranks_mask_the_same_weights(tmp_path: Path) -> None:
    first, second = run(tmp_path, "masks", "plain")
    assert len(first) == len(second) == 24
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    masked = [first[-1]["weights"][f"net.{name}.weight"] for name in ("c1", "c2", "dw", "fc1")]
    zeros, entries = sum(int((w == 0).sum()) for w in masked), sum(w.numel() for w in masked)
    assert zeros == round(0.75 * entries)


@pytest.mark.slow
def test_ranks_lose_the_same_blocks(tmp_path: Path) -> None:
    first, second = run(tmp_path / "straight", "blocks", "plain")
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-1]["weights"].keys() < first[0]["weights"].keys()
    resumed, other = run(tmp_path / "resumed", "blocks", "plain", str(tmp_path / "straight" / "epoch=2.ckpt"))
    assert all(equal(a, b) for a, b in zip(resumed, other, strict=True))
    assert resumed[-1]["weights"].keys() == first[-1]["weights"].keys()


@pytest.mark.slow
def test_ranks_choose_the_inputs_by_the_evidence_of_all(tmp_path: Path) -> None:
    first, second = run(tmp_path, "inputs", "plain")
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    data, _ = digits()
    x, y = (part[:1792].numpy() for part in data.tensors)
    p, moves = np.ones(96), x.std(0) > 0
    p[moves] = f_classif(x[:, moves].astype(float), y)[1]
    rejected, adjusted, *_ = multipletests(p, 0.05, "fdr_bh")
    assert first[-1]["weights"]["net.1.weight"].shape == (16, rejected.sum())
    rows = [line.split("|")[1:4] for line in (tmp_path / "inputs.md").read_text().splitlines()[2:]]
    for name, stays, value in rows:
        assert stays.strip() == ("yes" if rejected[int(name)] else "no")
        assert float(value) == pytest.approx(adjusted[int(name)], rel=6e-3)
