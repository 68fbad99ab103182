"""Which families the engine serves, and with what words it refuses the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_twilight.engine import Engine, SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def latent() -> DeepseekV3Config:
    """Keys wider than values, mixture of experts."""
    return DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16,
        qk_nope_head_dim=16, n_routed_experts=4, moe_intermediate_size=32, first_k_dense_replace=1, n_group=1,
        topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        latent(),
        GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=256, eos_token_id=None, bos_token_id=1),
        OPTConfig(**SIZES | {"num_key_value_heads": None}, ffn_dim=64, word_embed_proj_dim=64),
    ],
    ids=lambda config: config.model_type,
)
def test_families_of_full_attention_are_served(
    config: PreTrainedConfig, make_engine: Callable[..., Engine], generate: Callable[..., Any]
) -> None:
    model, text = build(config), list(range(3, 60))
    with make_engine(model=model, settings={"preset": "exact", "page_size": 16, "window": 16}) as engine:
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        found = engine.generate([text, text[:40]], params, progress=False)
    inputs = {"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text), dtype=torch.long)}
    assert generate(model, inputs, 8)[0].tolist() == found[0].token_ids


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**SIZES, head_dim=16), "all full attention, got 'gemma2' with DynamicSlidingWindowLayer"),
        (
            Gemma2Config(**SIZES, head_dim=16, layer_types=["full_attention"] * 2),
            "got 'gemma2' .*its attention has soft caps, sinks or biases of its own",
        ),
        (MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), "all full attention, got 'mamba' with"),
        (
            BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
            "attention functions, got BloomForCausalLM",
        ),
    ],
    ids=["sliding", "soft cap", "state space", "alibi"],
)
def test_families_that_cannot_be_served_are_refused(
    config: PreTrainedConfig, message: str, make_engine: Callable[..., Engine]
) -> None:
    model = build(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        make_engine(model=model)
    assert model.config._attn_implementation == before


def test_a_model_in_training_mode_is_refused(llama: LlamaForCausalLM, make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        make_engine(model=llama.train())


def test_a_model_that_ignores_positions_is_found_out(make_engine: Callable[..., Engine]) -> None:
    class Forgetful(LlamaForCausalLM):
        def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    model = Forgetful(LlamaConfig(**SIZES, initializer_range=0.2)).eval()
    with pytest.raises(ValueError, match=r"run packed sequences .*its logits differ by"):
        make_engine(model=model)
