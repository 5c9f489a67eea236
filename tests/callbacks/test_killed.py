"""Runs that are killed at any moment and resumed end as the one that nothing disturbed, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_as_the_undisturbed_one(tmp_path: Path, kills: int) -> None:
    """Weights, optimizer, learning rate, history, trials, masks and metrics."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    print(f"killed {report['killed']} times in {report['runs']} runs; differ: {report['differ']}")  # noqa: T201
    assert report["killed"] >= kills
    assert report["differ"] == []
    assert {trial.rpartition(" ")[2] for trial in report["trials"]} == {"kept", "back"}
