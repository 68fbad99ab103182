from __future__ import annotations

import random
from typing import Any

import pytest

from hf_twilight.engine.text import TextStream


class Pieces:
    """Ids are bytes; as in sentence pieces, a space at the very beginning is lost."""

    def decode(self, ids: list[int], **_: Any) -> str:
        text = bytes(ids).decode(errors="replace")
        return text[1:] if text.startswith(" ") else text


TEXT = "naïve café — 日本語 🙂 done, all done"


@pytest.mark.parametrize("stop", [(), ("done",), ("xyz", "語 🙂"), ("nothing",)])
def test_parts_add_up_and_never_split_a_character_or_show_a_stop_text(stop: tuple[str, ...]) -> None:
    stream = TextStream(Pieces(), stop)
    parts = []
    for byte in TEXT.encode():
        parts.append(stream.push(byte))
        if stream.is_stopped:
            break
    parts.append(stream.finish())
    end = min((TEXT.index(text) for text in stop if text in TEXT), default=len(TEXT))
    assert "".join(parts) == stream.text == TEXT[:end]
    assert stream.is_stopped == (end < len(TEXT))
    assert not any("\ufffd" in part for part in parts)


def test_what_may_begin_a_stop_text_is_held_back_until_it_is_known() -> None:
    stream = TextStream(Pieces(), ("abcd",))
    assert [stream.push(ord(c)) for c in "xabc"] == ["x", "", "", ""]
    assert stream.push(ord("e")) == "abce"
    assert stream.push(ord("a")) == "" and stream.finish() == "a"


def test_bytes_that_are_no_character_are_shown_once_it_is_certain() -> None:
    stream = TextStream(Pieces())
    parts = [stream.push(byte) for byte in b"a\xff\xfe\xff\xffb"]
    assert "".join(parts) + stream.finish() == "a\ufffd\ufffd\ufffd\ufffdb"


def test_an_unfinished_character_ends_as_the_replacement() -> None:
    stream = TextStream(Pieces())
    assert [stream.push(byte) for byte in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"


def test_random_texts_come_out_whole() -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("ab é語🙂") for _ in range(20)).strip()
        stop = "".join(draw.choice("ab é") for _ in range(3))
        stream = TextStream(Pieces(), (stop,))
        out = ""
        for byte in text.encode():
            out += stream.push(byte)
            if stream.is_stopped:
                break
        out += stream.finish()
        assert out == text.split(stop)[0]
