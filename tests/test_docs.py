"""The pages on schedules and budgets are whole, and their pictures are of what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lightning_slim.budgets import Budget
from lightning_slim.schedules import Schedule

DOCS = Path(__file__).parent.parent / "docs"


def listed(page: str) -> list[str]:
    """First entries of the rows of a page's first table."""
    table = (DOCS / page).read_text().split("|---|", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def test_every_schedule_and_every_budget_is_on_its_page() -> None:
    assert listed("schedules.md") == [kind.__name__ for kind in Schedule.__subclasses__()]
    assert listed("budgets.md") == [kind.__name__ for kind in Budget.__subclasses__()]


@pytest.mark.parametrize("kind", Schedule.__subclasses__())
def test_every_schedule_has_an_example(kind: type[Schedule]) -> None:
    assert f">>> [{kind.__name__}(" in (kind.__doc__ or "") or f"({kind.__name__}(" in (kind.__doc__ or "")


def test_the_picture_is_what_the_schedules_are() -> None:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    picture = (DOCS / "schedules.svg").read_text()
    assert pictures.draw() == picture
    root = ElementTree.fromstring(picture)
    svg = "{http://www.w3.org/2000/svg}"
    names = [text.text for text in root.iter(f"{svg}text") if text.get("font-weight")]
    assert names == [kind.__name__ for kind in Schedule.__subclasses__()]
    for kind, box, line in zip(
        Schedule.__subclasses__(), list(root.iter(f"{svg}rect"))[1:], root.iter(f"{svg}polyline"), strict=True
    ):
        left, top, width, height = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        for point in (line.get("points") or "").split()[::60]:
            x, y = map(float, point.split(","))
            assert 1 - (y - top) / height == pytest.approx(kind()((x - left) / width), abs=0.01)


@pytest.mark.parametrize("page", ["schedules.md", "budgets.md"])
def test_the_python_of_a_page_prints_what_it_says(page: str, capsys: pytest.CaptureFixture) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
        said = re.findall(r"print\(.*\)  # (.*)", block)
        assert said
        assert capsys.readouterr().out.splitlines() == said
