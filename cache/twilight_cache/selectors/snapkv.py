"""SnapKV: the tokens that the end of the prompt attends to, whatever comes later (arXiv 2404.14469, section 4).

The last queries of the prompt vote: the attention of 32 queries is summed over them and over the query heads of a KV
head, averaged over neighbouring tokens, and the best are the candidates of every later step. Deviations: nothing is
evicted, so another prompt in the same cache chooses anew among all tokens; tokens that are packed after the prompt
are candidates, too. Unlike other selectors it depends on how tokens were fed: the prompt is the last forward of more
than one token, and before one there is no limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from twilight_kernels import load_key_pages

from .budget import Budget, budget_tokens, every_page
from .selector import LayerView, Selection

NUM_QUERIES = 32  # that vote, of the prompt's last
_NEIGHBOURS = 5  # tokens whose votes are averaged


@dataclass(frozen=True)
class SnapKV:
    """Take what the prompt's last queries attended to, and all that is packed later.

    Args:
        budget: packed tokens of the prompt, or their share, that each KV head may attend to.
    """

    budget: Budget = 0.25

    def observe(self, queries: Tensor, layer: LayerView) -> None:
        """Choose the tokens; see ``Observer.observe``."""
        size, most = layer.page_size, max(layer.row_pages)
        if not most:
            return
        layer.state.reserve(layer.plain_keys, most, {"chosen": ((size,), torch.bool)})
        for row, pages in enumerate(layer.row_pages):
            layer.state.pages[row] = pages
            if not pages:
                continue
            votes = self._votes(queries[row], layer, row, pages)  # [K, S]
            best = votes.topk(budget_tokens(self.budget, pages * size), -1).indices
            chosen = torch.zeros_like(votes, dtype=torch.bool).scatter_(-1, best, True)
            layer.state.tensors["chosen"][row, :, :pages] = chosen.unflatten(-1, (pages, size))

    def select(self, query: Tensor, layer: LayerView) -> Selection | None:
        """Return the chosen tokens and all of later pages; see ``Selector.select``."""
        state, most = layer.state, max(layer.row_pages)
        if len(state.pages) != len(layer.row_pages) or not state.pages.any():
            return None
        state.reserve(layer.plain_keys, most, {"chosen": ((layer.page_size,), torch.bool)})
        described = torch.from_numpy(state.pages).to(query.device).view(-1, 1, 1, 1)
        is_later = torch.arange(most, device=query.device).view(1, 1, -1, 1) >= described
        tokens = (state.tensors["chosen"][:, :, :most] | is_later).flatten(2)
        return Selection(every_page(layer.num_pages, layer.kv_heads, most), tokens)

    def _votes(self, queries: Tensor, layer: LayerView, row: int, pages: int) -> Tensor:
        """Attention mass of each packed token, ``[K, S]``, summed over ``queries [H, W, D]``."""
        q = (queries.float() * layer.scaling).unflatten(0, (layer.kv_heads, -1))  # [K, G, W, D]
        keys = load_key_pages(layer.keys, layer.block_table[row, :pages], torch.float32)
        packed = q.flatten(1, 2) @ keys.transpose(0, 1).flatten(1, 2).transpose(1, 2)  # [K, G * W, S]
        length, num_queries = int(layer.plain_len[row]), q.shape[2]
        plain = (q.flatten(1, 2) @ layer.plain_keys[row, :, :, :length].float()).unflatten(1, q.shape[1:3])
        last = length - num_queries + torch.arange(num_queries, device=q.device)
        is_later = torch.arange(length, device=q.device) > last[:, None]  # [W, columns]
        plain_mass = plain.masked_fill(is_later, -torch.inf).logsumexp(-1).flatten(1)
        mass = packed.logsumexp(-1).logaddexp(plain_mass)
        votes = (packed - mass[..., None]).exp().sum(1)
        return avg_pool1d(votes, _NEIGHBOURS, 1, _NEIGHBOURS // 2)
