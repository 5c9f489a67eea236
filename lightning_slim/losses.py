"""The loss of each item of a batch, heard from the loss functions that a training step calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

FUNCTIONS: dict[Callable[..., Any], inspect.Signature] = {
    function: inspect.signature(function)
    for function in (
        F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits, F.kl_div, F.poisson_nll_loss, F.gaussian_nll_loss, F.soft_margin_loss,
        F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss, F.hinge_embedding_loss,
        F.cosine_embedding_loss, F.margin_ranking_loss, F.triplet_margin_loss,
    )
}  # fmt: skip


class NoLossError(ValueError):
    """A training step called no loss function, as one that passes over its batch."""


class HearLosses(TorchFunctionMode):
    """While it is entered, every loss function of `torch.nn.functional` is heard, also within the loss modules.

    What a training step computes is not changed; each loss is computed once more, without reduction.

    Example:
        >>> with HearLosses() as heard:
        ...     loss = F.mse_loss(torch.zeros(2), torch.tensor([1.0, 3.0]))
        >>> heard.of_items(loss)
        tensor([1., 9.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, Tensor, Tensor]] = []  # function, what it returned, each item's share

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FUNCTIONS and isinstance(result, Tensor):
            given = FUNCTIONS[func].bind(*args, **(kwargs or {}))
            given.apply_defaults()
            how = given.arguments["reduction"]
            given.arguments.update(
                reduction="none", **{k: None for k in ("size_average", "reduce") if k in given.arguments}
            )
            with torch.no_grad():
                each = func(*given.args, **given.kwargs).detach()
                each = each.flatten(1) if each.ndim > 1 else each.unsqueeze(-1) if each.ndim else each.view(1, 1)
            self.heard.append((func.__name__, result.detach(), each.sum(1) if how == "sum" else each.mean(1)))
        return result

    def of_items(self, loss: Tensor | None) -> Float[Tensor, "items"]:
        """The losses of the items, whose mean (or sum) the training step returned.

        Args:
            loss: what the training step returned; None if that is not known, which only one heard loss allows.

        Raises:
            NoLossError: no loss function was heard.
            ValueError: none, nor all together, made the loss.
        """
        if not self.heard:
            raise NoLossError(
                "Expected a training step that calls a loss function of `torch.nn.functional` or of `torch.nn`, heard "
                "none: the loss of each item is not known. Choose a score that does not need it."
            )
        if len(self.heard) == 1:
            return self.heard[0][2]
        together = torch.stack([result.double().mean() for _, result, _ in self.heard]).sum()
        alike = len({len(each) for _, _, each in self.heard}) == 1
        if loss is None or not alike or not torch.isclose(together, loss.detach().double(), rtol=1e-3):
            names = ", ".join(name for name, _, _ in self.heard)
            raise ValueError(
                f"Expected one loss function, or several whose plain sum is the loss, heard {names}: which share each "
                "item has is not known. Choose a score that does not need it."
            )
        return torch.stack([each.double() for _, _, each in self.heard]).sum(0)
