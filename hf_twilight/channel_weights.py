"""Which key channels bear rounding least: those whose steps, times the queries there, move logits most.

Rounding a channel in steps ``s`` moves a logit by ``q * s / sqrt(12)`` on average, so channels weigh as the mean of
``q ** 2`` times the mean of the squared range that a page's levels have to span.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .recording import Record, recording

_TOKENS = 2048  # seen; far fewer than drift needs


@torch.inference_mode()
def heavy_channels(model: PreTrainedModel, ids: Tensor, page_size: int, num_sinks: int) -> dict[int, list[list[int]]]:
    """Rank the key channels of each layer by what refining them saves.

    Args:
        model: a decoder model.
        ids: ``[B, T]`` token ids without padding; the first row is looked at.
        page_size: tokens of a page.
        num_sinks: first tokens, which are in no page.
    Returns:
        By layer, for each KV head, half as many channels as it has: the first n are those to refine if n are refined.
        A channel that is worth it comes again.
    """
    with recording(model, min(_TOKENS, ids.shape[1])) as records:
        model(ids[:1, :_TOKENS], use_cache=False, logits_to_keep=1)
    return {layer: _ranked(_weights(record, page_size, num_sinks)) for layer, record in sorted(records.items())}


def _weights(record: Record, page_size: int, num_sinks: int) -> Tensor:
    """``[K, D]``: mean squared query times mean squared range of a page."""
    keys = record.keys[0, :, num_sinks:].float()
    heads, tokens, _ = keys.shape
    pages = keys[:, : tokens // page_size * page_size].unflatten(1, (-1, page_size))
    ranges = (pages.amax(2) - pages.amin(2)).square().mean(1)
    queries = record.query[0].float().unflatten(0, (heads, -1))  # [K, G, T, D]
    weights: Tensor = queries.square().mean((1, 2)) * ranges
    return weights


def _ranked(weights: Tensor) -> list[list[int]]:
    """Channels by what two more bits take off their weight, one after the other."""
    found = []
    for row in weights.tolist():
        left, order = list(row), []
        for _ in range(len(row) // 2):
            order.append(max(range(len(left)), key=left.__getitem__))
            left[order[-1]] /= 16.0
        found.append(order)
    return found
