"""Everything shown runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


PAGES = ["before_and_after", "granger_prune", "input_screening", "sparsity_regularization", "weight_prune"]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/methods/{name}.md" for name in PAGES)])
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
    assert "left (" in out or "weights are zero" in out


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, (page, missing)
