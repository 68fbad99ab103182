"""How far a cache moves a model from itself: teacher-forced text, read through the cache.

Prefill attention sees unrounded keys, so perplexity of one long forward measures nothing of a cache. Two ways do:

- *packing*: the text goes through the cache in chunks no longer than its window, so that all older tokens are read
  from where they are stored; a chunk of several tokens attends to all of them.
- *decode*: a prompt is read at once, then the text goes on token by token, which is when pruning and selectors act.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .attention import ATTENTION_NAME

_REFERENCE_CHUNK = 1024


@dataclass(frozen=True)
class Reference:
    """What the model says of a text without any loss; made once, compared with many caches.

    Attributes:
        ids: ``[1, S]`` token ids on the model's device.
        logits: ``[S, V]`` in the model's dtype, of the token after each.
    """

    ids: Tensor
    logits: Tensor

    @staticmethod
    def of(model: PreTrainedModel, ids: Tensor, *, on_tokens: Callable[[int], object] = lambda _: None) -> Reference:
        """Read ``ids [1, S]`` with the stock cache.

        Args:
            model: with ``attn_implementation="twilight"``, which is the stock attention for stock caches.
            ids: at least 2 tokens.
            on_tokens: told after each forward how many tokens it took.
        Raises:
            ValueError: another attention, or a shape that is not ``[1, S]`` with S of at least 2.
        """
        _require(model, ids)
        ids = ids.to(model.device)
        cache = DynamicCache(config=model.config)
        logits: Tensor | None = None
        with torch.inference_mode():
            for start in range(0, ids.shape[1], _REFERENCE_CHUNK):
                part = ids[:, start : start + _REFERENCE_CHUNK]
                found = model(input_ids=part, past_key_values=cache).logits[0]
                if logits is None:
                    logits = found.new_empty(ids.shape[1], found.shape[-1])
                logits[start : start + part.shape[1]] = found
                on_tokens(part.shape[1])
        assert logits is not None
        return Reference(ids, logits)


@dataclass(frozen=True)
class Drift:
    """Differences at each predicted position, all ``[N]`` float64; join texts with ``+``.

    Attributes:
        kl: Kullback-Leibler divergence of the cache's next-token distribution from the reference's, nats.
        nll: negative log-likelihood of the text's next token through the cache, nats.
        dense_nll: the same by the reference.
        is_same: 1 where both hold the same token for the likeliest.
    """

    kl: Tensor
    nll: Tensor
    dense_nll: Tensor
    is_same: Tensor

    def __add__(self, other: Drift) -> Drift:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Drift(*(torch.cat(pair) for pair in pairs))

    def summary(self) -> dict[str, float]:
        """Return the figures that are reported, as plain numbers.

        ``kl`` is a mean with its standard error ``kl_error`` (positions taken as independent), ``kl_p99`` the 99th
        percentile; ``perplexity_change`` is relative, 0.01 meaning one per cent worse, and ``perplexity_change_error``
        its standard error over paired positions; ``agreement`` is the share of positions with the same likeliest token.
        """
        change = self.nll - self.dense_nll
        return {
            "positions": self.kl.numel(),
            "kl": float(self.kl.mean()),
            "kl_error": _standard_error(self.kl),
            "kl_p99": float(self.kl.quantile(0.99)),
            "perplexity": math.exp(float(self.nll.mean())),
            "dense_perplexity": math.exp(float(self.dense_nll.mean())),
            "perplexity_change": math.expm1(float(change.mean())),
            "perplexity_change_error": _standard_error(change),
            "agreement": float(self.is_same.mean()),
        }


def packing_drift(
    model: PreTrainedModel,
    reference: Reference,
    cache: Any,
    *,
    chunk: int = 64,
    on_tokens: Callable[[int], object] = lambda _: None,
) -> Drift:
    """Compare a cache with the reference while the text goes through it in chunks; pruning does not act.

    Args:
        model: with ``attn_implementation="twilight"``.
        reference: of the same model.
        cache: empty, of any kind; it holds all tokens but the last afterwards.
        chunk: tokens of a forward; no more than the cache keeps unrounded, or rounding is measured in part only.
        on_tokens: told after each forward how many tokens it took.
    Returns:
        The drift at all ``S - 1`` positions.
    Raises:
        ValueError: another attention, a chunk below 1, or a cache that is not empty.
    """
    _require(model, reference.ids, cache)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    return _follow(model, reference, cache, 0, chunk, on_tokens)


def decode_drift(
    model: PreTrainedModel,
    reference: Reference,
    cache: Any,
    *,
    positions: int = 64,
    on_tokens: Callable[[int], object] = lambda _: None,
) -> Drift:
    """Compare a cache with the reference token by token over the last ``positions``, after one prefill of the rest.

    Args:
        model: with ``attn_implementation="twilight"``.
        reference: of the same model.
        cache: empty, of any kind.
        positions: predicted positions, from 1 to S - 2.
        on_tokens: told after each forward how many tokens it took.
    Returns:
        The drift at the last ``positions`` positions.
    Raises:
        ValueError: another attention, positions outside their range, or a cache that is not empty.
    """
    _require(model, reference.ids, cache)
    prompt = reference.ids.shape[1] - 1 - positions
    if positions < 1 or prompt < 1:
        raise ValueError(
            f"positions must be from 1 to {reference.ids.shape[1] - 2} for a text of {reference.ids.shape[1]} tokens, "
            f"got {positions}"
        )
    with torch.inference_mode():
        model(input_ids=reference.ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    on_tokens(prompt)
    return _follow(model, reference, cache, prompt, 1, on_tokens)


def compare(reference_logits: Tensor, logits: Tensor, next_ids: Tensor) -> Drift:
    """Compare two predictions of the same positions.

    Args:
        reference_logits, logits: ``[N, V]``, any float dtype.
        next_ids: ``[N]`` the text's next tokens.
    """
    dense, ours = (x.double().log_softmax(-1) for x in (reference_logits, logits))
    kl = (dense.exp() * (dense - ours)).sum(-1)
    nll, dense_nll = (-x.gather(-1, next_ids[:, None])[:, 0] for x in (ours, dense))
    is_same = (dense.argmax(-1) == ours.argmax(-1)).double()
    return Drift(*(x.cpu() for x in (kl, nll, dense_nll, is_same)))


@torch.inference_mode()
def _follow(
    model: PreTrainedModel,
    reference: Reference,
    cache: Any,
    start: int,
    chunk: int,
    on_tokens: Callable[[int], object],
) -> Drift:
    """Feed the text from ``start`` on, ``chunk`` tokens a forward, and compare each forward's predictions."""
    ids, end = reference.ids, reference.ids.shape[1] - 1
    parts = []
    for first in range(start, end, chunk):
        last = min(first + chunk, end)
        logits = model(input_ids=ids[:, first:last], past_key_values=cache).logits[0]
        parts.append(compare(reference.logits[first:last], logits, ids[0, first + 1 : last + 1]))
        on_tokens(last - first)
    return Drift(*(torch.cat(column) for column in zip(*(vars(p).values() for p in parts), strict=True)))


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(values.numel())) if values.numel() > 1 else 0.0


def _require(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> None:
    attention = model.config._attn_implementation
    if attention != ATTENTION_NAME:
        raise ValueError(
            f'model must use attn_implementation="{ATTENTION_NAME}" (the stock attention, except for Twilight caches), '
            f'got {attention!r}; call model.set_attn_implementation("{ATTENTION_NAME}")'
        )
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must be [1, S] with S at least 2, got {list(ids.shape)}")
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"cache must be empty, got one of {cache.get_seq_length()} tokens; make a new one")
