from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_twilight import TwilightConfig, enable

SMALL = {"page_size": 16, "window": 16, "num_sinks": 4, "min_sparse_len": 0, "dense_layers": ()}
CONFIGS = {
    "exact": TwilightConfig.preset("exact", **SMALL),
    "packed": TwilightConfig.preset("quality", **SMALL),
}
CPU = torch.device("cpu")


def _dispatch(model: LlamaForCausalLM, folder: Path) -> None:
    """One layer stays, the other and the head lie on disk."""
    on_cpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    device_map = {**dict.fromkeys(on_cpu, "cpu"), "model.layers.1": "disk", "lm_head": "disk"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS: dict[str, Callable[[LlamaForCausalLM, Path], object]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
    "dispatch": _dispatch,
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights_change_no_token(
    offload: str, config: str, make_llama: Callable[..., LlamaForCausalLM],
    make_inputs: Callable[..., dict[str, Tensor]], generate: Callable[..., Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    inputs = make_inputs(60, [0, 7])
    expected = generate(enable(make_llama(), CONFIGS[config]), inputs, 12)
    model = make_llama()
    OFFLOADS[offload](model, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.equal(generate(enable(model, CONFIGS[config]), inputs, 12), expected)
    if config == "exact":
        assert torch.equal(expected, generate(make_llama(), inputs, 12))


@pytest.mark.parametrize("config", CONFIGS)
def test_device_map_of_from_pretrained_changes_no_token(
    config: str, make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., dict[str, Tensor]],
    generate: Callable[..., Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    inputs = make_inputs(60, [0, 7])
    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    expected = generate(enable(model, CONFIGS[config]), inputs, 12)
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
        attn_implementation="twilight",
    )
    assert loaded.hf_device_map == {"model": "cpu", "lm_head": "disk"}
    assert torch.equal(generate(enable(loaded, CONFIGS[config]), inputs, 12), expected)
