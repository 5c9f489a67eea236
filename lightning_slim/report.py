"""The table at the end: dense beside slim."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from lightning_slim.profile import Profile, bytes_on_disk, count_macs, evaluating, time_side_by_side
from lightning_slim.surgery import Example
from lightning_slim.surgery.example import as_example
from lightning_slim.weight_norm import settle


@dataclass(frozen=True)
class Report:
    """Two models side by side.

    Attributes:
        dense: before.
        slim: after.
        left_whole: layer -> why nothing was removed from it.
    """

    dense: Profile
    slim: Profile
    left_whole: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, dense, slim, slim against dense), readable; metrics get their difference, all else the ratio."""
        dense, slim = self.dense, self.slim
        table = [
            (name, f"{a:,}", f"{b:,}", f"{b / a:.1%}" if a else "-")
            for name, a, b in (
                ("params", dense.params, slim.params),
                ("MACs", dense.macs, slim.macs),
                ("bytes on disk", dense.bytes, slim.bytes),
            )
        ]
        a, b = dense.latency_ms, slim.latency_ms
        table.append(("CPU latency (median)", f"{a:.3f} ms", f"{b:.3f} ms", f"{b / a:.1%}"))
        for name, value in slim.metrics.items():
            known = dense.metrics.get(name)
            before, change = ("-", "-") if known is None else (f"{known:.4f}", f"{value - known:+.4f}")
            table.append((name, before, f"{value:.4f}", change))
        return table

    def to_json(self) -> str:
        """Keys `dense` and `slim` (`params`, `macs`, `bytes`, `latency_ms`, `metrics` each), and `left_whole`."""
        return json.dumps(asdict(self), indent=2)

    def to_markdown(self) -> str:
        """A Markdown table, and what was left whole."""
        lines = ["| | dense | slim | slim / dense |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        if self.left_whole:
            lines += ["", "Left whole:", "", *(f"- {layer}: {reason}" for layer, reason in self.left_whole.items())]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()

    def __rich__(self) -> Table:
        whole = "\n".join(f"{layer} stays whole: {reason}" for layer, reason in self.left_whole.items())
        table = Table(title="dense and slim", caption=whole or None, caption_justify="left")
        for column in ("", "dense", "slim", "slim / dense"):
            table.add_column(column, justify="right" if column else "left")
        for row in self.rows():
            table.add_row(*row)
        return table

    def save(self, folder: str | Path) -> None:
        """Writes `report.json` and `report.md`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(self.to_json() + "\n")
        (folder / "report.md").write_text(self.to_markdown())


def report(
    dense: nn.Module,
    slim: nn.Module,
    example_inputs: Any = None,
    *,
    networks: Mapping[str, Any] | None = None,
    dense_metrics: Mapping[str, float] | None = None,
    slim_metrics: Mapping[str, float] | None = None,
    left_whole: Mapping[str, str] | None = None,
) -> Report:
    """Measures two models side by side on the CPU; neither is changed.

    Args:
        dense: the original.
        slim: the pruned one, with the same submodules.
        example_inputs: one call: a tensor, a tuple of arguments or a dict of keyword arguments.
        networks: instead, one call for each of several submodules: dotted name -> example inputs.
        dense_metrics: for the table.
        slim_metrics: for the table.
        left_whole: layer -> why nothing was removed from it, for the table.
    """
    calls = {"": as_example(example_inputs)} if networks is None else networks
    calls = {name: Example(*_to_cpu(tuple(as_example(call)))) for name, call in calls.items()}
    for model in (dense, slim):
        settle(model)  # a weight with a graph behind it cannot be copied
    models = [copy.deepcopy(model).cpu() for model in (dense, slim)]
    with evaluating(models[0]), evaluating(models[1]), torch.no_grad():
        latencies = time_side_by_side([partial(_forward, model, calls) for model in models])
    metrics = (dict(dense_metrics or {}), dict(slim_metrics or {}))
    before, after = (_profile(*each, calls) for each in zip(models, latencies, metrics, strict=True))
    return Report(before, after, dict(left_whole or {}))


def _profile(model: nn.Module, latency_ms: float, metrics: dict[str, float], calls: Mapping[str, Example]) -> Profile:
    networks = [(model.get_submodule(name), call) for name, call in calls.items()]
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(sum(count_macs(net, call.args, call.kwargs).values()) // call.samples for net, call in networks),
        bytes=bytes_on_disk(model),
        latency_ms=latency_ms,
        metrics=metrics,
    )


def _forward(model: nn.Module, calls: Mapping[str, Example]) -> None:
    for name, call in calls.items():
        model.get_submodule(name)(*call.args, **call.kwargs)


def _to_cpu(tree: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, tree)
