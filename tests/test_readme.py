"""Everything shown runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


PAGES = sorted(path.name for path in (ROOT / "docs" / "methods").glob("*.md") if blocks(path))


def test_the_first_page_runs_in_an_empty_folder(tmp_path: Path) -> None:
    """As it stands, and with nothing of the checkout but the package."""
    (tmp_path / "run.py").write_text("\n".join(blocks(ROOT / "README.md")))
    shown = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"left \(50.0% asked\)", shown.stderr)
    assert re.search(r"MACs +│ 1,254,016 │ +6\d\d,\d\d\d │ +4\d\.\d%", shown.stdout)
    assert (tmp_path / "logs/lightning_logs/version_0/report.md").exists()
    assert (tmp_path / "logs/lightning_logs/version_1/metrics.csv").exists()


@pytest.mark.parametrize("page", [f"docs/methods/{name}" for name in PAGES])
def test_the_python_blocks_of_a_page_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    names: dict[str, object] = {}
    for block in blocks(ROOT / page):
        exec(compile(block, page, "exec"), names)
    assert blocks(ROOT / page)
    out = capsys.readouterr().out
    assert any(told in out for told in ("left (", "left, ", "weights are zero", "drawn structures"))


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, (page, missing)
