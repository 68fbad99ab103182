"""The ways of generating that ``hf-twilight parity`` compares: one function each, one line in ``MODES``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

_CHUNK = 256
_NUM_TURNS = 3


@dataclass(frozen=True)
class Prompts:
    """What modes start from.

    Attributes:
        long: ``[1, S]`` ids, long enough that pages are packed.
        rows: four prompts ``[T]`` of different lengths.
        new_tokens: tokens to generate.
        pad: id that fills rows on the left.
        seed: of the sampling mode.
    """

    long: Tensor
    rows: list[Tensor]
    new_tokens: int
    pad: int
    seed: int


@dataclass(frozen=True)
class Segment:
    """Ids ``[B, T]`` to feed: one token a forward if ``is_stepwise``, else ``chunk`` tokens a forward."""

    ids: Tensor
    is_stepwise: bool
    chunk: int = sys.maxsize


@dataclass(frozen=True)
class Played:
    """What a mode generated, and what to feed to repeat it token by token.

    Attributes:
        tokens: ``[B, T]`` generated ids.
        script: segments whose forwards see the same contexts as the generation.
        mask: ``[B, S]`` attention mask of the prompts; None if nothing is padding.
    """

    tokens: Tensor
    script: list[Segment]
    mask: Tensor | None = None


Mode = Callable[[PreTrainedModel, DynamicCache, Prompts], Played]


def greedy(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Generate greedily from a prompt of a few hundred tokens."""
    return _from_prompt(model, cache, prompts, prompts.rows[-1][None])


def greedy_long(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Generate greedily from the long prompt."""
    return _from_prompt(model, cache, prompts, prompts.long)


def sampling(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Sample from a fixed seed."""
    torch.manual_seed(prompts.seed)
    return _from_prompt(model, cache, prompts, prompts.rows[-1][None], do_sample=True, temperature=1.0)


def batch(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Generate greedily from four prompts of different lengths, padded on the left."""
    ids = pad_sequence(prompts.rows, batch_first=True, padding_value=prompts.pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in prompts.rows], batch_first=True, padding_side="left")
    return _from_prompt(model, cache, prompts, ids, mask=mask)


def beams(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Search with three beams; the drift follows the best one."""
    return _from_prompt(model, cache, prompts, prompts.rows[-1][None], num_beams=3)


def chunked_prefill(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Read the long prompt in chunks: later chunks attend to earlier ones as the cache stored them."""
    return _from_prompt(model, cache, prompts, prompts.long, chunk=_CHUNK, prefill_chunk_size=_CHUNK)


def prompt_lookup(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Draft tokens by looking them up in the prompt, and take wrong ones back."""
    return _from_prompt(model, cache, prompts, prompts.long, prompt_lookup_num_tokens=6)


def turns(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Hold a conversation of three turns on one cache."""
    history = prompts.long[:, : prompts.long.shape[1] // 2]
    generated, script = [], [Segment(history, is_stepwise=False)]
    for turn in range(_NUM_TURNS):
        if turn:
            asked = prompts.rows[turn][None]
            # the last token of an answer is chosen but not yet fed
            script.append(Segment(torch.cat([history[:, -1:], asked], 1), is_stepwise=False))
            history = torch.cat([history, asked], 1)
        out = _generate(model, cache, prompts, history)
        answer = out[:, history.shape[1] :]
        script.append(Segment(answer[:, :-1], is_stepwise=True))
        generated.append(answer)
        history = out
    return Played(torch.cat(generated, 1), script)


def copied(model: PreTrainedModel, cache: DynamicCache, prompts: Prompts) -> Played:
    """Prefill once, copy the cache, and continue the original and the copy each with another question."""
    document = prompts.rows[-1][None]
    with torch.inference_mode():
        model(input_ids=document, past_key_values=cache, logits_to_keep=1)
    generated, script = [], []
    for branch, one in ((1, copy.deepcopy(cache)), (2, cache)):
        asked = prompts.rows[branch][None]
        ids = torch.cat([document, asked], 1)
        answer = _generate(model, one, prompts, ids)[:, ids.shape[1] :]
        generated.append(answer)
        script = [Segment(document, False), Segment(asked, False), Segment(answer[:, :-1], True)]
    return Played(torch.cat(generated, 1), script)


MODES: dict[str, Mode] = {
    "greedy": greedy,
    "greedy, long prompt": greedy_long,
    "sampling": sampling,
    "left-padded batch of 4": batch,
    "3 beams": beams,
    "chunked prefill": chunked_prefill,
    "prompt lookup": prompt_lookup,
    "3 turns, one cache": turns,
    "copied cache": copied,
}


def _from_prompt(
    model: PreTrainedModel,
    cache: DynamicCache,
    prompts: Prompts,
    ids: Tensor,
    mask: Tensor | None = None,
    chunk: int = sys.maxsize,
    **options: Any,
) -> Played:
    tokens = _generate(model, cache, prompts, ids, mask=mask, **options)[:, ids.shape[1] :]
    return Played(tokens, [Segment(ids, False, chunk), Segment(tokens[:, :-1], True)], mask)


def _generate(
    model: PreTrainedModel,
    cache: DynamicCache,
    prompts: Prompts,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Generate exactly ``new_tokens``: an end token would leave little to compare."""
    given = {"do_sample": False, **options}
    out: Tensor = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=prompts.new_tokens,
        min_new_tokens=prompts.new_tokens,
        pad_token_id=prompts.pad,
        **given,
    )
    return out
