"""Forward hooks that pass on to a recorder what its readers are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_slim.surgery.layers.recurrent import heard
from lightning_slim.units import Reader

if TYPE_CHECKING:
    from lightning_slim.recording.recorder import Recorder


class Watch:
    """A forward pre-hook: passes a reader's input on to the recorder."""

    def __init__(self, recorder: Recorder, group: str, slot: int, reader: Reader) -> None:
        self.recorder, self.group, self.slot, self.reader = recorder, group, slot, reader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | PackedSequence))
        inputs = inputs.data if isinstance(inputs, PackedSequence) else inputs
        self.recorder.observe(self.group, self.slot, self.reader, inputs)


class WatchRecurrent:
    """A forward pre-hook on a recurrent layer, whose weights read the input or what other levels and steps make."""

    def __init__(self, recorder: Recorder, readers: Sequence[tuple[str, int, Reader]]) -> None:
        self.recorder, self.readers = recorder, readers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, nn.RNNBase)
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        enough = None if self.recorder.known else max(self.recorder.enough(reader) for _, _, reader in self.readers)
        read = heard(module, given["input"], given.get("hx"), enough)
        for group, slot, reader in self.readers:
            self.recorder.observe(group, slot, reader, read[reader.span.tensor.rpartition(".")[2]])


class WatchBlocks:
    """Forward hooks on all blocks of a group: once every one was called, passes on what they added to their inputs."""

    def __init__(self, recorder: Recorder, group: str, blocks: Sequence[str]) -> None:
        self.recorder, self.group, self.blocks = recorder, group, blocks
        self.updates: dict[str, Tensor] = {}

    def of(self, path: str) -> Callable[..., None]:
        """The hook for one block."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            made = result if isinstance(result, Tensor) else result[0]
            self.updates[path] = made.detach() - given.detach()
            if len(self.updates) == len(self.blocks):
                self.recorder.observe_blocks(self.group, [self.updates[path] for path in self.blocks])
                self.updates.clear()

        return hook
