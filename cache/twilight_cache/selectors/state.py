"""What a selector notes down about the rows of one layer, and what happens to it when the rows change."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SelectorState:
    """Tensors of a selector with rows, KV heads and logical pages first; empty for most selectors.

    They describe packed pages only, whose content never changes, so that they do not depend on how tokens were fed.

    Attributes:
        tensors: by name, ``[B, K, P, ...]``, P with room to grow.
        pages: ``[B]`` int64, the leading pages of each row that the tensors describe.
        run: pages that are described together: a row that is cut keeps the description of whole runs only.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.pages: NDArray[np.int64] = np.zeros(0, np.int64)
        self.run = 1

    @torch.inference_mode(mode=False)  # a tensor made in that mode could not be written to outside of it
    def reserve(
        self, like: Tensor, pages: int, numbers: dict[str, tuple[tuple[int, ...], torch.dtype]], run: int = 1
    ) -> None:
        """Make room for ``pages`` pages a row.

        Args:
            like: ``[B, K, ...]``, of whose rows, KV heads and device the tensors will be.
            pages: logical pages that will be described.
            numbers: shape and dtype of what describes one page of one KV head, by name.
            run: pages that are described together.
        """
        rows, heads = like.shape[:2]
        if len(self.pages) != rows:
            self.tensors, self.pages = {}, np.zeros(rows, np.int64)
        self.run = run
        if self.tensors and next(iter(self.tensors.values())).shape[2] >= pages:
            return
        room = -(-(pages + pages // 8) // run) * run
        for name, (shape, dtype) in numbers.items():
            grown = torch.zeros(rows, heads, room, *shape, dtype=dtype, device=like.device)
            if name in self.tensors:
                grown[:, :, : self.tensors[name].shape[2]] = self.tensors[name]
            self.tensors[name] = grown

    def crop(self, row: int, pages: int) -> None:
        """Forget what is known of page ``pages`` of a row and after."""
        if row < len(self.pages):
            self.pages[row] = min(self.pages[row], pages // self.run * self.run)

    @torch.inference_mode(mode=False)
    def select_rows(self, index: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        if len(self.pages):
            self.tensors = {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}
            self.pages = self.pages[index.cpu().numpy()]

    @torch.inference_mode(mode=False)
    def move(self, device: torch.device) -> None:
        """Move every tensor to ``device``."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of every tensor, room to grow included."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + self.pages.nbytes

    def saved(self) -> dict[str, Tensor]:
        """Every tensor by name, without the room to grow, and ``pages``; nothing if nothing is described."""
        if not len(self.pages):
            return {}
        most = int(self.pages.max())
        return {
            "pages": torch.from_numpy(self.pages.copy()),
            "run": torch.tensor([self.run]),
            **{f"tensors.{name}": tensor[:, :, :most] for name, tensor in self.tensors.items()},
        }

    @torch.inference_mode(mode=False)
    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take over what ``saved`` returned."""
        if saved:
            self.pages, self.run = saved["pages"].numpy().copy(), int(saved["run"])
            names = [name for name in saved if name.startswith("tensors.")]
            self.tensors = {name.removeprefix("tensors."): saved[name].clone() for name in names}
