"""The file that SKVQ needs: order, groups and clip of each layer, with the model it was calibrated for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twilight_kernels.skvq import SkvqCodec

TABLES_NAME = "skvq.safetensors"
TABLES_VERSION = 1
_KINDS = ("keys", "values")


@dataclass(frozen=True)
class SkvqTable:
    """What SKVQ needs to pack the keys, or the values, of one layer; see ``SkvqCodec``."""

    levels: int
    clip: float
    order: Tensor
    group: Tensor
    unit: Tensor


def write_tables(path: Path, tables: Mapping[tuple[int, str], SkvqTable], facts: Mapping[str, Any]) -> None:
    """Write tables by layer and kind (``"keys"``, ``"values"``), with ``facts`` of how they came about."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for (layer, kind), table in tables.items():
        name = f"layers.{layer}.{kind}"
        scalars[name] = {"levels": table.levels, "clip": table.clip}
        tensors |= {f"{name}.{part}": getattr(table, part).clone() for part in ("order", "group", "unit")}
    notes = {"tables_version": TABLES_VERSION, "scalars": scalars, **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    save_file(tensors, draft, metadata={"twilight_skvq": json.dumps(notes)})
    os.replace(draft, path)


def read_tables(path: str, layer: int, page_size: int) -> tuple[SkvqCodec, SkvqCodec]:
    """Return the codecs of keys and values of ``layer``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another file, one of a later version, or one without that layer.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"skvq_tables must be a file that calibrate_skvq wrote, got {path}, which is none")
    tables = _read(path, os.stat(path).st_mtime_ns)
    if (layer, "keys") not in tables:
        raise ValueError(f"{path} must hold a table of layer {layer}, got other layers; calibrate this model")
    keys, values = (tables[layer, kind] for kind in _KINDS)
    return tuple(  # type: ignore[return-value]
        SkvqCodec(table.levels, page_size, table.clip, table.order, table.group, table.unit) for table in (keys, values)
    )


@lru_cache(maxsize=4)
def _read(path: str, _changed: int) -> dict[tuple[int, str], SkvqTable]:
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {}).get("twilight_skvq", "null"))
            if notes is None:
                raise ValueError(f"{path} must be a file that calibrate_skvq wrote, got other safetensors")
            if notes["tables_version"] != TABLES_VERSION:
                raise ValueError(
                    f"{path} must have version {TABLES_VERSION}, got {notes['tables_version']}; update hf-twilight"
                )
            found = {}
            for name, scalars in notes["scalars"].items():
                _, layer, kind = name.split(".")
                parts = {part: file.get_tensor(f"{name}.{part}") for part in ("order", "group", "unit")}
                found[int(layer), kind] = SkvqTable(scalars["levels"], scalars["clip"], **parts)
            return found
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); calibrate again") from error
