from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_twilight.engine import Engine, EngineClosed, QueueFull, SamplingParams

PROMPT = list(range(3, 40))


def greedy(count: int = 8, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": count, "ignore_eos": True} | changes))


def test_tokens_come_one_by_one_and_add_up_to_the_result(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    handle = engine.submit(PROMPT, greedy(logprobs=2))
    tokens = list(handle)
    result = handle.result()
    assert [token.token_id for token in tokens] == result.token_ids
    assert "".join(token.text for token in tokens) == result.text
    assert [token.finish_reason for token in tokens] == [None] * 7 + ["length"]
    assert result.finish_reason == "length" and result.prompt_tokens == len(PROMPT)
    assert all(token.top_logprobs[0] == (token.token_id, token.logprob) for token in tokens)
    assert list(handle) == tokens  # whoever comes late reads it all again
    timings = result.timings
    assert timings.queued_s is not None and timings.first_token_s is not None and timings.total_s is not None
    assert 0 <= timings.queued_s <= timings.first_token_s <= timings.total_s


def test_asynchronous_readers_see_the_same(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()

    async def read() -> tuple[list[int], list[int], str]:
        handles = [engine.submit(PROMPT, greedy()) for _ in range(2)]
        first = [token.token_id async for token in handles[0]]
        return first, (await handles[1]).token_ids, (await handles[0]).text

    first, second, text = asyncio.run(read())
    assert first == second and len(first) == 8 and text


def test_logprobs_are_those_of_the_model(llama: LlamaForCausalLM, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(settings="exact")
    params = greedy(6, temperature=0.7, seed=5, logprobs=3)
    result = engine.generate([PROMPT], params, progress=False)[0]
    ids = torch.tensor([PROMPT + result.token_ids])
    with torch.no_grad():
        wanted = llama(ids).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
    chosen = wanted[torch.arange(6), torch.tensor(result.token_ids)]
    assert torch.allclose(torch.tensor(result.logprobs), chosen, atol=1e-4)
    for row, pairs in zip(wanted, result.top_logprobs, strict=True):
        assert [token for token, _ in pairs] == row.topk(3).indices.tolist()


def test_cancelling_ends_a_request_at_any_time(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_running=1)
    running, waiting = engine.submit(PROMPT, greedy(500)), engine.submit(PROMPT[::-1], greedy(500))
    next(iter(running))
    waiting.cancel()
    assert waiting.result().token_ids == []
    running.cancel()
    running.cancel()
    result = running.result()
    assert result.finish_reason == "cancelled" and 0 < len(result.token_ids) < 500
    assert list(running)[-1].finish_reason == "cancelled"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, stats.pages_idle)


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    whole = engine.generate([PROMPT], greedy(24), progress=False)[0].text
    stop = whole[5:8]
    handle = engine.submit(PROMPT, greedy(24, stop=(stop, "never said")))
    texts = [token.text for token in handle]
    assert "".join(texts) == handle.result().text == whole[: whole.index(stop)]
    assert handle.result().finish_reason == "stop"


def test_the_end_token_ends_the_answer(make_engine: Callable[..., Engine], tokenizer: Any) -> None:
    engine = make_engine()
    whole = engine.generate([PROMPT], greedy(24), progress=False)[0]
    tokenizer.eos_token_id = whole.token_ids[4]
    first = whole.token_ids.index(whole.token_ids[4])
    result = make_engine().generate([PROMPT], SamplingParams(max_tokens=24), progress=False)[0]
    assert result.token_ids == whole.token_ids[: first + 1] and result.finish_reason == "stop"


def test_a_logits_processor_sees_the_answer_and_decides(make_engine: Callable[..., Engine]) -> None:
    seen = []

    def only(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(list(ids))
        return logits.masked_fill(torch.arange(len(logits)) != 50 + len(ids), -torch.inf)

    result = make_engine().generate([PROMPT], greedy(4, logits_processor=only), progress=False)[0]
    assert result.token_ids == [50, 51, 52, 53]
    assert seen == [[], [50], [50, 51], [50, 51, 52]]


def test_a_failing_processor_fails_its_request_alone(make_engine: Callable[..., Engine]) -> None:
    def fail(ids: list[int], _: torch.Tensor) -> torch.Tensor:
        raise KeyError(f"after {len(ids)}")

    engine = make_engine()
    bad, good = engine.submit(PROMPT, greedy(logits_processor=fail)), engine.submit(PROMPT, greedy())
    with pytest.raises(KeyError, match="after 0"):
        bad.result()
    with pytest.raises(KeyError):
        list(bad)
    assert len(good.result().token_ids) == 8 and engine.is_alive


def test_a_request_that_breaks_the_forward_fails_alone(
    llama: LlamaForCausalLM, make_engine: Callable[..., Engine]
) -> None:
    wanted = make_engine().generate([PROMPT, PROMPT[:20]], greedy(), progress=False)

    def refuse(_: Any, inputs: tuple[torch.Tensor]) -> None:
        if (inputs[0] == 99).any():
            raise ArithmeticError("token 99")

    engine = make_engine()
    hook = llama.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        handles = [engine.submit(text, greedy()) for text in (PROMPT, [*PROMPT, 99, 5], PROMPT[:20])]
        with pytest.raises(ArithmeticError, match="token 99"):
            handles[1].result()
        assert [handles[0].result().token_ids, handles[2].result().token_ids] == [w.token_ids for w in wanted]
    finally:
        hook.remove()
    assert engine.is_alive and engine.stats().pages_used == engine.stats().pages_idle


def test_a_fatal_error_closes_the_engine_and_tells_everybody(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def fail() -> None:
        raise RuntimeError("broken plan")

    monkeypatch.setattr(engine._scheduler, "plan", fail)
    handles = [engine.submit(PROMPT, greedy()) for _ in range(2)]
    for handle in handles:
        with pytest.raises((RuntimeError, EngineClosed), match="broken plan"):
            handle.result(timeout=10)
    engine._worker.thread.join(10)
    assert not engine.is_alive and "broken plan" in str(engine.error)
    with pytest.raises(EngineClosed, match="broken plan"):
        engine.submit(PROMPT)


def test_closing_cancels_what_runs_and_gives_the_attention_back(
    llama: LlamaForCausalLM, make_engine: Callable[..., Engine]
) -> None:
    before = llama.config._attn_implementation
    engine = make_engine()
    assert llama.config._attn_implementation == "twilight"
    handle = engine.submit(PROMPT, greedy(900))
    engine.close()
    engine.close()
    assert handle.result().finish_reason == "cancelled"
    assert llama.config._attn_implementation == before
    with pytest.raises(EngineClosed, match="closed; make a new one"):
        engine.submit(PROMPT)


def test_a_full_queue_is_refused_and_generate_waits_for_room(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_running=1, max_waiting=2)
    handles = [engine.submit(PROMPT, greedy(400))]
    next(iter(handles[0]))
    handles += [engine.submit(PROMPT, greedy(2)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already") as refused:
        engine.submit(PROMPT)
    assert refused.value.retry_after_s >= 1
    for handle in handles:
        handle.cancel()
    assert len(engine.generate([PROMPT] * 9, greedy(2), progress=False)) == 9


def test_many_threads_may_submit(make_engine: Callable[..., Engine]) -> None:
    engine, found = make_engine(), {}

    def ask(index: int) -> None:
        found[index] = engine.submit(PROMPT[: 10 + index], greedy(4)).result().token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lonely = engine.generate([PROMPT[: 10 + index] for index in range(12)], greedy(4), progress=False)
    assert [found[index] for index in range(12)] == [one.token_ids for one in lonely]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token, got none"),
        ([3, 128], r"token ids must be in \[0, 128\), got 3 .. 128"),
        ([3] * 1024, "shorter than the context of 1024 tokens, got 1024"),
        ([3] * 600, r"fit the cache of 512 tokens, got 600 \+ 128; raise max_cache_tokens"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    prompt: list[int], message: str, make_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(max_cache_tokens=512).submit(prompt)


def test_the_context_ends_the_answer(make_engine: Callable[..., Engine]) -> None:
    result = make_engine().generate([[5] * 1000], greedy(500), progress=False)[0]
    assert len(result.token_ids) == 24 and result.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "max_running must be a whole number of at least 1, got 0"),
        ({"max_cache_tokens": 3}, "max_cache_tokens must be a whole number of at least 16"),
        ({"settings": "balancd"}, "did you mean 'balanced'"),
        ({"settings": {"selector": "quest"}}, "selector must be 'full', got 'quest'"),
        ({"settings": {"num_sinks": 65}}, "num_sinks must be at most page_size=64"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, Any], message: str, make_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(**options)


@pytest.mark.slow
def test_soak_leaks_no_page_and_answers_right(make_engine: Callable[..., Engine], make_llama: Any) -> None:
    """2,000 requests of mixed lengths, a fifth of them cancelled at random times, over a cache that is too small."""
    model = make_llama(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    draw = random.Random(0)
    bases = [[draw.randrange(3, 128) for _ in range(60)] for _ in range(5)]
    texts = [[*bases[i % 5][: 10 + i * 7 % 50], 3 + i // 5 % 3] for i in range(60)]
    counts = [1 + i * 5 % 13 for i in range(60)]
    with make_engine(model=model, max_running=1) as lonely:
        wanted = [one.token_ids for one in lonely.generate(texts, [greedy(count) for count in counts], progress=False)]
    engine = make_engine(model=model, max_running=8, max_waiting=40, max_cache_tokens=16 * 12, prefill_tokens=48)
    sizes = []
    for wave in range(50):
        picked = [draw.randrange(60) for _ in range(40)]
        handles = [engine.submit(texts[i], greedy(counts[i])) for i in picked]
        dropped = set(draw.sample(range(40), 8))
        for at in dropped:
            handles[at].cancel()
        for at, (i, handle) in enumerate(zip(picked, handles, strict=True)):
            found = handle.result().token_ids
            assert found == wanted[i] if at not in dropped else found == wanted[i][: len(found)]
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0) and stats.pages_idle == stats.pages_used
        if wave % 10 == 9:
            gc.collect()
            sizes.append(len(gc.get_objects()))
    assert stats.evictions > 100
    assert sizes[-1] < sizes[0] * 1.02
    assert not engine._worker.live and not engine._worker.by_schedule
    engine._scheduler.tree.clear()
    assert engine.stats().pages_used == engine.stats().plain_pages_used == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"skvq_tables": "/nowhere"}, "skvq_tables must be None; use generate for SKVQ"),
        ({"layers": {0: {"key_bits": 16, "value_bits": 16}}}, r"layers must be raw \(16 bits\) all or none"),
        ({"layers": {2: {"key_bits": 8}}}, "layers must be below the model's 2, got 2"),
        ({"calibrated_for": {"vocab_size": 5}}, "calibrated for another model"),
    ],
)
def test_settings_that_the_engine_cannot_serve_are_refused(
    settings: dict[str, Any], words: str, make_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(ValueError, match=words):
        make_engine(settings=settings)
