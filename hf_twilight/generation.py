"""Make ``generate(cache_implementation="twilight")`` work, and take it back.

Two guarded patches, inert for every other value: the tuple of allowed names in
``transformers.generation.configuration_utils`` and ``GenerationMixin._prepare_cache_for_generation``. If Transformers
does not look as expected, neither is applied and a warning says what to write instead. A third, in ``decode_call``, is
for CUDA graphs.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import configuration_utils

from .attention import ATTENTION_NAME
from .cache import TwilightCache
from .cache_name import CACHE_NAME, allow_name, forbid_name, is_name_allowed
from .config import TwilightConfig, as_config
from .decode_call import offer_graph, patch_call, unpatch_call

logger = logging.getLogger(__name__)

_METHOD = "_prepare_cache_for_generation"
_PARAMETERS = ["self", "generation_config", "model_kwargs", "generation_mode", "batch_size"]
_MARK = "_twilight_original"
_STOCK = "_twilight_stock_attention"

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def enable(model: ModelT, settings: TwilightConfig | dict[str, Any] | str | None = None, **changes: Any) -> ModelT:
    """Make every ``model.generate`` use a Twilight cache; return the same model.

    Nothing that a checkpoint saves names us: the settings stand in ``generation_config.twilight_config``, which
    Transformers carries along and a machine without this package ignores. Prefer this to writing the name into
    ``model.generation_config.cache_implementation``: ``save_pretrained`` would save it, and other machines refuse it.

    Args:
        model: a decoder-only model.
        settings: a ``TwilightConfig``, a dict of settings, a preset's name, a folder that ``calibrate`` wrote, or
            None for ``balanced``.
        changes: single settings on top, as ``p=0.9``.
    Raises:
        ValueError: an encoder-decoder model, or settings that do not exist.
    """
    config = as_config(settings, **changes)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"enable takes decoder-only models, got encoder-decoder {model.config.model_type!r}; leave it as it is"
        )
    _use_attention(model)
    generation_config: Any = model.generation_config
    generation_config.twilight_config = {**config.to_dict(), "is_enabled": True}
    generation_config._from_model_config = False  # such a config drops keys it does not know when loaded
    return model


def disable(model: ModelT) -> ModelT:
    """Undo ``enable``: stock caches and the attention that the model had before."""
    if hasattr(model.generation_config, "twilight_config"):
        del model.generation_config.twilight_config
    stock = getattr(model, _STOCK, None)
    if stock is not None:
        model.set_attn_implementation(stock)
        delattr(model, _STOCK)
    return model


@contextmanager
def twilight(
    model: ModelT, settings: TwilightConfig | dict[str, Any] | str | None = None, **changes: Any
) -> Iterator[ModelT]:
    """``enable`` for the length of a ``with`` block; what was enabled before is enabled again after it."""
    generation_config: Any = model.generation_config
    before = getattr(generation_config, "twilight_config", None)
    had_stock = hasattr(model, _STOCK)
    enable(model, settings, **changes)
    try:
        yield model
    finally:
        if before is not None:
            generation_config.twilight_config = before
        elif had_stock:
            vars(generation_config).pop("twilight_config", None)
        else:
            disable(model)


def patch() -> bool:
    """Make the name ``"twilight"`` legal; done when Transformers' generation is imported. Returns whether it is."""
    method = getattr(GenerationMixin, _METHOD, None)
    parameters = [] if method is None else list(inspect.signature(method).parameters)
    if parameters[: len(_PARAMETERS)] != _PARAMETERS or not allow_name(configuration_utils):
        forbid_name(configuration_utils)
        logger.warning(
            'cache_implementation="twilight" is not available: Transformers %s is not laid out as expected. Use '
            'attn_implementation="twilight" and generate(past_key_values=TwilightCache(model.config))',
            transformers.__version__,
        )
        return False
    if not hasattr(method, _MARK):
        setattr(GenerationMixin, _METHOD, _wrapped(method))
    patch_call()
    return True


def unpatch() -> None:
    """Take all patches back; a wrapper that another library put on top of ours stays, and ours stays under it."""
    forbid_name(configuration_utils)
    unpatch_call()
    method = getattr(GenerationMixin, _METHOD)
    ours, original = getattr(method, _MARK, (None, None))
    if ours is method:
        setattr(GenerationMixin, _METHOD, original)
    elif method.__module__ != GenerationMixin.__module__ or ours is not None:
        logger.warning("another library wrapped %s after us: its wrapper and ours stay in place, ours inert", _METHOD)


def _wrapped(method: Any) -> Any:
    @functools.wraps(method)
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not is_name_allowed(configuration_utils):
            return method(self, generation_config, model_kwargs, *args, **kwargs)  # unpatched, under another's wrapper
        settings = getattr(generation_config, "twilight_config", None)
        of_model = getattr(self.generation_config, "twilight_config", None)
        is_named = generation_config.cache_implementation == CACHE_NAME
        default = isinstance(of_model, dict) and of_model.get("is_enabled", False)
        is_enabled = isinstance(settings, dict) and settings.get("is_enabled", default)
        is_given = settings is not None and not isinstance(settings, dict)
        if not is_named and not (generation_config.cache_implementation is None and (is_enabled or is_given)):
            return method(self, generation_config, model_kwargs, *args, **kwargs)
        if is_named:
            generation_config.cache_implementation = None  # a copy that belongs to this call
        given = model_kwargs.get("past_key_values")
        if given is not None or generation_config.use_cache is False:
            if isinstance(given, TwilightCache) and not generation_config.output_attentions:
                _use_attention(self)
                offer_graph(self, given)
            return method(self, generation_config, model_kwargs, *args, **kwargs)
        if self.config.is_encoder_decoder or not self._supports_default_dynamic_cache():
            raise ValueError(
                f'cache_implementation="{CACHE_NAME}" takes decoder-only models with a standard cache, got '
                f"{self.config.model_type!r}; leave cache_implementation unset for it"
            )
        cache = TwilightCache(self.config, _settings(settings, generation_config.cache_config))
        if not generation_config.output_attentions:
            _use_attention(self)
            offer_graph(self, cache)
        elif hasattr(self, _STOCK):  # only the model's own attention makes weights
            self.set_attn_implementation(getattr(self, _STOCK))
        model_kwargs["past_key_values"] = cache
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None

    setattr(prepare, _MARK, (prepare, method))  # functools.wraps copies marks: the first says whose it is
    return prepare


def _settings(settings: Any, cache_config: Any) -> TwilightConfig:
    """The call's settings: ``cache_config`` if given, else ``twilight_config``, else the default."""
    chosen = cache_config if cache_config is not None else settings
    if isinstance(chosen, dict):
        chosen = {name: value for name, value in chosen.items() if name != "is_enabled"}
    return as_config(chosen)


def _use_attention(model: Any) -> None:
    """Switch a model to our attention function, which is the stock one wherever pages are not involved."""
    stock = model.config._attn_implementation
    if stock == ATTENTION_NAME:
        return
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation == ATTENTION_NAME:
        setattr(model, _STOCK, stock)
        logger.info("twilight: attention of %s switched from %r to 'twilight'", type(model).__name__, stock)
    else:
        logger.info(
            "twilight: %s does not take other attention functions: pages are dequantized for it at every step",
            type(model).__name__,
        )


patch()
