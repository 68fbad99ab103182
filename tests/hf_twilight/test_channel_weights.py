from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from hf_twilight.channel_weights import heavy_channels
from hf_twilight.recording import recording


def test_heavy_channels_are_those_whose_rounding_moves_logits_most(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama(attn_implementation="twilight")
    with torch.no_grad():  # RoPE turns channels 3 and 3 + 8 of a head into each other, so both become heavy
        model.model.layers[1].self_attn.k_proj.weight[3] *= 50
    ids = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(0))
    found = heavy_channels(model, ids, 16, 4)
    assert sorted(found) == [0, 1]
    assert [len(row) for row in found[1]] == [8, 8]
    assert set(found[1][0][:2]) == {3, 11}
    assert found[1][0].count(3) > 1 and found[1][0].count(11) > 1  # and again, for what is left of them


def test_heavy_channels_come_by_what_is_left_of_their_weight(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, ids = make_llama(attn_implementation="twilight"), torch.randint(3, 128, (1, 100))
    found = heavy_channels(model, ids, 16, 4)[0]
    with recording(model, 100) as records:
        model(ids)
    queries = records[0].query[0].unflatten(0, (2, -1)).square().mean((1, 2))
    pages = records[0].keys[0, :, 4:100].unflatten(1, (6, 16))
    weights = queries * (pages.amax(2) - pages.amin(2)).square().mean(1)  # [K, D]
    for head, order in enumerate(found):
        left = weights[head].clone()
        for channel in order:
            assert left[channel] >= left.max() * 0.999
            left[channel] /= 16
