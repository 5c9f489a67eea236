"""The console script: LightningCLI, with the dense baseline and the report."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from lightning_slim.callbacks import Prune
from lightning_slim.callbacks.base import SlimCallback, metrics_of


class SlimCLI(LightningCLI):
    """`LightningCLI`, whose `fit` can train the dense model as well and ends with both side by side."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--baseline",
            type=bool,
            default=False,
            help="First train the model without pruning, from the same seed and as long, and compare with it.",
        )

    def before_fit(self) -> None:
        for callback in self._pruning():
            callback.print_report = False  # it comes after the test, with the baseline's metrics
        self.dense_metrics: dict[str, float] = {}
        if self._get(self.config, "baseline"):
            self.dense_metrics = self._train_dense()

    def after_fit(self) -> None:
        slim_metrics = self._test(self.trainer, self.model)
        folder = self.trainer.log_dir or self.trainer.default_root_dir
        for callback in self._pruning():
            table = callback.report(slim_metrics, self.dense_metrics)
            if self.trainer.is_global_zero:
                table.save(folder)
                console = Console()
                console.print(table)
                console.print(f"Saved as report.json and report.md in {folder}", soft_wrap=True)
                logs = os.path.dirname(folder.rstrip("/")) or "."
                console.print(f"Watch both runs with: tensorboard --logdir {logs}", soft_wrap=True)

    def _pruning(self) -> list[Prune]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, Prune)]  # type: ignore[attr-defined]

    def _train_dense(self) -> dict[str, float]:
        trainer = self._dense_trainer()
        model = copy.deepcopy(self.model)
        print("Training the dense model for comparison.")
        trainer.fit(model, datamodule=self.datamodule)
        metrics = self._test(trainer, model)
        print("Dense model: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        # The slim run starts from where the dense one did.
        seed_everything(self._get(self.config, "seed_everything"), workers=True, verbose=False)
        return metrics

    def _dense_trainer(self) -> Trainer:
        """A trainer of the same configuration, with callbacks and loggers of its own and without pruning."""
        config = copy.deepcopy(dict(self._get(self.config_init, "trainer", default={})))
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        config["callbacks"] = [callback for callback in callbacks if not isinstance(callback, SlimCallback)]
        return self._instantiate_trainer(config, [])

    def _test(self, trainer: Trainer, model: Any) -> dict[str, float]:
        """Test metrics, or the last validation metrics where there is no test set."""
        has_test = self.datamodule is not None and "test_dataloader" in vars(type(self.datamodule))
        if not has_test:
            return metrics_of(trainer)
        return dict(trainer.test(model, datamodule=self.datamodule, verbose=False)[0])


def main(args: list[str] | None = None) -> None:
    """Entry point of `lightning-slim`; modules of the current folder can be named in `class_path`."""
    sys.path.insert(0, os.getcwd())
    SlimCLI(args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
