"""Behind a fit: a checkpoint that a user saves then resumes, and a full disk fails no run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_slim import Magnitude, OneShot, Prune, Units
from tests.callbacks.runs import Lit, loader, trainer


def prune() -> Prune:
    return Prune(Magnitude(), Units(0.5), schedule=OneShot(0.3), print_report=False)


def test_a_checkpoint_saved_behind_the_fit_resumes(tmp_path: Path) -> None:
    lit, first = Lit(), trainer(tmp_path, prune(), max_epochs=2)
    first.fit(lit, loader())
    first.save_checkpoint(tmp_path / "final.ckpt")
    resumed, again = Lit(), prune()
    trainer(tmp_path, again, max_epochs=3).fit(resumed, loader(), ckpt_path=str(tmp_path / "final.ckpt"))
    assert [p.shape for p in resumed.parameters()] == [p.shape for p in lit.parameters()]
    assert len(again.history.events) == 1
    assert all(torch.isfinite(p).all() for p in resumed.parameters())


def test_a_report_that_cannot_be_saved_fails_no_run(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()  # a file of that name cannot be written
    with pytest.warns(UserWarning, match="could not be saved"):
        trainer(tmp_path, Prune(Magnitude(), Units(0.5), schedule=OneShot(0.3)), max_epochs=2).fit(
            Lit(), loader(), loader()
        )
