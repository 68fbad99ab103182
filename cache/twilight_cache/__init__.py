"""Memory of packed key-value pages: pools, block tables, layer stores, selectors. Knows no Transformers."""

from .accounting import LayerBytes
from .layer_store import DecodePolicy, LayerStore
from .paged_store import PagedStore, RowTables
from .pool import PagePool
from .prefix_tree import PrefixTree
from .selectors import SELECTORS, Full, Quest, Selector, Streaming
from .sequences import DRAFT_SLACK, Crop, Flush, Layout, SequenceBatch, Step
from .tree_page import Match, TreePage

__all__ = [
    "DRAFT_SLACK",
    "SELECTORS",
    "Crop",
    "DecodePolicy",
    "Flush",
    "Full",
    "LayerBytes",
    "LayerStore",
    "Layout",
    "Match",
    "PagePool",
    "PagedStore",
    "PrefixTree",
    "Quest",
    "RowTables",
    "Selector",
    "SequenceBatch",
    "Step",
    "Streaming",
    "TreePage",
]
