"""Exact byte counts of a cache: what is stored, and what is allocated but empty."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of persistent tensors by what they are for; ``unused`` is contained in ``codes`` and ``scales``.

    Attributes:
        codes: packed numbers (or raw ones) of keys and values.
        scales: ``lo`` and ``step`` of keys and values, and which key channels are refined.
        sinks: first tokens in the model's dtype.
        window: last tokens in the model's dtype, room to grow included.
        selector: what selectors noted down, room to grow included.
        unused: bytes of page slots that no sequence owns.
    """

    codes: int = 0
    scales: int = 0
    sinks: int = 0
    window: int = 0
    selector: int = 0
    unused: int = 0

    @property
    def total(self) -> int:
        """All bytes that are allocated."""
        return self.codes + self.scales + self.sinks + self.window + self.selector

    def __add__(self, other: LayerBytes) -> LayerBytes:
        return LayerBytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(LayerBytes)))
