"""Carries out a plan; knows no score."""

from lightning_slim.surgery.batch_norm import (
    begin_recalibrating,
    end_recalibrating,
    keeping_statistics,
    pause_momentum,
    recalibrate_batch_norm,
)
from lightning_slim.surgery.blocks import drop, dropped, find_blocks, grow_back
from lightning_slim.surgery.cut import Cut, StructureChange, forget_blocks, remove_units, resize_to, restore
from lightning_slim.surgery.example import Example
from lightning_slim.surgery.groups import find_groups, survey
from lightning_slim.surgery.optimizer import UnknownState, check_states, migrate
from lightning_slim.surgery.passing import calls_after
from lightning_slim.surgery.selecting import selections, set_selections
from lightning_slim.surgery.sites import Survey
from lightning_slim.surgery.work import find_work

__all__ = [
    "Cut",
    "Example",
    "StructureChange",
    "Survey",
    "UnknownState",
    "begin_recalibrating",
    "calls_after",
    "check_states",
    "drop",
    "dropped",
    "end_recalibrating",
    "find_blocks",
    "find_groups",
    "find_work",
    "forget_blocks",
    "grow_back",
    "keeping_statistics",
    "migrate",
    "pause_momentum",
    "recalibrate_batch_norm",
    "remove_units",
    "resize_to",
    "restore",
    "selections",
    "set_selections",
    "survey",
]
