"""Which pages the rows of a step are told to read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_twilight.engine import Engine, SamplingParams
from hf_twilight.engine.plan import ScheduledRequest, Segment
from hf_twilight.engine.tables import TableMaker
from twilight_cache import Layout, PromptTables, RowTables, TreePage
from twilight_kernels import has_prompt_kernels

LAYOUT = Layout(page_size=16, num_sinks=4, window=32)
needs_tiles = pytest.mark.skipif(
    not has_prompt_kernels(torch.device("cpu"), torch.bfloat16), reason="this CPU has no matrix tiles for bfloat16"
)


def make_maker(*, has_prompt_kernels: bool = True, is_raw: bool = False) -> TableMaker:
    return TableMaker(LAYOUT, 3, is_raw, has_prompt_kernels, torch.device("cpu"))


def request(name: str, length: int, prompt_len: int, first_slot: int) -> ScheduledRequest:
    """A request with pages in neighbouring slots: plain ones from ``first_slot``, packed ones from 100 above it."""
    pages = [TreePage(None, 0, 0, LAYOUT.num_sinks, plain=first_slot)]
    for index in range(1, 1 + -(-(length - LAYOUT.num_sinks) // LAYOUT.page_size)):
        slots = {"plain": first_slot + index, "packed": first_slot + 100 + index}
        pages.append(TreePage(pages[-1], index, pages[-1].end, LAYOUT.page_size, **slots))
    return ScheduledRequest(name, list(range(length)), prompt_len, 1, pages=pages)


def test_prompts_and_answers_get_tables_of_their_own() -> None:
    decoding, reading = request("a", 61, 50, 0), request("b", 140, 140, 20)
    again = request("c", 90, 70, 40)  # lost its pages, and computes prompt and answer once more
    segments = [Segment(decoding, 60, 61, True), Segment(reading, 80, 140, True), Segment(again, 60, 90, False)]
    tables = make_maker().make(segments)
    assert [(type(table), table.first, table.last) for table in tables] == [
        (RowTables, 0, 1), (PromptTables, 1, 61), (PromptTables, 61, 71), (RowTables, 71, 91),
    ]  # fmt: skip
    prompt = tables[1]
    assert isinstance(prompt, PromptTables)
    # token 80 has 2 pages that left the window, token 139 has 6; sinks are page 0
    assert (prompt.start, prompt.window) == (80, 32)
    assert prompt.block_table.tolist() == [121, 122, 123, 124, 125, 126]
    assert prompt.plain_table.tolist() == [20, *range(23, 30)]
    rest = tables[3]
    assert isinstance(rest, RowTables)
    assert rest.num_pages.tolist() == [(at - 36) // 16 for at in range(70, 90)]
    assert rest.block_table[-1].tolist() == [141, 142, 143]


def test_raw_pages_are_their_own_packed_ones() -> None:
    reading = request("b", 140, 140, 20)
    (table,) = make_maker(is_raw=True).make([Segment(reading, 100, 140, True)])
    assert isinstance(table, PromptTables)
    assert table.block_table.tolist() == [21, 22, 23, 24, 25, 26]


def test_without_prompt_kernels_rows_decode() -> None:
    decoding, reading = request("a", 61, 50, 0), request("b", 140, 140, 20)
    segments = [Segment(decoding, 60, 61, True), Segment(reading, 80, 140, True)]
    (table,) = make_maker(has_prompt_kernels=False).make(segments)
    assert isinstance(table, RowTables)
    assert (table.first, table.last) == (0, 61)


@needs_tiles
def test_bfloat16_prompts_are_read_as_decode_steps_would(
    settings: dict[str, object],
    make_llama: Callable[..., LlamaForCausalLM],
    make_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On tiles or one by one: the next tokens are as likely, but for rounding."""
    text = [3 + (7 * index * index) % 120 for index in range(150)]
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=5)
    found, kept = [], []
    for has_kernels in (True, False):
        monkeypatch.setattr("hf_twilight.engine.runner.has_prompt_kernels", lambda *_, has=has_kernels: has)
        with make_engine(model=make_llama().to(torch.bfloat16), settings=settings, prefill_tokens=41) as engine:
            found.append(engine.generate([text], params, progress=False)[0])
            kept.append(engine.stats().kept_mass)
    assert abs(kept[0] - kept[1]) < 0.01
    likely = [dict(completion.top_logprobs[0]) for completion in found]
    common = set(likely[0]) & set(likely[1])
    assert len(common) >= 3
    assert max(abs(likely[0][token] - likely[1][token]) for token in common) < 0.1
