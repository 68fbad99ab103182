"""Is each kernel right on this GPU? Small cases against the float64 definition, one unit each: a fault has a name.

What is not right here is not timed anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_twilight import TwilightConfig
from twilight_kernels import (
    KeyPages,
    ValuePages,
    _reference,
    channel_logits,
    key_logits,
    load_key_pages,
    load_value_pages,
    page_masses,
    page_scores,
    top_p_flags,
)

from . import bench_gpu_decode, bench_gpu_prefill
from .gpu_check import error_of, reject_reason
from .gpu_inputs import make_inputs, make_rows, pack
from .gpu_sizes import Sizes
from .gpu_units import Setting, Unit

_PRESETS = {"K2V2": "compact", "K3V3": "balanced", "K4V4": "quality"}
_SCORES = {"key_logits": key_logits, "page_scores": page_scores, "page_masses": page_masses}
_CHANNELS = 4  # one in so many is read


def units(_: Sizes) -> Iterator[Unit]:
    """Those first that most others need."""
    for name, (preset, p) in bench_gpu_decode.LABELS.items():
        yield Unit(name, 0, functools.partial(_decode, name, preset, p))
    yield Unit("K3V3, p = 0.95", 0, functools.partial(_decode, "K3V3, p = 0.95", _PRESETS["K3V3"], 0.95))
    yield Unit("stripes", 0, _stripes)
    for name, preset in _PRESETS.items():
        yield Unit(f"{name}, pages", 0, functools.partial(_pages, preset))
        yield Unit(f"{name}, scores", 0, functools.partial(_scores, preset))
    yield Unit("top_p_flags", 0, _flags)


def _decode(name: str, preset: str, p: float, setting: Setting) -> dict[str, Any]:
    sizes = setting.sizes
    inputs = make_inputs(sizes.shape, sizes.check_context, setting.seed, setting.device, setting.dtype)
    settings = TwilightConfig.preset(preset, p=p)
    layer = pack(inputs.keys, inputs.values, settings, 1)
    return bench_gpu_decode.check(name, inputs, layer, settings)


def _stripes(setting: Setting) -> dict[str, Any]:
    sizes, device = setting.sizes, setting.device
    made = make_inputs(sizes.shape, sizes.prompts[-1], setting.seed, device, setting.dtype)
    padding = torch.zeros(1, dtype=torch.int32, device=device)
    plan = TwilightConfig.preset("balanced").stripe_plan
    return bench_gpu_prefill.check(
        make_rows(made, setting.seed), made.keys, made.values, plan, made.scaling, padding
    )  # fmt: skip


def _pages(preset: str, setting: Setting) -> dict[str, Any]:
    """Pages must be the definition's to the bit, and so must what is read back from them."""
    settings, device = TwilightConfig.preset(preset), setting.device
    sizes = setting.sizes
    inputs = make_inputs(sizes.shape, sizes.check_context, setting.seed, device, setting.dtype)
    layer = pack(inputs.keys, inputs.values, settings, 1)
    size, sinks, ids = settings.page_size, settings.num_sinks, layer.block_table[0]
    tokens = slice(sinks, sinks + len(ids) * size)
    keys, values = (x[0, :, tokens].unflatten(1, (-1, size)).transpose(0, 1) for x in (inputs.keys, inputs.values))
    (_, heads, dim, _), value_dim = layer.key_pages.form, layer.value_pages.head_dim
    key_pages = KeyPages.empty(len(ids), heads, dim, settings.key_codec, setting.dtype, device)
    value_pages = ValuePages.empty(len(ids), heads, value_dim, settings.value_codec, setting.dtype, device)
    _reference.store_key_pages(key_pages, ids, keys)
    _reference.store_value_pages(value_pages, ids, values)
    pairs = {
        **_pairs("keys", layer.key_pages, key_pages), **_pairs("values", layer.value_pages, value_pages),
        "load_key_pages": (
            load_key_pages(key_pages, ids, setting.dtype), _reference.load_key_pages(key_pages, ids, setting.dtype)
        ),
        "load_value_pages": (
            load_value_pages(value_pages, ids, setting.dtype),
            _reference.load_value_pages(value_pages, ids, setting.dtype),
        ),
    }  # fmt: skip
    otherwise = {name: float((a != b).double().mean()) for name, (a, b) in pairs.items()}
    if any(otherwise.values()):
        raise ArithmeticError(f"pages must be those of the definition, got this share otherwise: {otherwise}")
    return {"pages": len(ids), "otherwise": otherwise}


def _pairs(name: str, found: KeyPages | ValuePages, exact: KeyPages | ValuePages) -> dict[str, tuple[Tensor, Tensor]]:
    wanted = exact.tensors()
    return {f"{name}.{part}": (tensor, wanted[part]) for part, tensor in found.tensors().items()}


def _scores(preset: str, setting: Setting) -> dict[str, Any]:
    sizes = setting.sizes
    inputs = make_inputs(sizes.shape, sizes.check_context, setting.seed, setting.device, setting.dtype)
    layer = pack(inputs.keys, inputs.values, TwilightConfig.preset(preset), 1)
    tables: tuple[Any, ...] = (layer.block_table, layer.num_pages, inputs.scaling)
    exact, pages = inputs.query.double(), layer.key_pages
    pairs = {
        name: (found(inputs.query, pages, *tables), getattr(_reference, name)(exact, pages, *tables))
        for name, found in _SCORES.items()
    }
    count = max(1, inputs.query.shape[2] // _CHANNELS)
    pairs["channel_logits"] = (
        channel_logits(inputs.query, pages, count, *tables),
        _reference.channel_logits(exact, pages, count, *tables),
    )
    reasons = {name: reason for name, (a, b) in pairs.items() if (reason := reject_reason(a, b))}
    if reasons:
        raise ArithmeticError(f"scores must be those of float64, got {reasons}")
    return {"errors": {name: error_of(a, b) for name, (a, b) in pairs.items()}}


def _flags(setting: Setting) -> dict[str, Any]:
    """Flags must be the definition's but for ties; masses must agree."""
    heads, kv_heads, _ = setting.sizes.shape
    generator = torch.Generator().manual_seed(setting.seed)
    shape = 2, kv_heads, heads // kv_heads, setting.sizes.check_context // 64
    logits = (3 * torch.randn(shape, generator=generator)).to(setting.device)
    forced = torch.zeros(shape[:3], device=setting.device)
    flags, share = top_p_flags(logits, 0.95, forced_lse=forced)
    wide, exact = _reference.top_p_flags(logits.double(), 0.95, forced_lse=forced.double())
    otherwise = int((flags != wide).sum())
    reason = reject_reason(share, exact)
    if reason or otherwise > shape[1]:
        raise ArithmeticError(f"top_p_flags must be the definition's, got {otherwise} otherwise; masses: {reason}")
    return {"otherwise": otherwise, "error": error_of(share, exact)}
