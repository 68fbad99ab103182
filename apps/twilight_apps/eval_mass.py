"""``hf-twilight eval mass``: the share of attention mass that is asked for, and the share that is attended to.

Queries and keys are those of the dense model on real text. Each layer packs its keys as a preset does, a decode step
prunes by its own scores, and what it keeps is weighed with unquantized keys: so a shortfall is the estimate's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_twilight import TwilightCache, TwilightConfig
from hf_twilight.recording import Record, recording
from twilight_cache.selectors import NUM_QUERIES

from . import decode_check, eval_methods, models, tables
from .eval_texts import Excerpt
from .synthetic import AttentionInputs

EXACT_KEYS = "exact keys"
_QUANTILES = {"q01": 0.01, "q05": 0.05, "median": 0.5, "q999": 0.999}
# settings that decide what is attended to, and not how it is stored
_NO_ROUNDING = (
    "page_size", "num_sinks", "window", "p", "min_keep", "selector", "budget", "dense_layers", "min_sparse_len",
)  # fmt: skip
_SLACK = 0.005  # a head and step counts as kept if it is short of p by no more


@dataclass(frozen=True)
class Plan:
    """What is measured: decode steps over the last ``steps`` tokens of an excerpt, at each of ``shares``."""

    shares: tuple[float, ...]
    steps: int

    def __post_init__(self) -> None:
        for p in self.shares:
            if not 0.0 < p < 1.0:
                raise ValueError(f"p must be between 0 and 1, got {p}; p = 1 keeps the whole mass by definition")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Achieved:
    """Masses of one layer, one setting: ``mass`` and ``claimed`` ``[T, H]``, and packed tokens ``kept [T, H]``."""

    mass: Tensor
    claimed: Tensor
    kept: Tensor


def run(
    model_name: str, dtype: str, excerpt: Excerpt, settings: dict[str, TwilightConfig], plan: Plan
) -> dict[str, Any]:
    """Measure every setting at every share.

    Returns:
        What ``--json`` prints: ``"records"`` by setting and share, and ``"layers"`` by layer as well.
    """
    context = excerpt.ids.shape[1]
    if context <= plan.steps:
        raise ValueError(f"context must exceed steps, got {context} and {plan.steps}")
    model = models.load(model_name, dtype, context)
    with (
        recording(model, min(context, plan.steps + NUM_QUERIES)) as recorded,
        tables.layer_progress(model, "Dense forward"),
        torch.inference_mode(),
    ):
        model(input_ids=excerpt.ids.to(model.device), use_cache=False, logits_to_keep=1)
    layers: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    with tables.progress("Weighing", len(recorded) * len(settings) * len(plan.shares)) as bar:
        for name, config in settings.items():
            for p in plan.shares:
                found = {}
                for index, record in recorded.items():
                    cache = TwilightCache(model.config, replace(config, p=p))  # layers go one by one, each in its own
                    if cache.settings.policy(index).p < 1.0:
                        found[index] = weigh(cache, index, record, plan.steps)
                    bar.advance(bar.task_ids[0])
                records.append({"setting": name, "p": p, **_summary(p, list(found.values()))})
                layers += [{"setting": name, "p": p, "layer": i, **_heads(a)} for i, a in found.items()]
    return {
        "model": model_name, "dtype": str(model.dtype).removeprefix("torch."), "text": excerpt.text,
        "start": excerpt.start, "context": context, "steps": plan.steps,
        "settings": {name: config.to_dict() for name, config in settings.items()}, "records": records,
        "layers": layers,
    }  # fmt: skip


def chosen_settings(presets: Sequence[str], changes: Sequence[str]) -> dict[str, TwilightConfig]:
    """Return the presets with changes, and unrounded keys under the same pruner, which they are judged by."""
    found = eval_methods.configs(presets, changes)
    first = next(iter(found.values()))
    exact = TwilightConfig.preset("exact", **{name: getattr(first, name) for name in _NO_ROUNDING})
    return {EXACT_KEYS: exact, **found}


@torch.inference_mode()
def weigh(cache: TwilightCache, layer_idx: int, record: Record, steps: int) -> Achieved:
    """Take the last recorded queries' steps one by one in one layer and weigh what each attends to.

    Args:
        cache: an empty cache.
        layer_idx: the layer that is used; it packs and prunes as the cache's settings say.
        record: one row's queries, keys and values; queries before the last ``steps`` are shown to the selector as
            the end of the prompt.
        steps: at most as many as there are queries.
    """
    sequences, heads = cache.sequences, record.query.shape[1]
    keys, values = record.keys.float(), record.values.float()
    layer = cache.twilight_layers[[layer.layer_idx for layer in cache.twilight_layers].index(layer_idx)]
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    store = layer.store
    assert store is not None
    start = keys.shape[2] - steps
    store.append(sequences.begin(0, start, 1, [0]), keys[:, :, :start], values[:, :, :start])
    prompt, queries = record.query.float().split([record.query.shape[2] - steps, steps], 2)
    if prompt.shape[2]:
        store.observe(prompt, record.scaling)
    masses: list[Tensor] = []
    claimed: list[Tensor] = []
    kept: list[Tensor] = []
    for index in range(steps):
        end = start + index + 1
        query, seen = queries[:, :, index], keys[:, :, :end]
        shared = seen.repeat_interleave(heads // seen.shape[1], 1)
        logits = (shared @ query[..., None])[0, :, :, 0] * record.scaling
        inputs = AttentionInputs(query.contiguous(), seen, values[:, :, :end], logits, record.scaling)
        step = sequences.begin(end - 1, 1, 1, [0])
        store.decodes.clear()
        store.attend(inputs.query, record.scaling, step, seen[:, :, -1], inputs.values[:, :, -1])
        assert store.decodes.sums is not None
        _, _, kept_tokens, claim, _ = store.decodes.sums[0].T
        masses.append(decode_check.attended_mass(store, step, inputs))
        coverage = store.decodes.mean_coverage()
        claimed.append(claim * (torch.nan if coverage is None else torch.tensor(coverage, dtype=claim.dtype)))
        kept.append(kept_tokens)
        store.flush(step.flushes)
    return Achieved(*(torch.stack(parts).double() for parts in (masses, claimed, kept)))


def _summary(p: float, found: list[Achieved]) -> dict[str, Any]:
    if not found:
        raise ValueError("settings must leave at least one layer sparse, got dense_layers for all of them")
    mass = torch.cat([a.mass.flatten() for a in found])
    claimed = torch.cat([a.claimed.flatten() for a in found])
    return {
        **{name: float(mass.quantile(q)) for name, q in _QUANTILES.items()},
        "least": float(mass.min()),
        "share_reached": float((mass >= p - _SLACK).double().mean()),
        # a selector that knows nothing of the whole mass claims nothing
        "claimed_median": None if claimed.isnan().any() else float(claimed.median()),
        "kept_tokens": float(torch.cat([a.kept.flatten() for a in found]).mean()),
        "heads_and_steps": mass.numel(),
    }


def _heads(achieved: Achieved) -> dict[str, Any]:
    """Per query head: the 5th percentile of mass over steps, and mean kept tokens."""
    return {"mass_q05": achieved.mass.quantile(0.05, dim=0).tolist(), "kept": achieved.kept.mean(0).tolist()}


def print_results(result: dict[str, Any]) -> None:
    """Print one row a setting and share."""
    figures = ("median", "q05", "q01", "least")
    rows = [
        [
            r["setting"], f"{r['p']:g}", *(f"{r[name]:.4f}" for name in figures), f"{r['share_reached']:.2%}",
            f"{r['kept_tokens']:,.0f}",
        ]
        for r in result["records"]
    ]  # fmt: skip
    reached = f"at least p - {_SLACK:g}"
    columns = ["keys", "asked p", "median", "5th pct", "1st pct", "least", reached, "tokens attended"]
    title = (
        f"{result['model']}, {result['dtype']}, {result['text']}, {result['context']:,} tokens, {result['steps']} "
        "steps: mass attended to, by unquantized keys"
    )
    tables.print_table(title, columns, rows)
