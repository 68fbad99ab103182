"""Does the cache of a very long context fit beside the weights? Allocated for real, not only counted."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_twilight import TwilightConfig
from twilight_kernels import KeyPages, ValuePages, key_token_bytes, value_token_bytes

from .gpu_sizes import Sizes
from .gpu_units import Setting, Unit


def units(_: Sizes) -> Iterator[Unit]:
    """Each preset, and the stock cache's layout."""
    for name, preset in (("K2V2", "compact"), ("K3V3", "balanced"), ("K4V4", "quality"), ("stock", None)):
        yield Unit(name, 8, functools.partial(_run, preset))


def _run(preset: str | None, setting: Setting) -> dict[str, Any]:
    sizes = setting.sizes
    settings = None if preset is None else TwilightConfig.preset(preset)
    return {"tokens": sizes.memory_tokens, **_allocate(sizes, settings, setting.device, setting.dtype)}


def weight_count(sizes: Sizes) -> int:
    """Parameters of the Llama that ``sizes`` describe, embedding and head apart."""
    heads, kv_heads, head_dim = sizes.shape
    hidden, inner, vocab = (sizes.model[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * inner + 2 * hidden
    return int(sizes.model["num_hidden_layers"] * layer + 2 * vocab * hidden + hidden)


def _allocate(
    sizes: Sizes, settings: TwilightConfig | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    _, kv_heads, head_dim = sizes.shape
    key_dim = head_dim
    layers, tokens, item = sizes.model["num_hidden_layers"], sizes.memory_tokens, dtype.itemsize
    if settings is None:
        per_token = 2.0 * head_dim * item
    else:
        key_dim = head_dim + settings.refined(0, kv_heads, head_dim).count
        per_token = key_token_bytes(key_dim, settings.key_codec, item)
        per_token += value_token_bytes(head_dim, settings.value_codec, item)
    closed_form = int(per_token * kv_heads * layers * tokens)
    found: dict[str, Any] = {"weight_bytes": weight_count(sizes) * item, "cache_bytes_closed_form": closed_form}
    held: list[Tensor] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        found["device_bytes"] = torch.cuda.get_device_properties(device).total_memory
    try:
        held.append(torch.empty(weight_count(sizes), dtype=dtype, device=device))
        for _ in range(layers):
            if settings is None:
                held += [torch.empty(kv_heads, tokens, head_dim, dtype=dtype, device=device) for _ in range(2)]
                continue
            pages = -(-tokens // settings.page_size)
            keys = KeyPages.empty(pages, kv_heads, key_dim, settings.key_codec, dtype, device)
            values = ValuePages.empty(pages, kv_heads, head_dim, settings.value_codec, dtype, device)
            held += [*keys.tensors().values(), *values.tensors().values()]
    except torch.OutOfMemoryError as error:
        return {**found, "fits": False, "reason": str(error).splitlines()[0]}
    found["cache_bytes"] = sum(tensor.nbytes for tensor in held[1:])
    if device.type == "cuda":
        found["allocated_bytes"] = torch.cuda.memory_allocated(device)
    return {**found, "fits": True}
