"""What preparing and cutting half of the units costs in networks of real size: seconds, and memory.

    OMP_WAIT_POLICY=passive python benchmarks/bench_surgery.py --only ResNet-50 --threads 2

A ResNet-50 at 224 pixels and an encoder of BERT-base's size on 128 words, with random weights and two samples. Seconds
are of the clock, beside those of the processor and the training steps (two samples) that take as long, all of one run;
on a busy machine, threads that wait for one another should not do so actively. Preparing (`Pruner.prepare`) is finding
the units, trying them, and counting what they cost.

Memory comes in multiples of the parameters' bytes, and twice. *Tensors*: the most bytes of storages that are alive at
once, watched operation by operation; scratch space within an operation is not seen. *Resident*: the high-water mark of
a fresh process, less what it had before there was a network; what the allocator does not give back counts on.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_slim import MACs, Magnitude, OneShot, Pruner
from lightning_slim.surgery import Example, migrate, remove_units
from lightning_slim.surgery.groups import survey_networks
from lightning_slim.surgery.verify import compare, vet
from lightning_slim.units import Plan, UnitGroup

Result = TypeVar("Result")


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != 4 * width:
            project = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + self.shortcut(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride=2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(30522, 768), layers, nn.Linear(768, 2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "ResNet-50": (resnet50, lambda samples: torch.randn(samples, 3, 224, 224)),
    "BERT-base": (encoder, lambda samples: torch.randint(0, 30522, (samples, 128))),
}


def train(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    network(x).square().mean().backward()
    optimizer.step()


def half(groups: Sequence[UnitGroup]) -> Plan:
    return Plan({group.name: torch.arange(group.size) % 2 < 1 for group in groups})


def cut(
    network: nn.Module, groups: Sequence[UnitGroup], calls: Mapping[str, Example], optimizer: torch.optim.Optimizer
) -> None:
    """Compared, carried out, and followed by the optimizer."""
    plan = half(groups)
    if compare(network, groups, plan, calls):
        raise RuntimeError("Expected a cut that changes nothing where nothing reads what goes.")
    migrate(optimizer, remove_units(network, groups, plan))


# --- seconds ---


def timed(call: Callable[[], Result]) -> tuple[Result, float, float]:
    """What a call returns, the seconds it took, and those that the processor spent on it."""
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - clock, time.process_time() - processor


def seconds(name: str) -> None:
    make, data = NETWORKS[name]
    network, x = make(), data(2)
    calls = {"": Example((x,), samples=2)}
    optimizer = torch.optim.AdamW(network.parameters())
    steps = [timed(lambda: train(network, optimizer, x))[2] for _ in range(4)][1:]
    _, *preparing = timed(lambda: Pruner(network, Magnitude(), MACs(0.5), OneShot(0.5)).prepare(x))
    found, *finding = timed(lambda: survey_networks(network, calls))
    reasons, *trying = timed(lambda: vet(network, found.groups, calls))
    groups = [group for group in found.groups if group.name not in reasons]
    _, *cutting = timed(lambda: cut(network, groups, calls, optimizer))
    rows = {"prepare": preparing, "  find": finding, "  vet": trying, "one cut of half of the units": cutting}
    for what, (clock, processor) in rows.items():
        as_steps = processor / statistics.median(steps)
        print(f"  {what:44s}{clock:6.2f} s  {processor:6.2f} CPU s  {as_steps:6.1f} training steps")
    units = sum(group.size for group in groups)
    print(f"  {len(groups)} groups with {units:,} units can be cut, {len(reasons)} failed the trial", flush=True)


# --- memory ---


class Storages(TorchDispatchMode):
    """The most bytes of storages that are alive at once: of some tensors, and of all that operations within make."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}
        for tensor in known:
            self.watch(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf.untyped_storage())
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)


def peak(call: Callable[[], Result], known: Iterable[Tensor]) -> tuple[Result, int]:
    """What a call returns, and the most bytes there were meanwhile, those of some tensors included."""
    with Storages(known) as storages:
        result = call()
    return result, storages.peak


def tensors(name: str) -> None:
    make, data = NETWORKS[name]
    network, calls = make(), {"": Example((data(2),), samples=2)}
    size = bytes_of(network.parameters())
    groups = survey_networks(network, calls).groups
    plan = half(groups)

    def whole() -> list[Tensor]:
        return [*network.parameters(), *network.buffers()]

    rows = {"vet": peak(lambda: vet(network, groups, calls), whole())[1]}
    rows["compare a plan of half of the units"] = peak(lambda: compare(network, groups, plan, calls), whole())[1]
    optimizer = torch.optim.AdamW(network.parameters())
    train(network, optimizer, data(2))
    optimizer.zero_grad()
    cuts, rows["cut (remove_units)"] = peak(lambda: remove_units(network, groups, plan), whole())
    for what, most in rows.items():
        print(f"  {what:44s}{most / size:6.2f}, the network included")
    state = [value for values in optimizer.state.values() for value in values.values()]
    before = bytes_of(state)
    _, most = peak(lambda: migrate(optimizer, cuts), state)
    print(f"  {'migrate':44s}{most / size:6.2f}, AdamW's state included, which was {before / size:.2f}", flush=True)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def resident(name: str) -> None:
    """Prints the high-water marks of this process after each stage; meant for a fresh one."""

    def mark() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    make, data = NETWORKS[name]
    empty = mark()
    network, calls = make(), {"": Example((data(2),), samples=2)}
    marks = {"build": mark()}
    train(network, torch.optim.SGD(network.parameters()), data(2))
    marks["a training step"] = mark()
    groups = survey_networks(network, calls).groups
    marks["find"] = mark()
    vet(network, groups, calls)
    marks["vet"] = mark()
    compare(network, groups, half(groups), calls)
    remove_units(network, groups, half(groups))
    marks["compare and cut"] = mark()
    size = bytes_of(make().parameters())
    print(json.dumps({stage: (at - empty) / size for stage, at in marks.items()}))


def in_a_fresh_process(name: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--resident", name, "--threads", str(threads)]
    marks: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resident", choices=NETWORKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.resident:
        resident(args.resident)
        return
    names = [args.only] if args.only else list(NETWORKS)
    # Before anything else: a child's high-water mark begins with its parent's.
    resident_in = {name: in_a_fresh_process(name, args.threads) for name in names}
    for name in names:
        parameters = sum(p.numel() for p in NETWORKS[name][0]().parameters())
        print(f"{name}, {parameters / 1e6:.1f} M parameters, {args.threads} threads")
        seconds(name)
        print("  memory in tensors, in multiples of the parameters'")
        tensors(name)
        shown = ", ".join(f"{what} {at:.2f}" for what, at in resident_in[name].items())
        print(f"  memory resident, the most so far: {shown}\n", flush=True)


if __name__ == "__main__":
    main()
