"""``hf-twilight parity``: a model with and without Twilight, in every way of generating.

Each mode is played once with the stock cache and once with Twilight, from the same prompts. Where a packed
cache may round, tokens may differ; how far the model itself is moved is then measured by feeding the stock
cache's tokens to both and comparing logits ("drift"), which no early difference can inflate.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_twilight import TwilightCache

from . import documents, models, tables
from .parity_modes import MODES, Mode, Prompts, Segment

if TYPE_CHECKING:
    from hf_twilight import TwilightConfig

logger = logging.getLogger(__name__)

LONG_PROMPT = 1600
_SHORT_PROMPTS = (40, 170, 300, 420)


@dataclass
class Drift:
    """How far logits move when both caches are fed the stock cache's tokens.

    Attributes:
        largest: largest difference of a logit.
        mean_kl: mean over tokens of KL(stock || Twilight), in nats.
        agreement: share of tokens whose likeliest successor is the same.
    """

    largest: float
    mean_kl: float
    agreement: float


@dataclass
class Verdict:
    """What one mode showed.

    Attributes:
        mode: its name.
        status: ``"identical"``, ``"different"``, ``"failed"`` (with Twilight) or ``"unsupported"`` (by the model,
            with its stock cache).
        first_difference: first token that differs, counted from 0 within the generated ones; None if none does.
        tokens: generated tokens that were compared.
        drift: see ``Drift``; None where it could not be measured.
        stats: what decode steps attended to, averaged over layers and heads; None where nothing was decoded from
            pages (exact settings use the stock function).
        reason: why it failed or is not supported.
    """

    mode: str
    status: str
    first_difference: int | None = None
    tokens: int = 0
    drift: Drift | None = None
    stats: dict[str, float] | None = None
    reason: str | None = None


def run(model_name: str, dtype: str, settings: TwilightConfig, *, new_tokens: int, seed: int) -> dict[str, Any]:
    """Play every mode with both caches and print a table.

    Returns:
        What ``--json`` prints; ``is_passed`` says whether what must be identical is, and nothing failed.
    Raises:
        ValueError: fewer than 2 new tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2, got {new_tokens}")
    tokenizer = models.load_tokenizer(model_name)
    model = models.load(model_name, dtype)
    ids = documents.cut(tokenizer, documents.document_text(), LONG_PROMPT + sum(_SHORT_PROMPTS), repeat=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = _prompts(model, ids, new_tokens, pad if pad is not None else 0, seed)
    verdicts = []
    with tables.progress("Parity", len(MODES)) as bar:
        for name, mode in MODES.items():
            bar.update(bar.task_ids[0], description=f"Parity: {name}")
            verdicts.append(_judge(name, mode, model, settings, prompts))
            bar.advance(bar.task_ids[0])
    allowed = {"identical", "unsupported"} | (set() if settings.is_exact else {"different"})
    is_passed = all(verdict.status in allowed for verdict in verdicts)
    _print(model_name, model, settings, verdicts, is_passed)
    return {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": settings.to_dict(),
        "is_exact": settings.is_exact,
        "new_tokens": new_tokens,
        "prompt_tokens": {"long": prompts.long.shape[1], "batch": [row.shape[0] for row in prompts.rows]},
        "results": [asdict(verdict) for verdict in verdicts],
        "is_passed": is_passed,
    }


def _prompts(model: PreTrainedModel, ids: list[int], new_tokens: int, pad: int, seed: int) -> Prompts:
    """Cut prompts out of a text: one long, four short ones, shorter where the model takes fewer tokens."""
    limit = models.trained_context(model)
    long = LONG_PROMPT if limit is None else min(LONG_PROMPT, limit // 2 - 4 * new_tokens)
    if long < 16:
        raise ValueError(
            f"new_tokens must leave room for prompts in the {limit} tokens that the model takes, got {new_tokens}"
        )
    if long < LONG_PROMPT:
        logger.warning("prompts are cut to %d tokens, because the model takes %d", long, limit)
    row = torch.tensor(ids, device=model.device)
    rows, start = [], long
    for length in _SHORT_PROMPTS:
        length = max(2, length * long // LONG_PROMPT)
        rows.append(row[start : start + length])
        start += length
    return Prompts(long=row[None, :long], rows=rows, new_tokens=new_tokens, pad=pad, seed=seed)


def _judge(name: str, mode: Mode, model: PreTrainedModel, settings: TwilightConfig, prompts: Prompts) -> Verdict:
    try:
        models.use_attention(model, models.STOCK_ATTENTION)
        expected = mode(model, models.stock_cache(model), prompts)
    except Exception as error:  # a mode that the model itself does not know says nothing about Twilight
        logger.info("mode %s is not supported by this model", name, exc_info=True)
        return Verdict(name, "unsupported", reason=f"{type(error).__name__}: {error}")
    try:
        cache = TwilightCache(model.config, settings)
        models.use_attention(model, models.OUR_ATTENTION)
        played = mode(model, cache, prompts)
        place = _first_difference(expected.tokens, played.tokens)
        stats = models.cache_stats(cache)
        drift = _drift(model, settings, expected.script, expected.mask)
    except Exception as error:  # reported as the mode's result; the other modes are still of interest
        logger.info("mode %s failed", name, exc_info=True)
        return Verdict(name, "failed", reason=f"{type(error).__name__}: {error}")
    status = "identical" if place is None else "different"
    return Verdict(name, status, place, expected.tokens.numel(), drift, stats)


def _first_difference(expected: Tensor, got: Tensor) -> int | None:
    """First column in which rows of tokens differ; a missing token differs."""
    columns = min(expected.shape[1], got.shape[1])
    differs = (expected[:, :columns] != got[:, :columns]).any(0).nonzero()
    if differs.numel():
        return int(differs[0])
    return None if expected.shape == got.shape else columns


def _drift(model: PreTrainedModel, settings: TwilightConfig, script: list[Segment], mask: Tensor | None) -> Drift:
    models.use_attention(model, models.STOCK_ATTENTION)
    stock = _logits(model, models.stock_cache(model), script, mask)
    models.use_attention(model, models.OUR_ATTENTION)
    ours = _logits(model, TwilightCache(model.config, settings), script, mask)
    p, q = stock.log_softmax(-1), ours.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    same = (stock.argmax(-1) == ours.argmax(-1)).double().mean()
    return Drift(float((stock - ours).abs().max()), float(kl.mean()), float(same))


@torch.inference_mode()
def _logits(model: PreTrainedModel, cache: DynamicCache, script: list[Segment], mask: Tensor | None) -> Tensor:
    """Feed a script; return the logits ``[steps, B, V]``, float32, after each segment."""
    found, seen = [], 0
    for segment in script:
        parts = segment.ids.split(1, 1) if segment.is_stepwise else segment.ids.split(segment.chunk, 1)
        for part in parts:
            seen += part.shape[1]
            extra: dict[str, Any] = {}
            if mask is not None:
                padded = torch.nn.functional.pad(mask, (0, max(0, seen - mask.shape[1])), value=1)[:, :seen]
                positions = (padded.cumsum(-1) - 1).clamp_min(0)
                extra = {"attention_mask": padded, "position_ids": positions[:, -part.shape[1] :]}
            out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
            if segment.is_stepwise:
                found.append(out.logits[:, -1].float())
        if not segment.is_stepwise:
            found.append(out.logits[:, -1].float())
    return torch.stack(found)


def _print(
    name: str, model: PreTrainedModel, settings: TwilightConfig, verdicts: list[Verdict], is_passed: bool
) -> None:
    rows = []
    for verdict in verdicts:
        outcome = verdict.status
        if verdict.status == "different":
            outcome = f"differs from token {verdict.first_difference}"
        elif verdict.reason is not None:
            outcome = f"{verdict.status}: {verdict.reason}"
        drift, stats = verdict.drift, verdict.stats
        rows.append([
            verdict.mode,
            outcome,
            "-" if drift is None else f"{drift.largest:.2e}",
            "-" if drift is None else f"{drift.mean_kl:.1e}",
            "-" if drift is None else f"{drift.agreement:.1%}",
            "all" if stats is None else f"{stats['mass']:.2%}",
        ])  # fmt: skip
    dtype = str(model.dtype).removeprefix("torch.")
    title = f"{name}, {dtype}: Twilight against the stock cache"
    columns = ["mode", "tokens", "largest drift", "mean KL", "argmax agrees", "mass"]
    tables.print_table(title, columns, rows, left=2)
    if not is_passed:
        tables.say("NOT passed: " + ("exact settings must agree" if settings.is_exact else "a mode failed"))
    elif settings.is_exact:
        tables.say("passed: every token is the stock cache's")
    else:
        tables.say("passed: nothing failed; these settings round and leave out, so tokens may differ")
