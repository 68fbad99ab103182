"""Configurations for which the kernels over packed pages are compiled ahead of time (see ``_triton_aot``)."""

from __future__ import annotations

from typing import Any

from ._triton_aot import AotCase
from ._triton_attend import RUN, kept_kernel, plain_kernel
from ._triton_channels import channel_shape, channels_kernel
from ._triton_codec import _shape, load_kernel, pack_kernel, range_kernel
from ._triton_flags import flags_kernel
from ._triton_keys import logits_launch, score_launch, score_shape
from ._triton_logits import logits_kernel
from ._triton_merge import LISTED_TILE, SLOT_TILE, merge_kernel
from ._triton_prune import BLOCK, QUADS, ROUNDS, collect_kernel, limit_kernel, mass_kernel, start_kernel
from ._triton_score import _PAGES, _judge_kernel, _key_logits_kernel
from ._triton_tiles import LEAST_TOKENS, REGISTERS, SPLITS, channel_parts, power_of_two, tile_tokens, warps_for
from ._triton_values import value_launch, value_shape

# model dtype, key bits, value bits, page size, query heads on a KV head, key dim, value dim, value group
CONFIGURATIONS = (
    ("bf16", 2, 2, 64, 4, 128, 128, 64),
    ("bf16", 4, 4, 64, 4, 128, 128, 64),
    ("bf16", 3, 3, 64, 4, 128, 128, 64),
    ("fp16", 3, 3, 64, 3, 64, 64, 64),
    ("bf16", 8, 8, 32, 8, 96, 80, 32),
    ("bf16", 16, 16, 64, 16, 128, 128, 64),
    ("bf16", 3, 2, 128, 1, 256, 256, 64),
    ("fp32", 4, 4, 16, 7, 80, 96, 32),
    ("fp32", 16, 16, 64, 4, 128, 128, 64),
    # presets, whose keys have refined channels
    ("bf16", 2, 2, 64, 4, 144, 128, 64),
    ("bf16", 3, 3, 64, 4, 144, 128, 64),
    ("bf16", 4, 4, 32, 4, 144, 128, 64),
    ("fp16", 3, 3, 64, 3, 72, 64, 64),
    # the largest heads, many on a KV head
    ("bf16", 4, 4, 64, 16, 256, 256, 64),
)
_TYPES = {
    **dict.fromkeys(("key_lo", "key_step", "value_lo", "value_step", "lows", "steps"), "*fp16"),
    **dict.fromkeys(
        (
            "parts",
            "tops",
            "split_tops",
            "sums",
            "plain_tops",
            "plain_sums",
            "logits",
            "near",
            "known",
            "limits",
            "masses",
        ),
        "*fp32",
    ),
    **dict.fromkeys(("table", "plain_table", "num_pages", "plain_len", "candidates", "positions", "kept"), "*i32"),
    **dict.fromkeys(("counts", "limit_counts", "lengths"), "*i32"),
    **dict.fromkeys(("row_stride", "head_stride", "new_key_row", "new_key_head", "new_value_row"), "i32:16"),
    **dict.fromkeys(("new_value_head", "tokens", "stride", "capacity"), "i32:16"),
    **dict.fromkeys(("scaling", "p", "few"), "fp32"),
    "candidate_tokens": "*u8",
    "stats": "*fp64",
}


def aot_cases() -> list[AotCase]:
    """Each kernel at each configuration, with and without candidates."""
    found = []
    for configuration in CONFIGURATIONS:
        for is_listed in (False, True):
            found.extend(_decode_cases(configuration, is_listed))
        found.extend(_score_cases(configuration))
        found.extend(_codec_cases(configuration))
    return [*found, *_row_cases()]


def _decode_cases(configuration: tuple[Any, ...], is_listed: bool) -> list[AotCase]:
    dtype, key_bits, value_bits, page, per_kv, dim, value_dim, group = configuration
    name, is_wide = _name(configuration) + (", candidates" if is_listed else ""), dtype == "fp32"
    listed = {"HAS_PAGES": is_listed, "HAS_TOKENS": is_listed}
    codes = {"codes": _codes(dtype, key_bits), "value_codes": _codes(dtype, value_bits), "out": "*fp32"}
    scored = score_shape(page, dim, key_bits, per_kv)
    splits = {"PAGE": page, "SPLITS": SPLITS, "LEAST": max(1, LEAST_TOKENS // page)}
    kept = {**value_shape(value_dim, value_bits, group, per_kv, is_wide), "QUADS": QUADS}
    merged = {"SLOTS": 128, "TILE": SLOT_TILE, "LISTED": LISTED_TILE, "HAS_STATS": True, "PRUNES": True}
    heads = {**channel_parts(dim), "M": max(16, power_of_two(per_kv))}
    largest = max(heads["DP"], value_dim)
    tile = min(32, tile_tokens(largest, is_wide or largest > 128))
    plain = {**kept, **heads, "HAS_NEW": not is_listed, "IS_PAGED": is_listed, "RUN": RUN, "T": tile}
    types = {"keys": f"*{dtype}", "values": f"*{dtype}"}
    return [
        _case(name, plain_kernel, types, dtype, plain, num_warps=warps_for(is_wide, largest), maxnreg=REGISTERS),
        _case(
            name, logits_kernel, codes, dtype, scored, splits, listed,
            **logits_launch(scored, is_listed, is_wide),
        ),
        *(
            _case(
                f"{name}{'' if prunes else ', p = 1'}", kept_kernel, codes, dtype, kept, splits, listed,
                {"PRUNES": prunes}, **value_launch(kept, is_wide),
            )
            for prunes in (True, False)
        ),
        _case(name, merge_kernel, {"out": f"*{dtype}"}, dtype, kept, splits, listed, merged),
    ]  # fmt: skip


def _score_cases(configuration: tuple[Any, ...]) -> list[AotCase]:
    dtype, bits, _, page, per_kv, dim, _, _ = configuration
    name, codes = _name(configuration), {"codes": _codes(dtype, bits), "out": "*fp32"}
    scored = score_shape(page, dim, bits, per_kv)
    splits = {"SPLITS": SPLITS, "LEAST": max(1, LEAST_TOKENS // page)}
    few = channel_shape(per_kv, dim, page, dim // 4, bits)
    judged = {"PAGES": _PAGES, "LEVELS": 0 if bits == 16 else (1 << bits) - 1}
    launch = score_launch(scored)
    types = {**codes, "tokens": "fp32"}
    return [
        _case(name, _key_logits_kernel, codes, dtype, scored, splits, **launch),
        _case(name, channels_kernel, codes, dtype, few, **launch),
        *(
            _case(name, _judge_kernel, types, dtype, scored, judged, {"IS_MASS": flag}, maxnreg=REGISTERS)
            for flag in (False, True)
        ),
    ]


def _codec_cases(configuration: tuple[Any, ...]) -> list[AotCase]:
    dtype, key_bits, value_bits, page, _, dim, value_dim, group = configuration
    found = []
    for bits, is_key, shape in (
        (key_bits, True, _shape(dim, page, page)),
        (value_bits, False, _shape(page, value_dim, group)),
    ):
        if bits == 16:
            continue
        name = f"{_name(configuration)}, {'keys' if is_key else 'values'}"
        types = {"x": f"*{dtype}", "out": f"*{dtype}", "codes": "*u8", "clip": "fp32", "stride": "i32"}
        types |= {"lo": "*fp16", "step": "*fp16", "page_ids": "*i32", "row_stride": "i32", "head_stride": "i32"}
        ranged = {"LEVELS": (1 << bits) - 1, "IS_KEY": is_key}
        options: dict[str, Any] = {"maxnreg": REGISTERS, "enable_fp_fusion": False}
        found.append(_case(name, range_kernel, types, dtype, shape, ranged, **options))
        found.append(_case(name, pack_kernel, types, dtype, shape, {"BITS": bits}, **options))
        found.append(_case(name, load_kernel, types, dtype, shape, {"BITS": bits}, **options))
    return found


def _row_cases() -> list[AotCase]:
    found = []
    for per_kv, page, is_listed in ((4, 64, False), (1, 1, False), (8, 16, True)):
        name = f"{per_kv} heads, pages of {page}"
        shape = {"PAGE": page, "HAS_LISTED": is_listed, "SPLITS": SPLITS, "LEAST": max(1, LEAST_TOKENS // page)}
        starts, narrowed = {"PER_KV": per_kv, "RUNS": 4}, {"QUADS": 2 * QUADS, "ROUNDS": ROUNDS}
        found += [
            _case(name, start_kernel, {}, "", shape, starts, num_warps=1),
            _case(name, collect_kernel, {}, "", shape, {"BLOCK": BLOCK, "QUADS": QUADS}),
            _case(name, limit_kernel, {}, "", shape, starts, narrowed, num_warps=8, maxnreg=REGISTERS),
        ]
    rows = {"SPLITS": SPLITS, "LEAST": LEAST_TOKENS, "BLOCK": BLOCK}
    flags = {"PER_KV": 4, "BLOCK": BLOCK}
    return [
        *found,
        _case("rows", mass_kernel, {}, "", rows),
        _case("rows", flags_kernel, {"flags": "*u8"}, "", flags),
    ]


def _case(
    name: str, kernel: Any, types: dict[str, str], dtype: str, *constants: dict[str, Any], num_warps: int = 4,
    num_stages: int = 2, maxnreg: int | None = None, enable_fp_fusion: bool = True,
) -> AotCase:  # fmt: skip
    """Name the types of all arguments; of the constants, those that the kernel has."""
    given = {key: value for part in constants for key, value in part.items()}
    model = dict.fromkeys(("query", "new_key", "new_value"), f"*{dtype}")
    constexprs = {key: given[key] for key in kernel.arg_names if key in given}
    signature = {
        key: types.get(key) or model.get(key) or _TYPES.get(key, "i32")
        for key in kernel.arg_names
        if key not in constexprs
    }
    return AotCase(name, kernel, signature, constexprs, num_warps, num_stages, maxnreg, enable_fp_fusion)


def _codes(dtype: str, bits: int) -> str:
    return f"*{dtype}" if bits == 16 else "*u8"


def _name(configuration: tuple[Any, ...]) -> str:
    dtype, key_bits, value_bits, page, per_kv, dim, value_dim, group = configuration
    return f"{dtype} K{key_bits}V{value_bits} page {page} G{per_kv} D{dim}/{value_dim} group {group}"
