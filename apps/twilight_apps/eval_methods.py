"""What is evaluated: our presets, Transformers' caches and the policies of other papers, all by name.

Policies run on unrounded pages, so that what they leave out is told apart from what packing rounds off. New selectors
appear by themselves: each alone with a fixed budget, as its paper has it, and under the top-p pruner.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import DynamicCache, PreTrainedConfig, QuantizedCache

from hf_twilight import PRESETS, TwilightCache, TwilightConfig
from twilight_cache import SELECTORS

from . import models

DENSE = "dense"
PACKING, DECODE = "packing", "decode"
NO_BASELINES = "none"
PRESET, PEER, POLICY = "preset", "peer", "policy"

_BUDGET = 0.25  # share of the packed tokens, as in Quest's and Twilight's tables
_BUDGET_ONLY = ("streaming", "snapkv")  # these estimate no mass, so that nothing but a budget limits them
_POLICY_P = 0.95
# bits and axis as Transformers' documentation recommends them: axis 0 for quanto, 1 for hqq
_PEERS: dict[str, dict[str, Any]] = {
    "fp8": {"backend": "fp8"},
    "quanto 4-bit": {"backend": "quanto", "nbits": 4},
    "quanto 2-bit": {"backend": "quanto", "nbits": 2},
    "hqq 4-bit": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "hqq 2-bit": {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1},
}
_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
_PEERS_INSTALL = 'pip install "hf-twilight[peers]"'


@dataclass(frozen=True)
class Method:
    """One entrant.

    Attributes:
        name: as it is printed.
        kind: ``"dense"``, ``"preset"``, ``"peer"`` or ``"policy"``.
        make: builds an empty cache for a model's config.
        modes: the drift modes in which it differs from another entrant.
        settings: what identifies it in a record.
        missing: why it cannot run here; None if it can.
    """

    name: str
    kind: str
    make: Callable[[PreTrainedConfig], Any]
    modes: tuple[str, ...] = (PACKING, DECODE)
    settings: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None


def dense() -> Method:
    """Return the stock cache, which everything is judged by."""
    return Method(DENSE, DENSE, lambda config: DynamicCache(config=config))


def presets(names: Sequence[str], changes: Sequence[str] = ()) -> list[Method]:
    """Return our caches by preset name, or by the folder of a saved config; arguments and errors as ``configs``."""
    found = configs(names, changes)
    return [_ours(", ".join([name, *changes]), PRESET, config) for name, config in found.items()]


def configs(names: Sequence[str], changes: Sequence[str] = ()) -> dict[str, TwilightConfig]:
    """Return settings by preset name, or by the name of the folder they were saved in.

    Args:
        names: presets and folders.
        changes: ``key=value`` on top of each, as ``--set`` takes them.
    Raises:
        ValueError: neither a preset nor a folder (the nearest preset is named), or a name twice.
        FileNotFoundError: a folder without a config.
    """
    found: dict[str, TwilightConfig] = {}
    for name in names:
        is_folder = name not in PRESETS and Path(name).is_dir()
        label = Path(name).resolve().name if is_folder else name
        if label in found:
            raise ValueError(f"presets must have different names, got {label!r} twice; rename one folder")
        config = TwilightConfig.from_pretrained(name) if is_folder else TwilightConfig.preset(name)
        found[label] = models.changed(config, changes)
    return found


def baselines(names: Sequence[str]) -> list[Method]:
    """Return peers and policies by name; no names are all of them, ``"none"`` is none.

    Args:
        names: of peers and policies.
    Raises:
        ValueError: an unknown name; the nearest is given.
    """
    if list(names) == [NO_BASELINES]:
        return []
    every = {method.name: method for method in [*_peers(), *_policies()]}
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"baseline must be {NO_BASELINES!r} or among {', '.join(every)}, got {name!r}; did you mean {near!r}?"
            )
    return [method for name, method in every.items() if not names or name in names]


def _peers() -> list[Method]:
    found = []
    for name, options in _PEERS.items():

        def make(config: PreTrainedConfig, options: dict[str, Any] = options) -> Any:
            return QuantizedCache(config=config, **options)

        found.append(Method(name, PEER, make, settings=options, missing=_missing(options["backend"])))
    return found


def _missing(backend: str) -> str | None:
    package = _PACKAGES.get(backend)
    if package is None:
        return None
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: {_PEERS_INSTALL}"
    return None


def _policies() -> list[Method]:
    """Selectors and the pruner on unrounded pages; they act on single-token steps only."""
    pruned = f"top-p {_POLICY_P:g}"
    share = f"1/{round(1 / _BUDGET)}"
    found = []
    for name in SELECTORS:
        if name == "full":
            found.append(_policy(pruned, name, _POLICY_P, None))
            continue
        found.append(_policy(f"{name} {share}", name, 1.0, _BUDGET))
        found.append(_policy(f"{name} {share} + {pruned}", name, _POLICY_P, _BUDGET))
        if name not in _BUDGET_ONLY:
            found.append(_policy(f"{name} + {pruned}", name, _POLICY_P, None))
    return found


def _policy(label: str, selector: str, p: float, budget: float | None) -> Method:
    config = TwilightConfig.preset("exact", p=p, selector=selector, budget=budget, dense_layers=(0, 1))
    return _ours(label, POLICY, config, (DECODE,))


def _ours(name: str, kind: str, config: TwilightConfig, modes: tuple[str, ...] = (PACKING, DECODE)) -> Method:
    return Method(name, kind, lambda model: TwilightCache(model, config), modes, config.to_dict())
