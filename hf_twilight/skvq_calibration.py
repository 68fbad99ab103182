"""Calibration of SKVQ (arXiv 2405.06219, sections 3.2 and 3.3): channel order, groups, and searched clips.

Channels of a KV head whose minimum and maximum are alike share a group (k-means). One clip for the keys and one for
the values of a layer is searched on the error of the attention output. Needs scipy: ``hf-twilight[calibrate]``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from twilight_kernels.skvq import SkvqCodec, SkvqPages, load_skvq_pages, store_skvq_pages

from .attention import use_attention
from .config import TwilightConfig
from .samples import sample_ids
from .signature import signature
from .skvq_tables import TABLES_NAME, SkvqTable, write_tables

CLIPS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_PROBE = "twilight_probe"
_ROWS = 128  # queries whose attention is compared
_STARTS = 10  # of k-means, the best is taken
_BASE = TwilightConfig(num_sinks=5, window=128, p=1.0, dense_layers=())


def calibrate_skvq(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    folder: str | os.PathLike[str],
    *,
    group_size: int = 32,
    key_levels: int = 4,
    value_levels: int = 3,
    sample_len: int = 2048,
    seed: int = 0,
) -> TwilightConfig:
    """Calibrate SKVQ for ``model`` and write ``skvq.safetensors`` and ``twilight_config.json`` into ``folder``.

    Args:
        model: a decoder model.
        tokenizer: of the model.
        texts: what channel statistics and clips are taken from.
        folder: of the result; ``TwilightConfig.from_pretrained`` reads it.
        group_size: channels of a group on average; groups are clusters, so their sizes differ.
        key_levels, value_levels: 3, 4 or 16; the paper's recipe is 4 and 3 (2-bit keys, 1.5-bit values).
        sample_len: tokens that are read.
        seed: of the place in the texts and of k-means.
    Returns:
        The settings: 128 tokens of window and 5 sinks, as in the paper.
    Raises:
        ImportError: scipy is not installed.
        ValueError: too little text, a group larger than a head, or another number of levels.
    """
    ids = sample_ids(tokenizer, texts, sample_len, 1, seed, _BASE).to(model.device)
    decoder = model.config.get_text_config(decoder=True)
    layers: list[Any] = DynamicCache(config=decoder).layers
    wanted = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    tables: dict[tuple[int, str], SkvqTable] = {}

    def see(layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> None:
        if layer in wanted:
            found = _calibrate_layer(query, keys, values, scaling, (key_levels, value_levels), group_size, seed)
            tables[layer, "keys"], tables[layer, "values"] = found

    _watch(model, ids, see)
    facts = signature(decoder)
    del facts["rope_parameters"]
    target = Path(folder).absolute() / TABLES_NAME
    write_tables(target, tables, {"model": facts, "group_size": group_size, "seed": seed})
    settings = TwilightConfig(
        num_sinks=_BASE.num_sinks, window=_BASE.window, p=1.0, dense_layers=(), calibrated_for=facts,
        skvq_tables=TABLES_NAME,
    )  # fmt: skip
    settings.save_pretrained(folder)
    return TwilightConfig.from_pretrained(folder)


def _watch(model: PreTrainedModel, ids: Tensor, see: Any) -> None:
    """Run the model on ``ids``, showing ``see`` what each layer attends to."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scaling = kwargs.get("scaling")
        layer: Any = module.layer_idx
        see(layer, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return out

    AttentionInterface.register(_PROBE, attend)
    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    with use_attention(model, _PROBE), torch.inference_mode():
        model(ids, use_cache=False)


def _calibrate_layer(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, levels: tuple[int, int], group_size: int, seed: int
) -> tuple[SkvqTable, SkvqTable]:
    """Return the tables of keys and values, ``[1, K, T, D]``."""
    query, keys, values = query.float(), keys.float(), values.float()
    rows = torch.linspace(keys.shape[2] // 2, keys.shape[2] - 1, _ROWS).long()
    expected = _attend(query, keys, values, (None, None), rows, scaling)
    found = []
    for kind, x, count in (("keys", keys, levels[0]), ("values", values, levels[1])):
        order, group, unit = _groups(x[0], group_size, seed)
        best, chosen = float("inf"), 1.0
        for clip in CLIPS:
            rounded = _rounded(x, SkvqCodec(count, _BASE.page_size, clip, order, group, unit))
            used = (rounded, None) if kind == "keys" else (None, rounded)
            error = (_attend(query, keys, values, used, rows, scaling) - expected).square().sum().item()
            if error < best:
                best, chosen = error, clip
        found.append(SkvqTable(count, chosen, order, group, unit))
    return found[0], found[1]


def _groups(x: Tensor, group_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the channels of each KV head of ``[K, T, D]`` by minimum and maximum: order, group and unit."""
    try:
        from scipy.cluster.vq import kmeans2
    except ImportError as error:
        raise ImportError(
            f"scipy is needed ({error}); install it with: pip install 'hf-twilight[calibrate]'"
        ) from error
    if not 1 <= group_size <= x.shape[-1]:
        raise ValueError(f"group_size must be in [1, {x.shape[-1]}], the channels of a head, got {group_size}")
    orders, groups = [], []
    for head in x[:, _BASE.num_sinks :]:
        features = torch.stack([head.amin(0), head.amax(0)], -1).double().cpu().numpy()
        fits = []
        for start in range(_STARTS):
            centres, labels = kmeans2(
                features, -(-x.shape[-1] // group_size), minit="++", seed=seed + start, missing="warn"
            )
            fits.append((float(np.square(features - centres[labels]).sum()), start, labels))
        labels = torch.from_numpy(min(fits, key=lambda fit: fit[:2])[2].astype(np.int64))
        _, labels = labels.unique(return_inverse=True)
        order = labels.argsort(stable=True)
        orders.append(order)
        groups.append(labels[order])
    # headroom of two for what calibration did not see; beyond that FP8 scales are cut
    unit = x.abs().amax((1, 2)).clamp_min(1e-6) / 224.0
    device = x.device
    return torch.stack(orders).to(device), torch.stack(groups).to(device), unit


def _rounded(x: Tensor, codec: SkvqCodec) -> Tensor:
    """``[1, K, T, D]`` with whole pages behind the sinks rounded."""
    sinks, size = _BASE.num_sinks, codec.page_size
    count = (x.shape[2] - sinks) // size
    pages, page_ids = SkvqPages.empty(count, codec), torch.arange(count, dtype=torch.int32)
    store_skvq_pages(pages, page_ids, x[0, :, sinks : sinks + count * size].unflatten(1, (count, size)).transpose(0, 1))
    out = x.clone()
    loaded = load_skvq_pages(pages, page_ids, x.dtype)
    out[0, :, sinks : sinks + count * size] = loaded.transpose(0, 1).flatten(1, 2)
    return out


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rounded: tuple[Tensor | None, Tensor | None],
    rows: Tensor,
    scaling: float,
) -> Tensor:
    """Attention output of the query tokens ``rows``, older tokens than the window rounded: ``[1, K, G, R, D]``."""
    rounded_keys, rounded_values = rounded
    q = query[:, :, rows].unflatten(1, (keys.shape[1], -1))
    at = torch.arange(keys.shape[2], device=keys.device)
    causal = at <= rows[:, None].to(at.device)
    old = at <= rows[:, None].to(at.device) - _BASE.window
    logits = torch.einsum("bkgtd,bksd->bkgts", q, keys)
    if rounded_keys is not None:
        logits = torch.where(old, torch.einsum("bkgtd,bksd->bkgts", q, rounded_keys), logits)
    weights = (logits * scaling).masked_fill(~causal, -torch.inf).softmax(-1)
    if rounded_values is None:
        return torch.einsum("bkgts,bksd->bkgtd", weights, values)
    recent = torch.einsum("bkgts,bksd->bkgtd", weights * ~old, values)
    return recent + torch.einsum("bkgts,bksd->bkgtd", weights * old, rounded_values)
