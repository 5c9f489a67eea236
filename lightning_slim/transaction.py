"""A change of a model happens wholly or not at all, whatever is raised at whatever line."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_slim.aside import under_way

TORCH = frozenset(vars(nn.Module()))  # attributes of every module
CONTAINERS = (dict, list, set, deque)

_covered: ContextVar[frozenset[int]] = ContextVar("covered", default=frozenset())  # ids of what is put back already


@contextmanager
def all_or_nothing(*roots: object) -> Iterator[None]:
    """Whatever is raised within, and be it a `KeyboardInterrupt`, all that hangs on the roots is as it was before.

    Of modules: parameters, buffers and other tensors with their values, gradients and hooks; submodules, modes and
    attributes. Of optimizers and of this package's own objects: attributes, and what lies in their lists and
    dictionaries; tensors that lie there must be replaced, and not be written to. Of other roots: attributes. The random
    state, too. Memory: that of the modules' tensors once more.

    Within another one that covers the same, it does nothing: that one puts back all that was done since it began.

    Args:
        *roots: modules, optimizers, callbacks, and lists of them.
    """
    outer = _covered.get()
    if all(id(root) in outer for root in roots):
        yield
        return
    before = _Before()
    for root in (*roots, under_way):
        before.note(root)
    token = _covered.set(outer | before.seen.keys())
    try:
        yield
    except BaseException:
        with _deaf_to_interrupts():
            before.put_back()
        raise
    finally:
        _covered.reset(token)


class _Before:
    """What there was.

    Attributes:
        seen: id -> what was noted, and held, so that nothing else takes its id.
    """

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        self._undo: list[Callable[[], None]] = []
        random, fast_path = torch.random.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
        self._undo.append(lambda: torch.random.set_rng_state(random))
        self._undo.append(lambda: torch.backends.mha.set_fastpath_enabled(fast_path))

    def put_back(self) -> None:
        """All of it."""
        for undo in self._undo:
            undo()

    def note(self, root: Any) -> None:
        """Notes an object and all that hangs on it."""
        todo = [root]
        while todo:
            each = todo.pop()
            if id(each) in self.seen:
                continue
            if isinstance(each, nn.Module):
                within = self._of_module(each)
            elif isinstance(each, CONTAINERS):
                within = self._of_container(each)
            elif isinstance(each, tuple):
                within = list(each)
            elif isinstance(each, Optimizer | ExitStack) or is_ours(each):
                self._undo.append(_contents(vars(each)))
                within = list(vars(each).values())
            elif each is root:  # a strategy, a monitor
                self._undo.append(_contents(vars(each)))
                within = []
            else:
                continue
            self.seen[id(each)] = each
            todo += within

    def _of_module(self, module: nn.Module) -> list[Any]:
        self._undo.append(_contents(vars(module)))
        own = {name: value for name, value in vars(module).items() if name not in TORCH}
        # Lists of a user's own: what lies in them is theirs.
        self._undo += [_contents(value) for value in own.values() if isinstance(value, CONTAINERS)]
        for tensor in (*module._parameters.values(), *module._buffers.values(), *own.values()):
            if isinstance(tensor, Tensor) and id(tensor) not in self.seen:
                self.seen[id(tensor)] = tensor
                self._undo.append(_values(tensor))
        return [value for name, value in vars(module).items() if name in TORCH]

    def _of_container(self, container: Any) -> list[Any]:
        self._undo.append(_contents(container))
        return list(container.values() if isinstance(container, dict) else container)


def is_ours(each: object) -> bool:
    """Whether an object is of a class of this package, or of a child of one, and may change: frozen records do not."""
    frozen = getattr(getattr(each, "__dataclass_params__", None), "frozen", False)
    ours = any(kind.__module__.partition(".")[0] == "lightning_slim" for kind in type(each).__mro__)
    return ours and hasattr(each, "__dict__") and not frozen and not isinstance(each, type)


def _contents(container: Any) -> Callable[[], None]:
    """Puts back what lies in a list, dictionary or set."""
    had = container.copy()

    def put_back() -> None:
        if isinstance(container, list):
            container[:] = had
        else:
            container.clear()
            (container.extend if isinstance(container, deque) else container.update)(had)

    return put_back


def _values(tensor: Tensor) -> Callable[[], None]:
    """Puts back the values of a tensor, its gradient and its hooks."""
    if is_lazy(tensor) or tensor.is_meta:
        return lambda: None
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        values = tensor.detach().clone()
    grad, trains = tensor.grad if tensor.is_leaf else None, tensor.requires_grad
    hooks = {
        name: (held, None if held is None else held.copy())
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
        for held in [getattr(tensor, name, None)]
    }

    def put_back() -> None:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if not torch.equal(tensor, values):
                tensor.detach().copy_(values)
        if tensor.is_leaf:
            tensor.grad, tensor.requires_grad = grad, trains
        for name, (held, had) in hooks.items():
            if held is not None:
                held.clear()
                held.update(had)
            elif getattr(tensor, name, None):
                getattr(tensor, name).clear()

    return put_back


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    waiting: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            signal.raise_signal(signal.SIGINT)
