from __future__ import annotations

import copy
import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
    pipeline,
    set_seed,
)
from transformers.generation import configuration_utils

import hf_twilight
from hf_twilight import TwilightCache, TwilightConfig, disable, enable, patch, twilight, unpatch

SMALL: dict[str, Any] = {
    "page_size": 16,
    "window": 16,
    "num_sinks": 4,
    "min_sparse_len": 0,
    "dense_layers": (),
}
EXACT = TwilightConfig.preset("exact", **SMALL)
PACKED = TwilightConfig.preset("quality", **SMALL)
# raw pages and p = 1, and yet not exact: decode runs in the kernel, which must then agree token for token
KERNEL = TwilightConfig.preset("exact", selector="quest", budget=1.0, **SMALL)
OURS: dict[str, Any] = {"cache_implementation": "twilight", "cache_config": EXACT.to_dict()}

Generate = Callable[..., Tensor]
MakeInputs = Callable[..., dict[str, Tensor]]
MakeLlama = Callable[..., LlamaForCausalLM]

WAYS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "greedy": ([0], {}),
    "left padding": ([0, 5, 40], {}),
    "beam": ([0, 12], {"num_beams": 3}),
    "beam sampling": ([0], {"num_beams": 3, "do_sample": True}),
    "chunked prefill": ([0], {"prefill_chunk_size": 17}),
    "chunked prefill, padded": ([0, 30], {"prefill_chunk_size": 17}),
    "prompt lookup": ([0], {"prompt_lookup_num_tokens": 4}),
    "sampling": ([0, 9], {"do_sample": True, "temperature": 0.8, "top_k": 20}),
    "several answers": ([0], {"do_sample": True, "num_return_sequences": 3}),
    "penalties": ([0], {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}),
    "one token": ([0, 3], {"max_new_tokens": 1, "min_new_tokens": 1}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", [EXACT, KERNEL], ids=["exact", "kernel"])
def test_generate_equals_the_stock_cache(
    way: str, config: TwilightConfig, make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    pad, settings = WAYS[way]
    inputs = make_inputs(90, pad)
    set_seed(7)
    expected = generate(make_llama(), inputs, **settings)
    set_seed(7)
    found = generate(make_llama(), inputs, cache_implementation="twilight", cache_config=config.to_dict(), **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_generate_runs_packed_in_every_way(
    way: str, make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    pad, settings = WAYS[way]
    set_seed(7)
    found = generate(
        make_llama(),
        make_inputs(90, pad),
        cache_implementation="twilight",
        cache_config=PACKED.to_dict(),
        **settings,
    )
    assert found.shape == (
        len(pad) * settings.get("num_return_sequences", 1),
        settings.get("max_new_tokens", 24),
    )


@pytest.mark.parametrize("changes", [{"min_keep": 10_000}, {"min_sparse_len": 100_000}, {"dense_layers": (0, 1)}])
def test_settings_that_keep_every_token_equal_the_stock_cache(
    changes: dict[str, Any], make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    inputs = make_inputs(90, [0, 11])
    config = TwilightConfig.preset("exact", **(SMALL | {"p": 0.5} | changes))
    found = generate(make_llama(), inputs, cache_implementation="twilight", cache_config=config.to_dict())
    assert torch.equal(found, generate(make_llama(), inputs))


def test_packed_batch_of_equal_prompts_gives_equal_answers(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    one = make_inputs(90)
    inputs = {name: tensor.repeat(4, 1) for name, tensor in one.items()}
    found = generate(make_llama(), inputs, cache_implementation="twilight", cache_config=PACKED.to_dict())
    assert (found == found[0]).all()


def _pages(cache: TwilightCache, row: int) -> list[Tensor]:
    slots = torch.from_numpy(cache.sequences.table[row, : cache.sequences.pages[row]]).long()
    tensors = []
    for layer in cache.twilight_layers:
        assert layer.store is not None
        assert layer.store.keys is not None
        assert layer.store.values is not None
        for pages in (layer.store.keys, layer.store.values):
            tensors += [tensor[slots] for tensor in pages.tensors().values()]
    return tensors


@pytest.mark.parametrize("config", [PACKED, TwilightConfig.preset("compact", **SMALL)], ids=["4 bits", "2 bits"])
def test_packed_row_is_the_same_alone_and_padded_in_a_batch(
    config: TwilightConfig, make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    """Token for token, and bit-equal pages in every layer."""
    model, pads = enable(make_llama(), config), [0, 23, 50]
    inputs = make_inputs(100, pads)
    together = TwilightCache(model.config, config)
    found = generate(model, inputs, past_key_values=together)
    for row, pad in enumerate(pads):
        alone = TwilightCache(model.config, config)
        single = {name: tensor[row : row + 1, pad:] for name, tensor in inputs.items()}
        assert torch.equal(generate(model, single, past_key_values=alone)[0], found[row])
        assert alone.sequences.pages[0] == together.sequences.pages[row]
        assert alone.sequences.lengths[0] == together.sequences.lengths[row]
        for a, b in zip(_pages(alone, 0), _pages(together, row), strict=True):
            assert torch.equal(a, b)


def test_packed_row_does_not_depend_on_its_neighbours(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    """Same shapes, other contents: bit-equal pages and the same tokens."""
    model = enable(make_llama(), PACKED)
    first, second = make_inputs(100, [0, 23, 50]), make_inputs(100, [0, 70, 9], seed=1)
    for name in first:
        second[name][0] = first[name][0]
    caches = [TwilightCache(model.config, PACKED) for _ in range(2)]
    rows = [generate(model, x, past_key_values=cache)[0] for x, cache in zip((first, second), caches, strict=True)]
    assert torch.equal(*rows)
    assert all(torch.equal(a, b) for a, b in zip(*(_pages(cache, 0) for cache in caches), strict=True))


@pytest.mark.parametrize("chunk", [None, 17])
@pytest.mark.parametrize("config", [EXACT, KERNEL], ids=["exact", "kernel"])
def test_assistant_model_changes_no_token(
    chunk: int | None,
    config: TwilightConfig,
    make_llama: MakeLlama,
    make_inputs: MakeInputs,
    generate: Generate,
) -> None:
    inputs = make_inputs(90)
    expected = generate(make_llama(), inputs)
    assistant = make_llama(num_hidden_layers=1)
    found = generate(
        make_llama(),
        inputs,
        assistant_model=assistant,
        cache_implementation="twilight",
        cache_config=config.to_dict(),
        prefill_chunk_size=chunk,
    )
    assert torch.equal(found, expected)


def test_assistant_model_may_be_enabled_too(make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate) -> None:
    inputs = make_inputs(90)
    model, assistant = enable(make_llama(), EXACT), enable(make_llama(num_hidden_layers=1), PACKED)
    assert torch.equal(generate(model, inputs, assistant_model=assistant), generate(make_llama(), inputs))


def test_packed_draft_that_is_taken_back_leaves_no_trace(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    """Prompt lookup feeds drafts and crops them: the pages hold what was kept, and nothing else."""
    model = enable(make_llama(), PACKED)
    inputs = make_inputs(90)
    inputs["input_ids"][:, 45:] = inputs["input_ids"][:, :45]  # something to look up
    cache = TwilightCache(model.config, PACKED, p=1.0)
    found = generate(model, inputs, 40, past_key_values=cache, prompt_lookup_num_tokens=5)
    assert found.shape == (1, 40)
    lengths = cache.sequences.lengths
    assert lengths.tolist() == [cache.get_seq_length()]
    assert 90 + 39 <= cache.get_seq_length() <= 90 + 40
    assert cache.sequences.pages.tolist() == cache.settings.layout.pages_after(lengths).tolist()


def test_streamer_gets_every_token(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Collect(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    streams = [Collect(tokenizer, skip_prompt=True) for _ in range(2)]
    inputs = make_inputs(40)
    generate(make_llama(), inputs, streamer=streams[0])
    generate(make_llama(), inputs, streamer=streams[1], **OURS)
    assert streams[0].text
    assert streams[0].text == streams[1].text


def test_pipeline_takes_the_name_and_an_enabled_model(
    make_llama: MakeLlama, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [" ".join(f"w{i % 100}" for i in range(60)), "w5 w6 w7"]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "batch_size": 2}
    expected = pipeline("text-generation", model=make_llama(), tokenizer=tokenizer)(texts, **settings)
    named = pipeline("text-generation", model=make_llama(), tokenizer=tokenizer)(texts, **settings, **OURS)
    enabled = pipeline("text-generation", model=enable(make_llama(), EXACT), tokenizer=tokenizer)(texts, **settings)
    assert named == expected
    assert enabled == expected


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{i}": 3 + i for i in range(125)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


@pytest.mark.parametrize("config", [EXACT, KERNEL], ids=["exact", "kernel"])
def test_cache_serves_several_turns(config: TwilightConfig, make_llama: MakeLlama, make_inputs: MakeInputs) -> None:
    """Full input_ids each turn, one cache: nothing is computed twice, and the answers are stock."""
    stock, ours = make_llama(), enable(make_llama(), config)
    caches: list[Any] = [DynamicCache(config=stock.config), TwilightCache(ours.config, config)]
    ids = [make_inputs(50)["input_ids"]] * 2
    for turn in range(3):
        for index, (model, cache) in enumerate(zip((stock, ours), caches, strict=True)):
            ids[index] = model.generate(
                ids[index], attention_mask=torch.ones_like(ids[index]), past_key_values=cache,
                max_new_tokens=15, do_sample=False,
            )  # fmt: skip
            assert cache.get_seq_length() == ids[index].shape[1] - 1
            ids[index] = torch.cat([ids[index], make_inputs(20, seed=turn + 5)["input_ids"]], 1)
        assert torch.equal(*ids)


def test_one_prefix_serves_many_questions(make_llama: MakeLlama, make_inputs: MakeInputs) -> None:
    """The documented recipe: prefill once, deepcopy for each question."""
    stock, ours = make_llama(), enable(make_llama(), KERNEL)
    prefix = make_inputs(60)["input_ids"]
    cache = TwilightCache(ours.config, KERNEL)
    with torch.no_grad():
        ours(prefix, past_key_values=cache)
    for question in range(3):
        ids = torch.cat([prefix, make_inputs(9, seed=question)["input_ids"]], 1)
        settings: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 12,
            "do_sample": False,
        }
        found = ours.generate(ids, past_key_values=copy.deepcopy(cache), **settings)
        assert torch.equal(found, stock.generate(ids, **settings))
        assert cache.get_seq_length() == 60


def test_name_and_explicit_cache_are_the_same(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    inputs = make_inputs(90, [0, 8])
    model = make_llama()
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, PACKED)
    explicit = generate(model, inputs, past_key_values=cache)
    assert cache.stats()
    named = generate(make_llama(), inputs, cache_implementation="twilight", cache_config=PACKED.to_dict())
    assert torch.equal(explicit, named)


def test_returned_cache_is_ours_with_the_call_s_settings(make_llama: MakeLlama, make_inputs: MakeInputs) -> None:
    def cache_of(model: LlamaForCausalLM, **settings: Any) -> Any:
        settings = {"max_new_tokens": 1} | settings  # no decode step, so no kernel to compile for each setting
        out = model.generate(**make_inputs(40), do_sample=False, return_dict_in_generate=True, **settings)
        return out.past_key_values

    named = {"cache_implementation": "twilight"}
    assert cache_of(make_llama(), **named).settings == TwilightConfig.preset("balanced")
    assert cache_of(make_llama(), **named, cache_config={"preset": "compact"}).settings.key_bits == 2
    assert cache_of(make_llama(), **named, cache_config={"p": 0.7}).settings.p == 0.7
    model = enable(make_llama(), PACKED)
    assert cache_of(model).settings == PACKED
    assert cache_of(model, **named).settings == PACKED
    assert cache_of(model, twilight_config=EXACT).settings == EXACT
    assert cache_of(model, twilight_config="compact").settings == TwilightConfig.preset("compact")
    assert cache_of(model, twilight_config={"preset": "compact", "p": 0.5}).settings.p == 0.5
    assert cache_of(model).settings == PACKED, "a call's settings end with the call"
    assert cache_of(model, generation_config=GenerationConfig(max_new_tokens=1)).settings == PACKED
    assert type(cache_of(model, cache_implementation="dynamic")) is DynamicCache
    assert type(cache_of(disable(model))) is DynamicCache
    assert type(cache_of(make_llama())) is DynamicCache


def test_generate_names_the_nearest_unknown_setting(make_llama: MakeLlama, make_inputs: MakeInputs) -> None:
    with pytest.raises(ValueError, match="no setting 'windo'; did you mean 'window'"):
        make_llama().generate(**make_inputs(9), cache_implementation="twilight", cache_config={"windo": 3})
    with pytest.raises(ValueError, match="no setting 'windo'; did you mean 'window'"):
        enable(make_llama(), windo=3)


def test_generate_refuses_encoder_decoder_models() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="decoder-only models, got encoder-decoder 't5'"):
        enable(model)
    assert not hasattr(model.generation_config, "twilight_config")
    with pytest.raises(ValueError, match="decoder-only models"):
        model.generate(torch.ones(1, 4, dtype=torch.long), cache_implementation="twilight", max_new_tokens=2)


def test_use_cache_false_is_obeyed(make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate) -> None:
    inputs = make_inputs(40)
    expected = generate(make_llama(), inputs, 6)
    assert torch.equal(generate(make_llama(), inputs, 6, use_cache=False, cache_implementation="twilight"), expected)
    assert torch.equal(generate(enable(make_llama(), PACKED), inputs, 6, use_cache=False), expected)


# --- enable, disable, twilight


def _traces(model: LlamaForCausalLM) -> tuple[Any, ...]:
    generation = model.generation_config.to_dict()
    generation.pop("_from_model_config")  # whether it was ever changed
    return model.config._attn_implementation, generation, set(vars(model))


def test_enable_and_disable_leave_nothing_behind(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    model, inputs = make_llama(), make_inputs(60)
    before = _traces(model)
    expected = generate(model, inputs)
    assert enable(model, "compact", **SMALL) is model
    assert model.config._attn_implementation == "twilight"
    generate(model, inputs)
    enable(model, EXACT)
    assert torch.equal(generate(model, inputs), expected)
    assert disable(model) is model
    assert _traces(model) == before
    assert torch.equal(generate(model, inputs), expected)
    disable(model)
    assert _traces(model) == before


def test_twilight_context_nests_and_survives_exceptions(make_llama: MakeLlama) -> None:
    model = make_llama()
    before = _traces(model)

    def settings() -> Any:
        return getattr(model.generation_config, "twilight_config", {}).get("p")

    with twilight(model, p=0.9) as entered:
        assert entered is model
        assert settings() == 0.9

        def fail() -> None:
            with twilight(model, p=0.8):
                assert settings() == 0.8
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert settings() == 0.9
        assert model.config._attn_implementation == "twilight"
        with pytest.raises(ValueError, match="p must be"), twilight(model, p=7):
            pass
        assert settings() == 0.9
    assert _traces(model) == before

    enable(model, p=0.7)
    with twilight(model, p=0.6):
        assert settings() == 0.6
    assert settings() == 0.7
    assert model.config._attn_implementation == "twilight"
    disable(model)
    with twilight(model, p=0.6):
        disable(model)
    assert _traces(model) == before


def test_twilight_context_after_a_named_call(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    model, inputs = make_llama(), make_inputs(40)
    expected = generate(model, inputs)
    generate(model, inputs, **OURS)
    with twilight(model, PACKED):
        generate(model, inputs)
    with twilight(model, PACKED):
        disable(model)
    assert not hasattr(model.generation_config, "twilight_config")
    assert torch.equal(generate(model, inputs), expected)


def test_output_attentions_are_those_of_the_model(make_llama: MakeLlama, make_inputs: MakeInputs) -> None:
    """Only the model's own attention makes weights: it is left in place, over dequantized pages."""
    outputs = []
    for settings in ({}, OURS):
        model = make_llama(attn_implementation="eager")
        outputs.append(
            model.generate(
                **make_inputs(40, [0, 7]), max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
                output_attentions=True, output_logits=True, **settings,
            )
        )  # fmt: skip
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert len(outputs[1].attentions) == 5
    for step, other in zip(*(out.attentions for out in outputs), strict=True):
        assert len(step) == len(other) == 2
        for layer, weights in zip(step, other, strict=True):
            torch.testing.assert_close(weights[0], layer[0])
            torch.testing.assert_close(weights[1, ..., 7:], layer[1, ..., 7:])


def test_output_attentions_of_an_enabled_model_are_those_of_the_model(
    make_llama: MakeLlama, make_inputs: MakeInputs
) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True,
    }  # fmt: skip
    expected = make_llama(attn_implementation="eager").generate(**make_inputs(40), **settings)
    model = enable(make_llama(attn_implementation="eager"), EXACT)
    found = model.generate(**make_inputs(40), **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for step, other in zip(expected.attentions, found.attentions, strict=True):
        for layer, weights in zip(step, other, strict=True):
            torch.testing.assert_close(weights, layer)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_generate_in_any_autograd_mode(
    mode: Any, make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    inputs = make_inputs(60, [0, 4])
    expected = generate(make_llama(), inputs)
    with mode():
        for config in (EXACT, KERNEL):
            assert torch.equal(generate(enable(make_llama(), config), inputs), expected)


def test_cache_of_inference_mode_goes_on_outside_of_it(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    inputs = make_inputs(60)
    expected = generate(make_llama(), inputs)
    for config in (EXACT, KERNEL):
        model = enable(make_llama(), config)
        cache = TwilightCache(model.config, config)
        with torch.inference_mode():
            model(inputs["input_ids"][:, :50], past_key_values=cache)
            model(inputs["input_ids"][:, 50:51], past_key_values=cache)
        assert torch.equal(generate(model, inputs, past_key_values=cache), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_in_half_precision_exact_equals_stock(
    dtype: torch.dtype, make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate
) -> None:
    inputs = make_inputs(60, [0, 9])
    expected = generate(make_llama().to(dtype), inputs)
    assert torch.equal(generate(enable(make_llama().to(dtype), EXACT), inputs), expected)


# --- the two patches


def test_patches_are_inert_for_other_names(make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate) -> None:
    inputs = make_inputs(40)
    expected = generate(make_llama(), inputs)
    for name in ("dynamic", "static", None):
        model = make_llama()
        assert torch.equal(generate(model, inputs, cache_implementation=name), expected)
        assert model.config._attn_implementation == "sdpa"
    out = make_llama().generate(
        **inputs,
        cache_implementation="static",
        max_new_tokens=3,
        return_dict_in_generate=True,
        do_sample=False,
    )
    assert isinstance(out.past_key_values, StaticCache)
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(make_llama(), inputs, cache_implementation="twiligh")
    with pytest.raises(ValueError, match="nope"):  # the stock failure is the stock failure
        generate(make_llama(), inputs, cache_implementation="quantized", cache_config={"backend": "nope"})


def test_unpatch_takes_both_patches_back(make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate) -> None:
    inputs, model = make_inputs(40), make_llama()
    expected = generate(model, inputs)
    ours = GenerationMixin._prepare_cache_for_generation
    unpatch()
    assert "twilight" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    assert GenerationMixin._prepare_cache_for_generation is not ours
    assert GenerationMixin._prepare_cache_for_generation.__module__ == "transformers.generation.utils"
    unpatch()
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, inputs, **OURS)
    assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, inputs, past_key_values=TwilightCache(model.config, EXACT)), expected)
    assert patch()
    assert patch()
    assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("twilight") == 1
    assert torch.equal(generate(model, inputs, **OURS), expected)


@pytest.mark.parametrize("with_wraps", [False, True])
def test_unpatch_leaves_another_library_s_wrapper(
    with_wraps: bool, make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """``functools.wraps`` copies our mark onto a wrapper that is not ours."""
    inner, calls = GenerationMixin._prepare_cache_for_generation, []

    def foreign(self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: Any,
                *args: Any) -> Any:  # fmt: skip
        calls.append(1)
        return inner(self, generation_config, model_kwargs, generation_mode, batch_size, *args)

    if with_wraps:
        foreign = functools.wraps(inner)(foreign)
    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", foreign)
    inputs = make_inputs(30)
    expected = generate(make_llama(), inputs)
    with caplog.at_level(logging.WARNING):
        unpatch()
    assert "another library wrapped" in caplog.text
    assert GenerationMixin._prepare_cache_for_generation is foreign
    out = enable(make_llama(), PACKED).generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache, "under the wrapper, ours is inert"
    assert patch()
    assert "twilight" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    calls.clear()
    assert torch.equal(generate(make_llama(), inputs, **OURS), expected)
    assert bool(calls) == with_wraps, "a wrapper that hides us is taken for stock, and wrapped"


def test_patch_declines_a_transformers_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unpatch()

    def other(self: Any, config: Any) -> None: ...

    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", other)
    with caplog.at_level(logging.WARNING):
        assert not patch()
    assert "generate(past_key_values=TwilightCache(model.config))" in caplog.text
    assert "twilight" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    assert GenerationMixin._prepare_cache_for_generation is other


# --- what is saved


def _saved(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.json")))


def test_saved_model_names_no_cache_and_loads_without_us(
    make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate, tmp_path: Path
) -> None:
    model, inputs = enable(make_llama(), PACKED), make_inputs(40)
    expected = generate(model, inputs)
    generate(model, inputs, **OURS)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.get("cache_implementation") is None
    assert "attn_implementation" not in _saved(tmp_path)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, GenerationConfig\n"
        f"folder = {str(tmp_path)!r}\n"
        "GenerationConfig.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, return_dict_in_generate=True)\n"
        "assert type(out.past_key_values).__name__ == 'DynamicCache'\n"
        "assert model.config._attn_implementation == 'sdpa'\n"
        "model.save_pretrained(folder + '/again')\n"
        "assert 'hf_twilight' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(generate(loaded, inputs), expected), "with us, the saved settings apply again"
    cache = loaded.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    assert isinstance(cache, TwilightCache)
    assert cache.settings == PACKED


@pytest.mark.parametrize("when", ["in call", "in config object"])
def test_save_pretrained_never_writes_the_name(
    when: str, make_llama: MakeLlama, make_inputs: MakeInputs, generate: Generate, tmp_path: Path
) -> None:
    """A ``generation_config.json`` with the name makes the model unloadable on machines without us."""
    model = make_llama()
    if when == "in call":
        generate(model, make_inputs(9), 2, **OURS)
    else:
        generate(model, make_inputs(9), 2, generation_config=GenerationConfig(**OURS))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.get("cache_implementation") is None


def test_version_is_known() -> None:
    assert hf_twilight.__version__.count(".") == 2
