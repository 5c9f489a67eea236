"""Results of `bench_scores.py` as Markdown: means over seeds and their standard errors.

python benchmarks/tables.py scores/digits-gru.jsonl
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PLAIN = {"scope": "local", "start": 0.1, "compute": "same compute"}  # of arms that are no variants
Line = dict[str, Any]
Runs = dict[int, dict[str, float]]  # seed -> what the network does on the test set


def tables(lines: Sequence[Line], reference: str) -> str:
    """Controls; every fraction that remains, with differences to a score seed by seed; variants of the gradual arms."""
    good = [line for line in lines if "skipped" not in line]
    parts = [_controls(good)]
    fractions = sorted({line["arm"]["remaining"] for line in good if line["arm"]["score"]}, reverse=True)
    parts += [
        f"{remaining:.0%} of the units remain:\n\n{_scores(good, remaining, reference)}" for remaining in fractions
    ]
    parts.append(_variants(good))
    skipped = {(line["arm"]["score"], line["skipped"]) for line in lines if "skipped" in line}
    parts += [f"Skipped: {score}. {reason}" for score, reason in sorted(skipped)]
    return "\n\n".join(part for part in parts if part)


def _controls(lines: Sequence[Line]) -> str:
    rows = []
    dense = _runs(lines, kind="dense")
    for name, when in (("dense", "cut"), ("dense, trained on as after a cut", "end")):
        rows.append([name, "100 %", "", _cell(dense(when))])
    for remaining, compute in _distinct(lines, ("remaining", "compute"), kind="narrow"):
        chosen = _select(lines, kind="narrow", remaining=remaining, compute=compute)
        macs, cost = (statistics.mean(line[key] for line in chosen) for key in ("macs", "cost"))
        name = f"narrow from scratch, {remaining:.0%} of the units, {compute}"
        rows.append([name, f"{macs:.1%}", f"{cost:.2f}", _cell(_by_seed(chosen, "end"))])
    return _markdown(["network", "MACs", "training compute", "test loss"], rows)


def _scores(lines: Sequence[Line], remaining: float, reference: str) -> str:
    columns = [
        (f"{label}, {name}", {"kind": kind, "compensate": compensate}, when)
        for compensate, name in _names(lines)
        for label, kind, when in (
            ("cut", "one-shot", "cut"),
            ("tuned", "one-shot", "end"),
            ("gradual", "gradual", "end"),
        )
    ]
    common = {"remaining": remaining, **PLAIN}
    columns = [column for column in columns if _select(lines, **common, **column[1])]
    scores = [score for (score,) in _distinct(lines, ("score",), **common) if score]
    absolute, paired = [], []
    for score in scores:
        runs = [_runs(lines, score=score, **common, **where)(when) for _, where, when in columns]
        against = [_runs(lines, score=reference, **common, **where)(when) for _, where, when in columns]
        absolute.append([score, *(_cell(run) for run in runs)])
        paired.append([score, *(_difference(a, b) for a, b in zip(runs, against, strict=True))])
    head = [name for name, _, _ in columns]
    beside = [row for row in paired if row[0] != reference]
    return f"{_markdown(['score', *head], absolute)}\n\nMinus {reference}, seed by seed:\n\n" + _markdown(
        ["score", *head], beside
    )


def _variants(lines: Sequence[Line]) -> str:
    rows = []
    keys = ("kind", "remaining", "score", "compensate", *PLAIN)
    names = dict(_names(lines))
    for values in _distinct(lines, keys):
        arm = dict(zip(keys, values, strict=True))
        if arm["score"] and {key: arm[key] for key in PLAIN} != PLAIN:
            plain = _runs(lines, **{**arm, **PLAIN})
            variant = [f"{key} {arm[key]}" if key == "start" else arm[key] for key in PLAIN if arm[key] != PLAIN[key]]
            name = ", ".join([arm["kind"], arm["score"], f"{arm['remaining']:.0%}", names[arm["compensate"]], *variant])
            cost = statistics.mean(line["cost"] for line in _select(lines, **arm))
            runs = _runs(lines, **arm)
            cells = [_cell(runs("end")), _difference(runs("end"), plain("end"))]
            before = _difference(runs("cut"), plain("cut")) if arm["kind"] == "one-shot" else ""
            rows.append([name, f"{cost:.2f}", *cells, before])
    head = ["variant", "training compute", "test loss", "minus the same, local, start 0.1", "and as cut"]
    return (
        "Scope, with as many MACs left, start, and as many steps as one-shot arms:\n\n" + _markdown(head, rows)
        if rows
        else ""
    )


def _names(lines: Iterable[Line]) -> list[tuple[str, str]]:
    order = {"least_squares": 0, "exact": 1, "mean": 2, "none": 3}
    found = {line["arm"]["compensate"] for line in lines} - {""}
    return [(c, {"least_squares": "fold", "none": "no fold"}.get(c, c)) for c in sorted(found, key=order.__getitem__)]


def _select(lines: Iterable[Line], **arm: Any) -> list[Line]:
    return [line for line in lines if all(line["arm"][key] == value for key, value in arm.items())]


def _distinct(lines: Iterable[Line], keys: Sequence[str], **arm: Any) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(line["arm"][key] for key in keys) for line in _select(lines, **arm)))


def _runs(lines: Iterable[Line], **arm: Any) -> Callable[[str], Runs]:
    chosen = _select(lines, **arm)
    return lambda when: _by_seed(chosen, when)


def _by_seed(lines: Iterable[Line], when: str) -> Runs:
    return {line["seed"]: line[when] for line in lines if when in line}


def _cell(runs: Runs) -> str:
    """Mean loss and its standard error; mean accuracy in per cent."""
    if not runs:
        return ""
    accuracy = [run["accuracy"] for run in runs.values() if "accuracy" in run]
    behind = f" · {100 * statistics.mean(accuracy):.1f}" if accuracy else ""
    return _mean([run["loss"] for run in runs.values()], "") + behind


def _difference(runs: Runs, against: Runs) -> str:
    both = runs.keys() & against.keys()
    return _mean([runs[seed]["loss"] - against[seed]["loss"] for seed in both], "+") if both else ""


def _mean(values: Sequence[float], sign: str) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.3f} ± {error:.3f}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        print(f"\n## {path.stem}\n")
        print(tables([json.loads(line) for line in path.read_text().splitlines()], "Granger(lags=0)"))
