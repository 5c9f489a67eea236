"""Imports point down, and importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGE = Path(__file__).parent.parent / "lightning_slim"

# What each part may import of the package, beside `arguments`. A part is a folder or a file of its first level.
MAY_IMPORT = {
    "arguments": set(),
    "aside": set(),
    "transaction": {"aside"},
    "weight_norm": set(),
    "units": {"weight_norm"},
    "statistics": set(),
    "witness": set(),
    "losses": set(),
    "schedules": set(),
    "penalties": set(),
    "eager": set(),
    "flows": set(),
    "profile": {"eager"},
    "payload": set(),
    "history": {"payload"},
    "ranks": set(),
    "skipping": set(),
    "scores": {"flows", "statistics", "witness"},
    "guards": {"scores", "statistics"},
    "costs": {"units"},
    "budgets": {"costs"},
    "accuracy": {"budgets", "costs", "monitor"},
    "isomorphism": {"units", "weight_norm"},
    "selection": {"budgets", "costs", "isomorphism", "skipping", "units"},
    "patches": {"units"},
    "latency": {"costs", "profile", "surgery", "units", "weight_norm"},
    "recording": {"aside", "eager", "patches", "ranks", "statistics", "surgery", "units", "witness"},
    "surgery": {"aside", "costs", "eager", "profile", "units", "weight_norm"},
    "capture": {"eager", "surgery"},
    "folding": {"statistics", "surgery", "units"},
    "checkpoint": {"payload", "surgery", "units"},
    "report": {"profile", "surgery", "weight_norm"},
    "input_evidence": {"statistics"},
    "input_screener": {
        "eager", "history", "input_evidence", "payload", "ranks", "surgery", "transaction", "units",
    },
    "masks": {"flows", "scores", "skipping", "statistics", "weight_norm", "witness"},
    "masker": {
        "history", "masks", "payload", "ranks", "recording", "schedules", "skipping", "surgery", "transaction", "units",
    },
    "candidates": {"costs", "ranks", "scores", "skipping", "surgery", "units"},
    "evidence": {"recording", "scores", "statistics", "surgery", "units", "weight_norm", "witness"},
    "pruner": {
        "budgets", "candidates", "checkpoint", "costs", "evidence", "folding", "guards", "history",
        "latency", "patches", "payload", "ranks", "recording", "schedules", "scores", "selection", "skipping",
        "surgery", "transaction", "units",
    },
    "monitor": set(),
    "chart": set(),
    "sensitivity": {"chart", "costs", "monitor", "selection", "units"},
    "explore": {"budgets", "chart", "costs", "monitor", "selection", "units"},
    "regularizer": {
        "candidates", "payload", "penalties", "ranks", "scores", "skipping", "surgery", "units", "weight_norm",
    },
    "callbacks": {
        "accuracy", "budgets", "candidates", "capture", "checkpoint", "eager", "explore", "flows",
        "folding", "guards", "history", "input_evidence", "input_screener", "losses", "masker", "masks",
        "monitor", "payload", "penalties", "pruner", "ranks", "recording", "regularizer", "report", "schedules",
        "scores", "selection", "sensitivity", "skipping", "surgery", "transaction", "units", "weight_norm",
    },
    "cli": {"callbacks"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = {name.split(".")[1] for name in imports(path) if name.startswith("lightning_slim.")}
    assert own - {part(path), "arguments"} <= MAY_IMPORT[part(path)]


def test_lightning_lives_in_callbacks_and_cli_only() -> None:
    users = {part(path) for path in FILES if any(name.split(".")[0] == "lightning" for name in imports(path))}
    assert users == {"callbacks", "cli"}


def test_only_tracing_and_the_graph_know_torch_pruning() -> None:
    users = {path.name for path in FILES if any(name.startswith("torch_pruning") for name in imports(path))}
    assert users == {"graph.py", "tracing.py"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch_pruning", "torchao", "onnx", "sklearn", "matplotlib", "torchvision"}
    code = f"import sys, lightning_slim; print([m for m in sys.modules if m in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    import lightning_slim

    assert sorted(lightning_slim.__all__) == lightning_slim.__all__
    assert all(hasattr(lightning_slim, name) for name in lightning_slim.__all__)


def test_compromised_releases_of_lightning_are_not_installed() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    asked = [Requirement(line) for line in re.findall(r'"((?:pytorch-)?lightning[<>=!].*?)"', text)]
    assert len(asked) == 2
    for requirement in asked:
        assert "2.6.2" not in requirement.specifier
        assert "2.6.3" not in requirement.specifier
        assert "2.6.1" in requirement.specifier
