"""A prefilled cache as a safetensors file: a document read once, asked again later.

Pages are written as they lie in memory, packed, used ones only; pages that rows share stay shared. The file carries
the settings and the model's config, so that it loads on its own and is refused for another model.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from twilight_kernels import KeyPages, PlainTokens, ValuePages
from twilight_kernels.skvq import SkvqCodec, SkvqPages

from .config import TwilightConfig
from .signature import difference, signature

if TYPE_CHECKING:
    from .cache import TwilightCache
    from .layer import TwilightLayer

FILE_VERSION = 2


def save_cache(cache: TwilightCache, path: str | Path, *, tokens: Tensor | None = None) -> None:
    """Write a cache to ``path``; an existing file is replaced only when the new one is complete.

    Args:
        cache: a cache that holds at least one token.
        path: of the file, usually ``*.safetensors``.
        tokens: ``[B, S]`` token ids that the cache holds, to be handed back by ``load_cache``.
    Raises:
        ValueError: an empty cache, or layers whose state cannot be saved (linear attention).
    """
    if not cache.sequences.tokens:
        raise ValueError("cache must hold tokens to be saved, got an empty one; run the model on a prompt first")
    cache.commit()
    sequences = cache.sequences
    used = np.unique(np.concatenate([sequences.table[row, :count] for row, count in enumerate(sequences.pages)]))
    tensors = _shared_tensors(cache, used)
    if tokens is not None:
        tensors["token_ids"] = tokens.cpu().contiguous()
    lengths: dict[str, int] = {}
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        prefix = f"layers.{index}"
        if layer in cache.twilight_layers:
            tensors |= {f"{prefix}.{name}": t for name, t in _layer_tensors(layer, used).items()}
        elif isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None and layer.values is not None:
            tensors |= {
                f"{prefix}.keys": layer.keys.contiguous(),
                f"{prefix}.values": layer.values.contiguous(),
            }
            lengths[str(index)] = layer.cumulative_length
        elif getattr(layer, "is_initialized", False):
            raise ValueError(f"layer {index} must be full or sliding attention to be saved, got {type(layer).__name__}")
    notes = {
        "file_version": FILE_VERSION,
        "tokens": sequences.tokens,
        "settings": cache.settings.to_dict(),
        "signature": signature(cache.model_config),
        "config": cache.model_config.to_dict(),
        "sliding_lengths": lengths,
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, draft, metadata={"twilight_cache": json.dumps(notes, default=str)})
        os.replace(draft, target)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def load_cache(path: str | Path, config: PreTrainedConfig | None = None) -> TwilightCache:
    """Read a cache that ``save_cache`` wrote; its ``token_ids`` are what was given then, or None.

    Args:
        path: of the file.
        config: the config of the model it will be used with; None trusts the file.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no cache file, a truncated one, one of a later version, or one of another model.
    """
    from .cache import TwilightCache

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a file that cache.save wrote, got no file")
    try:
        with safe_open(str(path), framework="pt") as file:
            notes = (file.metadata() or {}).get("twilight_cache")
            if notes is None:
                raise ValueError(f"{path} must be a file that cache.save wrote, got other safetensors")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); save the cache again") from error
    facts: dict[str, Any] = json.loads(notes)
    if facts["file_version"] != FILE_VERSION:
        raise ValueError(f"{path} must have version {FILE_VERSION}, got {facts['file_version']}; update hf-twilight")
    if config is None:
        stored = dict(facts["config"])
        config = AutoConfig.for_model(stored.pop("model_type"), **stored)
    elif told := difference(facts["signature"], config.get_text_config(decoder=True)):
        raise ValueError(f"{path} was filled by another model: {told}; prefill the document with this model")
    cache = TwilightCache(config, TwilightConfig.from_dict(facts["settings"]))
    _restore(cache, tensors, facts)
    return cache


def _shared_tensors(cache: TwilightCache, used: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    """Block tables with pages renumbered in the order in which they are written."""
    sequences = cache.sequences
    width = int(sequences.pages.max(initial=0))
    table = sequences.table[:, :width]
    renumbered = np.where(table >= 0, np.searchsorted(used, table), -1).astype(np.int32)
    for row, count in enumerate(sequences.pages):
        renumbered[row, count:] = -1
    return {
        "table": torch.from_numpy(renumbered),
        "pages": torch.from_numpy(sequences.pages.copy()),
        "pad": torch.from_numpy(sequences.pad.copy()),
    }


def _layer_tensors(layer: TwilightLayer, used: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    if layer.store is None:
        return {}
    columns = int(layer.sequences.plain.max())
    found = {}
    for name, tensor in layer.store.tensors().items():
        if name == "refined.index":
            pass
        elif name == "plain.keys":
            tensor = tensor[..., :columns]
        elif name == "plain.values":
            tensor = tensor[:, :, :columns]
        else:
            tensor = tensor[torch.from_numpy(used).long().to(tensor.device)]
        found[name] = tensor.cpu().contiguous()
    state = layer.store.selector_state.saved()
    return found | {f"selector.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}


def _restore(cache: TwilightCache, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    sequences = cache.sequences
    table = tensors["table"].numpy().copy()
    sequences.tokens = int(facts["tokens"])
    sequences.pad, sequences.pages = tensors["pad"].numpy().copy(), tensors["pages"].numpy().copy()
    sequences.adopt(table)
    cache.token_ids = tensors.get("token_ids")
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if not own:
            continue
        if layer in cache.twilight_layers:
            stored = own["plain.keys"].transpose(-1, -2)
            refined = own["refined.index"].shape[-1] if "refined.index" in own else 0
            layer.lazy_initialization(stored[..., : stored.shape[-1] - refined], own["plain.values"])
            _restore_layer(layer, own)
        else:
            layer.lazy_initialization(own["keys"], own["values"])
            layer.keys, layer.values = own["keys"], own["values"]
            layer.cumulative_length = facts["sliding_lengths"][str(index)]


def _restore_layer(layer: TwilightLayer, own: dict[str, Tensor]) -> None:
    store = layer.store
    assert store is not None
    nothing = torch.empty(0, dtype=torch.float16)
    layer.tokens = store.tokens = layer.sequences.tokens
    keys, values = (
        (own[f"{kind}.codes"], own.get(f"{kind}.lo", nothing), own.get(f"{kind}.step", nothing))
        for kind in ("keys", "values")
    )
    key_codec, value_codec = store.key_codec, store.value_codec
    store.keys = SkvqPages(key_codec, *keys) if isinstance(key_codec, SkvqCodec) else KeyPages(key_codec, *keys)
    if isinstance(value_codec, SkvqCodec):
        store.values = SkvqPages(value_codec, *values)
    else:
        store.values = ValuePages(value_codec, *values)
    stored_keys, stored_values = own["plain.keys"], own["plain.values"]
    layout, columns = layer.sequences.layout, stored_values.shape[2]
    room = max(columns, layout.num_sinks + layout.window + layout.page_size)
    rows, heads, key_dim, _ = stored_keys.shape
    store.plain = PlainTokens.empty(rows, heads, key_dim, stored_values.shape[-1], room, stored_keys.dtype, "cpu")
    store.plain.keys[..., :columns] = stored_keys
    store.plain.values[:, :, :columns] = stored_values
    store.refined_index = own.get("refined.index")
    prefix = "selector."
    store.selector_state.restore({n.removeprefix(prefix): t for n, t in own.items() if n.startswith(prefix)})
