"""What top-p decode keeps and costs, measured on the steps that it really makes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import TwilightCache
from .config import TwilightConfig
from .drift import compare

STEPS = 48
SHARES = (0.8, 0.85, 0.9, 0.95, 0.98, 0.99)


class DecodeProbe:
    """Decodes the end of a text over a cache that holds its beginning.

    Args:
        model: a decoder model whose attention is ``"twilight"``.
        ids: ``[1, T]`` token ids; the last ``STEPS`` are decoded.
        settings: how the cache is packed.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, settings: TwilightConfig) -> None:
        self.model, self.ids = model, ids
        self.cache = TwilightCache(model.config.get_text_config(decoder=True), settings)
        with torch.inference_mode():
            model(ids[:, :-STEPS], past_key_values=self.cache)

    def kept_shares(self, p: float) -> dict[int, float]:
        """Return the share of packed tokens that each layer attends to when all layers keep a mass ``p``."""
        _, cache = self._decode(replace(self.cache.settings, p=p, dense_layers=(), min_sparse_len=0))
        return {
            int(layer["layer"]): sum(layer["kept"]) / max(1.0, sum(layer["scored"]))
            for layer in cache.stats()
            if sum(layer["scored"])
        }

    def smallest_p(self, settings: TwilightConfig, max_drift: float) -> tuple[TwilightConfig, dict[str, float]]:
        """Return ``settings`` with the smallest ``p`` of ``SHARES`` whose drift from ``p=1`` is at most ``max_drift``.

        Returns:
            The settings (``p=1`` if no share will do), and the drift of each share that was tried.
        """
        exact, _ = self._decode(replace(settings, p=1.0))
        next_ids = self.ids[0, -STEPS:].roll(-1)  # of no matter to the divergence
        tried: dict[str, float] = {}
        for p in SHARES:
            got, _ = self._decode(replace(settings, p=p, min_sparse_len=0))
            tried[str(p)] = float(compare(exact, got, next_ids).kl.mean())
            if tried[str(p)] <= max_drift:
                return replace(settings, p=p), tried
        return replace(settings, p=1.0), tried

    @torch.inference_mode()
    def _decode(self, settings: TwilightConfig) -> tuple[Tensor, TwilightCache]:
        """Logits of the last steps, ``[STEPS, vocabulary]``, and the cache that they went through."""
        cache = copy.deepcopy(self.cache)
        for layer in cache.twilight_layers:
            layer.settings = settings
            if layer.store is not None:
                layer.store.policy = settings.policy(layer.layer_idx)
        found = []
        for token in self.ids[:, -STEPS:].split(1, 1):
            found.append(self.model(token, past_key_values=cache).logits[0, -1])
        return torch.stack(found), cache
