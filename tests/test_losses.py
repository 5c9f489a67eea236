"""The loss of each item is that which torch computes without reduction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_slim.losses import HearLosses

X, CLASSES = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize(
    ("loss", "items"),
    [
        (lambda: F.cross_entropy(X, CLASSES), lambda: F.cross_entropy(X, CLASSES, reduction="none")),
        (lambda: nn.CrossEntropyLoss()(X, CLASSES), lambda: F.cross_entropy(X, CLASSES, reduction="none")),
        (lambda: nn.NLLLoss(reduction="sum")(X, CLASSES), lambda: F.nll_loss(X, CLASSES, reduction="none")),
        (lambda: F.mse_loss(X, 2 * X), lambda: X.square().mean(1)),
        (lambda: nn.MSELoss(reduction="sum")(X, 2 * X), lambda: X.square().sum(1)),
        (lambda: F.l1_loss(X[:, 0], 2 * X[:, 0]), lambda: X[:, 0].abs()),
        (
            lambda: nn.BCEWithLogitsLoss()(X, (X > 0).float()),
            lambda: F.binary_cross_entropy_with_logits(X, (X > 0).float(), reduction="none").mean(1),
        ),
        (lambda: F.huber_loss(X, 0 * X), lambda: F.huber_loss(X, 0 * X, reduction="none").mean(1)),
    ],
)
def test_each_item_is_heard(loss, items) -> None:
    with HearLosses() as heard:
        value = loss()
    torch.testing.assert_close(heard.of_items(value), items())


def test_what_is_heard_does_not_change_what_is_computed() -> None:
    x = X.clone().requires_grad_()
    with HearLosses():
        F.cross_entropy(x, CLASSES).backward()
    y = X.clone().requires_grad_()
    F.cross_entropy(y, CLASSES).backward()
    assert torch.equal(x.grad, y.grad)


def test_a_plain_sum_of_losses_is_the_sum_of_the_items() -> None:
    with HearLosses() as heard:
        loss = F.cross_entropy(X, CLASSES) + F.mse_loss(X, 2 * X)
    torch.testing.assert_close(
        heard.of_items(loss), (F.cross_entropy(X, CLASSES, reduction="none") + X.square().mean(1)).double()
    )


def test_weighted_losses_are_refused() -> None:
    with HearLosses() as heard:
        loss = F.cross_entropy(X, CLASSES) + 0.1 * F.mse_loss(X, 2 * X)
    with pytest.raises(ValueError, match="heard cross_entropy, mse_loss: which share"):
        heard.of_items(loss)


def test_a_loss_of_ones_own_is_refused() -> None:
    with HearLosses() as heard:
        loss = X.square().mean()
    with pytest.raises(ValueError, match=r"calls a loss function of `torch.nn.functional`.*heard none"):
        heard.of_items(loss)
