"""Which models the engine takes, found out by looking at their layers and by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from twilight_cache import PagePool, PrefixTree

from ..attention import ATTENTION_NAME
from .plan import ScheduledRequest
from .runner import Runner
from .scheduler import Scheduler

_UNKNOWN_CONTEXT = 32768
_PROBE_LENGTHS = (5, 3)


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose state is not keys and values of full attention.

    Raises:
        ValueError: another kind of model, or one in training mode.
    """
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise ValueError(f"the engine takes decoder-only models, got encoder-decoder {kind!r}; use model.generate")
    if model.training:
        raise ValueError("model must be in eval mode, got one in training mode; call model.eval()")
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"model must be float32, bfloat16 or float16, got {model.dtype}; load it with another dtype")
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if others or not layers:
        raise ValueError(
            f"the engine takes models whose layers are all full attention, got {kind!r} with "
            f"{', '.join(others) or 'no known layers'}; use model.generate with cache_implementation='twilight'"
        )


def context_of(model: PreTrainedModel) -> int:
    """Tokens that the model takes."""
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", None) or _UNKNOWN_CONTEXT)


def vocab_size(model: Any) -> int:
    """Token ids that the model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the model's and the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    if tokenizer is not None and getattr(tokenizer, "eos_token_id", None) is not None:
        ids.append(tokenizer.eos_token_id)
    return frozenset(ids)


@contextmanager
def attention_switched(model: PreTrainedModel) -> Iterator[None]:
    """Use our attention function, which is the stock one for every forward that is not the engine's."""
    before = model.config._attn_implementation
    if before != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    try:
        if model.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"the engine takes models whose attention can be set, got {type(model).__name__}; use model.generate"
            )
        yield
    finally:
        if before != ATTENTION_NAME:
            model.set_attn_implementation(before)


def probe(model: PreTrainedModel, runner: Runner) -> None:
    """Run two short sequences packed into one forward and compare with the model run on each.

    Raises:
        ValueError: the model does not take packed sequences through its attention function.
    """
    vocab = vocab_size(model)
    prompts = [[(7 * i + 3 * n) % vocab for i in range(n)] for n in _PROBE_LENGTHS]
    pool = PagePool(runner.stores[0].plain.keys.shape[0])
    tree = PrefixTree(
        runner.settings.layout, pool, None if runner.is_raw else PagePool(runner.stores[0].keys.num_pages)
    )
    scheduler = Scheduler(tree, max_running=len(prompts), prefill_tokens=sum(_PROBE_LENGTHS), max_cache_pages=1 << 30)
    for index, prompt in enumerate(prompts):
        scheduler.add(ScheduledRequest(str(index), prompt, len(prompt), 1))
    reason: object = None
    try:
        found = runner.run(scheduler.plan())
        wanted = torch.stack([_last_logits(model, prompt, runner.device) for prompt in prompts])
        spread = float(wanted.std())
        error = float((found - wanted).abs().max())
        if not error <= 0.1 * max(spread, 1e-6):
            reason = f"its logits differ by {error:.3g}"
    except Exception as caught:
        reason = f"{type(caught).__name__}: {caught}"
    if reason is not None:
        raise ValueError(
            f"the engine takes models that run packed sequences through their attention function, got "
            f"{model.config.model_type!r} ({reason}); use model.generate with cache_implementation='twilight'"
        )


def _last_logits(model: Any, prompt: list[int], device: torch.device) -> Tensor:
    ids = torch.tensor([prompt], device=device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return logits
