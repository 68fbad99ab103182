"""Arithmetic of packed key-value pages: plain functions on tensors, no Transformers.

Every kernel is defined by the function of its name in ``_reference``. This folder imports itself only
relatively, so a copy of it under another name works.
"""

from ._backend import backend_name, has_kernels, has_matrix_tiles, has_prompt_kernels, release_threads
from ._reference_codec import pack, repeat_channels, unpack
from .codec import (
    largest_magnitudes,
    load_key_pages,
    load_value_pages,
    store_key_pages,
    store_tokens,
    store_value_pages,
)
from .decode import decode_attention, prepare_decode
from .layout import DecodeCall, KeyPages, PlainTokens, ValuePages
from .page_codec import KeyCodec, ValueCodec, key_token_bytes, packed_size, value_token_bytes
from .prefill import attend_stripes, select_stripes
from .prompt import prompt_attention
from .rests import widest_channels, write_rests
from .score import channel_logits, key_logits, page_masses, page_scores
from .stripe_plan import StripePlan
from .top_p import top_p_flags, top_p_threshold

__all__ = [
    "DecodeCall",
    "KeyCodec",
    "KeyPages",
    "PlainTokens",
    "StripePlan",
    "ValueCodec",
    "ValuePages",
    "attend_stripes",
    "backend_name",
    "channel_logits",
    "decode_attention",
    "has_kernels",
    "has_matrix_tiles",
    "has_prompt_kernels",
    "key_logits",
    "key_token_bytes",
    "largest_magnitudes",
    "load_key_pages",
    "load_value_pages",
    "pack",
    "packed_size",
    "page_masses",
    "page_scores",
    "prepare_decode",
    "prompt_attention",
    "release_threads",
    "repeat_channels",
    "select_stripes",
    "store_key_pages",
    "store_tokens",
    "store_value_pages",
    "top_p_flags",
    "top_p_threshold",
    "unpack",
    "value_token_bytes",
    "widest_channels",
    "write_rests",
]
