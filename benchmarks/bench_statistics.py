"""Batched statistics beside loops over statsmodels, scikit-learn and refits, in one run on one thread.

    python benchmarks/bench_statistics.py

Loops that would take too long are timed on a subset of tests and extrapolated; the number that was timed is printed.
Times are CPU time, the least of several runs for the batched call and the mean over the subset for a loop.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_selection import f_classif
from statsmodels.regression.linear_model import OLS
from statsmodels.tsa.stattools import grangercausalitytests

sys.path.insert(0, str(Path(__file__).parent.parent))

from lightning_slim.statistics import (
    Anova,
    Regression,
    backward_elimination,
    forward_selection,
    granger_test,
    leave_one_out_test,
    ridge_leave_one_out,
)


def seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def bivariate(units: int, steps: int, lags: int, targets: int, goal: int, subset: int, repeats: int) -> None:
    x, y = torch.randn(steps, units), torch.randn(steps, targets)
    pairs = [(number % targets, number // targets) for number in torch.randperm(targets * units)[:subset].tolist()]
    columns = [np.column_stack([y[:, k].double().numpy(), x[:, i].double().numpy()]) for k, i in pairs]
    grangercausalitytests(columns[0], [lags])
    start = time.process_time()
    results = [grangercausalitytests(column, [lags])[lags][0] for column in columns]
    loop = (time.process_time() - start) / subset * units * targets

    def all_four() -> None:
        test = granger_test(x, y, lags)
        _ = test.params_ftest, test.ssr_ftest, test.ssr_chi2test, test.lrtest

    test = granger_test(x, y, lags)
    theirs = np.array([result["ssr_ftest"][0] for result in results])
    ours = np.array([float(test.f[k, i]) for k, i in pairs])
    error = np.abs(ours / theirs - 1).max()
    one, four = seconds(lambda: granger_test(x, y, lags), repeats), seconds(all_four, repeats)
    print(
        f"granger_test ({units}, {steps}, {lags}) x {targets}: {one * 1e3:.1f} ms, all four tests {four * 1e3:.1f} ms; "
        f"statsmodels {loop:.1f} s ({subset} of {units * targets} tests timed): "
        f"{loop / one:.0f}x, all four {loop / four:.0f}x (goal {goal}x {verdict(loop / four >= goal)}); "
        f"largest relative error of F {error:.0e}",
        flush=True,
    )


def leave_one_out(units: int, steps: int, lags: int) -> None:
    x, y = torch.randn(steps, units, dtype=torch.float64), torch.randn(steps, 1, dtype=torch.float64)
    ours = seconds(lambda: leave_one_out_test(x, y, lags), 2)
    past = [v[lags - a : steps - a].numpy() for v in (y, x) for a in range(1, lags + 1)]
    design, target = np.column_stack([np.ones(steps - lags), *past]), y[lags:, 0].numpy()
    start = time.process_time()
    for unit in range(2):
        columns = [1 + lags + a * units + unit for a in range(lags)]
        _ = OLS(target, np.delete(design, columns, axis=1)).fit().ssr
    loop = (time.process_time() - start) / 2 * units
    print(
        f"leave_one_out_test ({units}, {steps}, {lags}): {ours:.2f} s; "
        f"statsmodels {loop:.0f} s (2 of {units} refits timed): {loop / ours:.0f}x",
        flush=True,
    )


def ridge(units: int, steps: int, lags: int) -> None:
    x, y = torch.randn(steps, units, dtype=torch.float64), torch.randn(steps, 1, dtype=torch.float64)
    print(
        f"ridge_leave_one_out ({units}, {steps}, {lags}), dual, {units * lags} columns: "
        f"{seconds(lambda: ridge_leave_one_out(x, y, lags), 1):.2f} s",
        flush=True,
    )


def selection(units: int, keep: int, width: int = 1) -> None:
    rows = torch.randn(units, units * width)
    gram = (rows.T @ rows / len(rows)).double()
    gram.diagonal().add_(0.1)
    regression = Regression(gram, torch.randn(len(gram), 10, dtype=torch.float64) * 0.01, 1.0)
    del rows, gram
    forward = seconds(lambda: forward_selection([regression], units, keep), 1)
    goal = f" (goal 8 s {verdict(forward < 8)})" if units == 4096 else ""
    print(f"forward_selection {units} units of {width} columns, keep {keep}: {forward:.2f} s{goal}", flush=True)
    if units * width <= 1024:
        backward = seconds(lambda: backward_elimination([regression], units, keep), 1)
        print(f"backward_elimination {units} units of {width} columns, keep {keep}: {backward:.2f} s", flush=True)


def anova(units: int, classes: int, rows: int, repeats: int) -> None:
    batches = [(torch.randn(rows, units), torch.randint(classes, (rows,))) for _ in range(32)]
    stream, turn = Anova(classes, units), iter(batches * (repeats + 2))
    ours = seconds(lambda: stream.update(*next(turn)), 31 + repeats)
    total = torch.zeros(classes, units, dtype=torch.float64)

    def one_hot() -> None:
        values, labels = batches[0]
        total.addmm_(torch.nn.functional.one_hot(labels, classes).double().T, values.double())

    naive = seconds(one_hot, 5)
    values, labels = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    once = seconds(lambda: f_classif(values, labels), 1) / len(batches)
    stream = Anova(classes, units)
    for batch in batches:
        stream.update(*batch)
    result = seconds(stream.result, 3)
    error = np.abs(stream.result().statistic.numpy() / f_classif(values.astype(np.float64), labels)[0] - 1).max()
    print(
        f"Anova of {units} channels, {classes} classes: {ours * 1e3:.2f} ms a batch of {rows} (goal 5 ms "
        f"{verdict(ours < 5e-3)}), result {result * 1e3:.0f} ms; class sums by a one-hot product {naive * 1e3:.1f} ms "
        f"a batch; f_classif over all {len(labels)} rows at once {once * 1e3:.1f} ms a batch; "
        f"largest relative error of F {error:.0e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subset", type=int, default=200, help="statsmodels tests that are timed")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bivariate(512, 512, 4, 10, 800, args.subset, args.repeats)
    bivariate(4096, 512, 4, 10, 1000, args.subset, args.repeats)
    anova(4096, 1000, 128, args.repeats)
    leave_one_out(256, 2048, 2)
    leave_one_out(512, 4096, 2)
    ridge(4096, 512, 4)
    selection(512, 256)
    selection(4096, 512)
    selection(4096, 512, width=2)


if __name__ == "__main__":
    main()
