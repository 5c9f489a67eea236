"""What a budget of latency reaches: a ResNet of three stages, batch 32, on CPU, beside the dense one.

    python benchmarks/bench_latency.py

Dense and slim take turns on one thread, by CPU time; medians.
"""

from __future__ import annotations

import copy
import sys
import time
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_overhead import resnet20

from lightning_slim import Latency, Magnitude, OneShot, Pruner
from lightning_slim.profile import evaluating, time_side_by_side
from lightning_slim.selection import Selection


def main() -> None:
    torch.manual_seed(0)
    dense, x = resnet20(), torch.rand(32, 3, 32, 32)
    print("| asked | scope | round_to | foretold | measured | MACs left | measuring, s |")
    print("|---:|---|---|---:|---:|---:|---:|")
    for fraction, scope, round_to in product((0.7, 0.5, 0.3), ("local", "global"), (1, "auto")):
        slim = copy.deepcopy(dense)
        selection = Selection(scope, round_to)
        pruner = Pruner(slim, Magnitude(), Latency(fraction), OneShot(0.5), selection=selection, compensate="none")
        begin = time.perf_counter()
        pruner.prepare(x)
        seconds = time.perf_counter() - begin
        event = pruner.step(0.5)
        assert event is not None
        with evaluating(dense), evaluating(slim), torch.no_grad():
            times = time_side_by_side([lambda: dense(x), lambda net=slim: net(x)], seconds=8)
        macs = event.macs / pruner.costs.whole.macs(pruner.costs.original)
        asked = f"| {fraction} | {scope} | {round_to} "
        print(f"{asked}| {event.reached:.3f} | {times[1] / times[0]:.3f} | {macs:.3f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
