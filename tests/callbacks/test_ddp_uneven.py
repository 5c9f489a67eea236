"""Two processes of which one does other than the other: one decision, or one error, on both, and soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("ddp_uneven.py")
SKIPS = ("late", "early", "never", "never-taylor", "late-magnitude")  # layers, on rank 1
GO_ON = (*SKIPS, "network", "classes", "empty", "masks", "last-masks")
FAIL = ("nan", "evidence_of", "remove_units")


def test_ranks_decide_alike_or_fail_alike(tmp_path: Path) -> None:
    """Runs follow one another in the same two processes, which take longer to start than to train.

    Who waits for another rank in vain ends with an error of the process group, after 20 seconds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    command = [sys.executable, str(SCRIPT), str(tmp_path), *GO_ON, *FAIL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in (*GO_ON, *FAIL):
        first, second = (json.loads((tmp_path / f"{kind}.{rank}.json").read_text()) for rank in range(2))
        assert first["weights"] == second["weights"], kind
        if kind in GO_ON:
            assert first["told"] == second["told"] == "", kind
            assert first["zeros"] == second["zeros"] == 0.5 if "masks" in kind else first["width"] == 8, kind
            continue
        assert first["width"] == second["width"] == 16
        if kind == "nan":
            assert "ValueError: Expected finite activations" in first["told"]
            assert "ValueError: Expected finite activations" in second["told"]
        else:
            assert second["told"] == "MemoryError: no room"
            assert first["told"] == "RuntimeError: Expected all ranks to go on, got rank 1: MemoryError: no room"
