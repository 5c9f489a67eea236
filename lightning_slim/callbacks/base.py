"""The one file about what Lightning does when: strategies that cannot be served, checkpoints, resume."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_slim.checkpoint import fit_to, sign

# By name, so that both `lightning.pytorch` and `pytorch_lightning` are meant, and none of them is imported.
SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy", "XLAFSDPStrategy"}


class SlimCallback(Callback):
    """A callback that changes the structure of the model it is given."""

    def cut_tensors(self) -> list[str]:
        """Names of the module's tensors that this callback has cut."""
        return []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_what_cannot_be_cut(trainer, pl_module)
        # Lightning calls the module's hook before it loads weights, and the callbacks' hooks after: too late to resize.
        # It looks the hook up on the instance, so that is where it is wrapped. The module's hook for saving also runs
        # for `save_weights_only=True`, the callbacks' does not.
        load, save = pl_module.on_load_checkpoint, pl_module.on_save_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            fit_to(pl_module, checkpoint, self.cut_tensors())
            load(checkpoint)

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            sign(checkpoint, self.cut_tensors())
            save(checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]
        pl_module.on_save_checkpoint = on_save_checkpoint  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in ("on_load_checkpoint", "on_save_checkpoint"):
            pl_module.__dict__.pop(hook, None)


def refuse_what_cannot_be_cut(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raises before training where a cut would break the run.

    Raises:
        MisconfigurationException: sharded parameters, several processes, or compiled or scripted modules.
    """
    strategy = trainer.strategy
    if SHARDED & {c.__name__ for c in type(strategy).__mro__}:
        raise MisconfigurationException(
            f"Expected a strategy that keeps whole parameters on each device, got {type(strategy).__name__}: "
            "its shards cannot be cut. Prune on one device."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"Expected one process, got {trainer.world_size}: ranks would cut differently. Prune on one device."
        )
    for name, module in pl_module.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise MisconfigurationException(
                f"Expected eager modules, got the scripted module {name!r}: its layers cannot be seen. "
                "Script it after training."
            )
        if type(module).__name__ == "OptimizedModule":  # by name: torch._dynamo is slow to import
            raise MisconfigurationException(
                f"Expected eager modules, got the compiled module {name!r}: recording hooks do not fire in it. "
                "Compile it after training."
            )
