"""p-values adjusted for the number of tests."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Method = Literal["benjamini_hochberg", "benjamini_yekutieli", "holm"]


def adjusted_p(
    p: Float[Tensor, "*tests"], method: Method = "benjamini_hochberg", dim: int = -1
) -> Float[Tensor, "*tests"]:
    """Adjusted p-values: to reject where they are at most `q` holds the error of the whole family at `q`.

    With `m` tests and the `i`-th smallest p-value:

    - `"benjamini_hochberg"`: `min_{j >= i} m p_j / j`, the false discovery rate of independent tests and of those with
      positive dependence (Benjamini and Hochberg, 1995);
    - `"benjamini_yekutieli"`: that times `sum_{j <= m} 1 / j`, the same under any dependence (2001);
    - `"holm"`: `max_{j <= i} (m - j + 1) p_j`, the probability of any false rejection under any dependence (1979).

    Args:
        p: p-values in [0, 1].
        method: which of these.
        dim: the tests of a family; other dimensions are families of their own.

    Returns:
        float64, at most 1, never below `p`.

    Raises:
        ValueError: a value is not a p-value.

    Example:
        >>> adjusted_p(torch.tensor([0.01, 0.04, 0.03]))
        tensor([0.0300, 0.0400, 0.0400], dtype=torch.float64)
        >>> adjusted_p(torch.tensor([0.01, 0.04, 0.03]), "holm")
        tensor([0.0300, 0.0600, 0.0600], dtype=torch.float64)
    """
    p = p.double()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(
            f"expected p-values in [0, 1], got {int((~((p >= 0) & (p <= 1))).sum())} others: "
            "give logarithms to `adjusted_log_p`, and 1 for a test that could not be made."
        )
    return adjusted_log_p(p.log(), method, dim).exp()


def adjusted_log_p(
    log_p: Float[Tensor, "*tests"], method: Method = "benjamini_hochberg", dim: int = -1
) -> Float[Tensor, "*tests"]:
    """Logarithms of adjusted p-values from logarithms, so that p-values too small for a float keep their order.

    As `adjusted_p`.

    Raises:
        ValueError: a value is above 0, or NaN.

    Example:
        >>> adjusted_log_p(torch.tensor([-2000.0, -1000.0, -0.5])).tolist()
        [-1998.9013877113318, -999.5945348918918, -0.5]
    """
    log_p = log_p.double()
    if not bool((log_p <= 0).all()):
        raise ValueError(
            f"expected logarithms of p-values, at most 0, got {int((~(log_p <= 0)).sum())} others: "
            "give p-values to `adjusted_p`, and 0 for a test that could not be made."
        )
    if log_p.ndim == 0 or log_p.numel() == 0:
        return log_p
    ascending, order = log_p.movedim(dim, -1).sort(dim=-1, stable=True)
    number = ascending.shape[-1]
    rank = torch.arange(1, number + 1, dtype=torch.float64, device=log_p.device)
    if method == "holm":
        adjusted = (ascending + (number - rank + 1).log()).cummax(-1).values
    else:
        factor = number / rank
        if method == "benjamini_yekutieli":
            factor = factor * (1 / rank).sum()
        adjusted = (ascending + factor.log()).flip(-1).cummin(-1).values.flip(-1)
    # Into the order of the input, through the inverse permutation.
    return adjusted.clamp_max(0.0).gather(-1, order.argsort(-1)).movedim(-1, dim)
