"""Is one layer's decode attention from packed pages faster than the fastest dense attention of this GPU?

Regime: a batch of requests of equal length, one query token each, every context packed; every entrant in a CUDA graph,
a cold L2 cache before each run, all in turns.
"""

from __future__ import annotations

import functools
import importlib
import time
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
from .gpu_units import Setting, Unit, attempt, prepare_all, told
from .synthetic import AttentionInputs

_BORDER = 1e-4  # relative change of p that moves tokens across the threshold within rounding of the model's dtype
_P = 0.95
PRESETS = {"K2V2": "compact", "K4V4": "quality"}
LABELS = {f"{codec}, p = {p:g}": (preset, p) for codec, preset in PRESETS.items() for p in (_P, 1.0)}
_FLEX = "flex_attention, compiled"
_BESIDE_FLEX = (
    "sdpa, enable_gqa",
    "matmuls and softmax",
)  # its compilation is long: a unit of its own, with few others

Run = Callable[[], Tensor]


def units(sizes: Sizes) -> Iterator[Unit]:
    """Each context and batch, and FlexAttention last."""
    for index, (context, batch) in enumerate(sizes.decode):
        yield Unit(f"{context:,} x {batch}", 1 + 3 * index, functools.partial(_run, context, batch, is_flex=False))
    if sizes.flex_at is not None:
        context, batch = sizes.flex_at
        yield Unit(f"{context:,} x {batch}, flex", 90, functools.partial(_run, context, batch, is_flex=True))


def _run(context: int, batch: int, setting: Setting, *, is_flex: bool) -> dict[str, Any]:
    """Check what is ours once more at this length, then time whatever is right."""
    inputs = make_inputs(setting.sizes.shape, context, setting.seed, setting.device, setting.dtype)
    query = inputs.query.repeat(batch, 1, 1)
    faults = {name: "failed its check" for name in LABELS if name in setting.excluded}
    ours, checks, num_bytes = dict[str, Run](), dict[str, dict[str, Any]](), dict[str, int]()
    layers = dict[str, PackedLayer]()
    for name, (preset, p) in LABELS.items():
        if name in faults:
            continue
        with attempt(faults, name, setting.device):
            settings = TwilightConfig.preset(preset, p=p)
            if preset not in layers:
                layers[preset] = pack(inputs.keys, inputs.values, settings, batch)
            layer = layers[preset]
            found = check(name, inputs, layer.first(), settings)
            run = _attend(layer, query, inputs, settings)
            _require_equal_rows(name, run(), found["tolerance"])
            ours[name], checks[name], num_bytes[name] = run, found, layer.nbytes
    times = _time(inputs, query, ours, faults, setting, is_flex=is_flex)
    plain_bytes = batch * (inputs.keys.nbytes + inputs.values.nbytes)
    for row in times["entrants"]:
        row |= {"bytes_stored": num_bytes.get(row["name"], plain_bytes), "check": checks.get(row["name"])}
    return {"context": context, "batch": batch, "faults": faults, **times}


def check(name: str, inputs: AttentionInputs, layer: PackedLayer, settings: TwilightConfig) -> dict[str, Any]:
    """Compare one request with the float64 definition on the same pages; count what it keeps.

    Raises:
        ArithmeticError: the output is wrong.
    """
    p = settings.p
    stats = torch.zeros(1, inputs.query.shape[1], 5, dtype=torch.float64, device=inputs.query.device)
    options: dict[str, Any] = {"min_keep": settings.min_keep, "min_sparse_len": settings.min_sparse_len}
    begin = time.monotonic()
    out = layer.attend(inputs.query, inputs.scaling, p, stats=stats, **options)
    largest = float(out.abs().max())  # waits for the device
    first_s = time.monotonic() - begin

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
        "error": error, "tolerance": tolerance, "largest": largest, "first_call_s": first_s, "packed_tokens": scored,
        "needed": needed, "kept": kept, "mass": mass, "kept_share": kept / max(1.0, scored),
        "needed_share": needed / max(1.0, scored),
    }  # fmt: skip


def _time(
    inputs: AttentionInputs, query: Tensor, ours: dict[str, Run], faults: dict[str, str], setting: Setting, *,
    is_flex: bool,
) -> dict[str, Any]:  # fmt: skip
    device = setting.device
    dense, refused = _dense(inputs, query, is_flex)
    entrants = prepare_all(ours, faults, device) | prepare_all(dense, refused, device)
    rows = gpu_timing.time_rows(entrants, set(ours), device, setting.sizes.budget_s)
    prune, shares = _prune_names(), dict[str, float | None]()
    for name in entrants:
        if name in ours and LABELS[name][1] < 1.0:
            with attempt(faults, f"{name}, profile", device):
                shares[name] = gpu_timing.kernel_shares(ours[name], prune, device)
    return {"entrants": rows, "refused": refused, "top_p_share": shares}


def _attend(layer: PackedLayer, query: Tensor, inputs: AttentionInputs, settings: TwilightConfig) -> Run:
    options = {"min_keep": settings.min_keep, "min_sparse_len": settings.min_sparse_len}
    batch, p = query.shape[0], settings.p
    new_key, new_value = (x[:, :, -1].repeat(batch, 1, 1) for x in (inputs.keys, inputs.values))
    return lambda: layer.attend(query, inputs.scaling, p, new_key=new_key, new_value=new_value, **options)


def _require_equal_rows(name: str, out: Tensor, tolerance: float) -> None:
    error = float((out.double() - out[:1].double()).abs().max())
    if not error <= tolerance:
        raise ArithmeticError(
            f"decode_attention, {name}, must give equal requests equal rows to be timed, got a difference of "
            f"{error:.3g} in a batch of {out.shape[0]}; run the kernels' tests"
        )


def _dense(inputs: AttentionInputs, query: Tensor, is_flex: bool) -> tuple[dict[str, Run], dict[str, str]]:
    """Dense entrants that run here and are right, and why the others are left out."""
    batch = query.shape[0]
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
        made = {name: make for name, make in made.items() if name in _BESIDE_FLEX}

        def flex() -> Run:
            found = gpu_dense.flex_entrant(query[:, :, None], keys, values, inputs.scaling, is_causal=False)
            return lambda: found()[:, :, 0]

        made[_FLEX] = flex
    entrants, refused = dict[str, Run](), dict[str, str]()
    for name, make in made.items():
        try:
            entrants[name] = make()
            reason = reject_reason(entrants[name]()[-1], exact)
        except (RuntimeError, MemoryError, ValueError) as error:  # RuntimeError: a backend that takes no such shapes
            reason = told(error)
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
