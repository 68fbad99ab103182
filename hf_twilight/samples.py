"""What calibration feeds to a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import TwilightConfig


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
        raise ValueError(f"{told}; give more text, fewer samples or a smaller sample_len")
    places = torch.randperm(len(ids) // length, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([ids[place * length : (place + 1) * length] for place in places.tolist()])
