"""How far the output moves when a single layer's keys or values are rounded.

Rounding errors of different layers are nearly independent and small, so the drift of a whole cache is close to the
sum of these, and bits can be spent where they matter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from twilight_cache import PagePool, SequenceBatch

from .config import TwilightConfig
from .layer import TwilightLayer
from .layer_settings import LayerSettings, refined_count

# Tokens of a forward and of the window, whatever the preset's: almost all that is attended to has been packed, and
# what was measured for one preset serves others of its page size.
CHUNK = 64
TAIL_SHARE = 8  # the last eighth of the text is compared; before it stands a context that is long enough to matter


class LayerDrift:
    """Measures the drift of single layers of ``model`` at the end of ``ids``, over a cache of what stands before.

    Args:
        model: a decoder model with stock attention.
        ids: ``[B, T]`` token ids without padding.
        settings: page size, group size and sinks; nothing else of it is looked at.
        heavy: by layer and KV head, the key channels to refine, the heaviest first.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, settings: TwilightConfig, heavy: Mapping[int, list[list[int]]]
    ) -> None:
        self.model, self.ids, self.settings, self.heavy = model, ids, settings, heavy
        self.decoder = model.config.get_text_config(decoder=True)
        self.cache = DynamicCache(config=self.decoder)
        self.tail = tail_len(ids.shape[1])
        self._expected: list[Tensor] = []

    def measure(self, layer: int, key_bits: int, value_bits: int, key_clip: float, share: float = 0.0) -> float:
        """Return the mean KL divergence, in nats a token, from the model with an unrounded cache.

        ``share`` of the layer's key channels are refined.
        """
        if not self._expected:
            with torch.inference_mode():
                for chunk in self.ids[:, : -self.tail].split(8 * CHUNK, 1):
                    self.model(chunk, past_key_values=self.cache, use_cache=True)
            self._expected = self._run()
        count = refined_count(2 * len(self.heavy[layer][0]), share)
        refined = tuple(tuple(row[:count]) for row in self.heavy[layer]) if count else ()
        got, total, count = self._run(layer, LayerSettings(key_bits, value_bits, key_clip, refined)), 0.0, 0
        for wanted, found in zip(self._expected, got, strict=True):
            total += (wanted.exp() * (wanted - found)).sum().item()
            count += wanted.shape[0] * wanted.shape[1]
        return total / count

    @torch.inference_mode()
    def _packed(self, layer: int, exact: Any, own: LayerSettings) -> TwilightLayer:
        """A layer that holds what ``exact`` holds, rounded."""
        settings = TwilightConfig(
            page_size=self.settings.page_size, group_size=self.settings.group_size,
            num_sinks=self.settings.num_sinks, window=CHUNK, layers={layer: own},
        )  # fmt: skip
        sequences = SequenceBatch(settings.layout, PagePool(None))
        packed = TwilightLayer(layer, sequences, settings, self.decoder)
        packed.update(exact.keys, exact.values)
        return packed

    @torch.inference_mode()
    def _run(self, probed: int | None = None, own: LayerSettings | None = None) -> list[Tensor]:
        """Log-probabilities of each chunk of the tail, ``[B, CHUNK, vocabulary]``, layer ``probed`` rounded."""
        cache = copy.copy(self.cache)
        cache.layers = [_fork(layer) for layer in self.cache.layers]
        if probed is not None and own is not None:
            cache.layers[probed] = self._packed(probed, cache.layers[probed], own)
        found = []
        for chunk in self.ids[:, -self.tail :].split(CHUNK, 1):
            logits = self.model(chunk, past_key_values=cache, use_cache=True).logits
            found.append(logits.float().log_softmax(-1))
        return found


def tail_len(tokens: int) -> int:
    """Tokens at the end of a sample of ``tokens`` whose drift is measured."""
    return max(CHUNK, tokens // TAIL_SHARE // CHUNK * CHUNK)


@torch.inference_mode()
def layer_shapes(model: PreTrainedModel, ids: Tensor) -> dict[int, tuple[int, int, int]]:
    """Return KV heads, key dim and value dim of the layers that can be packed, found by reading the first token."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(ids[:1, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cached: list[Any] = cache.layers
    packable = [index for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    return {i: (cached[i].keys.shape[1], cached[i].keys.shape[-1], cached[i].values.shape[-1]) for i in packable}


def _fork(layer: Any) -> Any:
    """A layer that can be continued without the original: these two replace their tensors, others write to them."""
    return copy.copy(layer) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else copy.deepcopy(layer)
