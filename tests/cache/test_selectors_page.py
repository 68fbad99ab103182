"""The examples of docs/selectors.md run as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "selectors.md"


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = ModuleType("selectors_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where a dataclass looks for its types
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    scope = vars(module)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    assert bool(torch.isfinite(scope["out"]).all())
    assert scope["candidates"].tolist() == [64.0] * 4
    assert scope["store"].decodes.mean_coverage() is None, "it makes no estimate"
    written = blocks[1][blocks[1].index("@dataclass") :].strip().splitlines()
    assert len(written) <= 30, "the page says 30 lines"
