"""A model's own queries, keys and values, as its attention gets them in a dense forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import models, tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "twilight_captured"


@dataclass(frozen=True)
class Captured:
    """One layer: ``query [1, H, S, D]``, ``keys`` and ``values [1, K, S, D]`` in the model's dtype."""

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float


@torch.inference_mode()
def capture(model: PreTrainedModel, ids: Tensor, layers: Sequence[int]) -> dict[int, Captured]:
    """Run the model densely on ``ids [1, S]`` and return what ``layers`` attended with.

    Raises:
        ValueError: a layer that the model does not have.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    absent = [layer for layer in layers if not 0 <= layer < count]
    if absent:
        raise ValueError(f"layer must be 0 to {count - 1}, got {', '.join(map(str, absent))}")
    found: dict[int, Captured] = {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        if module.layer_idx in layers:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            found[module.layer_idx] = Captured(query.clone(), key.clone(), value.clone(), float(scaling))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    models.use_attention(model, _NAME)
    try:
        with tables.layer_progress(model, f"Reading {ids.shape[1]} tokens", 1):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        models.use_attention(model, before)
    return found
