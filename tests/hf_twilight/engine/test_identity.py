"""The answer to a request is the one it gets alone, whatever runs beside it and however it is cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_twilight import TwilightCache
from hf_twilight.engine import Completion, Engine, SamplingParams

COUNT = 24


def prompts(number: int = 6, shared: int = 70, own: int = 20, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    prefix = [draw.randrange(3, 128) for _ in range(shared)]
    return [prefix + [draw.randrange(3, 128) for _ in range(draw.randrange(1, own))] for _ in range(number)]


def greedy(count: int = COUNT) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


def answers(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def alone(make_engine: Callable[..., Engine], texts: list[list[int]], settings: Any, count: int = COUNT) -> Any:
    """Each request in an engine of its own, its prompt in one piece."""
    found = []
    for text in texts:
        with make_engine(settings=settings, max_running=1, prefill_tokens=1024) as engine:
            found += answers(engine.generate([text], greedy(count), progress=False))
    return found


@pytest.mark.parametrize("chunk", [1024, 50, 7])
def test_batch_sharing_and_chunks_change_nothing(
    chunk: int, settings: dict[str, Any], make_engine: Callable[..., Engine]
) -> None:
    texts = prompts()
    with make_engine(settings=settings, prefill_tokens=chunk) as engine:
        together = answers(engine.generate(texts, greedy(), progress=False))
        stats = engine.stats()
    assert stats.cached_tokens >= 5 * 70
    assert stats.prefill_rows <= 70 + sum(len(text) - 70 for text in texts)
    assert together == alone(make_engine, texts, settings)


def test_order_changes_nothing(settings: dict[str, Any], make_engine: Callable[..., Engine]) -> None:
    texts = prompts()
    with make_engine(settings=settings, max_running=2) as engine:
        forth = answers(engine.generate(texts, greedy(), progress=False))
    with make_engine(settings=settings, max_running=3) as engine:
        back = answers(engine.generate(texts[::-1], greedy(), progress=False))[::-1]
    assert forth == back


def test_eviction_and_preemption_change_nothing(settings: dict[str, Any], make_engine: Callable[..., Engine]) -> None:
    texts = prompts(8, shared=20, own=60)
    with make_engine(settings=settings, max_cache_tokens=16 * 16) as engine:
        engine._scheduler.expected_output = 1.0  # too hopeful, so that too many are let in
        together = answers(engine.generate(texts, greedy(40), progress=False))
        stats = engine.stats()
    assert stats.preemptions > 0 and stats.evictions > 0
    assert together == alone(make_engine, texts, settings, 40)


def test_cancelling_others_changes_nothing(settings: dict[str, Any], make_engine: Callable[..., Engine]) -> None:
    texts = prompts(8)
    with make_engine(settings=settings, prefill_tokens=40) as engine:
        handles = [engine.submit(text, greedy()) for text in texts]
        for index in (0, 3, 5):
            next(iter(handles[index]))
            handles[index].cancel()
        kept = [handle.result().token_ids for index, handle in enumerate(handles) if index not in (0, 3, 5)]
        assert {handles[index].result().finish_reason for index in (0, 3, 5)} <= {"cancelled", "length"}
    wanted = alone(make_engine, [text for index, text in enumerate(texts) if index not in (0, 3, 5)], settings)
    assert kept == wanted


def test_a_chat_goes_on_from_what_is_stored(settings: dict[str, Any], make_engine: Callable[..., Engine]) -> None:
    """What was computed while answering is read again as part of the next prompt, with the same result."""
    history, draw, total = prompts(1)[0], random.Random(1), 0
    with make_engine(settings=settings) as engine:
        for turn in range(4):
            before = engine.stats().prefill_rows
            answer = engine.generate([history], greedy(12), progress=False)[0]
            total = engine.stats().prefill_rows - before
            assert answers([answer]) == alone(make_engine, [history], settings, 12)
            if turn:
                assert total == 9 + 1  # the new tokens, and the last of the answer, which was never fed
            history = [*history, *answer.token_ids, *(draw.randrange(3, 128) for _ in range(9))]


def test_exact_answers_are_those_of_generate(
    llama: LlamaForCausalLM, make_engine: Callable[..., Engine], generate: Callable[..., Any]
) -> None:
    texts = prompts()
    with make_engine(settings={"preset": "exact", "page_size": 16, "window": 32}, prefill_tokens=33) as engine:
        found = answers(engine.generate(texts, greedy(), progress=False))
    for text, answer in zip(texts, found, strict=True):
        ids = torch.tensor([text])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert generate(llama, inputs, COUNT)[0].tolist() == answer


def test_packed_answers_are_those_of_generate_fed_token_by_token(
    make_llama: Callable[..., LlamaForCausalLM],
    settings: dict[str, Any],
    make_engine: Callable[..., Engine],
    generate: Callable[..., Any],
) -> None:
    """The rule of the engine, in terms of the cache: every token attends as a decode step at its position does."""
    texts = prompts(3)
    with make_engine(settings=settings, prefill_tokens=64) as engine:
        found = answers(engine.generate(texts, greedy(), progress=False))
    model = make_llama()
    model.set_attn_implementation("twilight")
    for text, answer in zip(texts, found, strict=True):
        ids = torch.tensor([text])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = TwilightCache(model.config, settings)
        assert generate(model, inputs, COUNT, past_key_values=cache, prefill_chunk_size=1)[0].tolist() == answer


def test_sampled_tokens_do_not_depend_on_neighbours(
    settings: dict[str, Any], make_engine: Callable[..., Engine]
) -> None:
    texts = prompts(4)
    params = [SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=index % 3) for index in range(4)]
    with make_engine(settings=settings) as engine:
        together = answers(engine.generate(texts, params, progress=False))
    with make_engine(settings=settings, max_running=1, prefill_tokens=9) as engine:
        lonely = answers(engine.generate(texts[::-1], params[::-1], progress=False))[::-1]
    assert together == lonely
