"""Recorded queries and keys are those that the model attended with, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_twilight.recording import recording


def test_records_reproduce_the_layers_attention(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    projection = llama.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    llama.set_attn_implementation("sdpa")
    with torch.inference_mode():
        expected = llama(input_ids=ids).logits
        with recording(llama, last=7) as records:
            logits = llama(input_ids=ids, use_cache=False).logits
    hook.remove()
    assert torch.allclose(logits, expected, atol=1e-5)
    assert sorted(records) == [0, 1]
    record = records[1]
    assert record.query.shape == (1, 4, 7, 16)
    assert record.keys.shape == record.values.shape == (1, 2, 40, 16)
    keys, values = (x.repeat_interleave(2, 1) for x in (record.keys, record.values))
    weights = (record.query[:, :, -1:] @ keys.transpose(2, 3) * record.scaling).softmax(-1)
    out = (weights @ values)[:, :, 0].flatten(1)  # [B, H * D]
    assert torch.allclose(out, seen[-1][:, -1], atol=1e-5)


def test_records_only_the_layers_that_are_asked_for(llama: LlamaForCausalLM) -> None:
    with torch.inference_mode(), recording(llama, last=1, layers=[1]) as records:
        llama(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert list(records) == [1]
    with pytest.raises(ValueError, match="layer must be 0 to 1, got 2"), recording(llama, last=1, layers=[0, 2]):
        pass


def test_the_model_is_as_before_even_after_an_error(llama: LlamaForCausalLM) -> None:
    llama.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="stop"), recording(llama, last=1):
        raise RuntimeError("stop")
    assert llama.config._attn_implementation == "sdpa"
    assert not any("_twilight_record" in vars(module) for module in llama.modules())
    with pytest.raises(ValueError, match="last must be at least 1"), recording(llama, last=0):
        pass
