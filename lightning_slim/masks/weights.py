"""Which weights of a network can be masked, and how each is seen: as a stack of matrices."""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_slim.skipping import Skip, skips
from lightning_slim.weight_norm import obstacle, weight_norm_of

LAYERS = (nn.Linear, _ConvNd, nn.RNNBase, nn.Embedding, nn.MultiheadAttention)


def find_weights(model: nn.Module, module: str = "", skip: Skip = ()) -> dict[str, nn.Parameter]:
    """The weights that can be masked: dotted name -> parameter; a tied one once, under its first name, if
    none of its layers stays whole.

    Those of linear layers, convolutions (transposed ones, too), recurrent layers, embeddings and the projections of
    attention, if they train. Never biases and norms.

    Args:
        model: the network.
        module: dotted name of the only part of it that counts; all of it if empty.
        skip: layers that stay whole: names, patterns or types.

    Raises:
        ValueError: a layer computes its weight of other tensors, as under a parametrization.
    """
    found: dict[str, nn.Parameter] = {}
    whole: set[int] = set()
    for path, layer in model.named_modules():
        outside = bool(module) and not f"{path}.".startswith(f"{module}.")
        if outside or any(skips(entry, path, layer) for entry in skip):
            whole |= {id(parameter) for parameter in layer.parameters(recurse=False)}
            continue
        if not isinstance(layer, LAYERS):
            continue
        reason = "is under weight norm: remove it, or leave it whole" if weight_norm_of(layer) else obstacle(layer)
        if reason:
            raise ValueError(f"Expected plain weights to mask, got {path or type(layer).__name__}, which {reason}.")
        for name, parameter in layer.named_parameters(recurse=False):
            if "weight" in name and parameter.requires_grad:
                found[f"{path}.{name}" if path else name] = parameter
    first: dict[int, str] = {}
    for name, parameter in found.items():
        first.setdefault(id(parameter), name)
    return {name: p for name, p in found.items() if first[id(p)] == name and id(p) not in whole}


def weights_left_out(model: nn.Module, module: str = "", skip: Skip = ()) -> dict[str, nn.Parameter]:
    """Matrices that train and that `find_weights` does not know: those of recurrent cells and of a user's own layers.

    Never biases, norms, nor what is skipped. Arguments as in `find_weights`.
    """
    found = {}
    for path, layer in model.named_modules():
        outside = bool(module) and not f"{path}.".startswith(f"{module}.")
        if outside or isinstance(layer, (*LAYERS, nn.LayerNorm)) or any(skips(entry, path, layer) for entry in skip):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad and sum(size > 1 for size in parameter.shape) > 1:
                found[f"{path}.{name}" if path else name] = parameter
    return found


def transposed_groups(model: nn.Module, name: str) -> int:
    """The number of groups of the transposed convolution that a weight belongs to; 0 if it belongs to none."""
    layer = model.get_submodule(name.rpartition(".")[0])
    return layer.groups if isinstance(layer, _ConvNd) and layer.transposed else 0


def stacked(tensor: Shaped[Tensor, "..."], transposed: int = 0) -> Shaped[Tensor, "taps rows inputs"]:
    """A weight, or what has its shape, as a matrix of outputs by inputs for each tap of a kernel.

    Args:
        tensor: (outputs, inputs / groups, *taps); of a transposed convolution (inputs, outputs / groups, *taps).
        transposed: groups of a transposed convolution; 0: it is none.
    """
    if transposed:
        tensor = tensor.reshape(transposed, -1, *tensor.shape[1:]).transpose(1, 2).flatten(0, 1)
    return tensor.flatten(2).permute(2, 0, 1) if tensor.ndim > 2 else tensor.unsqueeze(0)


def unstacked(
    stack: Shaped[Tensor, "taps rows inputs"], shape: tuple[int, ...], transposed: int = 0
) -> Shaped[Tensor, "..."]:
    """The inverse of `stacked`."""
    tensor = stack.permute(1, 2, 0)
    if transposed:
        tensor = tensor.reshape(transposed, -1, *tensor.shape[1:]).transpose(1, 2)
    return tensor.reshape(shape)
