"""A call right behind a hook of the module: what the module logs there is known then, and nothing is saved yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class BehindModule:
    """Lightning calls a hook of its callbacks, then that of the module, then that of what monitors and saves.

    A callback that needs what the module logs in its own hook, before a checkpoint is saved, is called in between.

    Args:
        hook: name of the hook.
    """

    def __init__(self, hook: str) -> None:
        self.hook = hook
        self._module: nn.Module | None = None
        self._own: Any = None  # what the module itself held under the name of the hook, if anything

    def call(self, module: nn.Module, then: Callable[[], None]) -> None:
        """Calls `then` once, behind the module's next call of the hook."""
        self.forget()
        called = getattr(module, self.hook)
        self._module, self._own = module, vars(module).get(self.hook)

        def hook(*args: Any, **kwargs: Any) -> Any:
            self.forget()
            result = called(*args, **kwargs)
            then()
            return result

        setattr(module, self.hook, hook)

    def forget(self) -> None:
        """The module is as it was."""
        if self._module is not None:
            delattr(self._module, self.hook)
            if self._own is not None:
                setattr(self._module, self.hook, self._own)
            self._module = self._own = None
