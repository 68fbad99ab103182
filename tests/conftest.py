"""What every test run says first: which code is under test, with which threads and versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from typing import Any

# A test never needs the network; without this, one that names a missing model waits for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Triton decides when a kernel is defined whether it compiles or interprets it. Without a GPU it interprets; 0 says that
# what it compiles is run by the machine of tests/ptx.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from twilight_kernels import _backend

PACKAGES = ("twilight_kernels", "twilight_cache", "hf_twilight", "twilight_apps")
LIBRARIES = ("torch", "transformers", "huggingface_hub", "numba", "numpy", "triton")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name the four packages' origins: a run at the root against a wheel could test a mixture."""
    versions = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        *(f"{name}: {_origin(name)}" for name in PACKAGES),
        f"versions: python {platform.python_version()}, {versions}",
        f"threads: torch {torch.get_num_threads()} of {os.cpu_count()} cores; gpu: {device}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give the tests of one case of a kernel, and those without, to one process: two would both compile for them."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            if not file.startswith("tests/kernels/") or "interpreter" in name:
                return nodeid
            case = re.search(r"\(.+\)|\{.+\}|\bshape\d+", name)
            return f"{file} {case[0] if case else ''}"

    return Scheduler(config, log)


@pytest.fixture(autouse=True)
def _backend_read_anew() -> Iterator[None]:
    """The backend that the environment names is read once a process: here, once a test."""
    _backend.override.cache_clear()
    yield
    _backend.override.cache_clear()


def _origin(package: str) -> str:
    spec = importlib.util.find_spec(package)
    return "NOT INSTALLED" if spec is None else str(spec.origin)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
