"""Is one layer's sparse prefill faster than the fastest dense attention of this GPU?

Regime: one prompt at once, causal, nothing cached; entrants in turns, a cold L2 cache before each run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_twilight import TwilightConfig
from twilight_kernels import StripePlan, _reference, attend_stripes, select_stripes

from . import gpu_dense, gpu_timing
from .gpu_check import error_of, reject_reason, tolerance_of
from .gpu_inputs import make_inputs, make_rows
from .gpu_sizes import Sizes
from .gpu_units import Setting, Unit, prepare_all, told

_TIE_SHARE = 1e-3  # of the stripes that the checked strips may choose otherwise than float64: ties at a bar

_BESIDE_FLEX = ("sdpa, enable_gqa", "sdpa flash, enable_gqa")  # its compilation is long: a unit of its own

Run = Callable[[], Tensor]


def units(sizes: Sizes) -> Iterator[Unit]:
    """Each length of prompt, and FlexAttention last."""
    for index, tokens in enumerate(sizes.prompts):
        yield Unit(f"{tokens:,}", 3 + 3 * index, functools.partial(_run, tokens, is_flex=False))
    if sizes.flex_prompt:
        yield Unit(f"{sizes.flex_prompt:,}, flex", 91, functools.partial(_run, sizes.flex_prompt, is_flex=True))


def _run(tokens: int, setting: Setting, *, is_flex: bool) -> dict[str, Any]:
    """Check the last strip at this length, then time.

    Raises:
        ArithmeticError: what is ours is wrong; nothing is timed then.
    """
    plan, device = TwilightConfig.preset("balanced").stripe_plan, setting.device
    made = make_inputs(setting.sizes.shape, tokens, setting.seed, device, setting.dtype)
    query, keys, values = make_rows(made, setting.seed), made.keys, made.values
    padding = torch.zeros(1, dtype=torch.int32, device=device)
    found = check(query, keys, values, plan, made.scaling, padding)
    mask, report = select_stripes(query, keys, plan, scaling=made.scaling, padding=padding)
    ours = _ours(query, keys, values, mask, plan, made.scaling, padding)
    dense, refused = _dense(query, keys, values, made.scaling, is_flex=is_flex)
    faults = dict[str, str]()
    entrants = prepare_all(ours, faults, device) | prepare_all(dense, refused, device)
    rows = gpu_timing.time_rows(entrants, set(ours), device, 3 * setting.sizes.budget_s)
    return {
        "tokens": tokens, "entrants": rows, "refused": refused, "check": found, "kept": _kept(report, plan, tokens),
        "faults": faults,
    }  # fmt: skip


def check(
    query: Tensor, keys: Tensor, values: Tensor, plan: StripePlan, scaling: float, padding: Tensor
) -> dict[str, float]:
    """Compare the last strip with the float64 definition: what it chooses, and what it attends to.

    Raises:
        ArithmeticError: either is wrong.
    """
    last = query[:, :, -plan.strip :]
    mask, report = select_stripes(last, keys, plan, scaling=scaling, padding=padding)
    wide, told = _reference.select_stripes(last.double(), keys.double(), plan, scaling=scaling, padding=padding)
    differing = sum(((mask ^ wide) >> bit & 1).sum() for bit in range(8)) / max(1.0, float(told[..., 0].sum()))
    out = attend_stripes(last, keys, values, mask, plan, scaling=scaling, padding=padding)
    exact = _reference.attend_stripes(
        last.double(), keys.double(), values.double(), mask, plan, scaling=scaling, padding=padding
    )
    error, tolerance = error_of(out, exact), tolerance_of(exact, out.dtype)
    if not error <= tolerance:
        raise ArithmeticError(
            f"attend_stripes must agree with its definition to be timed, got an error of {error:.3g} where rounding "
            f"explains {tolerance:.3g}; run the kernels' tests"
        )
    if not float(differing) <= _TIE_SHARE:
        raise ArithmeticError(
            f"select_stripes must choose what its definition chooses to be timed, got {float(differing):.2%} of the "
            "stripes otherwise; run the kernels' tests"
        )
    mass = float((report - told)[..., 1:].abs().max())
    return {"error": error, "tolerance": tolerance, "stripes_otherwise": float(differing), "mass_error": mass}


def _ours(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, plan: StripePlan, scaling: float, padding: Tensor
) -> dict[str, Run]:
    def select() -> Tensor:
        return select_stripes(query, keys, plan, scaling=scaling, padding=padding)[0]

    def attend(chosen: Tensor) -> Tensor:
        return attend_stripes(query, keys, values, chosen, plan, scaling=scaling, padding=padding)

    return {
        "twilight, both": lambda: attend(select()),
        "twilight, choosing": select,
        "twilight, attending": lambda: attend(mask),
    }


def _dense(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, *, is_flex: bool
) -> tuple[dict[str, Run], dict[str, str]]:
    """Dense entrants that run here and whose last row is right, and why the others are left out."""
    per_kv = query.shape[1] // keys.shape[1]
    weights = query[:, :, -1:].double() @ keys.double().repeat_interleave(per_kv, 1).transpose(-1, -2) * scaling
    exact = (weights.softmax(-1) @ values.double().repeat_interleave(per_kv, 1))[:, :, 0]
    made: dict[str, Callable[[], Run]] = {}
    for name, entrant in gpu_dense.prefill_entrants(query, keys, values, scaling).items():
        made[name] = lambda entrant=entrant: entrant  # type: ignore[misc]
    if is_flex:
        made = {name: make for name, make in made.items() if name in _BESIDE_FLEX}
        made["flex_attention, compiled"] = lambda: gpu_dense.flex_entrant(
            query, keys, values, scaling, is_causal=True
        )  # fmt: skip
    entrants, refused = dict[str, Run](), dict[str, str]()
    for name, make in made.items():
        try:
            found = make()
            out = found()[:, :, -1]
            why = reject_reason(out, exact)
            if why:
                refused[name] = why
            else:
                entrants[name] = found
        except (RuntimeError, ValueError) as reason:  # a backend that takes no such shapes
            refused[name] = told(reason)
            if keys.is_cuda:
                torch.cuda.empty_cache()
    return entrants, refused


def _kept(report: Tensor, plan: StripePlan, tokens: int) -> dict[str, float]:
    """Mean over strips and KV heads: share of the causal pairs computed, and mass kept by the sampled rows."""
    report, pairs, done = report.double().cpu(), 0.0, 0.0
    strips = plan.strips(tokens, tokens, 0)
    for n, (first, end) in enumerate(strips):
        own, slab = end - first, max(0, first - plan.window)
        always = min(plan.num_sinks, slab) + first - slab
        triangle = own * (own + 1) / 2
        done += own * (always + float(report[0, :, n, 0].mean())) + triangle
        pairs += own * first + triangle
    used = report[0, :, : len(strips)]
    return {"density": done / pairs, "mass": float(used[..., 2].mean()), "mass_q05": float(used[..., 3].mean())}
