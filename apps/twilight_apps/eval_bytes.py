"""What a cache weighs and what a decode step reads of it, for any kind of cache.

A model in float32 keeps windows and raw pages in float32. So that figures mean what a bfloat16 model would hold,
tensors in the model's own dtype count two bytes a number; everything that is packed counts as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_twilight import TwilightCache

BF16_BYTES = 2


def stored_bytes(cache: Any, dtype: torch.dtype) -> int:
    """Bytes of all persistent tensors of a filled cache, those in the model's ``dtype`` as bfloat16.

    Args:
        cache: a ``TwilightCache`` or any cache of Transformers.
        dtype: of the model.
    """
    if isinstance(cache, TwilightCache):
        total = cache.nbytes  # also commits what is pending
        plain = [
            t
            for layer in cache.twilight_layers
            if layer.store is not None
            for t in layer.store.tensors().values()
            if t.dtype == dtype
        ]
        return total - sum(t.nbytes - t.numel() * BF16_BYTES for t in plain)
    seen: set[int] = set()
    held = (tensor for layer in cache.layers for tensor in _tensors(vars(layer), seen))
    return sum(t.numel() * BF16_BYTES if t.dtype == dtype else t.nbytes for t in held)


def read_bytes(cache: Any, dtype: torch.dtype) -> float:
    """Bytes of keys, values and their scales that the average decode step of one row read.

    A Twilight cache counts what it read of its pages, and its sinks and window. Other caches read everything they
    store; what they write and read again to dequantize is not counted, in their favour.
    """
    if not isinstance(cache, TwilightCache):
        return float(stored_bytes(cache, dtype))
    plain_tokens = int(cache.sequences.plain.max())
    total = 0.0
    for layer in cache.stats():
        store = cache.layers[layer["layer"]].store
        item = store.plain.keys.element_size()
        is_raw = store.key_codec.is_raw and store.value_codec.is_raw
        total += layer["bytes_read"] * (BF16_BYTES / item if is_raw else 1.0)
        heads, key_dim = store.plain.keys.shape[1:3]
        total += plain_tokens * heads * (key_dim + store.plain.values.shape[-1]) * BF16_BYTES
    return total


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the plain tensors inside attributes, containers and quantized wrappers, each once."""
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        seen.add(id(value))
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name), seen)
        else:
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part, seen)
