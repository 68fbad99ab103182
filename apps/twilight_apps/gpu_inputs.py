"""Inputs of GPU benchmarks: packed pages and dense keys of a batch, as concentrated as a real model's attention.

A batch repeats one request: each has memory of its own, but the same content, so that kept shares are those of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_twilight import TwilightConfig
from twilight_kernels import KeyPages, PlainTokens, ValuePages, decode_attention, store_key_pages, store_value_pages

from .synthetic import AttentionInputs, attention_inputs

HOW = (
    "Logits of each query head fall as a power law of the rank, over positions in random order; exponents are drawn so "
    "that heads need shares of the tokens measured on the embedded model (concentration.NEEDED_SHARES). All requests "
    "of a batch hold copies of one. Rows of a prompt differ by noise of 0.6 of a "
    "query's standard deviation: at 16,384 tokens a quarter of the causal pairs is then computed, as measured on the "
    "embedded model at 16,000. In a whole model each layer's keys are made for the query it really has at that step."
)
_ROW_NOISE = 0.6


@dataclass(frozen=True)
class PackedLayer:
    """One layer of a batch: what ``decode_attention`` takes, the step's token in the last plain column already."""

    key_pages: KeyPages
    value_pages: ValuePages
    plain: PlainTokens
    block_table: Tensor
    num_pages: Tensor
    plain_len: Tensor

    def attend(self, query: Tensor, scaling: float, p: float, **options: Any) -> Tensor:
        """Attend one token a row, as a decode step does."""
        return decode_attention(
            query, self.key_pages, self.value_pages, self.plain, block_table=self.block_table,
            num_pages=self.num_pages, plain_len=self.plain_len, scaling=scaling, p=p, **options,
        )  # fmt: skip

    def first(self) -> PackedLayer:
        """The first request alone."""
        pages, keys, values = self.block_table.shape[1], self.key_pages, self.value_pages

        def part(found: KeyPages | ValuePages) -> tuple[Tensor, Tensor, Tensor]:
            return found.codes[:pages], found.lo[:pages], found.step[:pages]

        return PackedLayer(
            KeyPages(keys.codec, *part(keys)), ValuePages(values.codec, *part(values)),
            PlainTokens(self.plain.keys[:1], self.plain.values[:1]), self.block_table[:1], self.num_pages[:1],
            self.plain_len[:1],
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of pages, sinks and window."""
        tensors = [*self.key_pages.tensors().values(), *self.value_pages.tensors().values()]
        return sum(tensor.nbytes for tensor in [*tensors, self.plain.keys, self.plain.values])


def make_inputs(
    shape: tuple[int, int, int], tokens: int, seed: int, device: torch.device, dtype: torch.dtype
) -> AttentionInputs:
    """Make one request's decode inputs on ``device``; logits stay behind, they are those of unrounded keys."""
    made = attention_inputs(*shape, tokens, seed)
    return AttentionInputs(
        made.query.to(device, dtype), made.keys.to(device, dtype), made.values.to(device, dtype), made.logits,
        made.scaling,
    )  # fmt: skip


def make_rows(inputs: AttentionInputs, seed: int) -> Tensor:
    """Make queries of a whole prompt, ``[1, H, S, D]``, whose rows look for what the one query looks for."""
    heads, dim = inputs.query.shape[1:]
    generator = torch.Generator(inputs.query.device).manual_seed(seed)
    noise = torch.randn(
        1, heads, inputs.keys.shape[2], dim, generator=generator, device=inputs.query.device, dtype=inputs.query.dtype
    )
    return noise.mul_(_ROW_NOISE).add_(inputs.query[:, :, None])


def pack(keys: Tensor, values: Tensor, settings: TwilightConfig, batch: int) -> PackedLayer:
    """Pack one request, ``[1, K, S, D]`` each, ``batch`` times, as a cache with ``settings`` would hold it."""
    (_, heads, tokens, dim), value_dim = keys.shape, values.shape[3]
    size, sinks = settings.page_size, settings.num_sinks
    pages = max(0, (tokens - sinks - settings.window) // size)
    end, device = sinks + pages * size, keys.device
    packed_keys = KeyPages.empty(batch * pages, heads, dim, settings.key_codec, keys.dtype, device)
    packed_values = ValuePages.empty(batch * pages, heads, value_dim, settings.value_codec, keys.dtype, device)
    ids = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    for part in ids[0].split(1024):
        span = slice(sinks + int(part[0]) * size, sinks + (int(part[-1]) + 1) * size)
        rows = (x[0, :, span].unflatten(1, (-1, size)).transpose(0, 1) for x in (keys, values))
        store_key_pages(packed_keys, part, next(rows))
        store_value_pages(packed_values, part, next(rows))
    for tensor in [*packed_keys.tensors().values(), *packed_values.tensors().values()]:
        tensor.view(batch, pages, *tensor.shape[1:])[1:] = tensor[:pages]
    plain = PlainTokens.empty(batch, heads, dim, value_dim, sinks + tokens - end, keys.dtype, device)
    for first, column in ((slice(0, sinks), 0), (slice(end, tokens), sinks)):
        count = first.stop - first.start
        plain.keys[..., column : column + count] = keys[:, :, first].transpose(-1, -2)
        plain.values[:, :, column : column + count] = values[:, :, first]
    lengths = torch.full((batch,), pages, dtype=torch.int32, device=device)
    return PackedLayer(packed_keys, packed_values, plain, ids, lengths, torch.full_like(lengths, sinks + tokens - end))
