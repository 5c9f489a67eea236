"""Shapes in annotations are checked while the tests run."""

import logging
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import install_import_hook

hook = install_import_hook(
    [
        "lightning_slim.statistics",
        "lightning_slim.scores",
        "lightning_slim.penalties",
        "lightning_slim.units",
        "lightning_slim.masks",
    ],
    "beartype.beartype",
)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


ROOT = Path(__file__).parent
CACHES = {".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"}


@pytest.fixture(autouse=True)
def _nothing_is_written_into_the_checkout() -> Iterator[None]:
    before = {path.name for path in ROOT.iterdir()}
    yield
    new = {path.name for path in ROOT.iterdir()} - before - CACHES
    assert not new, f"a test wrote {sorted(new)} into {ROOT}: give it `tmp_path`"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    import lightning_slim
    from lightning_slim.profile import count_macs
    from lightning_slim.statistics import Moments, with_lags

    doctest_namespace.update(torch=torch, nn=torch.nn, Moments=Moments, with_lags=with_lags, count_macs=count_macs)
    doctest_namespace.update({name: getattr(lightning_slim, name) for name in lightning_slim.__all__})
