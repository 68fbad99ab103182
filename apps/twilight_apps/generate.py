"""``hf-twilight generate``: answer a question about a long document, beside the stock cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from hf_twilight import TwilightCache

from . import documents, models, tables

if TYPE_CHECKING:
    from hf_twilight import TwilightConfig


_WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class Request:
    """What is asked.

    Args:
        document: a text file; None for the built-in document.
        question: asked about the document; None for the one whose answer is hidden in the built-in document.
        prompt: asked as it stands, instead of a document and a question.
        context: tokens of the document.
        max_new_tokens: tokens of the answer at most.
        temperature: 0 takes the likeliest token, above it samples.
        save_cache: where the prefilled document is written, before the question.
        load_cache: a prefilled document that ``save_cache`` wrote.
    """

    document: Path | None = None
    question: str | None = None
    prompt: str | None = None
    context: int = 3500
    max_new_tokens: int = 64
    temperature: float = 0.0
    save_cache: Path | None = None
    load_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (likeliest token) or more, got {self.temperature}")
        text_given = self.document is not None or self.question is not None
        if self.prompt is not None and (text_given or self.load_cache is not None):
            raise ValueError("--prompt must stand alone: leave out --document, --question and --load-cache")
        if self.load_cache is not None and (self.document is not None or self.save_cache is not None):
            raise ValueError(
                "--load-cache must stand without --document and --save-cache, which it replaces; leave them out"
            )


@dataclass
class Answer:
    """What one cache made of the request: ids, text and times.

    ``prefill_s`` runs to the first token; ``ms_per_token`` is the median over the tokens after it.
    """

    text: str
    tokens: list[int]
    prefill_s: float
    ms_per_token: float | None


class _TimedStreamer(TextStreamer):
    """Print text as it comes and note when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_first: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self.on_first = on_first

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            if len(self.times) == 1:
                self.on_first()
        super().put(value)  # type: ignore[no-untyped-call]


def run(request: Request, model_name: str, dtype: str, settings: TwilightConfig, *, compare: bool) -> dict[str, Any]:
    """Answer a request from a Twilight cache and, if ``compare``, from the stock cache; print both.

    Returns:
        What ``--json`` prints: the request, the settings, one record for each cache, and whether they agree.
    """
    tokenizer = models.load_tokenizer(model_name)
    saved = TwilightCache.load(request.load_cache) if request.load_cache is not None else None
    prompt = _prompt(request, tokenizer, saved)
    model = _model_for(model_name, dtype, prompt.ids.shape[1] + request.max_new_tokens, saved)
    if request.load_cache is not None:
        cache = TwilightCache.load(request.load_cache, model.config)
    else:
        cache = TwilightCache(model.config, settings)
    _introduce(request, model_name, model, prompt)
    _warm_up(model, cache.settings, prompt.ids, with_stock=compare)
    document_s = 0.0
    if request.save_cache is not None:
        document_s = _prefill_and_save(model, cache, prompt.document, request.save_cache)
    ours = _answer("Twilight", model, tokenizer, cache, prompt.ids, request)
    ours.prefill_s += document_s
    records = {"twilight": {**asdict(ours), **_our_figures(cache)}}
    if compare:
        stock = models.stock_cache(model)
        theirs = _answer("Stock cache", model, tokenizer, stock, prompt.ids, request)
        records["stock"] = {**asdict(theirs), "kv_bytes": models.stock_bytes(stock)}
    _print_figures(records)
    if request.load_cache is not None:
        tables.say("Twilight's prefill is the question's alone: the document came from the file.")
    return {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "request": asdict(request),
        "settings": cache.settings.to_dict(),
        "prompt_tokens": prompt.ids.shape[1],
        "results": records,
        "is_identical": records["stock"]["tokens"] == ours.tokens if compare else None,
    }


def _prompt(request: Request, tokenizer: PreTrainedTokenizerBase, saved: TwilightCache | None) -> documents.Prompt:
    if request.prompt is not None:
        return documents.plain_prompt(tokenizer, request.prompt)
    question = request.question or documents.QUESTION
    if saved is not None:
        if saved.token_ids is None:
            raise ValueError(
                f"{request.load_cache} must hold the document's tokens, got a cache saved without them; "
                "write it with cache.save(path, tokens=ids) or hf-twilight generate --save-cache"
            )
        document = saved.token_ids.reshape(1, -1).long()
        return documents.Prompt(document, documents.question_suffix(tokenizer, question))
    text = documents.document_text(request.document)
    text = str(tokenizer.decode(documents.cut(tokenizer, text, request.context)))
    if request.document is None and request.question is None:
        text = documents.hide(text, documents.FACT)
    return documents.question_prompt(tokenizer, text, question)


def _model_for(name: str, dtype: str, tokens: int, saved: TwilightCache | None) -> PreTrainedModel:
    """Load the model; its RoPE is extended if it was not made for so many tokens, or as the saved cache's was."""
    if saved is not None:
        return models.load(name, dtype, getattr(saved.model_config, "max_position_embeddings", None))
    model = models.load(name, dtype)
    limit = models.trained_context(model)
    if limit is None or tokens <= limit:
        return model
    tables.say(f"note: {tokens} tokens exceed the {limit} the model was made for: RoPE extended with YaRN")
    return models.load(name, dtype, -(-tokens // limit) * limit)  # whole multiples: room for other questions


def _introduce(request: Request, name: str, model: PreTrainedModel, prompt: documents.Prompt) -> None:
    where = request.document or ("a saved cache" if request.load_cache else "Python's language reference")
    tables.say(f"model     {name} ({str(model.dtype).removeprefix('torch.')})")
    if request.prompt is None:
        hidden = ""
        if request.document is None and request.question is None and request.load_cache is None:
            hidden = f', with this hidden halfway: "{documents.FACT}"'
        tables.say(f"document  {prompt.document.shape[1]} tokens of {where}{hidden}")
        tables.say(f"question  {request.question or documents.QUESTION}")
    else:
        tables.say(f"prompt    {prompt.ids.shape[1]} tokens")


def _warm_up(model: PreTrainedModel, settings: TwilightConfig, ids: Tensor, *, with_stock: bool) -> None:
    """Run the beginning of a prompt through throw-away caches, so that no compilation or first touch is timed."""
    if ids.shape[1] >= settings.min_prefill_len > _WARM_UP_TOKENS:  # its kernels are those of sparse prefill, too
        settings = replace(settings, min_prefill_len=_WARM_UP_TOKENS)
    ids = ids[:, :_WARM_UP_TOKENS].to(model.device)
    caches = [TwilightCache(model.config, settings), *([models.stock_cache(model)] if with_stock else [])]
    steps = 3
    with tables.layer_progress(model, "Warm-up (the first run compiles)", len(caches) * (steps + 1)):
        for cache in caches:
            is_ours = isinstance(cache, TwilightCache)
            models.use_attention(model, models.OUR_ATTENTION if is_ours else models.STOCK_ATTENTION)
            with torch.inference_mode():
                for part in [ids] + [ids[:, -1:]] * steps:
                    model(input_ids=part, past_key_values=cache, logits_to_keep=1)


def _prefill_and_save(model: PreTrainedModel, cache: TwilightCache, document: Tensor, path: Path) -> float:
    """Read the document, save it, and return the seconds that reading took."""
    models.use_attention(model, models.OUR_ATTENTION)
    with torch.inference_mode(), tables.layer_progress(model, "Prefill of the document"):
        start = time.perf_counter()
        model(input_ids=document.to(model.device), past_key_values=cache, logits_to_keep=1)
        seconds = time.perf_counter() - start
    cache.save(path, tokens=document)
    tables.say(f"saved     {path}: ask again with --load-cache")
    return seconds


def _answer(
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: DynamicCache,
    ids: Tensor,
    request: Request,
) -> Answer:
    """Generate with ``cache``, printing the text as it comes."""
    is_ours = isinstance(cache, TwilightCache)
    models.use_attention(model, models.OUR_ATTENTION if is_ours else models.STOCK_ATTENTION)
    ids = ids.to(model.device)
    sampling: dict[str, Any] = {"do_sample": request.temperature > 0}
    if request.temperature > 0:
        sampling["temperature"] = request.temperature
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    random_state = torch.get_rng_state()
    with tables.layer_progress(model, f"{label}: prefill") as stop:

        def begin() -> None:
            stop()
            tables.say(f"\n{label} answers:")

        streamer = _TimedStreamer(tokenizer, begin)
        start = time.perf_counter()
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=streamer,
            max_new_tokens=request.max_new_tokens, pad_token_id=pad, **sampling,
        )  # fmt: skip
    torch.set_rng_state(random_state)  # both caches sample from the same numbers
    tokens = out[0, ids.shape[1] :].tolist()
    times = streamer.times
    gaps = [(after - before) * 1e3 for before, after in pairwise(times)]
    per_token = statistics.median(gaps) if gaps else None
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(str(text), tokens, times[0] - start, per_token)


def _our_figures(cache: TwilightCache) -> dict[str, Any]:
    memory = cache.memory()
    return {"kv_bytes": cache.nbytes, "bytes_by_part": asdict(memory), "decode": models.cache_stats(cache)}


def _print_figures(records: dict[str, dict[str, Any]]) -> None:
    ours, stock = records["twilight"], records.get("stock")

    def row(name: str, show: Callable[[dict[str, Any]], str], ratio: str = "") -> list[str]:
        return [name, show(ours), *([show(stock), ratio] if stock is not None else [])]

    def ratio(name: str) -> str:
        if stock is None or not stock[name] or not ours[name]:
            return ""
        return f"{stock[name] / ours[name]:.2f}x"

    ms = "ms_per_token"
    rows = [
        row("KV cache", lambda r: tables.size(r["kv_bytes"]), ratio("kv_bytes")),
        row("prefill", lambda r: f"{r['prefill_s']:.2f} s", ratio("prefill_s")),
        row("each further token", lambda r: "-" if r[ms] is None else f"{r[ms]:.1f} ms", ratio(ms)),
    ]
    filler = ["", ""] if stock is not None else []
    parts = ours["bytes_by_part"].items()
    rows[1:1] = [[f"  {part}", tables.size(count), *filler] for part, count in parts if count]
    if ours["decode"] is not None:
        decode = ours["decode"]
        rows += [
            ["packed tokens scored, mean of layers and heads", f"{decode['scored']:,.0f}", *filler],
            ["packed tokens attended", f"{decode['kept']:,.0f}", *filler],
            ["attention mass attended", f"{decode['mass']:.1%}", *filler],
        ]
    columns = ["", "Twilight", *(["stock", "stock / Twilight"] if stock is not None else [])]
    tables.say("")
    tables.print_table("Figures", columns, rows)
    if stock is not None:
        is_same = ours["tokens"] == stock["tokens"]
        tables.say(
            "The answers are identical." if is_same else f"The answers differ from {_first_difference(records)}."
        )


def _first_difference(records: dict[str, dict[str, Any]]) -> str:
    pairs = zip(records["twilight"]["tokens"], records["stock"]["tokens"], strict=False)
    place = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    return "the shorter's end on" if place is None else f"token {place + 1} on"
