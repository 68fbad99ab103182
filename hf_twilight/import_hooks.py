"""Run something once a module has been imported, now or later.

``import hf_twilight`` must be cheap, yet Transformers' generation and modeling modules take two seconds to import and
must know us before they are used. So we act when they come: at once if they are loaded, else when somebody imports
them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(name: str, action: Callable[[ModuleType], object]) -> None:
    """Call ``action(module)`` once the module ``name`` is imported, at once if it is already."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
        return
    sys.meta_path.insert(0, _Watcher(name, action))


class _Watcher(MetaPathFinder):
    """Wait for one module, then step aside."""

    def __init__(self, name: str, action: Callable[[ModuleType], object]) -> None:
        self._name, self._action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Acting(spec.loader, self._action)
        return spec


class _Acting(Loader):
    """A loader that acts after the module has run."""

    def __init__(self, loader: Loader, action: Callable[[ModuleType], object]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._action(module)
