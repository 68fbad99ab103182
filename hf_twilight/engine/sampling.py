"""Sampling parameters, and tokens drawn so that they depend on a request's seed and position alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
_MOST_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen.

    Args:
        max_tokens: tokens to generate at most, at least 1.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: share of the probability that the candidates carry, in ``(0, 1]``.
        top_k: most candidates; 0 for all.
        min_p: least probability of a candidate relative to the likeliest, in ``[0, 1)``.
        repetition_penalty: factor against tokens of prompt and answer, above 0; 1 for none.
        stop: texts that end the answer; they are not part of it.
        seed: of this request; None takes one from the engine's seed and the number of arrival.
        logprobs: likeliest tokens whose log-probability is reported, 0 to 20; None reports nothing.
        ignore_eos: go on after the model's end token.
        logits_processor: ``(generated ids, logits [V]) -> logits [V]``, float32, called for every token, as grammars
            need.
    Raises:
        ValueError: a value outside its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _require("max_tokens", self.max_tokens, _is_whole(self.max_tokens, 1), "a whole number of at least 1")
        _require("temperature", self.temperature, _is_real(self.temperature, 0.0), "a number of at least 0")
        _require("top_p", self.top_p, _is_real(self.top_p, 0.0) and 0 < self.top_p <= 1, "in (0, 1]")
        _require("top_k", self.top_k, _is_whole(self.top_k, 0), "a whole number, 0 for all")
        _require("min_p", self.min_p, _is_real(self.min_p, 0.0) and self.min_p < 1, "in [0, 1)")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, _is_real(penalty, 0.0) and penalty > 0, "above 0")
        is_text = all(isinstance(text, str) and text for text in self.stop)
        _require("stop", self.stop, is_text, "texts that are not empty")
        if self.seed is not None:
            _require("seed", self.seed, _is_whole(self.seed, 0) and self.seed < 1 << 64, "in [0, 2^64)")
        if self.logprobs is not None:
            is_few = _is_whole(self.logprobs, 0) and self.logprobs <= _MOST_LOGPROBS
            _require("logprobs", self.logprobs, is_few, f"in [0, {_MOST_LOGPROBS}]")

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the largest logit decides and nothing else is asked for."""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1
            and self.logprobs is None
            and self.logits_processor is None
        )


@dataclass(frozen=True)
class Choice:
    """A chosen token with its log-probability under the model, and the likeliest tokens with theirs."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, params: SamplingParams, tokens: Sequence[int], prompt_len: int, seed: int) -> Choice:
    """Choose the next token.

    Args:
        logits: ``[V]`` float32.
        params: how.
        tokens: prompt and generated ids.
        prompt_len: ids of the prompt.
        seed: of the request.
    Raises:
        ValueError: a logits processor returned another shape, or nothing is allowed any more.
    """
    told = logits.log_softmax(-1) if params.logprobs is not None else None
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        score = logits[seen]
        scaled = torch.where(score < 0, score * params.repetition_penalty, score / params.repetition_penalty)
        logits = logits.index_copy(0, seen, scaled)
    if params.logits_processor is not None:
        processed = params.logits_processor(list(tokens[prompt_len:]), logits)
        if processed.shape != logits.shape:
            raise ValueError(
                f"logits_processor must return {list(logits.shape)} like its input, got {list(processed.shape)}"
            )
        logits = processed
    top = logits.max()
    if not bool(torch.isfinite(top)):
        raise ValueError(f"logits must hold a finite largest number, got {top.item()}; no token is allowed")
    if params.temperature == 0:
        token = int(logits.argmax())
    else:
        token = _draw(logits, params, uniform(seed, len(tokens)))
    if told is None or params.logprobs is None:
        return Choice(token)
    best = told.topk(params.logprobs)
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Choice(token, float(told[token]), pairs)


def uniform(seed: int, position: int) -> float:
    """A number in ``[0, 1)`` from a counter-based generator (Philox): the seed is its key, the position its counter."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0])).random())


def _draw(logits: Tensor, params: SamplingParams, number: float) -> int:
    """Invert the cumulative distribution of the candidates, likeliest first, at ``number``."""
    weights = ((logits.double() - logits.max().double()) / params.temperature).exp()
    count = weights.shape[0] if params.top_k == 0 else min(params.top_k, weights.shape[0])
    if count == weights.shape[0] and params.top_p == 1 and params.min_p == 0:  # no order is needed
        order, cumulative = None, weights.cumsum(0)
    else:
        ranked = weights.topk(count) if params.top_k else weights.sort(descending=True, stable=True)
        order, kept = ranked.indices, ranked.values
        before = kept.cumsum(0) - kept
        allowed = (before < params.top_p * kept.sum()) & (kept >= params.min_p * kept[0])
        cumulative = (kept * allowed).cumsum(0)
    place = int(torch.searchsorted(cumulative, cumulative[-1] * number, right=True))
    place = min(place, int((cumulative < cumulative[-1]).sum()))
    return place if order is None else int(order[place])


def _require(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_real(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least
