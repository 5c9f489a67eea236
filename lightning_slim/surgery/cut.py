"""Carries out a plan: every tensor is cut once, all of them or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lightning_slim.surgery.blocks import Dropped, drop, put_back
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.layers.attention import WIDTH
from lightning_slim.surgery.layers.norm import norms_of_any_width
from lightning_slim.surgery.selecting import follow_width, select, selection_of
from lightning_slim.units import Plan, UnitGroup, named_tensors, renumber
from lightning_slim.weight_norm import weight_norm_of, weight_norms


@dataclass(frozen=True, eq=False)
class Cut:
    """One tensor before and after: what an optimizer, an average or a mask needs to follow it.

    Attributes:
        tensor: dotted name, as in `state_dict`.
        old: the tensor before; no longer part of the model.
        new: the tensor after; it has the same `requires_grad`, Python attributes and hooks, and the kept gradient. None
            if it is gone, with the block that it was in.
        keep: axis -> positions that stay, ascending; none if only values changed.
    """

    tensor: str
    old: Tensor
    new: Tensor | None
    keep: Mapping[int, Int[Tensor, "kept"]]

    def take(self, tensor: Tensor, axes: Iterable[int] | None = None) -> Tensor:
        """Cuts another tensor of the old shape in the same way (along all cut axes, or only `axes`)."""
        layout = torch.preserve_format
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        for axis in self.keep if axes is None else axes:
            tensor = tensor.index_select(axis, self.keep[axis].to(tensor.device))
        return tensor.contiguous() if layout is torch.preserve_format else tensor.contiguous(memory_format=layout)


@dataclass(frozen=True)
class StructureChange:
    """A cut that can be repeated on any copy of the model: on averages, teachers, other wrappers.

    Attributes:
        groups: the units as they were before the cut.
        plan: which of them stay.
    """

    groups: Sequence[UnitGroup]
    plan: Plan

    def apply(self, model: nn.Module) -> list[Cut]:
        """Cuts a copy of the model in the same way."""
        cuts = remove_units(model, self.groups, self.plan)
        forget_blocks(model)
        return cuts


@torch.inference_mode(False)
@torch.no_grad()
def remove_units(model: nn.Module, groups: Iterable[UnitGroup], plan: Mapping[str, Bool[Tensor, "units"]]) -> list[Cut]:
    """Cuts the units that a plan does not keep out of a model.

    All new tensors are made before the first is put in place, so that a failure leaves the model as it was. Attributes
    such as `out_features` follow the shapes. Ties stay ties. Layers that read given units are handed those that stay
    (see `selecting`). Under weight norm, the weights that stay are those that
    the layer computed with before. The random state is not touched.

    Args:
        model: the module in which `groups` were found.
        groups: all groups of the model.
        plan: group name -> keep mask, one entry a unit; groups that are not named stay whole.

    Returns:
        One cut for each tensor that changed, for `migrate`. Blocks that were taken out can be put back by `restore`
        until `forget_blocks` lets go of their parameters.

    Raises:
        ValueError: a group is not known, or its mask has the wrong length, or keeps less than must stay.
    """
    by_name = {group.name: group for group in groups}
    for name, mask in plan.items():
        _check(name, mask, by_name)
    blocks = {name: mask for name, mask in plan.items() if by_name[name].blocks}
    standing = {group.name: group for group in renumber(list(by_name.values()), blocks)}
    keep = _positions_kept(model, standing, {n: m for n, m in plan.items() if n in standing and n not in blocks})
    cuts = _with_lengths(model, [_prepare(name, tensor, axes) for name, tensor, axes in keep])
    for name, mask in blocks.items():
        for path in by_name[name].removed_blocks(mask):
            cuts += _drop(model, path, by_name[name].results)
    for name, group in standing.items():
        if group.given and name in plan:
            for layer, axis in {reader.layer: reader.axis for reader in group.readers}.items():
                select(model.get_submodule(layer), axis, plan[name])
    _replace(model, {id(cut.old): cut.new for cut in cuts if cut.new is not None})
    norms_of_any_width(model)
    return cuts


def restore(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Puts the old tensors back: the inverse of `remove_units`."""
    gone = {id(cut.old) for cut in cuts if cut.new is None}
    for path, module in [*model.named_modules()]:
        if isinstance(module, Dropped) and any(id(p) in gone for p in module.block.parameters()):
            put_back(model, path)
    _replace(model, {id(cut.new): cut.old for cut in cuts if cut.new is not None})
    norms_of_any_width(model, -1)


def forget_blocks(model: nn.Module) -> None:
    """Lets go of the parameters of blocks that were taken out: from now on `restore` cannot put these back."""
    for module in model.modules():
        if isinstance(module, Dropped):
            module.forget()


def _drop(model: nn.Module, path: str, results: int) -> list[Cut]:
    """Takes a block out; one cut for each of its parameters that are nowhere else."""
    block = dict(model.get_submodule(path).named_parameters())
    drop(model, path, results)
    left = {id(p) for p in model.parameters()}
    return [Cut(f"{path}.{name}", p, None, {}) for name, p in block.items() if id(p) not in left]


@torch.inference_mode(False)
@torch.no_grad()
def resize_to(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Gives tensors other shapes, smaller or larger, so that a checkpoint of that shape loads.

    The values are not set (they come from the checkpoint); `requires_grad`, ties and attributes are kept.

    Args:
        model: the module to change.
        shapes: tensor name -> shape; tensors that are not named, or have that shape, stay.

    Raises:
        ValueError: a shape has other axes than its tensor, or the tensors of a layer do not fit one another; nothing
            has changed.
    """
    tensors = named_tensors(model)
    _check_shapes(model, tensors, shapes)
    changed = {
        n: t for n, t in tensors.items() if n in shapes and not is_lazy(t) and tuple(t.shape) != tuple(shapes[n])
    }
    _replace(model, {id(t): _like(t, t.new_zeros(tuple(shapes[n]))) for n, t in changed.items()})
    if changed:
        norms_of_any_width(model)


def _check_shapes(model: nn.Module, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    new = {name: tuple(shapes[name]) for name, t in tensors.items() if name in shapes and not is_lazy(t)}
    for name, shape in new.items():
        sizes = all(isinstance(size, int) and size > 0 for size in shape)
        if len(shape) != tensors[name].ndim or not sizes:
            raise ValueError(
                f"Expected {tensors[name].ndim} sizes above 0 for {name}, of shape {tuple(tensors[name].shape)}, got "
                f"{shape}: the checkpoint is of another model, or damaged."
            )
    for path in dict.fromkeys(name.rpartition(".")[0] for name in new):
        layer = model.get_submodule(path)
        own = {name: f"{path}.{name}".lstrip(".") for name in (*layer._parameters, *layer._buffers)}
        wide = {name: new.get(named, tuple(tensors[named].shape)) for name, named in own.items() if named in tensors}
        if wrong := _disagree(layer, wide):
            raise ValueError(f"Expected shapes that fit one another, got {wrong} of {path}: {wide}.")


def _disagree(layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Names of tensors of a layer whose shapes cannot be together; empty if all is well, or not known."""
    if isinstance(layer, nn.Linear | _ConvNd) and "weight" in shapes:
        transposed, taps = False, tuple[int, ...]()
        if isinstance(layer, _ConvNd):
            transposed, taps = layer.transposed, tuple(layer.kernel_size)
            if transposed and layer.groups > 1:
                return ""  # the number of groups follows
        made = shapes["weight"][1 if transposed else 0]
        if shapes["weight"][2:] != taps or shapes.get("bias", (made,)) != (made,):
            return "weight and bias"
    of_channels = {shape for shape in shapes.values() if shape}  # not the counter of batches
    if isinstance(layer, _NormBase | nn.LayerNorm | nn.GroupNorm) and len(of_channels) > 1:
        return " and ".join(shapes)
    return ""


def _positions_kept(
    model: nn.Module, groups: Mapping[str, UnitGroup], plan: Mapping[str, Tensor]
) -> list[tuple[str, Tensor, dict[int, Tensor]]]:
    """(name, tensor, axis -> positions that stay) of every tensor that a plan changes; a tied one comes once."""
    tensors = named_tensors(model)
    gone: defaultdict[int, defaultdict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    first_name: dict[int, str] = {}
    for name, mask in plan.items():
        for span in groups[name].spans:
            if not bool(mask.all()):
                tensor = tensors[span.tensor]
                first_name.setdefault(id(tensor), span.tensor)
                gone[id(tensor)][span.axis].append(span.index[~mask.cpu()].flatten())
    result = []
    for key, axes in gone.items():
        tensor = tensors[first_name[key]]
        kept = {axis: _others(tensor.shape[axis], torch.cat(positions)) for axis, positions in axes.items()}
        result.append((first_name[key], tensor, kept))
    return result


def _check(name: str, mask: Tensor, groups: Mapping[str, UnitGroup]) -> None:
    if name not in groups:
        raise ValueError(f"Expected a plan for one of {sorted(groups)}, got {name!r}.")
    size, floor = groups[name].size, groups[name].floor
    if mask.dtype != torch.bool or tuple(mask.shape) != (size,):
        raise ValueError(
            f"Expected a boolean mask of {size} entries for {name!r}, got {mask.dtype} of shape {tuple(mask.shape)}."
        )
    if int(mask.sum()) < floor:
        raise ValueError(
            f"Expected at least {floor} units of {name!r} to stay, got {int(mask.sum())}: keep more, or leave it "
            "out of the plan."
        )


def _others(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def _with_lengths(model: nn.Module, cuts: list[Cut]) -> list[Cut]:
    """The cuts, and those of lengths: where a direction loses columns, `g / |v|` stays, so that the weight does."""
    by_tensor = {id(cut.old): cut for cut in cuts}
    for layer, norm in weight_norms(model).items():
        direction = by_tensor.get(id(norm.v))
        if direction is None or direction.new is None or direction.keep.keys() <= {norm.dim}:
            continue
        name = f"{layer}.{norm.length}" if layer else norm.length
        keep = {axis: at for axis, at in direction.keep.items() if axis == norm.dim}
        length = norm.lengths(direction.new)
        direction.new.masked_fill_(length == 0, 1)  # nothing of it is left: it may point anywhere
        scale = Cut(name, norm.g, norm.g, keep).take(norm.g / norm.lengths(norm.v))
        by_tensor[id(norm.g)] = _prepare(name, norm.g, keep, (scale * length).to(norm.g.dtype))
    return list(by_tensor.values())


def _prepare(name: str, old: Tensor, keep: dict[int, Tensor], value: Tensor | None = None) -> Cut:
    shell = Cut(name, old, old, keep)
    new = _like(old, shell.take(old.detach()) if value is None else value)
    if old.grad is not None:
        new.grad = shell.take(old.grad) if keep else old.grad.clone()
    return Cut(name, old, new, keep)


def _like(old: Tensor, value: Tensor) -> Tensor:
    """`value` as the same kind of tensor as `old`, with its Python attributes and hooks."""
    if not isinstance(old, nn.Parameter):
        return value
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if held := getattr(old, hooks, None):
            setattr(new, hooks, held)  # the same ones: their handles remove them still
    return new


def _replace(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Puts new tensors in the place of old ones, wherever these are held; attributes follow their shapes."""
    layers: set[tuple[str, ...]] = set()
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) in new:
                    held[name] = new[id(tensor)]
                    _follow(module, tensor.shape, new[id(tensor)].shape)
                    parts = path.split(".") if path else []
                    layers |= {tuple(parts[:depth]) for depth in range(len(parts) + 1)}
    # Outer layers come first: those that are built of others, as attention is, learn from these how they were before.
    for layer in sorted(layers, key=len):
        module = model.get_submodule(".".join(layer))
        norm, kind = weight_norm_of(module), layer_kind(module)
        if norm is not None:
            norm.refresh()
        if kind is not None:
            kind.refresh(module)
            if selection_of(module) is not None:
                follow_width(module, len(kind.places(module, "in")[0].index))


def _follow(module: nn.Module, old: Sequence[int], new: Sequence[int]) -> None:
    """Widths of a network that holds a tensor of its own, as a class token, follow that tensor."""
    if layer_kind(module) is None:
        for name in WIDTH:
            for before, after in zip(old, new, strict=True):
                if before != after and module.__dict__.get(name) == before:
                    setattr(module, name, after)
                    break
