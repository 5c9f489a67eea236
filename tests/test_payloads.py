"""Thousands of stored states, each changed in one place: refused with an error, or what they say is true."""

from __future__ import annotations

import copy
import random
import resource
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_slim import (
    Granger,
    GrangerPrune,
    History,
    InputScreening,
    Masker,
    OneShot,
    Pruner,
    RigL,
    Units,
    WeightPrune,
    WeightSaliency,
    load_from_checkpoint,
)
from lightning_slim.payload import SEAL, PayloadError, is_dense, opened, sealed
from lightning_slim.surgery import resize_to
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import images, same

FEW = pytest.param(50, id="50")
MANY = pytest.param(840, id="840", marks=pytest.mark.slow)


# --- what is changed ---


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested data."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same data, with something else in one place; parts that do not change are shared."""
    if not path:
        return new
    key, *rest = path
    entry = put(value[key], tuple(rest), new)
    if isinstance(value, tuple):
        return (*value[:key], entry, *value[key + 1 :])
    value = copy.copy(value)
    value[key] = entry
    return value


def changed(value: Any, draw: random.Random) -> Any:
    """Something else than a value."""
    if isinstance(value, Tensor):
        return draw.choice(
            [
                lambda: value[:-1] if value.ndim and len(value) else value.reshape(1),
                lambda: value.new_zeros(1).expand(*value.shape, 10**9),
                lambda: value.unsqueeze(0),
                lambda: value.new_zeros(0),
                lambda: torch.cat([value, value]) if value.ndim else value + 1,
                lambda: value.to(torch.complex64 if value.dtype != torch.complex64 else torch.float32),
                lambda: value.to_sparse() if value.ndim else None,
                lambda: value.logical_not() if value.numel() else None,
                lambda: "no tensor",
            ]
        )()
    if isinstance(value, bool):
        return draw.choice([not value, None, 7])
    if isinstance(value, int):
        return draw.choice([value + 1, -value - 1, 2**62, float(value) + 0.5, "x", None])
    if isinstance(value, float):
        return draw.choice([value + 1, -value - 1, float("nan"), float("inf"), "x", None])
    if isinstance(value, str):
        return draw.choice([f"{value}x", "", 3, None, "../../x"])
    if isinstance(value, list | tuple):
        return draw.choice([[*value, None], [*value, *value, 0], list(value)[1:] if value else [1], {}, None, 5])
    if isinstance(value, dict):
        less = {key: entry for number, (key, entry) in enumerate(value.items()) if number}
        return draw.choice([{**value, "extra": 1}, less if value else [], [], None, 5])
    return draw.choice([0, "x", [1], {}])


# --- what is stored ---


@cache
def pruned_run() -> dict[str, Any]:
    """A checkpoint of a run with two callbacks that has cut and masked."""
    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(folder, filename="x")
        trainer(folder, *callbacks(), saver, max_epochs=3).fit(Lit(), loader(), loader())
        return torch.load(Path(folder) / "x.ckpt", weights_only=True)


def callbacks() -> list[pl.Callback]:
    prune = GrangerPrune(Units(0.5), OneShot(0.5), record_every_n_steps=2, print_report=False)
    return [prune, WeightPrune(0.5, schedule=OneShot(0.6), score=WeightSaliency(), regrow=RigL())]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def prepared() -> Pruner:
    pruner = Pruner(net(), Granger(), Units(0.5), OneShot(0.5))
    pruner.prepare(torch.randn(2, 3, 8, 8))
    return pruner


def masked() -> Masker:
    masker = Masker(net(), 0.5, score=WeightSaliency(), schedule=OneShot(0.5))
    masker.prepare()
    masker.attach([])
    return masker


@cache
def stored(kind: str) -> Any:
    """What is stored by one of our parts, as it is read from a file."""
    if kind in ("load_from_checkpoint", "resume"):
        return pruned_run()
    if kind == "History":
        return pruned_run()["callbacks"]["GrangerPrune"]["pruner"]["history"]
    torch.manual_seed(0)
    if kind == "Masker":
        return masked().state_dict()
    if kind == "resize_to":
        return {
            **{"0.weight": [5, 3, 3, 3], "0.bias": [5], "1.weight": [5], "1.bias": [5]},
            **{"1.running_mean": [5], "1.running_var": [5], "5.weight": [4, 5]},
        }
    pruner = prepared()
    with pruner.recorder.recording():
        pruner.model(torch.randn(32, 3, 8, 8))
    pruner.recorder.hear()
    return pruner.state_dict()


# --- what becomes of it: each loads a state, and checks what is true then ---


def load(state: Any, folder: Path) -> None:
    torch.save(state, folder / "x.ckpt")
    lit = load_from_checkpoint(Lit, folder / "x.ckpt")
    assert lit.net(images(7, 4)[0]).shape == (4, 5)
    assert lit.net.c1.out_channels == len(lit.net.c1.weight) == len(state["state_dict"]["net.c1.weight"])


def resume(state: Any, folder: Path) -> None:
    torch.save(state, folder / "x.ckpt")
    lit, (prune, mask) = Lit(), callbacks()
    trainer(folder, prune, mask, max_epochs=3, limit_train_batches=0).fit(lit, loader(), ckpt_path=folder / "x.ckpt")


def history(state: Any, folder: Path) -> None:
    assert History.from_state(state).to_state() == stored("History")


def pruner(state: Any, folder: Path) -> None:
    pruner = prepared()
    before = copy.deepcopy(pruner.state_dict())
    try:
        pruner.load_state_dict(state)
    except Exception:
        assert same(pruner.state_dict()["recorder"], before["recorder"])
        raise
    assert pruner.state_dict()[SEAL] in (stored("Pruner")[SEAL], before[SEAL])


def masker(state: Any, folder: Path) -> None:
    masker = masked()
    masker.load_state_dict(state)
    assert masker.state_dict()[SEAL] == stored("Masker")[SEAL]


def resize(state: Any, folder: Path) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        resize_to(model, state)
    except Exception:
        assert same(model.state_dict(), before)
        raise
    for name, shape in state.items():
        if name in before:
            assert list(model.state_dict()[name].shape) == list(shape)
    assert len(model[0].weight) == len(model[0].bias) == model[0].out_channels
    assert len(model[1].weight) == len(model[1].bias) == model[1].num_features


LOADS: dict[str, Callable[[Any, Path], None]] = {
    "load_from_checkpoint": load,
    "resume": resume,
    "Pruner": pruner,
    "Masker": masker,
    "History": history,
    "resize_to": resize,
}


def ours(kind: str, state: Any) -> list[tuple[Any, ...]]:
    """Places in what we store; the rest of a checkpoint is Lightning's and the user's."""
    found = [path for path in places(state) if path and SEAL not in path]
    if kind == "load_from_checkpoint":
        cut = state["lightning_slim"]["shapes"]
        return [path for path in found if path[0] == "lightning_slim" or (path[0] == "state_dict" and path[-1] in cut)]
    if kind == "resume":
        return [path for path in found if path[0] == "callbacks" and len(path) > 1]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [FEW, MANY])
@pytest.mark.parametrize("kind", LOADS)
def test_changed_payloads_are_refused_or_true(kind: str, number: int, tmp_path: Path, capsys: Any) -> None:
    state, draw, refused = stored(kind), random.Random(0), 0
    LOADS[kind](state, tmp_path)  # as it was stored
    candidates = ours(kind, state)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(number):
        path = draw.choice(candidates)
        payload = put(state, path, changed(at(state, path), draw))
        try:
            LOADS[kind](payload, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"{kind}, payload {i}: believed what was changed at {path}") from error
        except Exception:
            refused += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    counts = f"{number} payloads, {refused} refused, {number - refused} true, 0 harmed, {grown:.0f} MiB more"
    print(f"{kind}: {counts}")  # noqa: T201 - shown by `pytest -rP`: the count is the result
    assert refused > number / 3
    assert grown < 200


def test_a_seal_holds_for_what_a_file_gives_back(tmp_path: Path) -> None:
    state = {"b": [1, 2.0, None, (True, "x")], "a": {3: torch.randn(4, 2).T, "n": float("nan")}, "t": torch.tensor(1)}
    torch.save(sealed(state), tmp_path / "x")
    back = opened(torch.load(tmp_path / "x", weights_only=True), "a test")
    assert back.keys() == state.keys()
    moved = {"t": state["t"], "a": {"n": float("nan"), 3: state["a"][3]}, "b": state["b"]}
    assert sealed(moved)[SEAL] == sealed(state)[SEAL]  # the order of keys says nothing
    for other in (1.0, True, "1", torch.tensor([1]), torch.tensor(1.0)):
        assert sealed({"t": other})[SEAL] != sealed({"t": torch.tensor(1)})[SEAL]
    with pytest.raises(PayloadError, match="without a seal"):
        opened(state, "a test")


def test_dense_is_what_has_memory_for_every_entry() -> None:
    dense = [torch.zeros(3, 4), torch.zeros(3, 4).T, torch.zeros(8)[::2], torch.tensor(1.0), torch.zeros(0, 3)]
    dense += [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(1, 3)]
    assert all(map(is_dense, dense))
    others = [torch.zeros(1).expand(5), torch.zeros(10).unfold(0, 3, 1), torch.eye(3).to_sparse()]
    assert not any(map(is_dense, [*others, torch.empty(3, device="meta")]))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"0.weight": [5, 3, 3]}, "4 sizes above 0"),
        ({"0.weight": [0, 3, 3, 3]}, "4 sizes above 0"),
        ({"0.weight": [5, 3, 3, 10**9], "0.bias": [5]}, "fit one another"),
        ({"0.weight": [5, 3, 3, 3]}, "fit one another"),
        ({"1.weight": [5], "1.bias": [5]}, "fit one another"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shapes: dict[str, list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resize_to(net(), shapes)


def test_input_screening_refuses_what_was_changed(tmp_path: Path) -> None:
    callback = InputScreening()
    with pytest.raises(PayloadError):
        callback.load_state_dict({"seen": 3, "screener": {}})
