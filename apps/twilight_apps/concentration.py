"""How concentrated real attention is: tokens that heads need for a share of their mass, as quantiles."""

from __future__ import annotations

from typing import Any

import torch

from . import documents, models, tables

CONTEXT = 8000
_STEPS = 16
_QUANTILES = 20

# Shares of the packed tokens (8,000 less sinks and a window of 64) that a query head needs for p = 0.95 of
# its mass, at the middle of each twentieth of the heads, in all layers but the two that presets keep dense.
# Measured on the embedded model, float32 keys and values as they are, by: hf-twilight bench decode
# --measure-concentration
NEEDED_SHARES = (
    0.0, 0.0, 0.00003, 0.00023, 0.00063, 0.00116, 0.00221, 0.00325, 0.0042, 0.00546,
    0.00726, 0.00867, 0.01248, 0.01713, 0.02373, 0.02855, 0.03717, 0.04791, 0.07401, 0.12942,
)  # fmt: skip


def measure(*, p: float = 0.95, context: int = CONTEXT) -> dict[str, Any]:
    """Measure on the embedded model what ``NEEDED_SHARES`` holds, and print it.

    The model reads real text densely, then takes a few more tokens of it; each head's need is exact, against
    unrounded keys and values.

    Returns:
        What ``--json`` prints.
    """
    from hf_twilight import TwilightCache, TwilightConfig

    tokenizer = models.load_tokenizer("smollm2")
    model = models.load("smollm2", "float32")
    models.use_attention(model, models.OUR_ATTENTION)
    ids = torch.tensor([documents.cut(tokenizer, documents.document_text(), context + _STEPS, repeat=True)])
    settings = TwilightConfig(
        key_bits=16, value_bits=16, window=64, p=p, min_keep=0, min_sparse_len=0, dense_layers=(0, 1)
    )
    cache = TwilightCache(model.config, settings)
    with torch.inference_mode(), tables.layer_progress(model, "Reading", _STEPS + 1):
        for part in ids.split([context] + [1] * _STEPS, 1):
            model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    layers = [layer for layer in cache.stats() if layer["layer"] not in settings.dense_layers]
    shares = torch.tensor(
        [need / scored for layer in layers for need, scored in zip(layer["needed"], layer["scored"], strict=True)],
        dtype=torch.float64,
    )
    middles = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    quantiles = [round(share, 5) for share in shares.quantile(middles).tolist()]
    union = sum(sum(layer["kept"]) for layer in layers) / sum(sum(layer["needed"]) for layer in layers)
    rows = [[f"{middle:.3f}", f"{share:.5f}"] for middle, share in zip(middles.tolist(), quantiles, strict=True)]
    tables.print_table(f"Share of {context} tokens needed for p = {p}", ["quantile of heads", "share"], rows, left=0)
    tables.say(f"mean share {float(shares.mean()):.4f}; union over the heads of a KV head: {union:.2f} times the mean")
    return {
        "model": "smollm2", "context": context, "p": p, "heads": shares.numel(), "needed_shares": quantiles,
        "mean_share": float(shares.mean()), "union_over_mean": union,
    }  # fmt: skip
