"""What does a token of ``generate`` cost with CUDA graphs and without, and are the tokens the same?

Regime: a Llama of random weights, one prompt of random tokens, greedy. Its attention is diffuse, so nothing is said of
pruning here: launches are what is compared. Milliseconds a token are those of a long answer less those of one token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_twilight import TwilightCache, TwilightConfig

from . import models, timing
from .bench_gpu_step import make_model
from .gpu_sizes import Sizes
from .gpu_units import Setting, Unit, attempt

_GRAPH, _PLAIN, _STOCK = "K2V2, graph", "K2V2, launched one by one", "stock, dynamic cache"
_ROUNDS = 3


def units(sizes: Sizes) -> Iterator[Unit]:
    """The one."""
    yield Unit(f"{sizes.generate_context:,}", 5, _run)


def _run(setting: Setting) -> dict[str, Any]:
    sizes, faults = setting.sizes, dict[str, str]()
    model = make_model(sizes, setting.device, setting.dtype, setting.seed)
    generator = torch.Generator().manual_seed(setting.seed)
    prompt = torch.randint(sizes.model["vocab_size"], (1, sizes.generate_context), generator=generator)
    prompt = prompt.to(setting.device)
    times = dict[str, list[float]]()
    answers, captures = dict[str, Tensor](), 0
    for index in range(1 + _ROUNDS):  # the first compiles and is not kept
        for name in (_GRAPH, _PLAIN, _STOCK):
            if name in faults:
                continue
            with attempt(faults, name, setting.device):
                answers[name], ms, cache = _generate(model, prompt, name, sizes.generate_tokens)
                if name == _GRAPH:
                    captures = 0 if cache is None or cache.graph is None else cache.graph.captures
                    if setting.device.type == "cuda" and not captures:
                        raise ArithmeticError(f"no graph was captured: {cache and cache.graph and cache.graph.reason}")
                times.setdefault(name, []).extend([ms] if index else [])
    if _GRAPH in answers and _PLAIN in answers:
        same = int((answers[_GRAPH] == answers[_PLAIN]).sum()) - sizes.generate_context
        if same < sizes.generate_tokens:
            faults["tokens"] = f"only {same} of {sizes.generate_tokens} are the same with a graph and without"
    rows = [
        {
            "name": name, "is_ours": name != _STOCK, "launch": "graph" if name == _GRAPH and captures else "eager",
            "ms": timing.summary(found),
        }
        for name, found in times.items() if name not in faults
    ]  # fmt: skip
    return {"context": sizes.generate_context, "captures": captures, "entrants": rows, "faults": faults}


def _generate(model: Any, prompt: Tensor, name: str, tokens: int) -> tuple[Tensor, float, TwilightCache | None]:
    """Answer with one token, then with ``tokens``: the long answer, milliseconds a token, and its cache."""
    seconds, answer, cache = [], prompt, None
    for count in (1, tokens):
        cache = None if name == _STOCK else TwilightCache(model.config, TwilightConfig.preset("compact"))
        if cache is None:
            models.use_attention(model, models.STOCK_ATTENTION)
        options: dict[str, Any] = {"disable_compile": name != _GRAPH}
        if cache is not None:
            options |= {"past_key_values": cache, "cache_implementation": "twilight"}
        timing.synchronize()
        begin = time.perf_counter()
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip
        timing.synchronize()
        seconds.append(time.perf_counter() - begin)
    return answer, (seconds[1] - seconds[0]) / (tokens - 1) * 1e3, cache
