"""Is a decode step of a whole model faster with packed pages than with the stock caches of Transformers?

Regime: a Llama of random weights, one request with a long context, one token, the same at every run; entrants in CUDA
graphs where they can be captured, in turns. Our step runs from static buffers: tables and lengths lie on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_twilight import TwilightConfig
from hf_twilight.attention import STEP_ARGUMENT

from . import gpu_timing, models
from .gpu_check import error_of
from .gpu_inputs import PackedLayer, pack
from .gpu_sizes import Sizes
from .gpu_units import Setting, Unit, attempt, prepare_all
from .synthetic import draw_exponents, keys_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PRESETS = {"K2V2, p = 0.95": "compact", "K4V4, p = 0.95": "quality"}
_P = 0.95
_TOKEN = 5
_SPARE = 64  # columns of the static cache beyond the context
_TOLERANCE = 0.05  # of the largest logit: what the order of sums moves in the model's dtype over all layers

Run = Callable[[], Tensor]


def units(sizes: Sizes) -> Iterator[Unit]:
    """The one."""
    yield Unit(f"{sizes.step_context:,}", 2, _run)


def _run(setting: Setting) -> dict[str, Any]:
    """Compare our step over unrounded pages with the stock cache's, then time those over packed pages.

    Raises:
        ArithmeticError: they disagree; nothing is timed then.
    """
    sizes, device = setting.sizes, setting.device
    model = make_model(sizes, device, setting.dtype, setting.seed)
    fill = _Fill(sizes, setting.seed)
    faults, refused, steps = dict[str, str](), dict[str, str](), dict[str, Run]()
    with torch.inference_mode():
        _ours(model, fill, sizes)()
        stock = _stock(model, fill.layers, sizes)
        checked = _check(_packed(model, fill, sizes, TwilightConfig.preset("exact", page_size=64)), stock)
        for name, preset in _PRESETS.items():
            if name in setting.excluded:
                faults[name] = "failed its check"
                continue
            with attempt(faults, name, device):
                steps[name] = _packed(model, fill, sizes, TwilightConfig.preset(preset, p=_P))
        entrants = prepare_all(steps, faults, device)
        entrants |= prepare_all(stock, refused, device)  # a version's static cache may lack what is used
        rows = gpu_timing.time_rows(entrants, set(steps), device, 5 * sizes.budget_s)
    return {
        "context": sizes.step_context, "model": {**sizes.model, "shape": sizes.shape}, "entrants": rows,
        "refused": refused, "check": checked, "faults": faults,
    }  # fmt: skip


def _packed(model: PreTrainedModel, fill: _Fill, sizes: Sizes, settings: TwilightConfig) -> Run:
    return _ours(model, _PackedStep(settings, [pack(k, v, settings, 1) for k, v in fill.layers]), sizes)


def _check(raw: Run, stock: dict[str, Run]) -> dict[str, float]:
    expected = stock["stock, dynamic cache"]()
    error, largest = error_of(raw(), expected), float(expected.abs().max())
    if not error <= _TOLERANCE * largest:
        raise ArithmeticError(
            f"a step over unrounded pages must give the stock logits to be timed, got a difference of {error:.3g} "
            f"where the largest is {largest:.3g}; run the kernels' tests"
        )
    return {"error": error, "largest_logit": largest}


def make_model(sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Make the Llama that ``sizes`` describe, of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, kv_heads, head_dim = sizes.shape
    config = LlamaConfig(
        **sizes.model, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=sizes.step_context + _SPARE,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)
        with device:
            model: PreTrainedModel = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval()
    return model


class _Fill:
    """Makes each layer's past in a forward: keys to which the query of that layer has the logits it should have.

    Attributes:
        layers: keys and values ``[1, K, S, D]`` of each layer, the step's own token last.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self._sizes, self._seed = sizes, seed

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Draw and keep a layer's keys and values, ``[1, K, S, D]``, for the queries ``[1, H, 1, D]`` that it gets."""
        kv_heads, dim = key.shape[1], key.shape[3]
        drawn = draw_exponents(query.shape[1], torch.Generator().manual_seed(self._seed + layer_idx))
        generator = torch.Generator(key.device).manual_seed(self._seed + layer_idx)
        tokens = self._sizes.step_context
        keys = keys_for(query[0, :, 0].float(), drawn, kv_heads, tokens, generator)[0].to(key.dtype)
        values = torch.randn(1, kv_heads, tokens, dim, generator=generator, device=key.device).to(key.dtype)
        keys[:, :, -1:], values[:, :, -1:] = key, value
        self.layers.append((keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)


@dataclass
class _PackedStep:
    """Attention of a step from static buffers; what ``hf_twilight`` calls in each layer."""

    settings: TwilightConfig
    layers: list[PackedLayer]

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        p = 1.0 if layer_idx in self.settings.dense_layers else self.settings.p
        out = self.layers[layer_idx].attend(
            query[:, :, 0], scaling, p, new_key=key[:, :, 0], new_value=value[:, :, 0],
            min_keep=self.settings.min_keep, min_sparse_len=self.settings.min_sparse_len,
        )  # fmt: skip
        return out[:, None]


def _ours(model: PreTrainedModel, step: _Fill | _PackedStep, sizes: Sizes) -> Run:
    inputs = _inputs(model, sizes)
    # read by nobody: our attention needs none, and a ready mask keeps the model from making one
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def forward() -> Tensor:
        models.use_attention(model, models.OUR_ATTENTION)
        out = model(**inputs, attention_mask=mask, use_cache=False, **{STEP_ARGUMENT: step})
        logits: Tensor = out.logits[0, -1]
        return logits

    return forward


def _stock(model: PreTrainedModel, layers: list[tuple[Tensor, Tensor]], sizes: Sizes) -> dict[str, Run]:
    """Steps with the caches of Transformers, each set back before it takes the token again."""
    from transformers import StaticCache

    inputs, past = _inputs(model, sizes), sizes.step_context - 1
    dynamic = models.stock_cache(model)
    for index, (keys, values) in enumerate(layers):
        dynamic.update(keys[:, :, :past], values[:, :, :past], index)

    def grow() -> Tensor:
        models.use_attention(model, models.STOCK_ATTENTION)
        logits: Tensor = model(**inputs, past_key_values=dynamic, use_cache=True).logits[0, -1]
        dynamic.crop(-1)
        return logits

    static: Any = StaticCache(config=model.config, max_cache_len=sizes.step_context + _SPARE)

    def write() -> Tensor:
        models.use_attention(model, models.STOCK_ATTENTION)
        for index, layer in enumerate(static.layers):
            if not layer.is_initialized:
                keys, values = layers[index]
                static.update(keys[:, :, :past], values[:, :, :past], index)
            layer.cumulative_length.fill_(past)
        logits: Tensor = model(**inputs, past_key_values=static, use_cache=True).logits[0, -1]
        return logits

    return {"stock, dynamic cache": grow, "stock, static cache": write}


def _inputs(model: PreTrainedModel, sizes: Sizes) -> dict[str, Tensor]:
    return {
        "input_ids": torch.full((1, 1), _TOKEN, device=model.device),
        "position_ids": torch.full((1, 1), sizes.step_context - 1, device=model.device),
    }
