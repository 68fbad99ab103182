"""Is one layer's decode attention from packed pages faster than the fastest dense attention of this GPU?

Regime: a batch of requests of equal length, one query token each, every context packed; every entrant in a CUDA graph,
a cold L2 cache before each run, all in turns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_twilight import TwilightConfig
from twilight_kernels import _reference

from . import gpu_dense, gpu_timing
from .gpu_check import error_of, reject_reason, tolerance_of
from .gpu_inputs import PackedLayer, make_inputs, pack
from .gpu_sizes import Sizes
from .synthetic import AttentionInputs

_BORDER = 1e-4  # relative change of p that moves tokens across the threshold within rounding of the model's dtype
_CODECS = {"K2V2": "compact", "K4V4": "quality"}
_P = 0.95

Run = Callable[[], Tensor]


def run(sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    """Yield one result for each context and batch, smallest first.

    Raises:
        ArithmeticError: a kernel of ours whose output is wrong; nothing of that context is timed then.
    """
    for context in sizes.contexts:
        inputs = make_inputs(sizes.shape, context, seed, device, dtype)
        packed, checks = {}, {}
        for name, preset in _CODECS.items():
            settings = TwilightConfig.preset(preset, p=_P)
            packed[name] = settings, pack(inputs.keys, inputs.values, settings, 1)
            for p in (_P, 1.0):
                checks[f"{name}, p = {p:g}"] = _check(f"{name}, p = {p:g}", inputs, packed[name][1], settings, p)
        for batch in sizes.batches:
            yield {
                "part": "decode", "context": context, "batch": batch,
                **_time(inputs, batch, sizes, checks, is_flex=(context, batch) in sizes.flex_at),
            }  # fmt: skip


def _check(
    name: str, inputs: AttentionInputs, layer: PackedLayer, settings: TwilightConfig, p: float
) -> dict[str, Any]:
    """Compare one request with the float64 definition on the same pages; count what it keeps."""
    stats = torch.zeros(1, inputs.query.shape[1], 5, dtype=torch.float64, device=inputs.query.device)
    options: dict[str, Any] = {"min_keep": settings.min_keep, "min_sparse_len": settings.min_sparse_len}
    out = layer.attend(inputs.query, inputs.scaling, p, stats=stats, **options)

    def define(share: float) -> Tensor:
        return _reference.decode_attention(
            inputs.query.double(), layer.key_pages, layer.value_pages, layer.plain, block_table=layer.block_table,
            num_pages=layer.num_pages, plain_len=layer.plain_len, scaling=inputs.scaling, p=share, **options,
        )  # fmt: skip

    exact = define(p)
    slack = 0.0
    if p < 1.0:  # a token on the threshold may fall on either side of it: that moves the output by what it weighs
        slack = float((define(min(1.0, p * (1 + _BORDER))) - define(p * (1 - _BORDER))).abs().max())
    error, tolerance = error_of(out, exact), tolerance_of(exact, out.dtype) + slack
    if not error <= tolerance:
        raise ArithmeticError(
            f"decode_attention, {name}, must agree with its definition to be timed, got an error of {error:.3g} where "
            f"rounding explains {tolerance:.3g}; run the kernels' tests"
        )
    scored, needed, kept, mass, _ = stats[0].mean(0).tolist()
    return {
        "error": error, "tolerance": tolerance, "packed_tokens": scored, "needed": needed, "kept": kept,
        "mass": mass, "kept_share": kept / max(1.0, scored), "needed_share": needed / max(1.0, scored),
    }  # fmt: skip


def _time(
    inputs: AttentionInputs, batch: int, sizes: Sizes, checks: dict[str, dict[str, Any]], *, is_flex: bool
) -> dict[str, Any]:
    device = inputs.query.device
    query = inputs.query.repeat(batch, 1, 1)
    ours: dict[str, Run] = {}
    num_bytes: dict[str, int] = {}
    for name, preset in _CODECS.items():
        settings = TwilightConfig.preset(preset, p=_P)
        layer = pack(inputs.keys, inputs.values, settings, batch)
        for p in (_P, 1.0):
            label = f"{name}, p = {p:g}"
            ours[label] = _attend(layer, query, inputs, settings, p)
            num_bytes[label] = layer.nbytes
            _require_equal_rows(label, ours[label](), checks[label]["tolerance"])
    dense, refused = _dense(inputs, query, batch, is_flex)
    entrants = {name: gpu_timing.prepare(found, device) for name, found in {**ours, **dense}.items()}
    times = gpu_timing.interleave(entrants, device, sizes.budget_s)
    plain_bytes = batch * (inputs.keys.nbytes + inputs.values.nbytes)
    rows = [
        {
            "name": name, "is_ours": name in ours, "launch": entrants[name].launch, "ms": times[name],
            "bytes_stored": num_bytes.get(name, plain_bytes), "check": checks.get(name),
        }
        for name in entrants
    ]  # fmt: skip
    prune = _prune_names()
    shares = {name: gpu_timing.kernel_shares(found, prune, device) for name, found in ours.items() if "0.95" in name}
    return {"entrants": rows, "refused": refused, "top_p_share": shares}


def _attend(layer: PackedLayer, query: Tensor, inputs: AttentionInputs, settings: TwilightConfig, p: float) -> Run:
    options = {"min_keep": settings.min_keep, "min_sparse_len": settings.min_sparse_len}
    batch = query.shape[0]
    new_key, new_value = (x[:, :, -1].repeat(batch, 1, 1) for x in (inputs.keys, inputs.values))
    return lambda: layer.attend(query, inputs.scaling, p, new_key=new_key, new_value=new_value, **options)


def _require_equal_rows(name: str, out: Tensor, tolerance: float) -> None:
    error = float((out.double() - out[:1].double()).abs().max())
    if not error <= tolerance:
        raise ArithmeticError(
            f"decode_attention, {name}, must give equal requests equal rows to be timed, got a difference of "
            f"{error:.3g} in a batch of {out.shape[0]}; run the kernels' tests"
        )


def _dense(inputs: AttentionInputs, query: Tensor, batch: int, is_flex: bool) -> tuple[dict[str, Run], dict[str, str]]:
    """Dense entrants that run here and are right, and why the others are left out."""
    keys, values = (x.expand(batch, -1, -1, -1).contiguous() for x in (inputs.keys, inputs.values))
    kv_heads = keys.shape[1]
    grouped = inputs.query[0].double().unflatten(0, (kv_heads, -1))
    weights = (grouped @ inputs.keys[0].double().transpose(-1, -2) * inputs.scaling).softmax(-1)
    exact = (weights @ inputs.values[0].double()).flatten(0, 1)  # [H, Dv]
    made: dict[str, Callable[[], Run]] = {
        gpu_dense.REPEATED: lambda: gpu_dense.repeated_entrant(query, keys, values, inputs.scaling)
    }
    for name, entrant in gpu_dense.decode_entrants(query, keys, values, inputs.scaling).items():
        made[name] = lambda entrant=entrant: entrant  # type: ignore[misc]
    if is_flex:

        def flex() -> Run:
            found = gpu_dense.flex_entrant(query[:, :, None], keys, values, inputs.scaling, is_causal=False)
            return lambda: found()[:, :, 0]

        made["flex_attention, compiled"] = flex
    entrants, refused = dict[str, Run](), dict[str, str]()
    for name, make in made.items():
        try:
            entrants[name] = make()
            reason = reject_reason(entrants[name]()[-1], exact)
        except (RuntimeError, MemoryError, ValueError) as error:  # RuntimeError: a backend that takes no such shapes
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if reason:
            refused[name] = reason
            entrants.pop(name, None)
            if keys.is_cuda:
                torch.cuda.empty_cache()
    return entrants, refused


def _prune_names() -> set[str]:
    """Names of the kernels of top-p pruning, where they are Triton's."""
    try:
        prune = importlib.import_module("twilight_kernels._triton_prune")
    except ImportError:  # no Triton here
        return set()
    return {name for name, found in vars(prune).items() if name.endswith("_kernel") and callable(found)}
