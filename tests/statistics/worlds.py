"""Panels of which is known what causes what."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def autoregressive(items: int, steps: int, units: int, phi: float) -> Tensor:
    """Independent AR(1) series of variance 1, `[items, steps, units]`."""
    series = randn(items, steps, units)
    for t in range(1, steps):
        series[:, t] = phi * series[:, t - 1] + math.sqrt(1 - phi**2) * series[:, t]
    return series


def null_world(kind: str, items: int, steps: int, units: int) -> tuple[Tensor, Tensor]:
    """Units that do not cause the target, which is AR(1)."""
    y = autoregressive(items, steps, 1, 0.7)
    if kind == "independent":
        return autoregressive(items, steps, units, 0.7), y
    if kind == "echo":  # units see the target at the same step
        return y + 0.7 * randn(items, steps, units), y
    if kind == "feedback":  # units respond to the target's past
        x = randn(items, steps, units)
        for t in range(1, steps):
            x[:, t] += 0.5 * x[:, t - 1] + 0.6 * y[:, t - 1]
        return x, y
    if kind == "profile":  # both follow the position within the sequence
        profile = torch.sin(torch.arange(steps) * 0.9).double()[:, None]
        return autoregressive(items, steps, units, 0.5) + profile, y + profile.roll(1, 0)
    if kind == "waves":  # noisy waves of one period, each with a phase of its own: nothing models them
        t, phase = torch.arange(steps).double()[:, None], 6.28 * torch.rand(items, 1, units + 1, dtype=torch.float64)
        waves = torch.sin(t + phase) + randn(items, steps, units + 1)
        return waves[..., 1:], waves[..., :1]
    raise ValueError(kind)


def null_pairs(kind: str, items: int, steps: int, number: int) -> tuple[Tensor, Tensor]:
    """As many units as targets, none of which causes another: one panel has as many tests as there are pairs."""
    y = autoregressive(items, steps, number, 0.7)
    if kind == "independent":
        return autoregressive(items, steps, number, 0.7), y
    x = randn(items, steps, number)  # feedback: each unit responds to its target's past
    for t in range(1, steps):
        x[:, t] += 0.5 * x[:, t - 1] + 0.6 * y[:, t - 1]
    return x, y


def planted_recurrent(items: int, steps: int) -> tuple[Tensor, Tensor, dict[str, slice]]:
    """A driven recurrent system: 16 units cause the target; copies, echoes, loud noise and dead units do not."""
    fixed = torch.Generator().manual_seed(7)
    causes, inputs = 16, 4
    decay = 0.2 + 0.7 * torch.rand(causes, generator=fixed, dtype=torch.float64)
    weight = 0.2 + torch.rand(causes, generator=fixed, dtype=torch.float64)
    weight = weight * torch.sign(torch.randn(causes, generator=fixed, dtype=torch.float64))
    reads = torch.randn(causes, inputs, generator=fixed, dtype=torch.float64)
    drive, state = randn(items, steps, inputs), torch.zeros(items, causes, dtype=torch.float64)
    causal, y = torch.zeros(items, steps, causes).double(), torch.zeros(items, steps, 1).double()
    for t in range(steps):
        state = torch.tanh(decay * state + 0.5 * drive[:, t] @ reads.T + 0.3 * randn(items, causes))
        causal[:, t] = state
        if t:
            cause = 0.3 * (causal[:, t - 1] * weight).sum(-1, keepdim=True)
            y[:, t] = 0.5 * y[:, t - 1] + cause + 0.5 * randn(items, 1)
    copies = causal[..., :8] + 0.3 * randn(items, steps, 8)
    echoes = torch.tanh(0.8 * y + 0.3 * randn(items, steps, 8))
    noise, dead = 3 * randn(items, steps, 16), 1e-4 * randn(items, steps, 16) + 0.5
    roles = {"causal": slice(0, 16), "copy": slice(16, 24), "echo": slice(24, 32), "noise": slice(32, 48)}
    return torch.cat([causal, copies, echoes, noise, dead], -1), y, {**roles, "dead": slice(48, 64)}


def planted_inputs(items: int, steps: int) -> tuple[Tensor, Tensor, dict[str, slice]]:
    """40 candidate inputs of a forecaster: 8 causes of falling strength, 8 echoes of the target, 8 copies, 16 noise."""
    x, y = autoregressive(items, steps, 40, 0.6), torch.zeros(items, steps, 1, dtype=torch.float64)
    weight = torch.linspace(0.6, 0.15, 8, dtype=torch.float64)
    for t in range(2, steps):
        cause = (weight[:4] * x[:, t - 1, :4]).sum(-1) + (weight[4:] * torch.tanh(x[:, t - 2, 4:8])).sum(-1)
        y[:, t, 0] = 0.6 * y[:, t - 1, 0] + cause + randn(items)
    x[..., 8:16] = y + 0.5 * randn(items, steps, 8)
    x[..., 16:24] = x[..., :8] + 0.7 * randn(items, steps, 8)
    return x, y, {"causal": slice(0, 8), "echo": slice(8, 16), "copy": slice(16, 24), "noise": slice(24, 40)}


def auc(score: Tensor, positive: Tensor) -> float:
    """Share of pairs of a positive and a negative of which the positive has the higher score."""
    return float((score[positive][:, None] > score[~positive]).double().mean())
