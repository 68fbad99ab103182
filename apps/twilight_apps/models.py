"""From command-line words to a model, its tokenizer, its settings and its two caches."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

    from hf_twilight import TwilightConfig

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
STOCK_ATTENTION = "sdpa"
OUR_ATTENTION = "twilight"


def parse_settings(preset: str, changes: Sequence[str]) -> TwilightConfig:
    """Build the settings of ``--preset`` with each ``--set key=value``.

    Raises:
        ValueError: no ``=``, no preset, folder or setting of that name (the nearest is named), or a value out of range.
    """
    from hf_twilight.config import as_config

    return as_config(preset, **_parse_changes(changes))


def changed(settings: TwilightConfig, changes: Sequence[str]) -> TwilightConfig:
    """Return settings with each ``--set key=value``.

    Raises:
        ValueError: as ``parse_settings``.
    """
    from hf_twilight.config import as_config

    return as_config(settings, **_parse_changes(changes))


def _parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set must be key=value, got {change!r}; write for example --set p=0.9")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text.strip()
        values[key.strip()] = tuple(value) if isinstance(value, list) else value
    return values


def parse_dtype(name: str) -> torch.dtype | str:
    """Return the dtype of ``--dtype``; ``"auto"`` stays a word.

    Raises:
        ValueError: another name.
    """
    import torch

    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return name if name == "auto" else getattr(torch, name)


def load(name: str, dtype: str, max_tokens: int | None = None) -> PreTrainedModel:
    """Load a model with stock attention; RoPE is extended (YaRN) only if ``max_tokens`` exceeds its range."""
    import transformers

    import hf_twilight

    if not logger.isEnabledFor(logging.INFO):
        transformers.utils.logging.disable_progress_bar()
    return hf_twilight.load_model(
        name, dtype=parse_dtype(dtype), attn_implementation=STOCK_ATTENTION, max_context=max_tokens
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model."""
    import hf_twilight

    return hf_twilight.load_tokenizer(name)


def trained_context(model: PreTrainedModel) -> int | None:
    """Tokens that the model was made for; None if its config does not say."""
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the model's attention function, if it is not in use already."""
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache of Transformers' default kind."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def stock_bytes(cache: DynamicCache) -> int:
    """Bytes of the tensors that a stock cache holds."""
    import torch

    held = (value for layer in cache.layers for value in vars(layer).values())
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


def cache_stats(cache: Any) -> dict[str, float] | None:
    """Average ``cache.stats()`` over layers and heads; None if nothing was decoded from pages."""
    layers = cache.stats()
    if not layers:
        return None
    means = {
        name: sum(sum(layer[name]) / len(layer[name]) for layer in layers) / len(layers)
        for name in ("scored", "needed", "kept", "mass")
    }
    return {**means, "bytes_read_per_token": sum(layer["bytes_read"] for layer in layers)}
