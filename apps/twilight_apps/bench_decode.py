"""Is one layer's decode attention from packed pages faster than dense attention, and how much does it read?

Regime: one request, one query token, the whole context packed, on inputs as concentrated as a real model's
(``synthetic``). All entrants run in the same rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_twilight import TwilightConfig
from twilight_cache import DecodePolicy, DecodeStats, Full, LayerStore, PagePool, Quest, SequenceBatch, Step

from . import tables, timing
from .decode_check import Check, check_decode
from .synthetic import AttentionInputs, attention_inputs

SHAPES = {"llama3-8b": (32, 8, 128), "smollm2": (9, 3, 64)}
SDPA, SDPA_BF16 = "sdpa float32", "sdpa bfloat16"
_TWO_BIT_PRESET = "compact"
_LAYOUT_ROUNDS = 5
_QUEST_SHARE = 0.25  # of the packed tokens (Twilight's experiments)

Run = Callable[[], Tensor]


def run(shape: str, contexts: list[int], *, p: float, preset: str, rounds: int, seed: int) -> dict[str, Any]:
    """Check, then time, decode attention at each context; print a table for each.

    Returns:
        What ``--json`` prints.
    Raises:
        ValueError: an unknown shape or preset, or numbers out of range.
        ArithmeticError: a kernel whose output is wrong; nothing is timed then.
    """
    heads, kv_heads, head_dim = parse_shape(shape)
    presets = {name: TwilightConfig.preset(name, p=p) for name in dict.fromkeys((_TWO_BIT_PRESET, preset))}
    results = []
    for context in contexts:
        inputs = attention_inputs(heads, kv_heads, head_dim, context, seed)
        results.append(_at_context(inputs, presets, rounds))
        _print(shape, inputs, results[-1])
    return {
        "shape": {"query_heads": heads, "kv_heads": kv_heads, "head_dim": head_dim},
        "p": p,
        "presets": {name: settings.to_dict() for name, settings in presets.items()},
        "rounds": rounds,
        "dtype": "float32",
        "results": results,
    }


def parse_shape(shape: str) -> tuple[int, int, int]:
    """Return query heads, KV heads and head dim of a name in ``SHAPES`` or of ``"H,K,D"``.

    Raises:
        ValueError: neither.
    """
    if shape in SHAPES:
        return SHAPES[shape]
    parts = shape.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"shape must be {', '.join(SHAPES)} or H,K,D as 32,8,128, got {shape!r}")
    heads, kv_heads, head_dim = map(int, parts)
    return heads, kv_heads, head_dim


def _at_context(inputs: AttentionInputs, presets: dict[str, TwilightConfig], rounds: int) -> dict[str, Any]:
    stores: dict[str, tuple[LayerStore, Step]] = {}
    for name, settings in presets.items():
        store, step = _packed(inputs, settings)
        for label, policy in _policies(settings).items():
            entrant = copy.copy(store)  # the same tensors, another policy
            entrant.policy, entrant.decodes = policy, DecodeStats()
            stores[f"{name}, {label}"] = entrant, step
    with tables.progress("Checking against the definition", len(stores)) as bar:
        checks: dict[str, Check] = {}
        for name, (store, step) in stores.items():
            checks[name] = check_decode(name, store, step, inputs)
            bar.advance(bar.task_ids[0])
    layout, dense = _fastest_dense(inputs)
    grouped = f"float32 matmuls, {layout}"
    entrants: dict[str, Run] = {SDPA: _sdpa(inputs, torch.float32), grouped: dense}
    entrants[SDPA_BF16] = _sdpa(inputs, torch.bfloat16)
    entrants |= {name: _ours(store, step, inputs) for name, (store, step) in stores.items()}
    with tables.progress("Timing", rounds + 2) as bar:
        times = timing.interleave(entrants, rounds, on_round=lambda: bar.advance(bar.task_ids[0]))
    tokens = inputs.keys.shape[2]
    plain_bytes = inputs.keys.nbytes + inputs.values.nbytes
    rows = []
    for name in entrants:
        ms = timing.summary(times[name])
        check = checks.get(name)
        num_bytes = check.bytes_read if check else plain_bytes // (2 if name == SDPA_BF16 else 1)
        row: dict[str, Any] = {
            "name": name, "ms": ms, "bytes_read": num_bytes, "gb_per_s": num_bytes / ms["median"] / 1e6,
            "check": asdict(check) if check else None,
        }  # fmt: skip
        rows.append(row)
    for row in rows:
        row["speedup_over_sdpa_float32"] = rows[0]["ms"]["median"] / row["ms"]["median"]
        row["speedup_over_float32_matmuls"] = rows[1]["ms"]["median"] / row["ms"]["median"]
    packed = int(stores[next(iter(stores))][1].num_pages[0])
    return {"context": tokens, "packed_pages": packed, "float32_matmuls": layout, "entrants": rows}


def _packed(inputs: AttentionInputs, settings: TwilightConfig) -> tuple[LayerStore, Step]:
    """Pack all tokens but the last, and open the step that takes the last."""
    sequences = SequenceBatch(settings.layout, PagePool())
    refined = settings.refined(0, inputs.keys.shape[1], inputs.keys.shape[3])
    store = LayerStore(sequences, settings.key_codec, settings.value_codec, DecodePolicy(), refined)
    before = inputs.keys.shape[2] - 1
    store.append(sequences.begin(0, before, 1, [0]), inputs.keys[:, :, :before], inputs.values[:, :, :before])
    return store, sequences.begin(before, 1, 1, [0])


def _policies(settings: TwilightConfig) -> dict[str, DecodePolicy]:
    quest = Quest(_QUEST_SHARE)
    sparse = settings.p, settings.min_keep, settings.min_sparse_len
    return {
        f"p = {settings.p:g}": DecodePolicy(*sparse, Full()),
        f"p = {settings.p:g}, quest": DecodePolicy(*sparse, quest),
        "p = 1, dense": DecodePolicy(),
    }


def _ours(store: LayerStore, step: Step, inputs: AttentionInputs) -> Run:
    key, value = inputs.keys[:, :, -1].contiguous(), inputs.values[:, :, -1].contiguous()
    return lambda: store.attend(inputs.query, inputs.scaling, step, key, value)


def _sdpa(inputs: AttentionInputs, dtype: torch.dtype) -> Run:
    """Transformers' own function, as a model's attention module calls it."""
    query, keys, values = (x.to(dtype) for x in (inputs.query[:, :, None], inputs.keys, inputs.values))
    module: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // keys.shape[1], is_causal=True)
    return lambda: sdpa_attention_forward(module, query, keys, values, None, scaling=inputs.scaling)[0]


def _fastest_dense(inputs: AttentionInputs) -> tuple[str, Run]:
    """Return the fastest dense float32 formulation without repeated KV heads, and the name of its layout."""
    kv_heads = inputs.keys.shape[1]
    query = (inputs.query[0] * inputs.scaling).unflatten(0, (kv_heads, -1))  # [K, G, D]
    keys, values = inputs.keys[0], inputs.values[0]  # [K, S, D]
    columns = keys.transpose(1, 2).contiguous()  # [K, D, S]
    columns_of_q = query.transpose(1, 2)
    layouts: dict[str, Run] = {
        "keys [K, S, D]": lambda: (query @ keys.transpose(1, 2)).softmax(-1) @ values,
        "keys [K, D, S]": lambda: (query @ columns).softmax(-1) @ values,
        "keys [K, S, D] on the left": lambda: (keys @ columns_of_q).transpose(1, 2).softmax(-1) @ values,
    }
    times = timing.interleave(layouts, _LAYOUT_ROUNDS)
    name = min(layouts, key=lambda layout: timing.summary(times[layout])["median"])
    return name, layouts[name]


def _print(shape: str, inputs: AttentionInputs, result: dict[str, Any]) -> None:
    rows = []
    for row in result["entrants"]:
        check = row["check"]
        rows.append([
            row["name"],
            tables.spread(row["ms"]),
            f"{row['speedup_over_sdpa_float32']:.2f}",
            f"{row['speedup_over_float32_matmuls']:.2f}",
            tables.size(row["bytes_read"]),
            f"{row['gb_per_s']:.1f}",
            f"{check['needed']:,.0f}" if check else "-",
            f"{check['kept']:,.0f}" if check else "all",
            f"{check['mass']:.2%}" if check else "100 %",
        ])  # fmt: skip
    title = (
        f"One layer's decode, {shape}, {result['context']:,} tokens, {torch.get_num_threads()} threads, "
        f"{inputs.query.device.type}"
    )
    columns = ["", "ms [p20, p80]", "x sdpa", "x matmuls", "read", "GB/s", "needed", "kept", "exact mass"]
    tables.print_table(title, columns, rows)
