"""The Kruskal-Wallis test: an analysis of variance of ranks, which outliers and monotone maps do not move."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.contingency import Contingency
from lightning_slim.statistics.labels import check_labels
from lightning_slim.statistics.screening import Screening, chi2_screening

BLOCK = 1 << 19  # values that are ranked at once


class KruskalWallis(Contingency):
    """Kruskal and Wallis's `H` of binned units across classes, streaming.

    Values within a bin count as ties: it is the exact test of the binned values, and approximates that of the values
    themselves, which takes all rows at once: `kruskal_wallis`. Of 32 quantile bins `H` is some 2 % off, of 8 some 6 %.

    The effect is `H / (rows - 1)`, the share of the ranks' variance that lies between classes.

    Example:
        >>> test = KruskalWallis(torch.tensor([[0.5]]), classes=2)
        >>> test.update(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1]))
        >>> test.result().statistic.tolist(), test.result().effect.tolist()
        ([3.0], [1.0])
    """

    def result(self) -> Screening:
        """The test of every unit; `statistic` is H and `effect` is `H / (rows - 1)`, both `[units]`."""
        bins, classes = self.table.sum(2), self.table.sum(1)
        rank = bins.cumsum(1) - (bins + bins.sum(1, keepdim=True)) / 2  # middle of each bin, about the mean of all
        total = torch.einsum("ubc,ub->cu", self.table, rank)
        return _of_ranks(total, (bins * rank.square()).sum(1), classes.T)


@torch.no_grad()
def kruskal_wallis(values: Float[Tensor, "rows units"], labels: Int[Tensor, "rows"], classes: int) -> Screening:
    """Kruskal and Wallis's `H` of every unit across classes, exact, with ties: all rows at once.

    `H = (rows - 1) * (between / all)`, squares of the ranks about their mean; tied values share their mean rank. Null
    hypothesis: the unit is distributed alike in all classes; then `H` is nearly chi-squared. Source: Kruskal and Wallis
    (1952); equal to `scipy.stats.kruskal`.

    Memory: some 100 MB beside the values, whatever their number, unless there are more than half a million rows.

    Args:
        values: all values; a unit with one that is not finite cannot be tested.
        labels: class of each row.
        classes: number of classes.

    Returns:
        `statistic` is H and `effect` is `H / (rows - 1)`, both `[units]`.

    Raises:
        ValueError: a label is none of the classes.

    Example:
        >>> values, labels = torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([0, 0, 1])
        >>> kruskal_wallis(values, labels, classes=2).statistic.tolist()
        [1.5]
    """
    labels = check_labels(labels.to(values.device), classes)
    count = torch.bincount(labels, minlength=classes).double()
    totals, squares = [], []
    for block in torch.split(values, max(1, BLOCK // max(1, len(values))), dim=1):
        column = block.T.double().contiguous()
        ordered = column.sort(1).values
        rank = torch.searchsorted(ordered, column) + torch.searchsorted(ordered, column, right=True)
        centred = ((rank - len(values)).double() / 2).T
        centred = torch.where(block.isfinite().all(0), centred, 0.0)
        totals.append(centred.new_zeros(classes, centred.shape[1]).index_add_(0, labels, centred))
        squares.append(centred.square().sum(0))
    return _of_ranks(torch.cat(totals, 1), torch.cat(squares), count[:, None].expand(-1, values.shape[1]))


def _of_ranks(
    total: Float[Tensor, "classes units"], square: Float[Tensor, "units"], count: Float[Tensor, "classes units"]
) -> Screening:
    between = (total.square() / count.clamp_min(1)).sum(0)
    share = torch.where(square > 0, between / square, 0.0)
    return chi2_screening((count.sum(0) - 1) * share, share, (count > 0).sum(0) - 1)
