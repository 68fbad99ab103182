"""A byte tokenizer, and engines over the tiny model of ``tests/hf_twilight``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from hf_twilight.engine import Engine


class ByteTokenizer:
    """Ids are ASCII codes; 2 ends a text."""

    eos_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(i for i in ids if i != self.eos_token_id).decode(errors="replace")


SMALL = {"page_size": 16, "window": 32, "num_sinks": 4}
SETTINGS = {
    "exact": {"preset": "exact", **SMALL},
    "packed": {"preset": "balanced", **SMALL, "group_size": 16},
    "sparse": {"preset": "balanced", **SMALL, "group_size": 16, "p": 0.8, "min_sparse_len": 16, "dense_layers": (0,)},
    "layers": {"preset": "balanced", **SMALL, "group_size": 16, "layers": {1: {"key_bits": 8, "value_bits": 4}}},
    "refined": {
        "preset": "compact", **SMALL, "group_size": 16, "p": 0.9, "min_sparse_len": 16,
        "layers": {1: {"key_refined": [[0, 1, 2, 3, 4, 5, 6, 7], [8, 8, 8, 1, 3, 4, 5, 6]]}},
    },
    "chosen": {
        "preset": "compact", **SMALL, "group_size": 16, "p": 0.9, "min_sparse_len": 16, "key_refined": 0.5,
    },
    "mixed": {"preset": "balanced", **SMALL, "value_bits": 16, "num_sinks": 0},
}  # fmt: skip


@pytest.fixture(params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETTINGS[request.param]


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def make_engine(llama: LlamaForCausalLM, tokenizer: ByteTokenizer) -> Iterator[Callable[..., Engine]]:
    """Make engines that are closed after the test."""
    made = []

    def make(**options: Any) -> Engine:
        made.append(Engine(options.pop("model", llama), tokenizer, **({"settings": SETTINGS["packed"]} | options)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
