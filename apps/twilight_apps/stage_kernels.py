"""Lay ``twilight_kernels`` out as a kernel of the Hugging Face Hub, for the package ``kernels`` to load.

The layout is that of kernels without compiled parts: one folder a backend under ``build``, the same Python files in
each, and a ``metadata.json`` that names the backend.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import twilight_kernels

NAME = "twilight-kernels"
BACKENDS = ("cpu", "cuda")
VERSION = 1
_CARD = "KERNEL_CARD.md"


def stage(out: Path) -> dict[str, Any]:
    """Write the kernel into ``out``: new, empty, or staged before; other files there are left alone.

    Returns:
        The folder, the backends and a hash of the sources.
    Raises:
        FileExistsError: ``out`` holds files and was not staged by this.
    """
    sources = sorted(Path(twilight_kernels.__file__).parent.glob("*.py"))
    if out.exists() and any(out.iterdir()) and not _is_ours(out):
        raise FileExistsError(f"{out} must be new, empty or staged before, got a folder with other files; name another")
    shutil.rmtree(out / "build", ignore_errors=True)
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:16]
    for backend in BACKENDS:
        folder = _variant(out, backend)
        folder.mkdir(parents=True)
        for path in sources:
            shutil.copyfile(path, folder / path.name)
        metadata = {
            "name": NAME, "id": f"_twilight_kernels_{backend}_{digest}", "version": VERSION, "license": "Apache-2.0",
            "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(sources[0].parent / _CARD, out / "README.md")
    return {"folder": str(out), "backends": list(BACKENDS), "sources": digest, "files": len(sources)}


def _variant(out: Path, backend: str) -> Path:
    return out / "build" / f"torch-{backend}"


def _is_ours(out: Path) -> bool:
    try:
        metadata = json.loads((_variant(out, BACKENDS[0]) / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(isinstance(metadata, dict) and metadata.get("name") == NAME)
