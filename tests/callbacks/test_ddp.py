"""Two processes cut in step: after every batch their weights and optimizer states are equal to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.feature_selection import f_classif
from statsmodels.stats.multitest import multipletests

from lightning_slim import WeightScore, WeightWanda
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.screened import digits
from tests.masks.test_contract import SCORES
from tests.networks import images, same

SCRIPT = Path(__file__).with_name("ddp_run.py")


Rank = list[dict[str, Any]]  # what one rank wrote down, after every batch


def start(folder: Path, *runs: str) -> None:
    """Two processes carry out one run after the other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    command = [sys.executable, str(SCRIPT), str(folder), *runs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def written(folder: Path, kind: str) -> list[Rank]:
    return [torch.load(folder / kind / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def run(folder: Path, kind: str, strategy: str, *checkpoint: str) -> list[Rank]:
    start(folder, ":".join((kind, strategy, *checkpoint)))
    return written(folder, kind)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    states = zip(a["state"], b["state"], strict=True)
    return same(a["weights"], b["weights"]) and all(torch.equal(x, y) for x, y in states)


def check_cut(folder: Path, kind: str) -> None:
    """Elsewhere the reducer goes on watching dead tensors: it raises, or, with `find_unused_parameters`, ranks drift
    apart without a word (by 1.7e-2 in three steps).
    """
    first, second = written(folder, kind)
    assert len(first) == len(second) == 24
    assert (folder / kind / "report.md").exists()  # made by rank 0 alone, at a place that all agree on
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0]["weights"]["net.c1.weight"].shape[0] == 8
    assert first[-1]["weights"]["net.c1.weight"].shape[0] == 4
    last, before = first[-1]["weights"], first[-3]["weights"]
    assert all(not torch.equal(last[name], before[name]) for name in last)  # all of it still trains


def check_masked(folder: Path, kind: str) -> None:
    """Inputs are other ones on each rank: what rank 0 heard decides."""
    first, second = written(folder, kind)
    assert len(first) == len(second) == 24
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    masked = [first[-1]["weights"][f"net.{name}.weight"] for name in ("c1", "c2", "dw", "up", "fc1")]
    zeros, entries = sum(int((w == 0).sum()) for w in masked), sum(w.numel() for w in masked)
    assert zeros == round(0.75 * entries)


def check_rolled_back(folder: Path, kind: str) -> None:
    """Every step is rolled back, and halved; after each, the wrapper is made anew."""
    first, second = written(folder, kind)
    assert len(first) == len(second) == 24
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    widths = [snapshot["weights"]["net.c1.weight"].shape[0] for snapshot in first]
    assert widths[0] == 8
    assert widths[2] < widths[6] <= 8


def check_masked_before_training(folder: Path, kind: str) -> None:
    """SNIP: the product with the mean of the ranks' gradients, each of its own first batch."""
    first, second = written(folder, kind)
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    (x, y), order = images(7, 64), torch.randperm(64, generator=torch.Generator().manual_seed(0))  # the sampler's
    gradients = []
    for rank in range(2):
        lit, batch = Lit(), order[rank:16:2]
        F.cross_entropy(lit.net(x[batch]), y[batch]).backward()
        gradients.append(lit.net)
    names = [f"{name}.weight" for name in ("c1", "c2", "dw", "up", "fc1")]
    zero = torch.cat([first[-1]["weights"][f"net.{name}"].flatten() == 0 for name in names])
    scores = [
        (net.get_parameter(name).detach() * sum(n.get_parameter(name).grad for n in gradients)).abs().flatten()
        for net, name in ((gradients[0], name) for name in names)
    ]
    assert torch.equal(zero, torch.cat(scores) <= torch.cat(scores)[zero].max())
    assert int(zero.sum()) == round(0.75 * zero.numel())


def check_sensitivity(folder: Path, kind: str) -> None:
    first, second = written(folder, kind)
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    tables = [json.loads((folder / kind / f"table{rank}.json").read_text()) for rank in range(2)]
    assert tables[0] == tables[1]
    # each rank validates on its half of the data, and the mean of both is that of all
    module = Lit()
    module.load_state_dict(torch.load(folder / kind / "epoch=1.ckpt", weights_only=True)["state_dict"])
    (expected,) = trainer(folder).validate(module, loader(64), verbose=False)
    assert tables[0]["whole"]["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


USUAL = {
    "granger:plain": check_cut,
    "WeightWanda:plain": check_masked,
    "guard:plain": check_rolled_back,
    "start masks:static": check_masked_before_training,
    "sensitivity:plain": check_sensitivity,
}


def test_ranks_stay_in_step(tmp_path: Path) -> None:
    start(tmp_path, *USUAL)
    for name, check in USUAL.items():
        check(tmp_path, name.partition(":")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"), [("taylor", "unused"), ("granger", "static"), ("magnitude", "views"), ("evidence", "plain")]
)
def test_ranks_stay_in_step_with_any_reducer(tmp_path: Path, kind: str, strategy: str) -> None:
    run(tmp_path, kind, strategy)
    check_cut(tmp_path, kind)


@pytest.mark.slow
def test_ranks_are_equal_after_a_resume_too(tmp_path: Path) -> None:
    straight, _ = run(tmp_path / "straight", "granger", "plain")
    first, second = run(
        tmp_path / "resumed", "granger", "plain", str(tmp_path / "straight" / "granger" / "epoch=2.ckpt")
    )
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-1]["weights"]["net.c1.weight"].shape == straight[-1]["weights"]["net.c1.weight"].shape


@pytest.mark.slow
def test_ranks_go_by_what_the_first_one_measured(tmp_path: Path) -> None:
    first, second = run(tmp_path, "latency", "plain")  # the second would raise if it measured
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-1]["weights"]["net.c2.weight"].shape < first[0]["weights"]["net.c2.weight"].shape


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SCORES if kind is not WeightWanda])
def test_ranks_mask_the_same_weights(tmp_path: Path, kind: type[WeightScore]) -> None:
    run(tmp_path, kind.__name__, "plain")
    check_masked(tmp_path, kind.__name__)


@pytest.mark.slow
def test_ranks_pull_the_same_units_alike(tmp_path: Path) -> None:
    """The penalty is added once, behind the mean over ranks."""
    first, second = run(tmp_path, "penalty", "plain")
    assert len(first) == len(second) == 24
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["start", "end"])
def test_ranks_cut_in_step_before_and_after_training(tmp_path: Path, kind: str) -> None:
    first, second = run(tmp_path, kind, "plain")
    assert len(first) == len(second) == 24
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0]["weights"]["net.c1.weight"].shape[0] == (4 if kind == "start" else 8)
    assert first[-1]["weights"]["net.c1.weight"].shape[0] == 4
    last, before = first[-1]["weights"], first[-3]["weights"]
    assert all(not torch.equal(last[name], before[name]) for name in last)


@pytest.mark.slow
def test_ranks_lose_the_same_blocks(tmp_path: Path) -> None:
    first, second = run(tmp_path / "straight", "blocks", "plain")
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-1]["weights"].keys() < first[0]["weights"].keys()
    resumed, other = run(
        tmp_path / "resumed", "blocks", "plain", str(tmp_path / "straight" / "blocks" / "epoch=2.ckpt")
    )
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
    rows = [line.split("|")[1:4] for line in (tmp_path / "inputs" / "inputs.md").read_text().splitlines()[2:]]
    for name, stays, value in rows:
        assert stays.strip() == ("yes" if rejected[int(name)] else "no")
        assert float(value) == pytest.approx(adjusted[int(name)], rel=6e-3)
