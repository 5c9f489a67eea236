"""Granger causality over many sequences, with a Wald test that lets the rows of a sequence depend on one another."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.statistics.distributions import f_log_sf
from lightning_slim.statistics.nested import COLLINEAR
from lightning_slim.statistics.panel import PanelGranger, PanelTest
from lightning_slim.statistics.panel_rows import DESIGN, PanelDesign, Rows

BLOCK = 1 << 20  # float64 numbers of products of moments that are held at once


class ClusteredPanel(PanelGranger):
    """`PanelGranger` with the cluster-robust Wald test over items in place of F and of its calibration.

    Rows of one item may depend on one another in any way, as long as items are independent. The covariance of the
    coefficients is the sandwich `A^-1 (sum over items of s s') A^-1`, with `s` the sum over an item's rows of
    regressors times residual, which is a linear map of the item's moments: the second moments of these are what is
    kept. Corrected for few items as in Stata and statsmodels, by `items / (items - 1) * (rows - 1) / (rows -
    coefficients)`, and compared with F of `lags` and `items - 1` degrees of freedom. Needs many items: some 50 and
    more. Effects are those of `PanelGranger`. Source: Liang and Zeger (1986).

    Memory: `8 * units * targets * d ** 2` bytes more, `d = m * (m + 1) / 2`, `m = lags + own_lags + 1`: 36 numbers a
    pair for one lag, 225 for two, 784 for three.

    Args:
        units: number of units.
        targets: number of targets.
        design: lags, steps that count, and means that are subtracted.
        device: where the sums are kept.
    """

    SUMS: ClassVar = {**PanelGranger.SUMS, "products": 0, "items": None}

    def __init__(
        self,
        units: int,
        targets: int,
        design: PanelDesign = DESIGN,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(units, targets, design, nulls=0, device=device)
        columns = self.design.lags + self.design.own + 1
        moments = columns * (columns + 1) // 2
        self.products: Float[Tensor, "units targets moments moments"] = self._zeros(units, targets, moments, moments)
        self.items: Float[Tensor, "1"] = self._zeros(1)

    def result(self, distinct: int | float | None = None) -> PanelTest:
        """The Wald test of every pair; see `PanelGranger.result`. The number of distinct rows does not enter it.

        Items that overlap are not independent: of windows of one series, take every so many.
        """
        tests = [self._wald(target) for target in range(len(self.target_size))]
        wald, rank = (torch.stack(part) for part in zip(*tests, strict=True))
        df2 = (self.items - 1).clamp_min(0).expand_as(wald)
        testable = (rank >= 1) & (df2 >= 1) & wald.isfinite()
        F = torch.where(testable, wald / rank.clamp_min(1), 0.0)
        log_p = f_log_sf(F, rank, df2)
        effects = super().result(distinct)
        return effects._replace(statistic=F, p_value=log_p.exp(), log_p=log_p, df1=rank, df2=df2)

    def _add(self, world: int, rows: Rows) -> None:
        super()._add(world, rows)
        if rows.at.start == 0:
            self.items += rows.counts.any(1).sum()
        order = [*range(1, self.design.own + 1), 0]
        rows_of = rows.targets[..., order]  # items rows targets columns
        own, lags = self.design.own, self.design.lags
        first, second = torch.triu_indices(own + lags + 1, own + lags + 1, device=self.device)
        outer, inner = torch.tensor([*range(own), own + lags], device=self.device), slice(own, own + lags)
        block = max(1, BLOCK // max(1, len(rows.units) * len(first)))
        for target in range(rows_of.shape[2]):
            answers = rows_of[:, :, target]
            fixed = answers.mT @ answers
            for start in range(0, rows.units.shape[3], block):
                units = rows.units[..., start : start + block]
                moments = units.new_zeros(len(units), units.shape[3], own + lags + 1, own + lags + 1)
                moments[:, :, outer[:, None], outer] = fixed[:, None]
                moments[:, :, inner, inner] = torch.einsum("briu,brju->buij", units, units)
                cross = torch.einsum("briu,brc->buic", units, answers)
                moments[:, :, inner, outer] = cross
                moments[:, :, outer, inner] = cross.mT
                packed = moments[..., first, second].transpose(0, 1)  # units items moments
                at = slice(rows.at.start + start, rows.at.start + start + units.shape[3])
                self.products[at, target] += packed.mT @ packed

    def _wald(self, target: int) -> tuple[Float[Tensor, "units"], Float[Tensor, "units"]]:
        own, lags = self.design.own, self.design.lags
        joint = self._joint(0, target).nan_to_num(0.0, 0.0, 0.0)
        products = self.products[:, target].nan_to_num(0.0, 0.0, 0.0)
        variance = joint.diagonal(dim1=1, dim2=2)
        alive = variance > self._floor(self.target_size[target])
        scale = torch.where(alive, variance, torch.inf).rsqrt()  # 0 for what is dead: it drops out
        gram = joint * scale[:, :, None] * scale[:, None, :]
        inverse = torch.linalg.pinv(gram[:, :-1, :-1], hermitian=True, rtol=COLLINEAR)
        theta = (inverse @ gram[:, :-1, -1:])[..., 0]
        residual = torch.cat([-theta, torch.ones_like(theta[:, :1])], 1)  # of all columns
        first, second = torch.triu_indices(own + lags + 1, own + lags + 1, device=self.device)
        eye = torch.eye(own + lags + 1, dtype=gram.dtype, device=gram.device)
        # score = moments @ residual, as a linear map of the packed upper triangle
        score = (
            eye[:, first] * residual[:, None, second] + (first != second) * eye[:, second] * residual[:, None, first]
        )
        packed = (
            products * (scale[:, first] * scale[:, second])[:, :, None] * (scale[:, first] * scale[:, second])[:, None]
        )
        bread = (inverse @ score[:, :-1])[:, own:]
        used = torch.linalg.matrix_rank(gram[:, :-1, :-1], hermitian=True, rtol=COLLINEAR)
        own_used = torch.linalg.matrix_rank(gram[:, :own, :own], hermitian=True, rtol=COLLINEAR)
        rows = self.rows[0] - self.absorbed[0] - used
        few = self.items / (self.items - 1).clamp_min(1) * (self.rows[0] - 1) / rows.clamp_min(1)
        covariance = bread @ packed @ bread.mT * few[:, None, None]
        beta = theta[:, own:]
        wald = (
            beta[:, None] @ torch.linalg.pinv(covariance, hermitian=True, rtol=COLLINEAR) @ beta[..., None]
        ).flatten()
        return wald, torch.where(rows >= 1, used - own_used, 0).to(wald)
