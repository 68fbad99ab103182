"""Sparse prefill against dense prefill: next tokens, mass that is kept, pairs that are computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_twilight import TwilightCache
from hf_twilight.drift import compare

from . import models, tables
from .eval_plots import new_figure, save
from .eval_texts import Excerpt, excerpts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_twilight import TwilightConfig

POSITIONS = 256  # last positions whose next token is compared


def run(
    model_name: str, dtype: str, texts: dict[str, str], context: int, count: int, *, alphas: tuple[float, ...],
    changes: Sequence[str], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Prefill ``count`` excerpts of each text densely and with each alpha.

    Returns:
        ``records``, one for each excerpt and alpha; ``layers``, density per layer and KV head of the last alpha.
    Raises:
        ValueError: a text too short, a context longer than the model was made for, settings out of range.
    """
    tokenizer = models.load_tokenizer(model_name)
    model = models.load(model_name, dtype)
    limit = models.trained_context(model)
    if limit is not None and context > limit:
        raise ValueError(f"context must be at most {limit}, what the model was made for, got {context}")
    settings = [models.parse_settings("exact", ["dense_layers=[0, 1]", *changes, f"alpha={alpha}"]) for alpha in alphas]
    found = [e for name, text in texts.items() for e in excerpts(tokenizer, name, text, context + 1, count, seed)]
    records: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    with tables.progress("Prefill", len(found) * (1 + len(settings))) as bar:
        for excerpt in found:
            dense = _logits(model, excerpt, None)[0]
            bar.advance(bar.task_ids[0])
            for config in settings:
                sparse, layers = _logits(model, excerpt, config)
                records.append(_record(excerpt, config.alpha, dense, sparse, layers))
                bar.advance(bar.task_ids[0])
    return {
        "model": model_name, "dtype": dtype, "context": context, "seed": seed, "positions": POSITIONS,
        "settings": [config.to_dict() for config in settings], "records": records, "layers": layers,
    }  # fmt: skip


def print_results(result: dict[str, Any]) -> None:
    """Print a row for each excerpt and alpha, and the means."""
    rows = [[f"{r['text']} @ {r['start']:,}", *_cells(r)] for r in result["records"]]
    for alpha in dict.fromkeys(r["alpha"] for r in result["records"]):
        rows.append(["mean", *_cells(_mean([r for r in result["records"] if r["alpha"] == alpha]))])
    title = f"{result['model']}, {result['dtype']}, {result['context']:,} tokens: sparse against dense prefill"
    columns = ["excerpt", "alpha", "KL, next token", f"KL, last {POSITIONS}", "argmax agrees", "perplexity"]
    columns += ["mass", "worst 5 %", "pairs"]
    tables.print_table(title, columns, rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the share of pairs that each layer and KV head computes."""
    density = torch.tensor([layer["density"] for layer in result["layers"]])
    alpha = result["records"][-1]["alpha"]
    figure = new_figure(7, 8)
    axes = figure.subplots()
    image = axes.imshow(100 * density, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    axes.set_yticks(range(len(density)), [str(layer["layer"]) for layer in result["layers"]], fontsize=8)
    axes.set_xticks(range(density.shape[1]))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer (those left out are dense)")
    for row, shares in enumerate(density.tolist()):
        for head, share in enumerate(shares):
            colour = "black" if share > 0.6 else "white"
            axes.text(head, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_title(
        f"Query-key pairs computed at alpha = {alpha:g}, in % of dense\n{result['model']}, "
        f"{result['context']:,} tokens, mean {100 * float(density.mean()):.0f} %",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, label="%")
    save(figure, path)


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, excerpt: Excerpt, settings: TwilightConfig | None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Logits ``[POSITIONS, V]`` of the last positions but the excerpt's very last, and what prefill did."""
    models.use_attention(model, models.STOCK_ATTENTION if settings is None else models.OUR_ATTENTION)
    cache = models.stock_cache(model) if settings is None else TwilightCache(model.config, settings)
    out = model(input_ids=excerpt.ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=POSITIONS)
    stats = cache.prefill_stats() if isinstance(cache, TwilightCache) else []
    return out.logits[0], stats


def _record(
    excerpt: Excerpt, alpha: float, dense: Tensor, sparse: Tensor, layers: list[dict[str, Any]]
) -> dict[str, Any]:
    drift = compare(dense, sparse, excerpt.ids[0, -POSITIONS:])

    def mean(name: str) -> float:
        shares = [share for layer in layers for share in layer[name]]
        return sum(shares) / len(shares) if shares else 1.0

    return {
        "text": excerpt.text, "start": excerpt.start, "alpha": alpha, "kl_next": float(drift.kl[-1]),
        "kl": float(drift.kl.mean()), "agreement": float(drift.is_same.mean()),
        "perplexity_change": drift.summary()["perplexity_change"],
        "mass": mean("mass"), "mass_q05": mean("mass_q05"), "density": mean("density"), "sparse_layers": len(layers),
    }  # fmt: skip


def _cells(record: dict[str, Any]) -> list[str]:
    return [
        f"{record['alpha']:g}", f"{record['kl_next']:.5f}", f"{record['kl']:.5f}", f"{record['agreement']:.1%}",
        f"{record['perplexity_change']:+.2%}", f"{record['mass']:.1%}", f"{record['mass_q05']:.1%}",
        f"{record['density']:.1%}",
    ]  # fmt: skip


def _mean(records: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("alpha", "kl_next", "kl", "agreement", "perplexity_change", "mass", "mass_q05", "density")
    return {name: sum(r[name] for r in records) / len(records) for name in names}
