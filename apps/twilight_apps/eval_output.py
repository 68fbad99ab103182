"""Results as files: JSON, CSV and PNG in one folder, each whole or not there."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import tables
from .environment import environment, print_json

Draw = Callable[[Path], None]


def finish(
    command: str,
    result: dict[str, Any],
    rows: Iterable[dict[str, Any]],
    folder: Path | None,
    json_line: bool,
    draw: Draw,
) -> None:
    """Write the files if a folder is given, and the JSON line if it is asked for; arguments as ``write``'s."""
    if folder is not None:
        paths = write(folder, command, result, rows, draw)
        tables.say(f"written: {', '.join(map(str, paths))}")
    if json_line:
        print_json(f"eval {command}", **result)


def write(folder: Path, name: str, result: dict[str, Any], rows: Iterable[dict[str, Any]], draw: Draw) -> list[Path]:
    """Write ``name.json``, ``name.csv`` and ``name.png`` into ``folder``, which is made if missing.

    Args:
        folder: where to.
        name: of the files.
        result: what ``--json`` prints, to which the environment is added.
        rows: flat records; the columns are the union of their keys, in order.
        draw: draws the figure into the path it is given.
    Returns:
        The paths.
    Raises:
        ImportError: matplotlib is missing.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**result, "environment": environment()}, indent=2, allow_nan=False, default=str)
    paths = [folder / f"{name}.{ending}" for ending in ("json", "csv", "png")]
    _replace(paths[0], lambda draft: draft.write_text(content + "\n", encoding="utf-8"))
    _replace(paths[1], lambda draft: draft.write_text(_csv(list(rows)), encoding="utf-8"))
    _replace(paths[2], draw)
    return paths


def require_plotting(folder: Path | None) -> None:
    """Fail before anything is measured if the figures could not be drawn; no folder needs no figures.

    Raises:
        ImportError: matplotlib is missing.
    """
    if folder is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError('--out needs matplotlib; run: pip install "hf-twilight[eval]"') from None


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file beside ``path`` and give it that name only when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    draft = Path(name)
    try:
        make(draft)
        os.chmod(draft, 0o666 & ~_umask())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
