"""All that is known of a group when it is scored: what was recorded of it, and what the model says itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_slim.recording import Recorder
from lightning_slim.scores import Evidence, Need, Reading
from lightning_slim.statistics import Moments
from lightning_slim.surgery.layers.norm import norm_scales
from lightning_slim.units import Reader, UnitGroup, columns, coupled_rows, rows
from lightning_slim.weight_norm import weight
from lightning_slim.witness import Gathered, Witness


def evidence_of(
    model: nn.Module, group: UnitGroup, recorder: Recorder, needs: Collection[Need], generator: torch.Generator
) -> Evidence:
    """The evidence that a score needs of one group.

    Args:
        model: the module that `group` was found in.
        group: the units.
        recorder: of the model.
        needs: which parts of the evidence must be there.
        generator: for scores that draw.
    """
    moments = recorder.seen(group.name) if "moments" in needs else []
    readings = tuple(
        _reading(m, r, weight(model, r.span.tensor).detach(), recorder.told(group.name, slot))
        for slot, (m, r) in enumerate(zip(moments, group.readers, strict=False))
        if m is not None
    )
    if group.blocks:  # what follows reads the sum of what the blocks add
        readings = tuple(Reading(m, torch.ones(group.size, 1)) for m in moments if m is not None)
    parts = [rows(model, group, role=None)] if group.blocks else coupled_rows(model, group, role=None)
    return Evidence(
        weights=torch.cat(parts, 1).detach(),
        fans=tuple(part.shape[1] for part in parts),
        readings=readings,
        effects={effect: recorder.mean(effect, group.name) for effect in recorder.effects},
        gates=recorder.gated(group.name),
        made=rows(model, group).detach() if "made" in needs and not group.blocks else None,
        scales=norm_scales(model, group) if "scales" in needs else None,
        generator=generator,
    )


def _reading(moments: Moments, reader: Reader, tensor: Tensor, told: Mapping[Witness, Gathered]) -> Reading:
    weight = columns(tensor, reader.span)
    channels = reader.span.index.shape[1] if reader.joint else 1
    if reader.patches:  # of one unit: channels, outputs, taps
        weight = weight.view(len(weight), channels, -1, tensor.shape[2:].numel()).mT
        channels *= weight.shape[2]
    return Reading(moments, weight.reshape(len(weight) * channels, -1), channels, told)
