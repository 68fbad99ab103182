"""The face of the package: what is public, what it is defined by, what importing it costs."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import twilight_kernels
from twilight_kernels import _reference

FOLDER = Path(twilight_kernels.__file__).parent
OTHERS = ("_backend", "page_codec", "_reference_codec")  # public functions that are no kernels
KERNELS = [
    name
    for name in twilight_kernels.__all__
    if inspect.isfunction(getattr(twilight_kernels, name))
    and getattr(twilight_kernels, name).__module__.rpartition(".")[2] not in OTHERS
]


def test_all_is_complete_and_sorted() -> None:
    assert sorted(twilight_kernels.__all__) == twilight_kernels.__all__
    assert {"decode_attention", "top_p_threshold", "page_scores", "store_key_pages"} <= set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_has_a_reference_of_its_signature(name: str) -> None:
    public, reference = getattr(twilight_kernels, name), getattr(_reference, name)
    assert inspect.signature(public) == inspect.signature(reference)
    assert public.__doc__
    assert reference.__doc__


@pytest.mark.parametrize(("backend", "absent"), [("numba", set()), ("triton", {"prepare_decode", "prompt_attention"})])
def test_every_kernel_has_the_signature_of_its_reference(backend: str, absent: set[str]) -> None:
    pairs = {
        name: ast.dump(node.args)
        for path in FOLDER.glob(f"_{backend}_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and (name := node.name) in KERNELS
    }
    assert set(pairs) == set(KERNELS) - absent
    references = [ast.parse(path.read_text()).body for path in FOLDER.glob("_reference*.py")]
    for node in itertools.chain(*references):
        if isinstance(node, ast.FunctionDef) and node.name in pairs:
            assert pairs[node.name] == ast.dump(node.args), node.name


def _run(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_import_loads_no_compiler() -> None:
    code = "import sys, twilight_kernels; print({'numba', 'llvmlite', 'triton', 'transformers'} & {*sys.modules})"
    assert _run(code, FOLDER.parent).stdout.strip() == "set()"


COPY = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
import twilight_copy as kernels
assert "twilight_kernels" not in sys.modules
limit = kernels.top_p_threshold(torch.tensor([[0.0, 3.0, 1.0]]), 0.8)
assert "numba" in sys.modules and "twilight_kernels" not in sys.modules
print(1.0 < limit.item() <= 3.0)
"""


def test_a_copy_under_another_name_works_and_says_when_it_compiles(tmp_path: Path) -> None:
    """The first run announces compilation before it; the second finds the result and says nothing."""
    shutil.copytree(FOLDER, tmp_path / "twilight_copy", ignore=shutil.ignore_patterns("__pycache__"))
    first, second = (_run(COPY, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")) for _ in range(2))
    assert first.stdout.strip() == second.stdout.strip() == "True"
    assert first.stderr.count("compiling a CPU kernel: top_p_threshold (once; cached for later runs)") == 1
    assert "compiling" not in second.stderr


def test_missing_numba_is_named() -> None:
    code = """
import sys, torch, twilight_kernels
sys.modules["numba"] = None
try:
    twilight_kernels.top_p_threshold(torch.zeros(1, 3), 0.8)
except ImportError as error:
    print(error)
"""
    said = _run(code, FOLDER.parent).stdout
    assert said.startswith("numba is needed to run on CPUs: ")
    assert said.strip().endswith("install it with: pip install numba")
