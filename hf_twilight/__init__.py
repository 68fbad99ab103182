"""Long-context inference on Hugging Face Transformers: packed KV cache and adaptive sparse attention.

Importing this package makes the name ``"twilight"`` known to Transformers, as a cache and as an attention; everything
heavy is imported when it is first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .cache_name import allow_name
from .import_hooks import on_import

if TYPE_CHECKING:
    from .cache import TwilightCache
    from .calibration import Calibration, calibrate
    from .config import PRESETS, TwilightConfig
    from .embedded import load_model, load_tokenizer
    from .engine import Engine, SamplingParams
    from .generation import disable, enable, patch, twilight, unpatch
    from .prefill_calibration import calibrate_prefill
    from .skvq_calibration import calibrate_skvq

_HOMES = {
    "Calibration": "calibration",
    "Engine": "engine",
    "PRESETS": "config",
    "SamplingParams": "engine",
    "TwilightCache": "cache",
    "TwilightConfig": "config",
    "calibrate": "calibration",
    "calibrate_prefill": "prefill_calibration",
    "calibrate_skvq": "skvq_calibration",
    "disable": "generation",
    "enable": "generation",
    "load_model": "embedded",
    "load_tokenizer": "embedded",
    "patch": "generation",
    "twilight": "generation",
    "unpatch": "generation",
}

__all__ = [
    "PRESETS",
    "Calibration",
    "Engine",
    "SamplingParams",
    "TwilightCache",
    "TwilightConfig",
    "calibrate",
    "calibrate_prefill",
    "calibrate_skvq",
    "disable",
    "enable",
    "load_model",
    "load_tokenizer",
    "patch",
    "twilight",
    "unpatch",
]

try:
    __version__ = version("hf-twilight")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


on_import("transformers.generation.configuration_utils", allow_name)
# importing these two registers the attention and wraps the cache factory
on_import("transformers.modeling_utils", lambda _: import_module(".attention", __name__))
on_import("transformers.generation.utils", lambda _: import_module(".generation", __name__))
