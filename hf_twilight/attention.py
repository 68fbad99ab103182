"""The attention and mask functions named ``"twilight"``.

A Twilight cache layer returns keys that carry a ``Handle``. The attention function finds the layer through it,
decodes from packed pages and prefills prompts, long ones sparsely; for everything else (other caches, few tokens,
sliding layers, soft caps, attention sinks) it is the stock function on full tensors, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

if TYPE_CHECKING:
    from .layer import TwilightLayer

ATTENTION_NAME = "twilight"
STEP_ARGUMENT = "twilight_step"  # the engine's forward, see engine/runner.py
_HANDLE = "_twilight_handle"
_PADDING = "_twilight_padding"
# what changes attention and is only in a model's own eager function
_EAGER_ONLY = frozenset(("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"))


class Handle(NamedTuple):
    """What a Twilight layer pins to the keys it returns; ``is_stand_in`` if they hold no numbers."""

    layer: TwilightLayer
    is_stand_in: bool


def pin(tensor: Tensor, handle: Handle) -> Tensor:
    """Attach ``handle`` to a tensor and return it."""
    setattr(tensor, _HANDLE, handle)
    return tensor


def twilight_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Build the stock ``sdpa`` mask and note on it how much left padding each row has.

    Returns:
        ``[B, 1, T, S]`` bool or None, as the stock function. A causal mask whose only other restriction is left
        padding carries the padding of each row, from which decode needs no mask at all.
    """
    mask = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    if mask is not None and mask_function is causal_mask_function and kv_offset == 0:
        padding = [0] * batch_size if attention_mask is None else _left_padding(attention_mask, kv_length)
        if q_length == 1:  # generate makes it contiguous where steps come from graphs, and a copy has no attributes
            mask = mask.contiguous()
        setattr(mask, _PADDING, padding)
    return mask


def twilight_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend, from packed pages where the keys come from a Twilight cache.

    Args:
        module: the model's attention module.
        query: ``[B, H, T, D]`` model dtype, after RoPE.
        key, value: ``[B, K, S, D]`` as the cache returned them.
        attention_mask: what ``twilight_mask`` built, or any mask of the stock function.
        scaling: factor of the logits; None means ``D ** -0.5``.
        dropout: attention dropout; above 0 the stock function is used.
        kwargs: passed to the stock function; the engine's step, which attends by itself, is one of them.
    Returns:
        ``[B, T, H, D]`` in the query's dtype, and None for the weights.
    """
    forward = kwargs.get(STEP_ARGUMENT)
    if forward is not None:
        if _needs_eager(kwargs):
            raise ValueError("its attention has soft caps, sinks or biases of its own")
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return forward.attend(module.layer_idx, query, key, value, factor), None
    handle: Handle | None = getattr(key, _HANDLE, None)
    if handle is None:
        return _stock(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    layer, is_stand_in = handle
    padding = [0] * query.shape[0] if attention_mask is None else getattr(attention_mask, _PADDING, None)
    if padding is not None and getattr(value, _HANDLE, None) is handle:
        layer.is_untouched = True
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    is_plain = dropout == 0.0 and not needs_grad and not _needs_eager(kwargs)
    if query.shape[2] == 1 and is_plain and padding is not None and layer.can_decode(padding):
        out = layer.decode(query[:, :, 0], query.shape[-1] ** -0.5 if scaling is None else scaling, padding)
        return out.unsqueeze(1), None
    if is_stand_in:
        key, value = layer.full()
    if is_plain and padding is not None and layer.prefill.pays(query, key):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = layer.prefill.attend(query, key, value, scaling, padding)
        layer.commit(padding)
        layer.observe(query, scaling)
        return out.transpose(1, 2), None
    layer.commit(padding)
    if query.shape[2] > 1:
        layer.observe(query, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return _stock(module, query, key, value, attention_mask, scaling, dropout, kwargs)


def padding_of(mask: Tensor, tokens: int) -> list[int] | None:
    """Left padding of each row, as a mask ``[B, S]`` or one that ``twilight_mask`` built tells; None if it does not."""
    return _left_padding(mask, tokens) if mask.dim() == 2 else getattr(mask, _PADDING, None)


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let ``model`` attend with the registered function ``name`` inside the block, and as before after it.

    Raises:
        ValueError: the model does not take other attention functions.
    """
    before = model.config._attn_implementation
    if before != name:
        model.set_attn_implementation(name)
    try:
        if model.config._attn_implementation != name:
            raise ValueError(
                f"model must take other attention functions, got {type(model).__name__}, which does not; "
                "choose another model, or use model.generate"
            )
        yield
    finally:
        if before != name:
            model.set_attn_implementation(before)


def register() -> None:
    """Make ``attn_implementation="twilight"`` known to Transformers, with the mask it needs."""
    AttentionInterface.register(ATTENTION_NAME, twilight_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, twilight_mask)


def _left_padding(attention_mask: Tensor, kv_length: int) -> list[int] | None:
    """Leading zeros of each row of ``[B, S]``; None if a zero follows a one or the mask is too short."""
    if attention_mask.shape[-1] < kv_length:
        return None
    mask = attention_mask[:, :kv_length].to(torch.bool)
    real = mask.sum(-1)
    padding = mask.shape[-1] - real
    starts = torch.arange(mask.shape[-1], device=mask.device) >= padding[:, None]
    return padding.tolist() if bool((mask == starts).all()) else None


def _needs_eager(kwargs: dict[str, Any]) -> bool:
    return not _EAGER_ONLY.isdisjoint(kwargs) and any(kwargs.get(name) is not None for name in _EAGER_ONLY)


def _stock(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the model would have used: its own eager function where only that knows all arguments, else sdpa."""
    if _needs_eager(kwargs):
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is not None:
            mask = _additive(mask, query, key, bool(getattr(module, "is_causal", True)))
            out: tuple[Tensor, Tensor | None] = eager(
                module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
            )
            return out[0], None
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Tensor | None:
    """Turn a bool mask, or the None that means plain causal, into what eager functions add to logits."""
    rows, columns = query.shape[2], key.shape[2]
    if mask is None:
        if not is_causal or rows == 1:
            return None
        last = torch.arange(rows, device=query.device) + columns - rows
        mask = (torch.arange(columns, device=query.device) <= last[:, None])[None, None]
    if mask.dtype != torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, least)


register()
