"""Tiny random models, made in the test: float32, peaked enough for greedy decoding without ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import configuration_utils
from transformers.utils import logging

import hf_twilight

logging.disable_progress_bar()


def _llama_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
        "dtype": "float32",
    }  # fmt: skip
    return LlamaConfig(**(settings | changes))


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Build a model of the same weights at each call."""

    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(_llama_config(**changes)).eval()

    return make


@pytest.fixture
def llama(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """Random prompts with left padding: ``make_inputs(length, pad=[0, 3])``."""

    def make(
        length: int = 90, pad: list[int] | None = None, vocab: int = 128, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        pad = [0] if pad is None else pad
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, vocab, (len(pad), length), generator=generator)
        mask = (torch.arange(length) >= torch.tensor(pad)[:, None]).long()
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}

    return make


@pytest.fixture
def generate() -> Callable[..., torch.Tensor]:
    """Generate greedily, new tokens only."""

    def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor], count: int = 24, **settings: Any) -> torch.Tensor:
        settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count} | settings
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]

    return run


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads would only wait for each other: nothing here is large enough to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    """Leave Transformers as the package sets it, whatever a test undid."""
    yield
    hf_twilight.patch()
    assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("twilight") == 1
