"""Selectors: which packed tokens a decode step may attend to, one file each."""

from __future__ import annotations

from .budget import Budget, check_budget
from .double_sparse import DoubleSparse
from .full import Full
from .quest import Quest
from .selector import LayerView, Observer, Selection, Selector
from .snapkv import NUM_QUERIES, SnapKV
from .state import SelectorState
from .streaming import Streaming
from .tactic import Tactic

__all__ = [
    "NUM_QUERIES",
    "SELECTORS",
    "Budget",
    "DoubleSparse",
    "Full",
    "LayerView",
    "Observer",
    "Quest",
    "Selection",
    "Selector",
    "SelectorState",
    "SnapKV",
    "Streaming",
    "Tactic",
    "check_budget",
]

SELECTORS: dict[str, type[Selector]] = {
    "full": Full,
    "quest": Quest,
    "tactic": Tactic,
    "double_sparse": DoubleSparse,
    "streaming": Streaming,
    "snapkv": SnapKV,
}
