from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from hf_twilight import TwilightCache, TwilightConfig
from hf_twilight.signature import signature

MIXED: dict[str, Any] = {
    "key_bits": 2, "value_bits": 2, "page_size": 16, "group_size": 16, "num_sinks": 2, "window": 8,
    "layers": {1: {"key_bits": 8, "value_bits": 4, "key_clip": 1.0}},
}  # fmt: skip
NAMED = MIXED | {"layers": {1: {"key_refined": [[0, 1, 2, 3, 4, 5, 6, 7], [8, 8, 8, 1, 3, 4, 5, 6]]}}}
CHOSEN = MIXED | {"key_refined": 0.5}


def test_layers_are_packed_with_their_own_bits(
    llama: LlamaForCausalLM, make_inputs: Callable[..., dict[str, torch.Tensor]]
) -> None:
    cache = TwilightCache(llama.config, MIXED)
    keys = torch.randn(1, 2, 90, 16, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        cache.update(keys, keys, layer)
    cache.commit()
    stores = [layer.store for layer in cache.twilight_layers]
    assert [(s.key_codec.bits, s.value_codec.bits) for s in stores if s is not None] == [(2, 2), (8, 4)]
    sizes = [store.num_bytes().codes / (2 * 16 * store.keys.num_pages) for store in stores if store and store.keys]
    assert sizes == [16 * 2 / 8 * 2, 16 * 8 / 8 + 16 * 4 / 8]  # bytes of a page's token and head
    errors = [(layer.full()[0] - keys).abs().max() for layer in cache.twilight_layers]
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize("settings", [MIXED, NAMED, CHOSEN])
def test_layers_of_their_own_generate_and_come_back_from_a_file(
    settings: dict[str, Any],
    llama: LlamaForCausalLM,
    make_inputs: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    llama.set_attn_implementation("twilight")
    cache = TwilightCache(llama.config, settings, p=1.0)
    prompt = make_inputs(80)["input_ids"]
    with torch.inference_mode():
        llama(prompt, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = TwilightCache.load(tmp_path / "cache.safetensors", llama.config)
        assert loaded.settings == cache.settings
        for token in range(20):  # in which a page is packed
            step = torch.tensor([[token + 3]])
            expected, got = (llama(step, past_key_values=c).logits for c in (cache, loaded))
            assert torch.equal(expected, got)


@pytest.mark.parametrize("settings", [NAMED, CHOSEN])
def test_a_refined_step_attends_to_what_full_returns(
    settings: dict[str, Any], llama: LlamaForCausalLM, make_inputs: Callable[..., dict[str, torch.Tensor]]
) -> None:
    llama.set_attn_implementation("twilight")
    prompt, step = make_inputs(80)["input_ids"], torch.tensor([[5]])
    with torch.inference_mode():
        cache = TwilightCache(llama.config, settings, p=1.0)
        llama(prompt, past_key_values=cache)
        stock = DynamicCache(config=llama.config)
        for layer, (keys, values, _) in enumerate(cache):
            stock.update(keys, values, layer)
        got, expected = (llama(step, past_key_values=c).logits for c in (cache, stock))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"key_refined": "0 1"},
            r"layers\[1\]: key_refined must be a share in .*, or of one layer a list of channels .*, got '0 1'",
        ),
        ({"key_refined": [[0, 1]]}, "as many channels for each KV head, a multiple of 8"),
        ({"key_refined": [[0] * 8], "key_bits": 16}, "must be empty for 16-bit keys"),
    ],
)
def test_refined_channels_are_checked(own: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TwilightConfig(layers={1: own})


def test_cache_refuses_refined_channels_of_another_model(llama: LlamaForCausalLM) -> None:
    cache = TwilightCache(llama.config, layers={1: {"key_refined": [[16] * 8] * 2}})
    keys = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="must name channels below 16 for each of 2 KV heads"):
        cache.update(keys, keys, 1)


def test_cache_refuses_layers_that_the_model_has_not(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="layers must be below the model's 2, got 2"):
        TwilightCache(llama.config, layers={2: {"key_bits": 4}})


def test_cache_refuses_settings_calibrated_for_another_model(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    settings = TwilightConfig(calibrated_for=signature(make_llama().config))
    TwilightCache(make_llama().config, settings)
    with pytest.raises(ValueError, match=r"another model: vocab_size 128 \(this model: 96\); calibrate this model"):
        TwilightCache(make_llama(vocab_size=96).config, settings)
