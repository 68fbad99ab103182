"""What calibration feeds to a model: excerpts of texts, and facts hidden in them that are asked for at the end.

Prose hardly ever asks a model to copy, so that a sample of prose alone tells little about which layers and channels
copying needs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import TwilightConfig

_PLACES = """
Lisbon Oslo Cairo Vienna Lima Quito Dublin Warsaw Prague Athens Madrid Berlin Havana Bogota Nairobi Delhi Tokyo Seoul
Manila Jakarta Sydney Toronto Boston Denver Dallas Chicago Geneva Milan Naples Lagos
"""
_NAMES = tuple(_PLACES.split())
_TAIL_TOKENS_A_FACT = 36  # of the tail, one fact asked for: some two fifths of it, where a fact takes 14 tokens


def sample_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    length: int,
    count: int,
    seed: int,
    settings: TwilightConfig,
) -> Tensor:
    """Return ``[count, length]`` token ids from random places in ``texts``.

    Raises:
        ValueError: a length that leaves hardly anything to pack, or too little text.
    """
    least = settings.num_sinks + settings.window + 4 * settings.page_size
    if length < least or count < 1:
        raise ValueError(f"sample_len must be at least {least} and samples at least 1, got {length} and {count}")
    parts = [texts] if isinstance(texts, str) else list(texts)
    ids = torch.cat([tokenizer(part, return_tensors="pt", verbose=False).input_ids[0] for part in parts])
    if len(ids) < length * count:
        told = f"texts must hold {length * count} tokens, got {len(ids)}"
        raise ValueError(f"{told}; give more text, fewer samples or a smaller sample_len (at least {least})")
    places = torch.randperm(len(ids) // length, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([ids[place * length : (place + 1) * length] for place in places.tolist()])


def with_facts(tokenizer: PreTrainedTokenizerBase, ids: Tensor, tail: int, seed: int) -> Tensor:
    """Hide numbers in samples and say them again at the end, in another order; prose makes room.

    Args:
        tokenizer: of the model.
        ids: ``[B, T]`` token ids.
        tail: last tokens, in which facts are said again; before them they are hidden. A tail that has no room for one
            stays as it is.
        seed: of names, numbers and places.
    Returns:
        ``[B, T]`` token ids.
    """
    return torch.stack([_row(tokenizer, row.tolist(), tail, random.Random(seed + i)) for i, row in enumerate(ids)])


def _row(tokenizer: PreTrainedTokenizerBase, prose: list[int], tail: int, numbers: random.Random) -> Tensor:
    hidden = min(len(_NAMES), tail // _TAIL_TOKENS_A_FACT * 10 // 7)
    names = numbers.sample(_NAMES, hidden)
    lines = [f" The code for {name} is {numbers.randrange(1_000_000, 10_000_000)}." for name in names]
    facts: list[list[int]] = [
        tokenizer(line, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0].tolist()
        for line in lines
    ]
    order = numbers.sample(range(hidden), min(hidden, tail // _TAIL_TOKENS_A_FACT))
    said = [token for index in order for token in facts[index]]
    taken = sum(map(len, facts))
    before, kept = len(prose) - tail - taken, len(prose) - taken - len(said)
    if len(said) > tail or before < 1:
        return torch.tensor(prose)
    row, last = [], 0
    for place, fact in zip(sorted(numbers.randrange(before) for _ in facts), facts, strict=True):
        row += prose[last:place] + fact
        last = place
    return torch.tensor(row + prose[last:kept] + said)
