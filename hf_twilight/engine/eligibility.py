"""Which models the engine takes, found out by looking at their layers and by trying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from twilight_cache import PagePool, PrefixTree
from twilight_kernels import has_kernels

from ..attention import STEP_ARGUMENT
from .plan import ScheduledRequest
from .scheduler import Scheduler

if TYPE_CHECKING:
    from .runner import Runner

_UNKNOWN_CONTEXT = 32768
_PROBE_LENGTHS = (7, 5)
# times the root of the dtype's epsilon, of the logits' spread: 0.0007 in float32, 0.18 in bfloat16. 30 layers of the
# embedded model round to 2e-6 and 0.045 (its own eager and sdpa attention: 0.03); positions that do not arrive: 0.66
_ROUNDING = 2.0
_PROBE_ROWS = 6  # so that the first sequence is cut: positions and pages must reach the second step


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
    if not has_kernels(model.device, model.dtype):
        raise ValueError(
            f"model must be float32, bfloat16 or float16 where {model.device.type} has kernels, got {model.dtype}; "
            "load it with another dtype, and see `hf-twilight env` for the kernels of this machine"
        )
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


@dataclass(frozen=True)
class LayerShape:
    """What a layer hands to its attention function: heads and channels."""

    num_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


class _Recorder:
    """Stands where a step would, and notes the shapes of every layer."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, _: float) -> Tensor:
        self.shapes[layer_idx] = LayerShape(query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


def layer_shapes(model: Any) -> list[LayerShape]:
    """Run a few tokens to see what each layer hands to the attention function.

    Raises:
        ValueError: some layer does not come to it, or the model does not pass the step on.
    """
    recorder, reason = _Recorder(), "not every layer comes to it"
    try:
        ids = torch.arange(4, device=model.device)[None]
        model(
            input_ids=ids, position_ids=ids, attention_mask=unread_mask(model), use_cache=False,
            **{STEP_ARGUMENT: recorder},
        )  # fmt: skip
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        if sorted(recorder.shapes) == list(range(count)):
            return [recorder.shapes[layer] for layer in range(count)]
    raise ValueError(_refusal(model, reason))


def unread_mask(model: Any) -> Tensor:
    """A 4D mask: models take one as it is given and build none of their own; our attention never reads it."""
    return torch.ones(1, 1, 1, 1, dtype=model.dtype, device=model.device)


def probe(model: PreTrainedModel, runner: Runner) -> None:
    """Run two short sequences packed into two forwards and compare with the model run on each.

    Raises:
        ValueError: the model does not take packed sequences through its attention function.
    """
    vocab = vocab_size(model)
    prompts = [[(7 * i + 3 * n) % vocab for i in range(n)] for n in _PROBE_LENGTHS]
    pool = PagePool(runner.stores[0].plain.keys.shape[0])
    tree = PrefixTree(
        runner.settings.layout, pool, None if runner.is_raw else PagePool(runner.stores[0].keys.num_pages)
    )
    scheduler = Scheduler(tree, max_running=len(prompts), prefill_tokens=_PROBE_ROWS, max_cache_pages=1 << 30)
    for index, prompt in enumerate(prompts):
        scheduler.add(ScheduledRequest(str(index), prompt, len(prompt), 1))
    reason: object = None
    try:
        logits: dict[str, Tensor] = {}
        while len(logits) < len(prompts):
            plan = scheduler.plan()
            rows = runner.run(plan)
            scheduler.commit(plan)
            ended = [segment.request for segment in plan.segments if segment.is_last]
            logits.update((request.request_id, row) for request, row in zip(ended, rows, strict=True))
        found = torch.stack([logits[str(index)] for index in range(len(prompts))])
        wanted = torch.stack([_last_logits(model, prompt, runner.device) for prompt in prompts])
        error = float((found - wanted).square().mean().sqrt()) / max(float(wanted.std()), 1e-6)
        if not error <= (limit := _ROUNDING * torch.finfo(model.dtype).eps ** 0.5):
            reason = f"its logits differ by {error:.2g} of their spread, rounding explains {limit:.2g}"
    except Exception as caught:
        reason = f"{type(caught).__name__}: {caught}"
    if reason is not None:
        raise ValueError(_refusal(model, reason))


def _refusal(model: Any, reason: object) -> str:
    return (
        "the engine takes models that run packed sequences through their attention function, got "
        f"{model.config.model_type!r} ({reason}); use model.generate with cache_implementation='twilight'"
    )


def _last_logits(model: Any, prompt: list[int], device: torch.device) -> Tensor:
    ids = torch.tensor([prompt], device=device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return logits
