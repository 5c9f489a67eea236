"""Mutual information of binned units and classes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.statistics.contingency import Contingency
from lightning_slim.statistics.screening import Screening, chi2_screening


class MutualInformation(Contingency):
    """What a unit's bin tells of the class, streaming: the likelihood-ratio test `G = 2 * rows * information`.

    Null hypothesis: bin and class are independent; then `G` is chi-squared with `(bins - 1) * (classes - 1)` degrees of
    freedom, of bins and classes that have rows. The effect is the mutual information in nats, as of scikit-learn's
    `mutual_info_score` on the same bins. It is biased upwards by about `df1 / (2 * rows)` (Miller and Madow, 1955).

    Example:
        >>> information = MutualInformation(torch.tensor([[0.5]]), classes=2)
        >>> information.update(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
        >>> round(information.result().effect.item(), 4)  # log(2)
        0.6931
    """

    def result(self) -> Screening:
        """The test of every unit; `statistic` is G and `effect` the mutual information in nats, both `[units]`."""
        return mutual_information(self.table)


def mutual_information(table: Float[Tensor, "units bins classes"]) -> Screening:
    """Mutual information of the bins and classes of a table of counts; see `MutualInformation`."""
    table = table.double()
    bins, classes = table.sum(2), table.sum(1)
    rows = bins.sum(1)
    # log(n_bc n / (n_b n_c)), in two ratios: no product of counts is rounded before the logarithm.
    ratio = (table / bins[:, :, None].clamp_min(1)) / (classes / rows[:, None].clamp_min(1))[:, None].clamp_min(1e-300)
    nats = torch.special.xlogy(table, torch.where(table > 0, ratio, 1.0)).sum((1, 2)).clamp_min(0)
    df = ((bins > 0).sum(1) - 1) * ((classes > 0).sum(1) - 1)
    return chi2_screening(2 * nats, nats / rows.clamp_min(1), df)
