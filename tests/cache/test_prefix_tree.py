from __future__ import annotations

import pytest

from twilight_cache import Layout, PagePool, PrefixTree, TreePage

LAYOUT = Layout(page_size=4, num_sinks=2, window=4)


def make_tree(plain: int = 20, packed: int | None = 20) -> PrefixTree:
    return PrefixTree(LAYOUT, PagePool(plain), None if packed is None else PagePool(packed))


def store(tree: PrefixTree, tokens: list[int], *, is_packed: bool = True) -> list[TreePage]:
    """Enter a sequence as a request that has finished leaves it: all pages plain, those before the window packed."""
    tree.step += 1
    pages: list[TreePage] = []
    at = 0
    while at < len(tokens):
        page = tree.begin_page(pages[-1] if pages else tree.root, tree.take_plain(1)[0])
        page.tokens.extend(tokens[at : page.end])
        at = page.end
        if page.is_full:
            tree.list_full(page)
        pages.append(page)
    for page in pages[1 : 1 + tree.pages_before(len(tokens) - 1)] if is_packed and tree.packed_pool else []:
        page.packed = tree.take_packed(1)[0]
    for page in pages[::-1]:
        tree.drop_plain(page)
        tree.release(page)
    return pages


TOKENS = list(range(100, 120))  # sinks, four pages, two tokens


def test_match_finds_full_pages_and_the_beginning_of_the_next() -> None:
    tree = make_tree()
    pages = store(tree, TOKENS)
    whole = tree.match(TOKENS, 19)
    assert (whole.pages, whole.source, whole.count, whole.tokens) == (pages[:5], pages[5], 1, 19)
    forked = tree.match([*TOKENS[:9], 7, 7, 7], 11)
    assert (forked.pages, forked.source, forked.count, forked.tokens) == (pages[:2], pages[2], 3, 9)
    nothing = tree.match([5, *TOKENS], 20)
    assert (nothing.pages, nothing.tokens) == ([], 0)


def test_a_prefix_is_followed_as_far_as_its_window_is_there() -> None:
    tree = make_tree(plain=6)
    pages = store(tree, TOKENS)
    tree.take_plain(1)  # the oldest that hangs on nothing: the last, unfinished page
    assert pages[5].serial not in tree.pages
    assert tree.match(TOKENS, 19).tokens == 18
    pages[4].plain_users += 1  # somebody reads the last page, so the ones before it go first
    tree.take_plain(1)
    assert pages[3].plain is None and pages[3].packed is not None
    pages[4].plain_users -= 1
    assert tree.match(TOKENS, 19).tokens == 18  # which reads page 3 packed
    tree.take_plain(1)
    assert pages[4].serial not in tree.pages
    # position 14 would read page 3 in plain form, position 10 does not read it at all
    assert tree.match(TOKENS, 19).tokens == 10


def test_the_page_unused_for_longest_goes_first_and_its_leaves_before_it() -> None:
    tree = make_tree(packed=None, plain=12)
    old, new = store(tree, TOKENS), store(tree, [1, *TOKENS])
    tree.take_plain(2)
    assert [page.serial in tree.pages for page in old] == [True, True, True, True, False, False]
    assert all(page.serial in tree.pages for page in new)
    assert tree.evictions == 2


def test_pages_in_use_are_never_dropped() -> None:
    tree = make_tree(packed=None, plain=6)
    pages = store(tree, TOKENS)
    tree.acquire(pages, 0)
    assert not tree.can_take(1, 0)
    with pytest.raises(MemoryError):
        tree.take_plain(1)
    for page in pages[::-1]:
        tree.drop_plain(page)
        tree.release(page)
    assert tree.can_take(6, 0)


def test_merge_gives_the_listed_page_what_it_lacks() -> None:
    tree = make_tree()
    pages = store(tree, TOKENS[:6])
    listed = pages[1]
    assert listed.plain is not None and tree.packed_pool is not None
    listed.packed = tree.take_packed(1)[0]
    tree.plain_pool.release([listed.plain])
    listed.plain = None
    tree.acquire(pages[:1], 0)
    mine = tree.begin_page(pages[0], tree.take_plain(1)[0])
    mine.tokens.extend(TOKENS[2:6])
    tree.list_full(mine)
    assert not mine.is_listed
    follower = tree.begin_page(mine, tree.take_plain(1)[0])
    slot = mine.plain
    assert tree.merge(mine, follower) is listed
    assert (listed.plain, listed.users, follower.parent) == (slot, 1, listed)
    assert mine.serial not in tree.pages and follower in listed.open
