"""Write the figures of documents from the JSON lines that benchmarks and evaluations printed.

    python -m twilight_apps.figures docs/results README.md docs/*.md

replaces what stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` in each document that has such
markers; the names are those of ``SECTIONS``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import bench_figures, eval_figures, serve_figures

SECTIONS: dict[str, Callable[[Path], str]] = {
    "summary": bench_figures.render_summary,
    "performance": bench_figures.render,
    "evaluation": eval_figures.render,
    "serving": serve_figures.render,
    "machine code": bench_figures.render_machine_code,
}

_SECTION = re.compile(r"<!-- figures: (?P<name>[^\n]*?) -->.*?<!-- end of figures -->", re.DOTALL)


def main() -> None:
    """Replace the figures of all documents named by those of the folder named first."""
    if len(sys.argv) < 3:
        sys.exit("usage: python -m twilight_apps.figures docs/results DOCUMENT.md ...")
    folder, *documents = map(Path, sys.argv[1:])
    for document in documents:
        text = document.read_text(encoding="utf-8")
        if (new := with_figures(text, folder)) != text:
            document.write_text(new, encoding="utf-8")
            print(f"{document}: figures anew")


def with_figures(text: str, folder: Path) -> str:
    """Return the document's text with the figures of ``folder``.

    Raises:
        ValueError: a marker names no section.
    """
    return _SECTION.sub(lambda found: _section(found["name"], folder), text)


def _section(name: str, folder: Path) -> str:
    if name not in SECTIONS:
        raise ValueError(f"figures: {name!r} is none of {', '.join(SECTIONS)}")
    return f"<!-- figures: {name} -->\n{SECTIONS[name](folder)}\n<!-- end of figures -->"


if __name__ == "__main__":
    main()
