"""How much mass sparse prefill has to keep for one model, from a text (SampleAttention, arXiv 2406.15486, section 4.4).

The paper profiles its settings offline, the cheapest that keep 99 % of a benchmark's score. The score here is the
likelihood that the model gives a text's own tokens, which needs no labels and moves with the smallest harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .attention import use_attention
from .cache import TwilightCache
from .config import TwilightConfig
from .drift import Drift, compare
from .samples import sample_ids

ALPHAS = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
POSITIONS = 512  # last positions of a sample whose next token is scored


def calibrate_prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    settings: TwilightConfig,
    *,
    kept_score: float = 0.99,
    sample_len: int | None = None,
    samples: int = 2,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[TwilightConfig, dict[str, Any]]:
    """Choose the smallest ``alpha`` whose sparse prefill keeps the score of dense prefill.

    Args:
        model: a decoder model.
        tokenizer: of the model.
        texts: what the model will read is best.
        settings: where everything else comes from; pages do not matter, since prefill reads what is not packed yet.
        kept_score: share of the dense score to keep, in ``(0, 1]``; the score is the geometric mean of the likelihoods
            of a text's tokens, the inverse of its perplexity.
        sample_len: tokens of a sample; None for twice ``min_prefill_len``, at most what the model was made for.
        samples: places in the texts that are measured.
        seed: of the places.
        on_progress: called with forwards made and at most to be made, before each.
    Returns:
        The settings with ``alpha`` (1, dense, if no share will do), and a JSON-ready report: ``kept_score`` asked for,
        ``sample_len``, ``samples``, and for each ``alpha`` that was tried the ``score`` kept, ``agreement`` of the
        likeliest token, ``kl`` in nats and ``density``, the share of query-key pairs computed.
    Raises:
        ValueError: a share outside its range, samples too short to be prefilled sparsely, or too little text.
    """
    if not 0.0 < kept_score <= 1.0:
        raise ValueError(f"kept_score must be in (0, 1], got {kept_score}; pass 0.99 to lose at most a hundredth")
    config = model.config.get_text_config(decoder=True)
    made_for = getattr(config, "max_position_embeddings", None) or 2 * settings.min_prefill_len
    length = min(2 * settings.min_prefill_len, made_for) if sample_len is None else sample_len
    if length <= max(settings.min_prefill_len, POSITIONS):
        raise ValueError(
            f"sample_len must be above min_prefill_len = {settings.min_prefill_len} and {POSITIONS} for prefill to be "
            f"sparse, got {length}; the model was made for {made_for} tokens, so set min_prefill_len below"
        )
    ids = sample_ids(tokenizer, texts, length, samples, seed, settings).to(model.device)
    total, tried = len(ids) * (1 + len(ALPHAS)), {}
    done = iter(range(total))

    def report() -> None:
        if on_progress is not None:
            on_progress(next(done), total)

    with use_attention(model, "twilight"):
        dense = []
        for row in ids:
            report()
            dense.append(_logits(model, row[None], None)[0])
        for alpha in ALPHAS:
            drift, density = _drift(model, ids, dense, replace(settings, alpha=alpha), report)
            kept = 1.0 / (1.0 + drift.summary()["perplexity_change"])
            tried[str(alpha)] = {
                "score": round(kept, 5), "agreement": float(drift.is_same.mean()), "kl": float(drift.kl.mean()),
                "density": round(density, 4),
            }  # fmt: skip
            if kept >= kept_score:
                break
        else:
            alpha = 1.0
    facts = {"kept_score": kept_score, "sample_len": length, "samples": samples, "seed": seed, "tried": tried}
    return replace(settings, alpha=alpha), facts


def _drift(
    model: PreTrainedModel, ids: Tensor, dense: list[Tensor], settings: TwilightConfig, report: Callable[[], None]
) -> tuple[Drift, float]:
    parts, shares = [], []
    for row, expected in zip(ids, dense, strict=True):
        report()
        logits, density = _logits(model, row[None], settings)
        parts.append(compare(expected[:-1], logits[:-1], row[-POSITIONS + 1 :]))
        shares += density
    return sum(parts[1:], parts[0]), sum(shares) / len(shares) if shares else 1.0


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: Tensor, settings: TwilightConfig | None) -> tuple[Tensor, list[float]]:
    """Logits ``[POSITIONS, V]`` of the last positions, and the density of each sparse layer and KV head."""
    config = model.config
    cache = DynamicCache(config=config) if settings is None else TwilightCache(config, settings)
    logits: Tensor = model(input_ids=ids, past_key_values=cache, logits_to_keep=POSITIONS).logits[0]
    layers = cache.prefill_stats() if isinstance(cache, TwilightCache) else []
    return logits, [share for layer in layers for share in layer["density"]]
