"""What we write into checkpoints is sealed, and believed only if the seal holds: nothing changed, nothing expanded."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SEAL = "seal"


class PayloadError(ValueError):
    """A checkpoint holds something else than what was stored."""


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with a digest of all its keys, values, tensors and their shapes. It detects damage, not forgery.

    Args:
        state: plain data and tensors, nested at will; parts that are sealed already count by their seals.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, {key: value for key, value in state.items() if key != SEAL})
    return {**state, SEAL: digest.hexdigest()}


def opened(state: Any, what: str) -> dict[str, Any]:
    """The inverse of `sealed`; nothing is allocated for what is refused.

    Args:
        state: as it was read from a file.
        what: whose it is, for the message.

    Raises:
        PayloadError: it is not what was stored, or a tensor in it has no memory for each of its entries.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get(SEAL), str):
        raise PayloadError(
            f"Expected a sealed state of {what}, got {type(state).__name__} without a seal: it was not written by this "
            "version of lightning-slim. Begin the run anew, or take another checkpoint."
        )
    content = {key: value for key, value in state.items() if key != SEAL}
    try:
        holds = sealed(content)[SEAL] == state[SEAL]
    except PayloadError as error:
        raise PayloadError(f"{error} ({what})") from None
    if not holds:
        raise PayloadError(
            f"Expected the state of {what} as it was stored, got one that was changed since: the file is damaged, or "
            "was edited. Take another checkpoint."
        )
    return content


def is_dense(value: Tensor) -> bool:
    """Whether every entry has its own place in memory, and that memory is there: nothing expanded, nothing sparse."""
    if value.layout != torch.strided or value.device.type == "meta" or value.is_nested:
        return False
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach += stride * (size - 1)
    return value.numel() == 0 or value.untyped_storage().nbytes() >= reach * value.element_size()


def _feed(digest: Any, value: Any) -> None:
    """Adds a value, told apart from all others by its type and length."""
    if isinstance(value, Tensor):
        if not is_dense(value):
            raise PayloadError(f"Expected dense tensors in a checkpoint, got one of {tuple(value.shape)} that is not")
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        if isinstance(value.get(SEAL), str):
            value = {SEAL: sealed(value)[SEAL]}
        digest.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)};".encode())
        for entry in value:
            _feed(digest, entry)
    elif isinstance(value, float):
        digest.update(b"float" + struct.pack("<d", value))
    else:  # of an unknown type what it prints may differ from one process to another
        plain = value is None or isinstance(value, bool | int | str | bytes | complex)
        text = f"{type(value).__name__} {value!r}".encode() if plain else type(value).__name__.encode()
        digest.update(f"{len(text)} ".encode() + text)
