"""What stands in for the gradient of the loss in scores that are taken before training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

Gradients = dict[nn.Parameter, Tensor]
Losses = Sequence[Callable[[], Tensor]]  # the loss of each of several batches, with its graph, as often as asked


class Call(Protocol):
    """One call of a network."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments."""


class Flow(ABC):
    """A frozen dataclass: what stands in for the gradient of the loss, so that a score is `weight * gradient`.

    Attributes:
        rounds: in how many rounds units or weights go, where nothing else is asked for.
    """

    rounds: ClassVar[int] = 1

    @abstractmethod
    def __call__(
        self, model: nn.Module, losses: Losses, calls: Mapping[str, Call], average: Callable[[Tensor], Tensor]
    ) -> Iterator[Gradients]:
        """Gradients of the parameters that train; of several, the mean counts.

        Args:
            model: the network, or what holds several.
            losses: of some batches.
            calls: dotted name of each network -> one call of it.
            average: several processes: the mean over ranks.
        """


@dataclass(frozen=True)
class LossGradient(Flow):
    """The gradient of the loss itself, batch by batch."""

    def __call__(
        self, model: nn.Module, losses: Losses, calls: Mapping[str, Call], average: Callable[[Tensor], Tensor]
    ) -> Iterator[Gradients]:
        for loss in losses:
            yield whole_gradients(loss(), model, average)


@dataclass(frozen=True)
class GradientFlow(Flow):
    """Hessian times gradient of the loss: how much each weight adds to the squared norm of the gradient.

    Without a weight, that norm changes by `-2 * weight * (Hg)`, to first order (Wang et al., 2020, equation 8). The
    gradient is that of all batches together; the Hessian is met by a second backward pass, batch by batch.

    Attributes:
        temperature: the networks' outputs are divided by it, so that the loss does not hang on the scale of initial
            weights. 200 in the authors' code, for logits; 1 for what is no classification.
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"Expected `temperature` above 0, got {self.temperature}: 1 changes nothing.")

    def __call__(
        self, model: nn.Module, losses: Losses, calls: Mapping[str, Call], average: Callable[[Tensor], Tensor]
    ) -> Iterator[Gradients]:
        with self._tempered(model, calls), _twice_differentiable():
            every = [whole_gradients(loss(), model, average) for loss in losses]
            mean = {p: torch.stack([of_batch[p] for of_batch in every]).mean(0) for p in every[0]}
            for loss in losses:
                graphs = torch.autograd.grad(loss(), list(mean), create_graph=True, materialize_grads=True)
                together = sum((g * v).sum() for g, v in zip(graphs, mean.values(), strict=True))
                yield whole_gradients(together, model, average)  # type: ignore[arg-type]

    @contextmanager
    def _tempered(self, model: nn.Module, calls: Mapping[str, Call]) -> Iterator[None]:
        def cool(module: nn.Module, args: Any, output: Any) -> Any:
            return tree_map(lambda leaf: leaf / self.temperature if _is_floating(leaf) else leaf, output)

        with ExitStack() as hooks:
            for name in calls:
                hooks.callback(model.get_submodule(name).register_forward_hook(cool).remove)
            yield


@dataclass(frozen=True)
class SynapticFlow(Flow):
    """How much flows through each weight, `|weight| * dR/d|weight|` over the sum of these; needs no data.

    R is the sum of what the network makes of an input of ones, in eval mode, with the absolute value of every
    parameter and buffer in its place (Tanaka et al., 2020). In a network of linear layers without biases, convolutions
    and ReLUs, all layers add up to the same. It is computed in double precision (on MPS, which has none, in single),
    for R is a product over layers, and divided by the sum over all weights, so that no gradient overflows.
    """

    rounds: ClassVar[int] = 100

    def __call__(
        self, model: nn.Module, losses: Losses, calls: Mapping[str, Call], average: Callable[[Tensor], Tensor]
    ) -> Iterator[Gradients]:
        trained = [p for p in model.parameters() if p.requires_grad]
        dtype = torch.float32 if trained[0].device.type == "mps" else torch.float64
        positive: Gradients = {p: p.detach().abs().to(dtype).requires_grad_() for p in model.parameters()}
        with _in_eval_mode(model), _default_dtype(dtype):
            each = [_through(model.get_submodule(name), call, positive, dtype) for name, call in calls.items()]
            through = torch.stack(each).sum()
            found = torch.autograd.grad(through, [positive[p] for p in trained], materialize_grads=True)
        scores = [positive[p].detach() * g for p, g in zip(trained, found, strict=True)]
        net, total = (sum(float(part.sum()) for part in parts) for parts in (scores, [s.abs() for s in scores]))
        if not 1e-9 * abs(float(through.detach())) < net <= total < torch.inf:
            raise ValueError(
                f"Expected a network whose outputs grow with its weights, got a synaptic flow of {net:.3g}: SynFlow "
                "needs outputs before a softmax, of a network through which ones come; norms that take a mean away, as "
                "LayerNorm does, may stop them."
            )
        yield {p: (p.detach().sign() * g / total).to(p.dtype) for p, g in zip(trained, found, strict=True)}


def whole_gradients(value: Tensor, model: nn.Module, average: Callable[[Tensor], Tensor]) -> Gradients:
    """Gradients of all parameters that train, zeros where there is none: the mean over ranks.

    No hook on a parameter's gradient sees them: not that of a distributed wrapper, nor of an optimizer in a backward
    pass.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, trained, materialize_grads=True)
    return {p: average(g) for p, g in zip(trained, found, strict=True)}


def _through(network: nn.Module, call: Call, positive: Gradients, dtype: torch.dtype) -> Tensor:
    """The sum of what a network makes of ones; what is no floating tensor goes in as it came."""
    tensors = {name: positive[p] for name, p in network.named_parameters()}
    buffers = {name: b.abs().to(dtype) for name, b in network.named_buffers() if b.is_floating_point()}
    args, kwargs = tree_map(
        lambda leaf: torch.ones_like(leaf, dtype=dtype) if _is_floating(leaf) else leaf, (call.args, dict(call.kwargs))
    )
    made = torch.func.functional_call(network, {**tensors, **buffers}, args, kwargs)
    return torch.stack([leaf.sum() for leaf in tree_leaves(made) if _is_floating(leaf)]).sum()


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Fused kernels of attention and of recurrent layers have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that a network makes itself, as first states, are of the same precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
