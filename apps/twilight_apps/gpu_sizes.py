"""How large the GPU benchmarks are: as real models, or toys that walk the same path without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shape: query heads, KV heads, head dim.
        decode: contexts and batches, those worth most first.
        prompts: tokens of prefill, those worth most first.
        flex_at: context and batch at which FlexAttention, which compiles for long, is timed in decode, if at all.
        flex_prompt: tokens at which it is in prefill; 0 for nowhere.
        check_context: tokens at which kernels are checked.
        step_context: tokens in the cache of a whole model's step.
        generate_context, generate_tokens: tokens of the prompt, and of the answer, of ``generate``.
        model: what its configuration is changed by.
        memory_tokens: of the largest cache.
        budget_s: seconds of timing one configuration.
    """

    shape: tuple[int, int, int]
    decode: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    flex_at: tuple[int, int] | None
    flex_prompt: int
    check_context: int
    step_context: int
    generate_context: int
    generate_tokens: int
    model: dict[str, Any]
    memory_tokens: int
    budget_s: float


FULL = Sizes(
    shape=(32, 8, 128),
    decode=(
        (131072, 8),
        (8192, 1),
        (131072, 1),
        (32768, 8),
        (131072, 64),
        (32768, 1),
        (8192, 8),
        (32768, 64),
        (8192, 64),
    ),
    prompts=(131072, 32768, 8192),
    flex_at=(131072, 8),
    flex_prompt=131072,
    check_context=8192,
    step_context=131072,
    generate_context=8192,
    generate_tokens=129,
    model={"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    memory_tokens=1 << 20,
    budget_s=2.0,
)
TOY = Sizes(
    shape=(4, 2, 16),
    decode=((1160, 2), (1160, 1)),
    prompts=(300,),
    flex_at=None,
    flex_prompt=0,
    check_context=1160,
    step_context=260,
    generate_context=300,
    generate_tokens=5,
    model={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64},
    memory_tokens=1000,
    budget_s=0.0,
)
