"""Tiny models of many families: the exact preset changes no token, the packed ones stay near."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_twilight import TwilightCache, TwilightConfig

SMALL: dict[str, Any] = {
    "page_size": 16,
    "window": 16,
    "num_sinks": 4,
    "min_sparse_len": 0,
    "dense_layers": (),
}
EXACT = TwilightConfig.preset("exact", **SMALL)
PACKED = TwilightConfig.preset("quality", **SMALL)
# raw pages and p = 1, and yet not exact: decode runs in the kernel
KERNEL = TwilightConfig.preset("exact", selector="quest", budget=1.0, **SMALL)

BASE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MIXED = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 32,
}  # fmt: skip
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "head_dim": None}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip

# model type: (settings, packed layers, whether decode runs in our kernel)
FAMILIES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "llama": ({}, 2, True),
    "mistral": ({"sliding_window": 32}, 0, False),
    "qwen3": ({}, 2, True),
    "phi3": ({}, 2, True),
    "gemma2": ({**MIXED, "query_pre_attn_scalar": 16}, 2, False),
    "gemma3_text": ({**MIXED, "query_pre_attn_scalar": 16}, 2, True),
    "gpt_oss": ({**MIXED, **EXPERTS}, 2, False),
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}, 2, True),
    "gpt_neox": ({}, 2, True),
    "falcon": (GROUPED, 2, False),
    "deepseek_v2": (LATENT, 2, False),
    "deepseek_v3": (LATENT, 2, False),
    "qwen3_next": (LINEAR, 2, True),
}  # fmt: skip

WAYS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "greedy, padded": ([0, 6, 33], {}),
    "beam": ([0], {"num_beams": 3}),
    "chunked prefill": ([0], {"prefill_chunk_size": 17}),
    "prompt lookup": ([0], {"prompt_lookup_num_tokens": 3}),
}

_MODELS: dict[str, PreTrainedModel] = {}


def _model(family: str) -> PreTrainedModel:
    """The family's model with its stock attention; made once, as making it takes longest."""
    if family not in _MODELS:
        torch.manual_seed(0)
        settings = FAMILIES[family][0]
        given = {name: value for name, value in (BASE | settings).items() if value is not None or name != "head_dim"}
        config = AutoConfig.for_model(family, **given)
        # Transformers 5.17 chooses sdpa for gemma2, which drops the soft cap without a word
        attention = "eager" if family == "gemma2" else None
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        _MODELS[family] = model.eval()
        _MODELS[family].stock_attention = _MODELS[family].config._attn_implementation
    model = _MODELS[family]
    if model.config._attn_implementation != model.stock_attention:
        model.set_attn_implementation(model.stock_attention)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_the_stock_cache(
    family: str, way: str, make_inputs: Callable[..., dict[str, Tensor]], generate: Callable[..., Tensor]
) -> None:
    pad, settings = WAYS[way]
    inputs, model = make_inputs(70, pad), _model(family)
    if way == "prompt lookup":
        inputs["input_ids"][:, 35:] = inputs["input_ids"][:, :35]
    try:
        expected = generate(model, inputs, 14, **settings)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"the stock cache cannot: {error}")
    found = generate(model, inputs, 14, cache_implementation="twilight", cache_config=EXACT.to_dict(), **settings)
    assert torch.equal(found, expected)


def _teacher_forced(model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
    found = []
    with torch.no_grad():
        for start, end in [(0, 60), (60, 66), *((at, at + 1) for at in range(66, ids.shape[1]))]:
            found.append(model(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_over_raw_pages_equals_the_stock_cache(
    family: str, make_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    """A wrong scaling, or a position that is missed, would show far above float32 rounding."""
    ids, model = make_inputs(90)["input_ids"], _model(family)
    expected = _teacher_forced(model, DynamicCache(config=model.config), ids)
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, KERNEL)
    found = _teacher_forced(model, cache, ids)
    assert bool(cache.stats()) == FAMILIES[family][2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["stock", "twilight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_stays_near_the_stock_cache(
    family: str, attention: str, make_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    ids, model = make_inputs(90)["input_ids"], _model(family)
    expected = _teacher_forced(model, DynamicCache(config=model.config), ids)
    if attention == "twilight":
        model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, PACKED)
    found = _teacher_forced(model, cache, ids)
    _, packed, in_kernel = FAMILIES[family]
    assert len(cache.twilight_layers) == packed
    assert bool(cache.stats()) == (in_kernel and attention == "twilight")
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, :60], expected[:, :60]), "what is prefilled is attended to before it is packed"
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.8
    if packed:
        assert cache.sequences.pages.tolist() == [4]
        assert not torch.equal(found[:, 60:], expected[:, 60:])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_generates_in_every_way(
    family: str, make_inputs: Callable[..., dict[str, Tensor]], generate: Callable[..., Tensor]
) -> None:
    model, served = _model(family), []
    for way, (pad, settings) in WAYS.items():
        inputs = make_inputs(70, pad)
        try:
            expected = generate(model, inputs, 6, **settings)
        except (ValueError, RuntimeError, NotImplementedError):
            continue  # the stock cache cannot, as the test above tells
        found = generate(model, inputs, 6, cache_implementation="twilight", cache_config=PACKED.to_dict(), **settings)
        assert found.shape == expected.shape
        served.append(way)
        _model(family)
    assert "greedy, padded" in served


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_never_gets_a_stand_in(family: str, make_inputs: Callable[..., dict[str, Tensor]]) -> None:
    """These models expand what the cache returns: the layer must go on handing out numbers."""
    model = _model(family)
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, EXACT)
    _teacher_forced(model, cache, make_inputs(70)["input_ids"])
    assert not any(layer.is_untouched for layer in cache.twilight_layers)
    layer = cache.twilight_layers[0]
    keys = torch.zeros(1, layer.num_heads, 1, layer.key_dim)
    values = torch.zeros(1, layer.num_heads, 1, layer.value_dim)
    assert all(torch.isfinite(tensor).all() for tensor in layer.update(keys, values))
