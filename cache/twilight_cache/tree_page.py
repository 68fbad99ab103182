"""One page of the prefix tree, and what a prompt finds there."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class TreePage:
    """One page of the tree, or one that a request is still filling.

    Attributes:
        parent: the page before it; None for the root.
        serial: when it was made, which breaks ties.
        start, size: position of its first token, and how many tokens it can hold.
        tokens: those it holds, or will hold once the step that was planned has run.
        plain, packed: its slots, None where it has none.
        users, plain_users: requests whose sequence it is part of; requests that read its plain form.
        last_use: step in which it was last held.
        is_listed: whether others can find it.
        children: full pages after it by their tokens.
        open: pages after it that are not full.
    """

    parent: TreePage | None
    serial: int
    start: int
    size: int
    tokens: list[int] = field(default_factory=list)
    plain: int | None = None
    packed: int | None = None
    users: int = 0
    plain_users: int = 0
    last_use: int = 0
    is_listed: bool = False
    children: dict[tuple[int, ...], TreePage] = field(default_factory=dict)
    open: list[TreePage] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return len(self.tokens) == self.size

    @property
    def end(self) -> int:
        """Position after the last token it can hold."""
        return self.start + self.size


@dataclass(frozen=True)
class Match:
    """What a prompt finds in the tree.

    Attributes:
        pages: full pages to go on from.
        source: a page whose first ``count`` tokens continue them, to be copied; None if there is none.
        count: tokens of ``source`` that agree.
        tokens: tokens found in all.
    """

    pages: list[TreePage]
    source: TreePage | None
    count: int
    tokens: int
