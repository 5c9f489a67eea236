"""Scores, compensations and schedules side by side, beside a narrow network trained from scratch.

    python benchmarks/bench_scores.py digits-fnn digits-gru --seeds 5 --out scores
    python benchmarks/bench_scores.py --data folder-of-public-files --out scores

Seed by seed, every arm starts from the same weights and sees the same batches. One-shot arms cut the trained dense
network and are tested as cut and after fine-tuning; gradual arms prune while they train. Narrow networks have the
widths of the pruned ones and new weights. Training compute is forward multiply-accumulates x steps, and that of gradual
arms and of narrow networks is that of dense training, cut and fine-tuning, as far as `--longest` allows.

Results are lines of JSON below `--out`: arms that are there are not run again, and `tables.py` reads them.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import tables
from tasks import TASKS, Data, Task
from torch import Tensor, nn

from lightning_slim import Cubic, MACs, OneShot, Pruner, Score, Units, scores
from lightning_slim.losses import HearLosses
from lightning_slim.selection import Selection
from lightning_slim.surgery import recalibrate_batch_norm

SCORES = (
    "Granger(lags=0)", "Granger(lags=1)", "Magnitude", "MagnitudeTimesStd", "Wanda", "ActivationStd", "Taylor",
    "BatchNormScale", "Random",
)  # fmt: skip
BASIC = ("Granger(lags=0)", "Magnitude", "Random")
HOLD = 0.6  # of the run at the full learning rate, then down to zero in a line
CUTS = 12  # of a gradual arm
RECORDED = 1024  # samples before a one-shot cut
EVERY = 5  # steps between two recorded ones of a gradual arm


@dataclass(frozen=True)
class Arm:
    """One way to a network; `kind` is dense, narrow, one-shot or gradual."""

    kind: str
    remaining: float = 1.0
    score: str = ""
    compensate: str = ""
    scope: str = "local"
    start: float = 0.1
    compute: str = "same compute"  # or "same steps", as dense training and fine-tuning together


@dataclass
class Bench:
    """A task and a seed: what all of its arms share."""

    task: Task
    data: Data
    seed: int
    longest: float

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.start = self.task.network()
        self.dense = copy.deepcopy(self.start)
        self.recorded = torch.randperm(len(self.data.x))[:RECORDED]  # samples come by time, or by class
        self.train(self.dense, self.task.steps)

    def train(
        self,
        network: nn.Module,
        steps: int,
        rate: float = 1.0,
        before: Callable[[int, torch.optim.Optimizer], Any] | None = None,
        step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """Adam with a rate that is held, then falls to zero; `step` computes the loss and its gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(network.parameters(), rate * self.task.rate)
        network.train()
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = rate * self.task.rate * min(1.0, (1 - i / steps) / (1 - HOLD))
            batch = torch.randint(len(self.data.x), (self.task.batch,), generator=generator)
            if before is not None:
                before(i, optimizer)
            optimizer.zero_grad()
            if step is None:
                self.task.loss(network(self.data.x[batch]), self.data.y[batch]).backward()
            else:
                step(i, self.data.x[batch], self.data.y[batch])
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()

    @torch.no_grad()
    def test(self, network: nn.Module) -> dict[str, float]:
        output = torch.cat([network.eval()(x) for x in self.data.test_x.split(500)])
        result = {"loss": self.task.loss(output, self.data.test_y).item()}
        if self.task.classify:
            result["accuracy"] = float((output.argmax(1) == self.data.test_y).float().mean())
        return result

    def pruner(self, network: nn.Module, arm: Arm, schedule: OneShot | Cubic) -> Pruner:
        """A prepared one. A global scope is given the multiply-accumulates that the local one leaves."""
        local = self._prepared(network, arm, schedule, Units(arm.remaining), Selection())
        if arm.scope == "local":
            return local
        macs = local.costs.macs(self.widths(local, arm.remaining)) / local.costs.macs(local.costs.original)
        return self._prepared(network, arm, schedule, MACs(macs), Selection("global"))

    def _prepared(
        self, network: nn.Module, arm: Arm, schedule: OneShot | Cubic, budget: Units | MACs, selection: Selection
    ) -> Pruner:
        pruner = Pruner(
            network,
            score(arm.score),
            budget,
            schedule,
            selection=selection,
            compensate=arm.compensate,  # type: ignore[arg-type]
            verify=False,
            seed=self.seed,
        )
        network.eval()
        pruner.prepare(self.data.x[:2])
        return pruner

    def widths(self, pruner: Pruner, remaining: float) -> dict[str, int]:
        """Of every group, where all keep the same fraction of their units."""
        whole = pruner.costs.original
        alike = {name: torch.ones(units) for name, units in whole.items()}
        return Selection().fit(remaining, Units(remaining), pruner.costs, whole, alike)

    def total(self, pruner: Pruner, remaining: float) -> float:
        """Multiply-accumulates of dense training, cut and fine-tuning."""
        costs = pruner.costs
        slim = costs.macs(self.widths(pruner, remaining))
        return self.task.steps * costs.macs(costs.original) + self.task.fine_tune * slim

    def lasting(self, total: float, each: float) -> int:
        """Steps of `each` that make a total, as far as `longest` allows."""
        return min(round(total / each), round(self.longest * self.short))

    @property
    def short(self) -> int:
        """Steps of dense training and fine-tuning together."""
        return self.task.steps + self.task.fine_tune

    # --- arms ---

    def run(self, arm: Arm) -> dict[str, Any]:
        """What an arm comes to; `cost` is its training compute over that of dense training, cut and fine-tuning.

        Raises:
            ValueError: the score cannot judge this network.
        """
        begin = time.perf_counter()
        result = {"dense": self.run_dense, "narrow": self.narrow, "one-shot": self.one_shot, "gradual": self.gradual}[
            arm.kind
        ](arm)
        return {**result, "seconds": round(time.perf_counter() - begin, 2)}

    def run_dense(self, arm: Arm) -> dict[str, Any]:
        network = copy.deepcopy(self.dense)
        cut = self.test(network)
        self.train(network, self.task.fine_tune, rate=0.5)
        return {"cut": cut, "end": self.test(network), "macs": 1.0, "cost": 1.0}

    def one_shot(self, arm: Arm) -> dict[str, Any]:
        network = copy.deepcopy(self.dense)
        pruner = self.pruner(network, arm, OneShot(0.5))
        self.record(pruner)
        pruner.step(0.5)
        recalibrate_batch_norm(network, self.data.x[self.recorded].split(128))
        cut = self.test(network)
        self.train(network, self.task.fine_tune, rate=0.5)
        macs = pruner.costs.macs(pruner.widths) / pruner.costs.macs(pruner.costs.original)
        return {"cut": cut, "end": self.test(network), "macs": macs, "cost": 1.0, "widths": pruner.widths}

    def record(self, pruner: Pruner) -> None:
        """The same samples for every score: all of them as one step, or, for more than moments, a step a batch."""
        network = pruner.model.eval()
        x, y = self.data.x[self.recorded], self.data.y[self.recorded]
        recorder = pruner.recorder
        if not (pruner.score.needs_gradients or recorder.experiments or recorder.known):
            with pruner.recording(), torch.no_grad():
                for part in x.split(128):
                    network(part)
            return
        for i in range(0, len(x), self.task.batch):
            some, known = x[i : i + self.task.batch], y[i : i + self.task.batch]
            if recorder.experiments:
                recorder.experiment(partial(self.losses, network, some, known))
            network.zero_grad()
            with pruner.recording(), HearLosses() as heard:
                output = network(some)
                self.task.loss(output, known).backward()
            recorder.hear(labels=known, outputs=output, losses=heard.of_items(None))
            recorder.observe_gradients()

    def losses(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Of each item."""
        with HearLosses() as heard:
            self.task.loss(network(x), y)
        return heard.of_items(None)

    def gradual(self, arm: Arm) -> dict[str, Any]:
        network = copy.deepcopy(self.start)
        schedule = Cubic(arm.start, HOLD)
        pruner = self.pruner(network, arm, schedule)
        costs, total = pruner.costs, self.total(pruner, arm.remaining)
        course = [1 - (1 - arm.remaining) * schedule((p + 0.5) / 40) for p in range(40)]
        each = sum(costs.macs(self.widths(pruner, left)) for left in course) / len(course)
        steps = self.short if arm.compute == "same steps" else self.lasting(total, each)
        cuts = {round(steps * (arm.start + (HOLD - arm.start) * i / (CUTS - 1))) for i in range(CUTS)}
        spent = 0

        def before(i: int, optimizer: torch.optim.Optimizer) -> None:
            nonlocal spent
            if i in cuts and pruner.recorder.ready:
                pruner.step(max(i / steps, HOLD if i == max(cuts) else 0.0), [optimizer])
            spent += costs_now(pruner)

        def step(i: int, x: Tensor, y: Tensor) -> Tensor:
            recorded = i % EVERY == 0 and i < max(cuts)
            if recorded:
                with pruner.recording():
                    output = network(x)
            else:
                output = network(x)
            loss = self.task.loss(output, y)
            loss.backward()
            if recorded and pruner.score.needs_gradients:
                pruner.recorder.observe_gradients()
            return loss

        self.train(network, steps, before=before, step=step)
        macs = costs_now(pruner) / costs.macs(costs.original)
        result = self.test(network)
        return {"end": result, "macs": macs, "cost": spent / total, "steps": steps, "widths": pruner.widths}

    def narrow(self, arm: Arm) -> dict[str, Any]:
        """The widths that a pruner leaves, and new weights."""
        network = copy.deepcopy(self.start)
        pruner = self.pruner(network, Arm("one-shot", arm.remaining, "Random", "none"), OneShot(0.5))
        total = self.total(pruner, arm.remaining)
        pruner.step(0.5)
        torch.manual_seed(self.seed)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        each = costs_now(pruner)
        steps = self.short if arm.compute == "same steps" else self.lasting(total, each)
        self.train(network, steps)
        macs = each / pruner.costs.macs(pruner.costs.original)
        return {"end": self.test(network), "macs": macs, "cost": each * steps / total, "steps": steps}


def costs_now(pruner: Pruner) -> int:
    return pruner.costs.macs(pruner.widths)


def score(text: str) -> Score:
    """A score of the package by name, `Magnitude` or `Granger(lags=1)`."""
    call = ast.parse(text, mode="eval").body
    name, options = (call.func, call.keywords) if isinstance(call, ast.Call) else (call, [])
    assert isinstance(name, ast.Name)
    made: Score = getattr(scores, name.id)(**{str(o.arg): ast.literal_eval(o.value) for o in options})
    return made


def arms(args: argparse.Namespace, task: Task) -> Iterator[Arm]:
    names = [name for name in args.scores if task.series or name != "Granger(lags=1)"]
    yield Arm("dense")
    for remaining, compute in itertools.product(args.remaining, ("same steps", "same compute")):
        yield Arm("narrow", remaining, compute=compute)
    for remaining, name, compensate in itertools.product(args.remaining, names, args.compensate):
        yield Arm("one-shot", remaining, name, compensate)
    best = args.compensate[-1]
    for remaining in args.gradual_remaining:
        for name in (name for name in names if name in args.gradual):
            yield Arm("gradual", remaining, name, best)
        for name in args.unfolded:
            yield Arm("gradual", remaining, name, "none")
        for compensate in args.compensate if args.short else ():
            yield Arm("gradual", remaining, names[0], compensate, compute="same steps")
        for start in args.starts:
            yield Arm("gradual", remaining, names[0], best, start=start)
    for kind, options in (("one-shot", args.remaining), ("gradual", args.gradual_remaining)):
        for remaining, name in itertools.product(options, args.everywhere):
            yield Arm(kind, remaining, name, best, scope="global")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"of {', '.join(TASKS)}; all unless given")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the public files")
    parser.add_argument("--out", type=Path, default=Path("scores"), help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scores", nargs="+", default=SCORES, help="differences are taken to the first")
    parser.add_argument("--gradual", nargs="*", default=SCORES, help="scores that also prune while training")
    parser.add_argument("--unfolded", nargs="*", default=BASIC, help="those of gradual arms without compensation")
    parser.add_argument("--everywhere", nargs="*", default=BASIC[:2], help="those of arms with a global scope")
    parser.add_argument("--short", action="store_true", help="gradual arms also with as many steps as one-shot ones")
    parser.add_argument("--starts", nargs="*", type=float, default=[0.0, 0.3, 0.5], help="of gradual arms, beside 0.1")
    parser.add_argument("--compensate", nargs="+", default=["none", "least_squares"])
    parser.add_argument("--remaining", nargs="+", type=float, default=[0.5, 0.3, 0.15], help="fraction of the units")
    parser.add_argument("--gradual-remaining", nargs="*", type=float, default=[0.5, 0.3, 0.15])
    parser.add_argument("--longest", type=float, default=6.0, help="most steps, in those of dense training")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks or TASKS:
        task, file = TASKS[name], args.out / f"{name}.jsonl"
        try:
            data = task.load(args.data)
        except FileNotFoundError as absent:
            print(f"{name}: skipped. {absent}")
            continue
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        done = {(line["seed"], Arm(**line["arm"])) for line in lines}
        wanted = dict.fromkeys(arms(args, task))
        for seed in range(args.seeds):
            missing = [arm for arm in wanted if (seed, arm) not in done]
            bench = Bench(task, data, seed, args.longest) if missing else None
            for arm in missing:
                assert bench is not None
                try:
                    result = bench.run(arm)
                except ValueError as reason:
                    result = {"skipped": str(reason)}
                lines.append({"seed": seed, "arm": asdict(arm), **result})
                with file.open("a") as out:
                    out.write(json.dumps(lines[-1]) + "\n")
        print(f"\n## {name}\n\n{tables(lines, args.scores[0])}", flush=True)


if __name__ == "__main__":
    main()
