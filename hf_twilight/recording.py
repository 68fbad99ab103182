"""Queries, keys and values of a forward as attention saw them, layer by layer, for measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .attention import twilight_attention, twilight_mask, use_attention

RECORDING_NAME = "twilight_recording"
_RECORD = "_twilight_record"


@dataclass
class Record:
    """What one layer's attention was called with, after RoPE, in the model's dtype.

    Attributes:
        query: ``[B, H, T, D]``, the last tokens only.
        keys: ``[B, K, S, D]``.
        values: ``[B, K, S, Dv]``.
        scaling: factor of the logits.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float


@contextmanager
def recording(model: PreTrainedModel, last: int, layers: Sequence[int] | None = None) -> Iterator[dict[int, Record]]:
    """Record attention layers of the forwards inside; a later forward replaces an earlier one's records.

    Args:
        model: its attention is switched meanwhile; the computation stays the stock one.
        last: query tokens that are kept.
        layers: which are recorded; None for all.
    Yields:
        Records by layer.
    Raises:
        ValueError: ``last`` below 1, a layer that the model does not have, or a model that does not take other
            attention functions.
    """
    if last < 1:
        raise ValueError(f"last must be at least 1 token, got {last}")
    records: dict[int, Record] = {}
    numbered: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    chosen = [module for module in numbered if layers is None or module.layer_idx in layers]
    absent = sorted(set(layers or ()) - {module.layer_idx for module in chosen})
    if absent:
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        raise ValueError(f"layer must be 0 to {count - 1}, got {', '.join(map(str, absent))}")
    with use_attention(model, RECORDING_NAME):
        for module in chosen:
            setattr(module, _RECORD, (records, last))
        try:
            yield records
        finally:
            for module in chosen:
                delattr(module, _RECORD)


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Note what attention is called with, then attend as ``twilight_attention`` does."""
    found = getattr(module, _RECORD, None)
    if found is not None:
        records, last = found
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        records[module.layer_idx] = Record(query[:, :, -last:].detach().clone(), key.detach(), value.detach(), factor)
    return twilight_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)


AttentionInterface.register(RECORDING_NAME, recording_attention)
AttentionMaskInterface.register(RECORDING_NAME, twilight_mask)
