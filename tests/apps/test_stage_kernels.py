"""The kernels as the Hub's package loads them: from a folder, under a name of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import twilight_kernels
from twilight_apps.stage_kernels import BACKENDS, stage


def test_stage_loads_with_the_package_kernels(tmp_path: Path) -> None:
    pytest.importorskip("kernels.layer", reason="the package, not the folder of ours of that name")
    kernels = importlib.import_module("kernels")
    stage(tmp_path / "hub")
    loaded = kernels.get_local_kernel(tmp_path / "hub")
    assert loaded.__name__.startswith("_twilight_kernels_")
    assert loaded is not twilight_kernels
    logits = torch.randn(3, 200)
    assert torch.equal(loaded.top_p_threshold(logits, 0.9), twilight_kernels.top_p_threshold(logits, 0.9))
    assert sorted(loaded.__all__) == sorted(twilight_kernels.__all__)


def test_stage_writes_every_backend_and_again(tmp_path: Path) -> None:
    out = tmp_path / "hub"
    first = stage(out)
    (out / "notes.txt").write_text("mine")
    (out / "build" / "torch-cpu" / "old.py").write_text("gone")
    assert stage(out) == first
    assert (out / "notes.txt").read_text() == "mine"
    names = {path.name for path in Path(twilight_kernels.__file__).parent.glob("*.py")}
    for backend in BACKENDS:
        assert {path.name for path in (out / "build" / f"torch-{backend}").iterdir()} == {*names, "metadata.json"}
    assert (out / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_stage_leaves_a_folder_of_others_alone(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "precious").write_text("mine")
    result = cli("stage-kernels", "--out", tmp_path)
    assert result.exit_code == 2
    assert "must be new, empty or staged before" in result.stderr
    assert (tmp_path / "build" / "precious").read_text() == "mine"
