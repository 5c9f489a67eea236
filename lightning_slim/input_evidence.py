"""Which inputs tell of the target: evidence, streamed batch by batch, and a choice that controls false discoveries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lightning_slim.statistics import Accumulator, Anova, Correlation, PanelDesign, PanelGranger, adjusted_log_p
from lightning_slim.statistics.random_walks import dickey_fuller_sums, unit_roots
from lightning_slim.statistics.streaming import Pivoted

Method = Literal["auto", "granger", "anova", "correlation"]
Test = Literal["granger", "anova", "correlation"]


class InputTest(NamedTuple):
    """The test of every input.

    Attributes:
        log_p: logarithm of the p-value; the least of all targets and positions, times their number (Bonferroni).
        effect: the largest of all targets and positions: Geweke's measure in nats, eta-squared or r-squared.
        own_past: whether the input is the target's own past, which such a test takes for granted.
    """

    log_p: Float[Tensor, "features"]
    effect: Float[Tensor, "features"]
    own_past: Bool[Tensor, "features"]


def test_for(inputs: Float[Tensor, "items ..."], target: Shaped[Tensor, "items ..."], method: Method) -> Test:
    """The test that shapes and types ask for, or the one that was chosen, if they allow it.

    Args:
        inputs: `(item, feature)`, or `(item, step, feature)` in either order, or images.
        target: whole numbers for classes, `(item)`; floating-point for numbers, `(item)` or `(item, target)`, series of
            them, `(item, step)` or `(item, step, target)`; labels of which an item may have several, `(item, label)`.

    Raises:
        ValueError: no test fits.
    """
    whole = not target.is_floating_point()
    if method == "auto":
        method = "anova" if whole and target.ndim == 1 else "granger" if inputs.ndim == 3 else "correlation"
    shapes = f"inputs of shape {tuple(inputs.shape)} and a target of {target.dtype} of shape {tuple(target.shape)}"
    if target.ndim == 0 or len(target) != len(inputs):
        raise ValueError(f"Expected a target for every item, got {shapes}: check `inputs` and `target`.")
    if method == "anova" and (not whole or target.ndim != 1):
        raise ValueError(
            f'Expected one class for every item, as whole numbers, got {shapes}: use method="correlation".'
        )
    if method == "granger" and (inputs.ndim != 3 or target.ndim > 3):
        raise ValueError(f'Expected series of inputs and their targets, got {shapes}: use method="correlation".')
    if method == "correlation" and target.ndim > 2:
        raise ValueError(f"Expected targets `(item)` or `(item, target)`, got {shapes}: screen the data beforehand.")
    return method


class InputEvidence:
    """A streaming test of every input.

    Inputs of several steps or pixels have a test for each of these, unless their past is tested as a whole.

    Args:
        test: `"granger"`: does the input's present and past tell of a series what that series' own past does not;
            `"anova"`: does its mean differ from class to class; `"correlation"`: with numbers or several labels.
        axis: of the features.
        lags: of `"granger"`: present and past steps of each input, and past steps of the target.
        overlap: of `"granger"`: how many windows hold the same step.
        difference: of `"granger"`: whether what is tested are first differences, of inputs and of target series.
    """

    def __init__(self, test: Test, axis: int, lags: int, overlap: float, difference: bool = False) -> None:
        self.test, self.axis, self.lags, self.overlap, self.difference = test, axis, lags, overlap, difference
        self.streamed: Accumulator | None = None
        self.steps: Float[Tensor, "sums features"] | None = None  # of series: for `unit_roots`
        self.features = 0

    def update(self, inputs: Float[Tensor, "items ..."], target: Shaped[Tensor, "items ..."]) -> None:
        """Adds a batch.

        Raises:
            ValueError: another number of inputs or targets than before, or too few steps for the lags.
        """
        inputs, target = inputs.detach().movedim(self.axis, -1), target.detach()
        self.features = inputs.shape[-1]
        if self.test == "granger":
            self._update_granger(inputs, target)
            return
        inputs = inputs.flatten(1)
        if self.test == "anova":
            known = target >= 0  # such as `ignore_index`
            classes = int(target.max()) + 1
            if self.streamed is None:
                self.streamed = Anova(max(classes, 1), inputs.shape[1], inputs.device)
            assert isinstance(self.streamed, Anova)
            self.streamed.grow(classes)
            self.streamed.update(inputs[known], target[known])
            return
        target = target.reshape(len(target), -1)
        if self.streamed is None:
            self.streamed = Correlation(target.shape[1], inputs.shape[1], inputs.device)
        self.streamed.update(inputs, target)

    def _update_granger(self, inputs: Tensor, target: Tensor) -> None:
        """A target of the step after each step, or one of the step after the last, whose own past is not given."""
        steps, series = inputs.shape[1], True
        sums = dickey_fuller_sums(inputs)
        self.steps = sums if self.steps is None else self.steps + sums
        if target.ndim == 3 and target.shape[1] != steps:
            target = target.transpose(1, 2)
        if target.ndim < 2 or target.shape[1] != steps:
            series, inputs = False, inputs[:, -self.lags - self.difference :]
            last = target.reshape(len(target), 1, -1)
            target = torch.cat([last.expand(-1, inputs.shape[1] - 1, -1) * 0, last], 1)
        target = target.reshape(*target.shape[:2], -1)
        if self.difference:
            inputs = inputs.diff(dim=1)
            target = target.diff(dim=1) if series else target[:, 1:]
        if self.streamed is None:
            own_lags = self.lags if series else 0
            design = PanelDesign(self.lags, own_lags, first_lag=0)
            self.streamed = PanelGranger(self.features, target.shape[2], design, device=inputs.device)
        self.streamed.update(inputs, target)

    def unit_roots(self, reduce: Callable[[Tensor, str], Tensor]) -> list[int]:
        """Inputs that look like random walks, tested as levels for a target without a past: its test is spurious then.

        Args:
            reduce: sums over ranks.
        """
        if self.difference or self.steps is None or self._own_lags:
            return []
        return unit_roots(reduce(self.steps.clone(), "sum").cpu(), self.overlap).nonzero().flatten().tolist()

    @property
    def _own_lags(self) -> int:
        """Past steps of the target that are taken for granted."""
        return self.streamed.design.own_lags or 0 if isinstance(self.streamed, PanelGranger) else 0

    def sum_over_ranks(self, reduce: Callable[[Tensor, str], Tensor], agree: Callable[[Any], Any]) -> None:
        """Lets every rank know what all of them have seen."""
        streamed = self.seen
        if isinstance(streamed, Anova):
            streamed.grow(int(reduce(torch.tensor(len(streamed.count), device=streamed.device), "max")))
        if isinstance(streamed, Pivoted):
            streamed.move_pivots(agree(streamed.pivots))
        for name, value in streamed.sums.items():
            setattr(streamed, name, reduce(value, "sum"))

    @property
    def seen(self) -> Accumulator:
        """What was streamed."""
        if self.streamed is None:
            raise RuntimeError("Expected at least one batch before a test.")
        return self.streamed

    def result(self) -> InputTest:
        """The test of every input, on the CPU."""
        streamed = self.seen
        own_past = torch.zeros(self.features, dtype=torch.bool)
        if isinstance(streamed, PanelGranger):
            distinct = float(streamed.rows[0]) / self.overlap if self.overlap > 1 else None
            test = streamed.result(distinct)
            log_p, effect = test.log_p, test.geweke
            spread = streamed.unit_moments[0].diagonal(dim1=1, dim2=2).sum(1)
            alive = spread > 1e-20 * streamed.unit_size
            own_past = (alive & (test.df1 == 0).any(0)).cpu()
        else:
            screening = streamed.result()
            log_p, effect = screening.log_p, screening.effect  # type: ignore[attr-defined]
        log_p, effect = (part.reshape(-1, self.features).cpu() for part in (log_p, effect))
        least = (log_p.amin(0) + math.log(len(log_p))).clamp_max(0)
        return InputTest(least, effect.amax(0), own_past)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data only."""
        streamed = {"features": self.features, "own_lags": self._own_lags, "streamed": self.seen.state_dict()}
        return streamed if self.steps is None else {**streamed, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`."""
        self.features, tensors = state["features"], state["streamed"]
        self.steps = state["steps"].to(device) if "steps" in state else None
        if self.test == "granger":
            units, targets = len(tensors["unit_size"]), len(tensors["target_size"])
            self.streamed = PanelGranger(
                units, targets, PanelDesign(self.lags, state["own_lags"], first_lag=0), device=device
            )
        else:
            self.streamed = (Anova if self.test == "anova" else Correlation)(1, 1, device)
        self.streamed.load_state_dict(tensors)


class Choice(NamedTuple):
    """Which inputs stay.

    Attributes:
        keep: which they are.
        adjusted_p: p-values of the family of all inputs, by Benjamini and Hochberg.
        significant: how many are discoveries.
    """

    keep: Bool[Tensor, "features"]
    adjusted_p: Float[Tensor, "features"]
    significant: int


def choose(
    test: InputTest,
    alpha: float,
    min_inputs: int,
    stays: Bool[Tensor, "features"],
    layers: Iterable[Int[Tensor, "read"]],
) -> Choice:
    """Keeps the inputs that tell of the target; all of them if none does.

    Args:
        test: of every input.
        alpha: share of false discoveries that is allowed.
        min_inputs: so many stay; the best, if too few are significant.
        stays: what must stay, whatever the test says.
        layers: for each layer that reads inputs, which: at least one of these stays.
    """
    adjusted = adjusted_log_p(test.log_p)
    significant = adjusted <= math.log(alpha)
    best = sorted(range(len(adjusted)), key=lambda i: (float(test.log_p[i]), -float(test.effect[i])))
    keep = significant | test.own_past | stays
    if not bool(significant.any()):
        keep = torch.ones_like(keep)
    for i in best:
        if int(keep.sum()) < min_inputs:
            keep[i] = True
    for read in layers:
        if len(read) and not bool(keep[read].any()):
            keep[next(i for i in best if i in read.tolist())] = True
    return Choice(keep, adjusted.exp(), int(significant.sum()))
