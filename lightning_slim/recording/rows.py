"""Units as they arrive at a reader, as rows of a table."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.statistics import with_lags
from lightning_slim.units import Reader


def rows_at(
    inputs: Tensor, reader: Reader, width: int, lags: int, skip_short: bool
) -> Float[Tensor, "rows units columns"] | None:
    """The units at a reader, one row for every sample, pixel or step, with their past where they arrive as series.

    Several positions of a unit (behind a flatten, or in the chunks of a grouped convolution) are several rows; where
    they are variables of their own (the channels of a head), they are its columns, without a past. A series of no more
    steps than `lags` has no past to speak of; where longer ones were seen before, a short one is None if `skip_short`.
    """
    units = _gathered(inputs, reader, width)
    if reader.joint:
        return units.flatten(0, -3)
    # item, step, units, positions: a Conv1d, or a linear layer on (item, step, channel)
    if lags and units.ndim == 4:
        if units.shape[1] > lags:
            return with_lags(units.permute(0, 3, 1, 2).flatten(0, 1), lags)
        if skip_short:
            return None
    return units.movedim(-1, 0).flatten(0, -2).unsqueeze(-1)


def items_at(inputs: Tensor, reader: Reader, width: int) -> Float[Tensor, "items positions columns"]:
    """The units at a reader, item by item; pixels, steps and positions of a unit are positions.

    Where the positions of a unit are variables of their own, they are its columns.
    """
    units = _gathered(inputs, reader, width)
    if reader.joint:
        return units.flatten(-2).reshape(len(units), -1, units.shape[-2] * units.shape[-1])
    return units.transpose(-1, -2).reshape(len(units), -1, units.shape[-2])


def _gathered(inputs: Tensor, reader: Reader, width: int) -> Float[Tensor, "*shape units positions"]:
    index = torch.cat([reader.span.index + chunk * width for chunk in range(reader.chunks)], dim=1)
    channels = inputs.movedim(reader.axis, -1)
    everything = index.shape == (channels.shape[-1], 1) and torch.equal(index[:, 0], torch.arange(len(index)))
    # nothing is gathered where unit u simply is channel u
    return channels.unsqueeze(-1) if everything else channels[..., index.to(inputs.device)]
