"""How large the GPU benchmarks are: as real models, or toys that walk the same path without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shape: query heads, KV heads, head dim.
        contexts, batches: of decode.
        prompts: tokens of prefill.
        flex_at: contexts and batches at which FlexAttention, which compiles for long, takes part in decode.
        flex_prompt: tokens at which it does in prefill.
        step_context: tokens in the cache of a whole model's step.
        model: what its configuration is changed by.
        memory_tokens: of the largest cache.
        budget_s: seconds of timing one configuration.
    """

    shape: tuple[int, int, int]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    flex_at: tuple[tuple[int, int], ...]
    flex_prompt: int
    step_context: int
    model: dict[str, Any]
    memory_tokens: int
    budget_s: float


FULL = Sizes(
    shape=(32, 8, 128),
    contexts=(8192, 32768, 131072),
    batches=(1, 8, 64),
    prompts=(8192, 32768, 131072),
    flex_at=((131072, 8),),
    flex_prompt=131072,
    step_context=131072,
    model={"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    memory_tokens=1 << 20,
    budget_s=2.0,
)
TOY = Sizes(
    shape=(4, 2, 16),
    contexts=(1160,),
    batches=(1, 2),
    prompts=(300,),
    flex_at=(),
    flex_prompt=0,
    step_context=260,
    model={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64},
    memory_tokens=1000,
    budget_s=0.0,
)
