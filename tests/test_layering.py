"""The four floors: imports point down only, and importing the face stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# lowest floor first
FLOORS = {
    "twilight_kernels": ROOT / "kernels" / "twilight_kernels",
    "twilight_cache": ROOT / "cache" / "twilight_cache",
    "hf_twilight": ROOT / "hf_twilight",
    "twilight_apps": ROOT / "apps" / "twilight_apps",
}
HEIGHT = {name: height for height, name in enumerate(FLOORS)}
OUTER_FOLDERS = ("kernels", "cache", "apps")
KERNELS_EAGER = {*sys.stdlib_module_names, "torch", "numpy"}
KERNELS_LAZY = {"numba", "llvmlite", "triton"}
HEAVY = ("triton", "numba", "gradio", "fastapi", "scipy", "ray")
BASELINE = (
    "torch",
    "transformers",
    "transformers.cache_utils",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_utils",
)
NAMES_THAT_SAY_NOTHING = {"utils", "helpers", "common", "misc"}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and where it stands."""

    module: str
    line: int
    is_relative: bool
    is_lazy: bool


def test_layers_import_downwards_only() -> None:
    offenders = []
    for floor, path in _sources():
        for found in _imports(path):
            target = found.module.split(".")[0]
            if HEIGHT.get(target, -1) > HEIGHT[floor]:
                offenders.append(f"{_place(path, found)}: {floor} imports {found.module}, which is above it")
    assert not offenders, "\n".join(offenders)


def test_kernels_import_only_what_a_hub_copy_finds() -> None:
    offenders = []
    for floor, path in _sources():
        if floor != "twilight_kernels":
            continue
        is_backend = any(part.startswith(("_numba", "_triton")) for part in path.relative_to(ROOT).parts)
        for found in _imports(path):
            top = found.module.split(".")[0]
            if found.is_relative:
                reason = None if top == floor else "leaves the package"
            elif top == floor:
                reason = "must be a relative import"
            elif top in KERNELS_LAZY:
                reason = None if found.is_lazy or is_backend else "must be inside a function"
            else:
                reason = None if top in KERNELS_EAGER else "is not among stdlib, torch, numpy"
            if reason:
                offenders.append(f"{_place(path, found)}: {found.module} {reason}")
    assert not offenders, "\n".join(offenders)


def test_cache_never_imports_transformers() -> None:
    offenders = [
        f"{_place(path, found)}: {found.module}"
        for floor, path in _sources()
        if floor == "twilight_cache"
        for found in _imports(path)
        if found.module.split(".")[0] == "transformers"
    ]
    assert not offenders, "\n".join(offenders)


def test_outer_folders_are_never_imported() -> None:
    """``from kernels.twilight_kernels`` would load a second copy, or the distribution named kernels."""
    paths = [path for _, path in _sources()] + sorted((ROOT / "tests").rglob("*.py"))
    offenders = [
        f"{_place(path, found)}: {found.module}"
        for path in paths
        for found in _imports(path)
        if not found.is_relative and found.module.startswith(tuple(f"{folder}.twilight_" for folder in OUTER_FOLDERS))
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("folder", OUTER_FOLDERS)
def test_outer_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow a distribution"


@pytest.mark.parametrize("floor", FLOORS)
def test_packages_are_typed(floor: str) -> None:
    assert (FLOORS[floor] / "py.typed").is_file()


def test_modules_are_named_after_a_concept() -> None:
    offenders = [
        str(path.relative_to(ROOT))
        for _, path in _sources()
        if NAMES_THAT_SAY_NOTHING & {part.strip("_") for part in path.relative_to(ROOT).with_suffix("").parts}
    ]
    assert not offenders, offenders


def test_import_of_the_face_is_cheap(tmp_path: Path) -> None:
    """What torch and transformers themselves bring along is not ours to forbid, and is left out."""
    brought_along = _loaded_by(BASELINE, tmp_path)
    loaded = _loaded_by(("twilight_kernels", "twilight_cache", "hf_twilight"), tmp_path)
    assert not loaded - brought_along, f"import hf_twilight also imports {sorted(loaded - brought_along)}"


def test_imports_sees_every_form(tmp_path: Path) -> None:
    """The reader of imports is tested too: a form it missed would be a hole in every test above."""
    package = tmp_path / "pkg"
    package.mkdir()
    source = package / "module.py"
    source.write_text(
        "import a.b as c, d\n"
        "from e import f\n"
        "from . import g\n"
        "from .h import i\n"
        "from .. import j\n"
        "def k():\n    import l\n"
        "if TYPE_CHECKING:\n    import m\n"
        "import importlib\n"
        "importlib.import_module('n.o')\n"
    )
    found = {(imported.module, imported.is_lazy) for imported in _imports(source, package_root=package)}
    eager = {"a.b", "d", "e", "e.f", "pkg", "pkg.g", "pkg.h", "pkg.h.i", "", "j", "importlib", "n.o"}
    assert found == {(name, False) for name in eager} | {("l", True), ("m", True)}


def _sources() -> Iterator[tuple[str, Path]]:
    for floor, folder in FLOORS.items():
        for path in sorted(folder.rglob("*.py")):
            yield floor, path


def _place(path: Path, found: Import) -> str:
    return f"{path.relative_to(ROOT)}:{found.line}"


def _imports(path: Path, package_root: Path | None = None) -> list[Import]:
    """List the modules that a file imports, by any statement or by a literal ``import_module``.

    ``from a import b`` counts as ``a`` and as ``a.b``: b may be a module.
    """
    root = package_root or next((folder for folder in FLOORS.values() if path.is_relative_to(folder)), None)
    package = [root.name, *path.relative_to(root).parent.parts] if root else []
    found: list[Import] = []

    def visit(node: ast.AST, is_lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, False, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: max(len(package) - node.level + 1, 0)] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)]
            found.extend(Import(name, node.lineno, node.level > 0, is_lazy) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [str(first.value) for first in node.args[:1] if isinstance(first, ast.Constant)]
            found.extend(Import(name, node.lineno, name.startswith("."), is_lazy) for name in names)
        deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, is_lazy or deeper or typing_only)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)
    return found


def _loaded_by(modules: tuple[str, ...], cwd: Path) -> set[str]:
    """Name the heavy packages that a fresh interpreter holds after importing ``modules``."""
    code = f"import sys, {', '.join(modules)}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))
