"""What does reading a prompt cost, dense and sparse, one layer and the whole model?

Regime: one long prompt at once, nothing cached. Layers are timed on the model's own queries, keys and values; then
whole forwards, stock cache and attention against Twilight's, in turns.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_twilight import TwilightCache
from hf_twilight.prefill import SparsePrefill
from hf_twilight.recording import Record, recording
from twilight_kernels import _reference, attend_stripes, select_stripes

from . import documents, eval_plots, models, resident, tables, timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_twilight import TwilightConfig

_WARMUP = 1024  # tokens that load every kernel
_CHECKED_ROWS = 128  # query rows that are compared with the definition
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the largest output


@dataclass(frozen=True)
class Plan:
    """What is timed: ``layers`` one by one (none if empty), then ``rounds`` of whole forwards (none if 0)."""

    contexts: tuple[int, ...]
    dtypes: tuple[str, ...]
    layers: tuple[int, ...]
    rounds: int


def run(model_name: str, settings: TwilightConfig, plan: Plan, *, text: Path | None) -> dict[str, Any]:
    """Time prefill at each dtype and context; print a table for each.

    Returns:
        What ``--json`` prints.
    Raises:
        ValueError: a layer that the model does not have.
        ArithmeticError: the kernels disagree with their definition.
    """
    tokenizer = models.load_tokenizer(model_name)
    document = documents.document_text(text)
    results = []
    for dtype in plan.dtypes:
        for context in plan.contexts:
            ids = torch.tensor([documents.cut(tokenizer, document, context, repeat=True)])
            model = models.load(model_name, dtype)
            limit = models.trained_context(model)
            is_extended = limit is not None and context > limit
            if is_extended:
                tables.say(f"note: {context} tokens exceed the {limit} the model was made for: RoPE extended with YaRN")
                model = models.load(model_name, dtype, context)
            result: dict[str, Any] = {"dtype": dtype, "context": context, "rope_extended_with_yarn": is_extended}
            if plan.layers:
                result["layers"] = _layers(model, ids, settings, plan)
                _print_layers(result)
            if plan.rounds:
                result |= _whole(model, ids, settings, plan.rounds)
                _print_whole(model_name, result)
            results.append(result)
    return {"model": model_name, "settings": settings.to_dict(), "results": results}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the time to the first token against the length of the prompt, for each dtype."""
    from matplotlib.ticker import NullLocator

    dtypes = list(dict.fromkeys(found["dtype"] for found in result["results"]))
    figure = eval_plots.new_figure(5.5 * len(dtypes), 4.5)
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        found = sorted((r for r in result["results"] if r["dtype"] == dtype), key=lambda r: r["context"])
        contexts = [r["context"] for r in found]
        for name, colour in (("stock", "#57534e"), ("twilight", "#c2410c")):
            seconds = [r["ttft_ms"][name]["median"] / 1e3 for r in found]
            axes.plot(contexts, seconds, "o-", color=colour, label=name)
        for r in found:
            at = r["context"], r["ttft_ms"]["twilight"]["median"] / 1e3
            axes.annotate(f"{r['ttft_speedup']:.2f}x", at, (4, -12), textcoords="offset points", fontsize=8)
        ends = r"doubling the prompt costs {:.1f}x (stock), {:.1f}x (twilight) at the long end"
        growth = [_growth(found, name) for name in ("stock", "twilight")] if len(found) > 1 else None
        axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="seconds to the first token")
        axes.margins(x=0.1)  # room for the labels
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{result['model']}, {dtype}" + (f"\n{ends.format(*growth)}" if growth else ""), fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend()
    eval_plots.save(figure, path)


def _growth(found: list[dict[str, Any]], name: str) -> float:
    """What doubling the prompt costs, from the two longest."""
    (few, short), (many, long) = ((r["context"], r["ttft_ms"][name]["median"]) for r in found[-2:])
    return float((long / short) ** (1 / math.log2(many / few)))


@torch.inference_mode()
def _layers(model: PreTrainedModel, ids: Tensor, settings: TwilightConfig, plan: Plan) -> list[dict[str, Any]]:
    with recording(model, ids.shape[1], plan.layers) as records, tables.layer_progress(model, "Reading", 1):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [{"layer": layer, **_one_layer(records[layer], settings)} for layer in plan.layers]


def _one_layer(found: Record, settings: TwilightConfig) -> dict[str, Any]:
    query, keys, values = found.query, found.keys, found.values
    per_kv, stripe_plan = query.shape[1] // keys.shape[1], settings.stripe_plan
    repeated = keys.repeat_interleave(per_kv, 1), values.repeat_interleave(per_kv, 1)
    padding = torch.zeros(1, dtype=torch.int32)
    _check(found, settings)
    kept: list[Tensor] = []
    spent = {"select": 0.0, "attend": 0.0}
    chosen: dict[str, list[float]] = {}

    def dense() -> None:
        kept[:] = [scaled_dot_product_attention(query, *repeated, is_causal=True, scale=found.scaling)]

    def sparse() -> None:
        prefill = SparsePrefill(settings, -1)
        start = time.perf_counter()
        mask = prefill.choose(query, keys, found.scaling, [0])
        middle = time.perf_counter()
        out = attend_stripes(query, keys, values, mask, stripe_plan, scaling=found.scaling, padding=padding)
        spent.update(select=(middle - start) * 1e3, attend=(time.perf_counter() - middle) * 1e3)
        kept[1:] = [out]
        chosen.update(prefill.stats() or {})

    times = timing.interleave({"sdpa": dense, "twilight": sparse}, 2, warmup=1)
    dense()
    sparse()
    exact, out = kept
    best = {name: min(found) for name, found in times.items()}
    return {
        "sdpa_ms": best["sdpa"], "twilight_ms": best["twilight"], "select_ms": spent["select"],
        "attend_ms": spent["attend"], "speedup": best["sdpa"] / best["twilight"],
        **{name: sum(shares) / len(shares) for name, shares in chosen.items()},
        "error": float((out.float() - exact.float()).norm() / exact.float().norm()),
    }  # fmt: skip


def _check(found: Record, settings: TwilightConfig) -> None:
    """Compare the last rows with the float64 definition on the same stripes."""
    plan, padding = settings.stripe_plan, torch.zeros(1, dtype=torch.int32)
    query = found.query[:, :, -_CHECKED_ROWS:]
    mask, _ = select_stripes(query, found.keys, plan, scaling=found.scaling, padding=padding)
    out = attend_stripes(query, found.keys, found.values, mask, plan, scaling=found.scaling, padding=padding)
    exact = _reference.attend_stripes(
        query.double(), found.keys.double(), found.values.double(), mask, plan, scaling=found.scaling, padding=padding
    )
    error = float((out.double() - exact).abs().max() / exact.abs().max())
    if not error <= _TOLERANCE[query.dtype]:
        raise ArithmeticError(
            f"attend_stripes must agree with its definition to be timed, got an error of {error:.3g}; run the "
            "kernels' tests"
        )


def _whole(model: PreTrainedModel, ids: Tensor, settings: TwilightConfig, rounds: int) -> dict[str, Any]:
    """Time forwards of the whole prompt, each with a new cache."""
    stats: list[dict[str, Any]] = []
    peaks: dict[str, list[int]] = {}

    @torch.inference_mode()
    def read(attention: str, tokens: Tensor = ids, own: TwilightConfig = settings) -> None:
        models.use_attention(model, attention)
        is_ours = attention == models.OUR_ATTENTION
        cache = TwilightCache(model.config, own) if is_ours else models.stock_cache(model)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if isinstance(cache, TwilightCache):
            stats[:] = cache.prefill_stats()
        peaks.setdefault("twilight" if is_ours else "stock", []).append(resident.peak_bytes() or 0)

    entrants = {"stock": lambda: read(models.STOCK_ATTENTION), "twilight": lambda: read(models.OUR_ATTENTION)}
    for attention in (models.STOCK_ATTENTION, models.OUR_ATTENTION):  # a whole round to warm up would cost too much
        read(attention, ids[:, :_WARMUP], replace(settings, min_prefill_len=_WARMUP // 2))
    peaks.clear()
    with tables.progress("Reading", rounds) as bar:
        times = timing.interleave(
            entrants, rounds, warmup=0, before=resident.reset_peak, on_round=lambda: bar.advance(bar.task_ids[0])
        )
    summaries = {name: timing.summary(found) for name, found in times.items()}
    density = [share for layer in stats for share in layer["density"]]
    return {
        "ttft_ms": summaries,
        "ttft_speedup": summaries["stock"]["median"] / summaries["twilight"]["median"],
        "peak_bytes": {name: min(found) or None for name, found in peaks.items()},
        "sparse_layers": len(stats),
        "density": sum(density) / len(density) if density else 1.0,
    }


def _print_layers(result: dict[str, Any]) -> None:
    rows = [
        [
            str(row["layer"]), f"{row['sdpa_ms']:,.0f}", f"{row['twilight_ms']:,.0f}", f"{row['select_ms']:,.0f}",
            f"{row['speedup']:.2f}", f"{row['stripes']:,.0f}", f"{row['dense']:.0%}", f"{row['mass']:.1%}",
            f"{row['mass_q05']:.1%}", f"{row['error']:.3f}",
        ]
        for row in result["layers"]
    ]  # fmt: skip
    title = (
        f"Attention of one layer, {result['dtype']}, {result['context']:,} tokens, {torch.get_num_threads()} threads"
    )
    columns = [
        "layer",
        "sdpa ms",
        "ours ms",
        "of it choosing",
        "x sdpa",
        "stripes",
        "dense",
        "mass",
        "worst 5 %",
        "error",
    ]
    tables.print_table(title, columns, rows)


def _print_whole(name: str, result: dict[str, Any]) -> None:
    extended = ", RoPE extended with YaRN" if result["rope_extended_with_yarn"] else ""
    title = f"{name}, {result['dtype']}, {result['context']:,} tokens{extended}: time to the first token"
    rows = [
        [
            entrant, f"{times['median'] / 1e3:.2f}", f"{result['ttft_ms']['stock']['median'] / times['median']:.2f}",
            f"{(result['peak_bytes'][entrant] or math.nan) / 1e6:,.0f}",
        ]
        for entrant, times in result["ttft_ms"].items()
    ]  # fmt: skip
    tables.print_table(title, ["cache", "seconds", "x stock", "peak MB, model included"], rows)
    tables.say(f"sparse in {result['sparse_layers']} layers, which compute {result['density']:.1%} of the pairs")
