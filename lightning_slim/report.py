"""The table at the end: dense beside slim."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

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
        batch_sizes: samples in the batch that latency was measured with; several, if networks got different ones.
    """

    dense: Profile
    slim: Profile
    left_whole: dict[str, str] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = ()

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
        of = f", {size_in_words(self.batch_sizes)}" if self.batch_sizes else ""
        table.append((f"CPU latency (median{of})", f"{a:.3f} ms", f"{b:.3f} ms", f"{b / a:.1%}"))
        for name, value in slim.metrics.items():
            known = dense.metrics.get(name)
            before, change = ("-", "-") if known is None else (f"{known:.4f}", f"{value - known:+.4f}")
            table.append((name, before, f"{value:.4f}", change))
        return table

    def to_json(self) -> str:
        """Keys `dense` and `slim` (`params`, `macs`, `bytes`, `latency_ms`, `metrics` each), and the rest."""
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
    slim_networks: Mapping[str, Any] | None = None,
    timed: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
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
        slim_networks: calls of the slim model's, where one of them takes in what another one makes, and less of it.
        timed: other calls, of the dense and of the slim model, that latency is measured with.
        dense_metrics: for the table.
        slim_metrics: for the table.
        left_whole: layer -> why nothing was removed from it, for the table.
    """
    given = {"": example_inputs} if networks is None else networks
    calls = [_examples(given), _examples(given if slim_networks is None else slim_networks)]
    timed_calls = [_examples(each) for each in timed] if timed and timed[0] else calls
    for model in (dense, slim):
        settle(model)  # a weight with a graph behind it cannot be copied
    models = [copy.deepcopy(model).cpu() for model in (dense, slim)]
    with evaluating(models[0]), evaluating(models[1]), torch.no_grad():
        latencies = time_side_by_side([partial(_forward, *each) for each in zip(models, timed_calls, strict=True)])
    metrics = (dict(dense_metrics or {}), dict(slim_metrics or {}))
    before, after = (_profile(*each) for each in zip(models, latencies, metrics, calls, strict=True))
    return Report(before, after, dict(left_whole or {}), batch_sizes(timed_calls[0]))


def _examples(networks: Mapping[str, Any]) -> dict[str, Example]:
    examples = {}
    for name, given in networks.items():
        call = as_example(given)
        args, kwargs = _to_cpu((call.args, dict(call.kwargs)))
        examples[name] = Example(args, kwargs, call.samples)
    return examples


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


def batch_sizes(calls: Mapping[str, Example]) -> tuple[int, ...]:
    """How many samples the calls hold, each number once: the first axis of the first tensor is the batch."""
    tensors = ([t for t in tree_leaves(call[:2]) if isinstance(t, torch.Tensor) and t.ndim] for call in calls.values())
    return tuple(sorted({of_call[0].shape[0] for of_call in tensors if of_call}))


def size_in_words(sizes: Sequence[int]) -> str:
    """
    >>> size_in_words([64]), size_in_words([1, 64])
    ('batch of 64', 'batches of 1 and 64')
    """
    return f"batch of {sizes[0]}" if len(sizes) == 1 else f"batches of {' and '.join(map(str, sizes))}"


def _to_cpu(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, tree)
