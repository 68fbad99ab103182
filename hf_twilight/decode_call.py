"""What ``generate`` calls for each token: the model, or a step of a ``DecodeGraph``.

Where a cache says that it ``is_compileable`` and the model is on a GPU, ``generate`` decodes with what
``PreTrainedModel.get_compiled_call`` returns (and prefills with the model itself); ``disable_compile=True`` forbids it.
A third guarded patch answers that call for our caches, and lets everything else through to Transformers.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention import padding_of
from .cache import TwilightCache
from .decode_graph import DecodeGraph, refusal

logger = logging.getLogger(__name__)

_METHOD = "get_compiled_call"
_PARAMETERS = ["self", "compile_config"]
_MARK = "_twilight_original"
# what a decode step may be given; all else goes to the model itself
_KNOWN = frozenset(("input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "return_dict"))
_IGNORED = frozenset(("logits_to_keep", "cache_position"))  # one token has one row of logits, at one place


def patch_call() -> bool:
    """Let ``get_compiled_call`` answer for our caches; return whether it does."""
    method = getattr(PreTrainedModel, _METHOD, None)
    if method is None or list(inspect.signature(method).parameters) != _PARAMETERS:
        logger.info("twilight: no CUDA graphs in generate: %s is not laid out as expected", _METHOD)
        return False
    if not hasattr(method, _MARK):
        setattr(PreTrainedModel, _METHOD, _wrapped(method))
    return True


def unpatch_call() -> None:
    """Take the patch back; under another library's wrapper it stays, inert without a cache that offers a graph."""
    method = getattr(PreTrainedModel, _METHOD, None)
    ours, original = getattr(method, _MARK, (None, None))
    if method is not None and ours is method:
        setattr(PreTrainedModel, _METHOD, original)


def offer_graph(model: Any, cache: TwilightCache) -> None:
    """Let ``generate`` take the decode steps of ``cache`` from a graph, where that is possible."""
    reason = refusal(model, cache) if is_patched() else "Transformers is not laid out as expected"
    cache.graph = DecodeGraph(model, cache) if reason is None else None
    if reason is not None and model.device.type != "cpu":
        logger.info("twilight: no CUDA graphs in generate: %s", reason)


def is_patched() -> bool:
    """Whether ``get_compiled_call`` is ours, perhaps under others' wrappers."""
    return hasattr(getattr(PreTrainedModel, _METHOD, None), _MARK)


def _wrapped(method: Any) -> Any:
    @functools.wraps(method)
    def get_compiled_call(self: Any, compile_config: Any) -> Any:
        def call(*args: Any, **inputs: Any) -> Any:
            cache = inputs.get("past_key_values")
            if not isinstance(cache, TwilightCache):
                return method(self, compile_config)(*args, **inputs)
            out = None if args else _decode(self, cache, inputs)
            return self(*args, **inputs) if out is None else out

        return call

    setattr(get_compiled_call, _MARK, (get_compiled_call, method))
    return get_compiled_call


def _decode(model: Any, cache: TwilightCache, inputs: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """A step from the cache's graph; None where it is none, or one that the model itself must take."""
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    others = {name for name, value in inputs.items() if value is not None and value is not False}
    if cache.graph is None or not cache.graph.serves(model):
        return None
    if ids is None or not others <= _KNOWN | _IGNORED or not inputs.get("use_cache", True):
        return None
    rows, tokens = cache.sequences.batch_size, cache.sequences.tokens
    if tuple(ids.shape) != (rows, 1) or not tokens or inputs.get("return_dict") is False:
        return None
    if positions is not None and tuple(positions.shape) not in ((rows, 1), (1, 1)):
        return None
    cache.commit()
    padding = _padding(inputs.get("attention_mask"), rows, tokens + 1)
    if padding is None or max(padding) > tokens or not cache.sequences.accepts_padding(padding, tokens):
        return None
    if positions is None and any(padding):
        return None
    logits = cache.graph.step(ids, positions)
    return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)


def _padding(mask: Tensor | None, rows: int, tokens: int) -> list[int] | None:
    return [0] * rows if mask is None else padding_of(mask, tokens)
