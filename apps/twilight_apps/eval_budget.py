"""``hf-twilight eval budget``: how many tokens each layer and head attends to, and how that grows with context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_twilight import TwilightCache, TwilightConfig

from . import models, tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .eval_texts import Excerpt


@dataclass(frozen=True)
class Plan:
    """What is measured: ``steps`` decode steps after each of ``contexts`` tokens of one text."""

    contexts: tuple[int, ...]
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if min(self.contexts) < 1:
            raise ValueError(f"context must be at least 1 token, got {min(self.contexts)}")


def run(
    model_name: str, dtype: str, excerpt: Excerpt, settings: dict[str, TwilightConfig], plan: Plan
) -> dict[str, Any]:
    """Decode after each context with each preset.

    Args:
        excerpt: the longest context and ``steps`` more.
    Returns:
        What ``--json`` prints: ``"records"`` by preset and context, ``"layers"`` by layer as well.
    """
    model = models.load(model_name, dtype, excerpt.ids.shape[1])
    models.use_attention(model, models.OUR_ATTENTION)
    records: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    ids = excerpt.ids.to(model.device)
    with tables.progress("Decoding", len(settings) * (sum(plan.contexts) + len(plan.contexts) * plan.steps)) as bar:
        for name, config in settings.items():
            for context in plan.contexts:
                found = _decode(model, ids[:, : context + plan.steps], config, plan.steps)
                records.append({"setting": name, "context": context, **_summary(found, config, context)})
                layers += [{"setting": name, "context": context, **layer} for layer in found]
                bar.advance(bar.task_ids[0], context + plan.steps)
    return {
        "model": model_name, "dtype": str(model.dtype).removeprefix("torch."), "text": excerpt.text,
        "start": excerpt.start, "steps": plan.steps,
        "settings": {name: config.to_dict() for name, config in settings.items()}, "records": records,
        "layers": layers,
    }  # fmt: skip


@torch.inference_mode()
def _decode(model: PreTrainedModel, ids: Tensor, config: TwilightConfig, steps: int) -> list[dict[str, Any]]:
    """Read a prompt at once and the rest token by token; return ``cache.stats()``."""
    cache = TwilightCache(model.config, config)
    for part in ids.split([ids.shape[1] - steps] + [1] * steps, 1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    return cache.stats()


def _summary(layers: list[dict[str, Any]], config: TwilightConfig, context: int) -> dict[str, Any]:
    """Tokens over the layers that prune; of all layers if the context is too short for any to."""
    sparse = [layer for layer in layers if config.policy(layer["layer"]).p < 1.0]
    if not sparse:
        raise ValueError("settings must leave at least one layer sparse, got p = 1 or dense_layers for all of them")
    needed, kept = (torch.tensor([layer[key] for layer in sparse]).flatten().double() for key in ("needed", "kept"))
    packed = max(max(layer["scored"]) for layer in layers)
    is_sparse = packed >= config.min_sparse_len
    return {
        "is_sparse": is_sparse,
        "packed_tokens": packed,
        "kept_mean": float(kept.mean()),
        "kept_median": float(kept.median()),
        "kept_p10": float(kept.quantile(0.1)),
        "kept_p90": float(kept.quantile(0.9)),
        "needed_mean": float(needed.mean()),
        "kept_share": float(kept.mean()) / context,
    }


def print_results(result: dict[str, Any]) -> None:
    """Print one row a preset and context."""
    rows = [
        [
            r["setting"], f"{r['context']:,}", f"{r['needed_mean']:,.0f}", f"{r['kept_mean']:,.0f}",
            f"{r['kept_median']:,.0f}", f"{r['kept_p90']:,.0f}", f"{r['kept_share']:.1%}",
            "" if r["is_sparse"] else "too short: dense",
        ]
        for r in result["records"]
    ]  # fmt: skip
    title = (
        f"{result['model']}, {result['dtype']}, {result['text']}: packed tokens a head needs, and that its KV head "
        "attends to"
    )
    columns = ["preset", "context", "needed", "attended", "median", "90th pct", "of context", ""]
    tables.print_table(title, columns, rows)
