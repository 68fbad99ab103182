"""Memory of packed key-value pages: pools, block tables, layer stores, selectors. Knows no Transformers."""

from .accounting import LayerBytes
from .decode_policy import DecodePolicy
from .decode_stats import DecodeStats
from .layer_store import LayerStore
from .paged_store import PagedStore, PromptTables, RowTables
from .pool import PagePool
from .prefix_tree import PrefixTree
from .refined_channels import RefinedChannels, check_refined
from .selectors import (
    SELECTORS,
    Budget,
    DoubleSparse,
    Full,
    LayerView,
    Quest,
    Selection,
    Selector,
    SelectorState,
    SnapKV,
    Streaming,
    Tactic,
    check_budget,
)
from .sequences import DRAFT_SLACK, Crop, Flush, Layout, SequenceBatch, Step
from .tree_page import Match, TreePage

__all__ = [
    "DRAFT_SLACK",
    "SELECTORS",
    "Budget",
    "Crop",
    "DecodePolicy",
    "DecodeStats",
    "DoubleSparse",
    "Flush",
    "Full",
    "LayerBytes",
    "LayerStore",
    "LayerView",
    "Layout",
    "Match",
    "PagePool",
    "PagedStore",
    "PrefixTree",
    "PromptTables",
    "Quest",
    "RefinedChannels",
    "RowTables",
    "Selection",
    "Selector",
    "SelectorState",
    "SequenceBatch",
    "SnapKV",
    "Step",
    "Streaming",
    "Tactic",
    "TreePage",
    "check_budget",
    "check_refined",
]
