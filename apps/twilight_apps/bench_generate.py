"""What does a generated token cost with each cache, in the whole model?

Regime: one request, a long prompt already in the cache, one token a forward. The stock cache and every preset
take turns of a few tokens, so that noise of the machine hits all alike; the first of a turn is not timed, because
processor and interpreter have just learned another cache's ways, and ``generate`` stays with one. All are fed what the
stock cache chose before, so that their contexts stay the same and their own choices can be compared step by step. On
GPUs our steps come from a CUDA graph, as they do in ``generate``; the stock cache's are launched one by one, as in
``generate``.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_twilight import TwilightCache
from hf_twilight.decode_call import offer_graph

from . import documents, models, tables, timing

if TYPE_CHECKING:
    from hf_twilight import TwilightConfig

logger = logging.getLogger(__name__)

STOCK, BASE = "stock", "stock, 16 tokens"
_BASE_TOKENS = 16
_TURN = 8  # tokens timed in a row, after one that is not
_PREFILL_CHUNK = 8192


@dataclass
class Entrant:
    """One cache and what its forwards took and chose.

    Attributes:
        cache: filled with the prompt.
        attention: the attention function that goes with it.
        tokens: tokens in the cache.
        times: milliseconds of each forward that was timed.
        choices: likeliest token after each forward.
    """

    cache: DynamicCache
    attention: str
    tokens: int
    times: list[float] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)

    def advance(self, model: PreTrainedModel, token: Tensor, *, is_timed: bool = False) -> None:
        """Feed one token ``[1, 1]`` and note the choice, and the time if asked for."""
        # the name alone: a real switch walks the whole model, and only the entrant after one would find the
        # processor's caches cold
        model.config._attn_implementation = self.attention
        found: list[Tensor] = []
        graph = self.cache.graph if isinstance(self.cache, TwilightCache) else None
        position = torch.tensor([[self.tokens]], device=model.device)

        def forward() -> None:
            if graph is not None:
                found.append(graph.step(token, position)[:, None])
                return
            out = model(input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True)
            found.append(out.logits)

        elapsed = timing.run_ms(forward)
        if is_timed:
            self.times.append(elapsed)
        self.tokens += 1
        self.choices.append(int(found[0][0, -1].argmax()))


def run(
    model_name: str,
    contexts: list[int],
    dtypes: list[str],
    settings: dict[str, TwilightConfig],
    *,
    new_tokens: int,
    text: Path | None,
) -> dict[str, Any]:
    """Time generation at each dtype and context; print a table for each.

    Returns:
        What ``--json`` prints.
    Raises:
        ValueError: fewer than one context token or new token.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    tokenizer = models.load_tokenizer(model_name)
    document = documents.document_text(text)
    tables.say("Every cache is filled with the exact keys and values of the stock cache's prefill.")
    results = []
    for dtype in dtypes:
        for context in contexts:
            ids = torch.tensor([documents.cut(tokenizer, document, context, repeat=True)])
            model, is_extended = _model(model_name, dtype, context + _fed(new_tokens))
            result = _at_context(model, ids, settings, new_tokens)
            result["rope_extended_with_yarn"] = is_extended
            results.append(result)
            _print(model_name, result)
            del model  # two models and their caches would not fit everywhere
    return {
        "model": model_name,
        "text": "file" if text is not None else "pydoc_data.topics",
        "new_tokens": new_tokens,
        "settings": {name: config.to_dict() for name, config in settings.items()},
        "filled_from": "the stock cache's exact keys and values",
        "results": results,
    }


def _model(name: str, dtype: str, tokens: int) -> tuple[PreTrainedModel, bool]:
    model = models.load(name, dtype)
    limit = models.trained_context(model)
    if limit is None or tokens <= limit:
        return model, False
    tables.say(f"note: {tokens} tokens exceed the {limit} the model was made for: RoPE extended with YaRN")
    return models.load(name, dtype, tokens), True


@torch.inference_mode()
def _at_context(
    model: PreTrainedModel, ids: Tensor, settings: dict[str, TwilightConfig], new_tokens: int
) -> dict[str, Any]:
    ids = ids.to(model.device)
    stock, prefill_s = _prefilled(model, ids)
    base, _ = _prefilled(model, ids[:, :_BASE_TOKENS])
    length = ids.shape[1]
    entrants = {STOCK: Entrant(stock, models.STOCK_ATTENTION, length)}
    for name, config in settings.items():
        entrants[name] = Entrant(_filled(model, stock, config), models.OUR_ATTENTION, length)
    entrants[BASE] = Entrant(base, models.STOCK_ATTENTION, min(_BASE_TOKENS, length))
    sizes = {name: _num_bytes(entrant.cache) for name, entrant in entrants.items()}
    _take_turns(model, entrants, _written(model, stock, ids[:, -1:], _fed(new_tokens)))
    rows = []
    bf16_bytes = sizes[STOCK] * 2 // model.dtype.itemsize
    expected = entrants[STOCK].choices
    for name, entrant in entrants.items():
        same = sum(a == b for a, b in zip(entrant.choices, expected, strict=True)) / len(expected)
        row: dict[str, Any] = {"name": name, "ms_per_token": timing.summary(entrant.times)}
        if name != BASE:
            row |= {"kv_bytes": sizes[name], "bf16_bytes_over_kv_bytes": bf16_bytes / sizes[name]}
            row["agreement"] = same
        if isinstance(entrant.cache, TwilightCache):
            row["launch"] = "graph" if entrant.cache.graph is not None and entrant.cache.graph.captures else "eager"
            row["decode"] = models.cache_stats(entrant.cache)
        rows.append(row)
    for row in rows:
        row["speedup"] = rows[0]["ms_per_token"]["median"] / row["ms_per_token"]["median"]
    dtype = str(model.dtype).removeprefix("torch.")
    return {"dtype": dtype, "context": length, "stock_prefill_s": prefill_s, "entrants": rows}


def _fed(new_tokens: int) -> int:
    """Tokens that an entrant takes for so many to be timed: each turn begins with one that is not."""
    return new_tokens + -(-new_tokens // _TURN)


def _written(model: PreTrainedModel, stock: DynamicCache, token: Tensor, count: int) -> Tensor:
    """Return ``token [1, 1]`` and what the stock cache writes after it, ``count`` tokens ``[1, count]`` in all."""
    writer = Entrant(copy.deepcopy(stock), models.STOCK_ATTENTION, stock.get_seq_length())
    tokens = [token]
    with tables.progress("Writing", count - 1) as bar:
        for _ in range(count - 1):
            writer.advance(model, tokens[-1])
            tokens.append(torch.tensor([[writer.choices[-1]]], device=model.device))
            bar.advance(bar.task_ids[0])
    return torch.cat(tokens, 1)


def _take_turns(model: PreTrainedModel, entrants: dict[str, Entrant], tokens: Tensor) -> None:
    """Feed ``tokens [1, N]`` to every entrant, a turn after the other, each round beginning with another entrant."""
    names, turns = list(entrants), tokens.split(1 + _TURN, 1)
    with tables.progress("Timing", len(turns)) as bar:
        for index, turn in enumerate(turns):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                for place, token in enumerate(turn.split(1, 1)):
                    entrants[name].advance(model, token, is_timed=place > 0)
            bar.advance(bar.task_ids[0])


def _prefilled(model: PreTrainedModel, ids: Tensor) -> tuple[DynamicCache, float]:
    """Read ``ids`` with a stock cache, in chunks where there are many; return seconds too."""
    models.use_attention(model, models.STOCK_ATTENTION)
    cache = models.stock_cache(model)
    parts = ids.split(_PREFILL_CHUNK, 1)

    def read() -> None:
        for part in parts:
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)

    with tables.layer_progress(model, f"Prefill of {ids.shape[1]} tokens", len(parts)):
        seconds = timing.run_ms(read) / 1e3
    return cache, seconds


def _filled(model: PreTrainedModel, stock: DynamicCache, config: TwilightConfig) -> TwilightCache:
    """Return a Twilight cache that holds the stock cache's keys and values."""
    models.use_attention(model, models.STOCK_ATTENTION)  # else tokens would wait for attention to claim them
    cache = TwilightCache(model.config, config)
    for index, layer in enumerate(stock.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise ValueError(
                f"bench generate needs a model whose layers all have keys and values, got "
                f"{type(layer).__name__} in layer {index}; choose another model"
            )
        cache.update(keys, values, index)
    cache.memory()
    models.use_attention(model, models.OUR_ATTENTION)
    offer_graph(model, cache)
    return cache


def _num_bytes(cache: DynamicCache) -> int:
    return cache.nbytes if isinstance(cache, TwilightCache) else models.stock_bytes(cache)


def _print(name: str, result: dict[str, Any]) -> None:
    rows = []
    for row in result["entrants"]:
        decode = row.get("decode")
        rows.append([
            row["name"],
            tables.spread(row["ms_per_token"]),
            f"{row['speedup']:.2f}",
            tables.size(row["kv_bytes"]) if "kv_bytes" in row else "-",
            f"{row['bf16_bytes_over_kv_bytes']:.2f}" if "kv_bytes" in row else "-",
            f"{row['agreement']:.1%}" if "agreement" in row else "-",
            f"{decode['kept']:,.0f} of {decode['scored']:,.0f}" if decode else "all",
            f"{decode['mass']:.2%}" if decode else "-",
        ])  # fmt: skip
    extended = ", RoPE extended with YaRN" if result["rope_extended_with_yarn"] else ""
    title = (
        f"{name}, {result['dtype']}, {result['context']:,} tokens{extended}, "
        f"{torch.get_num_threads()} threads, prefill {result['stock_prefill_s']:.1f} s"
    )
    columns = ["cache", "ms a token [p20, p80]", "x stock", "KV", "bf16 / KV", "agrees", "attended", "mass"]
    tables.print_table(title, columns, rows)
