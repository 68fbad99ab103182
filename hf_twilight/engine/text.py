"""Token ids to text as they come: never half a character, never the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # tokens that one character may take: UTF-8 bytes


class TextStream:
    """Text of one answer.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.is_stopped = False
        self.text = ""  # handed out
        self._held = ""  # decoded, but may turn out to begin a stop text
        self._ids: list[int] = []
        self._context = 0  # ids from here on are decoded again, as spaces depend on what stands before
        self._read = 0  # ids before this one are text already

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        is_cut = whole.endswith(_REPLACEMENT) and len(self._ids) - self._read < _LONGEST_CHARACTER
        if len(whole) <= len(before) or is_cut:
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._add(whole[len(before) :])

    def finish(self) -> str:
        """Return what was held back; bytes that are no character become the replacement character."""
        if self.is_stopped:
            return ""
        before = self._decode(self._ids[self._context : self._read])
        rest = self._decode(self._ids[self._context :])[len(before) :]
        self._context = self._read = len(self._ids)
        out = self._add(rest)
        held, self._held = self._held, ""
        return out + self._hand_out(held)

    def _add(self, new: str) -> str:
        """Hold back what may be the beginning of a stop text."""
        held = self._held + new
        found = [at for at in (held.find(text) for text in self.stop) if at >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return self._hand_out(held[: min(found)])
        keep = max((_overlap(held, text) for text in self.stop), default=0)
        self._held = held[len(held) - keep :] if keep else ""
        return self._hand_out(held[: len(held) - keep])

    def _hand_out(self, text: str) -> str:
        self.text += text
        return text

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _overlap(text: str, stop: str) -> int:
    """Longest end of ``text`` that begins ``stop``."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if stop.startswith(text[-count:])), 0)
