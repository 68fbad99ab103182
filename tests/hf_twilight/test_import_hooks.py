"""Each order of imports in a process of its own: what is imported first must not matter."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from hf_twilight.import_hooks import on_import

ORDERS = {
    "ours first": "import hf_twilight, transformers",
    "transformers first": "import transformers; transformers.LlamaForCausalLM; import hf_twilight",
    "only a config before": "from transformers import GenerationConfig; import hf_twilight",
}
CHECK = """
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
import torch
GenerationConfig(cache_implementation="twilight")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1)
model = LlamaForCausalLM._from_config(config, attn_implementation="twilight")
out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, cache_implementation="twilight",
                     return_dict_in_generate=True)
assert type(out.past_key_values).__name__ == "TwilightCache"
"""


@pytest.mark.parametrize("order", ORDERS)
def test_import_order_does_not_matter(order: str, tmp_path: Path) -> None:
    code = f"{ORDERS[order]}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_on_import_acts_at_once_on_a_loaded_module() -> None:
    seen: list[object] = []
    on_import("json", seen.append)
    assert seen == [sys.modules["json"]]


def test_on_import_acts_once_when_the_module_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "comes_later.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders, seen = list(sys.meta_path), []
    on_import("comes_later", lambda module: seen.append(module.VALUE))
    assert seen == []
    module = importlib.import_module("comes_later")
    importlib.import_module("comes_later")
    assert seen == [3], "the module has run before we act"
    assert sys.meta_path == finders
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    monkeypatch.delitem(sys.modules, "comes_later")


def test_on_import_of_a_module_that_fails_leaves_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_later.py").write_text("raise RuntimeError('its own')\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[object] = []
    on_import("fails_later", seen.append)
    with pytest.raises(RuntimeError, match="its own"):
        importlib.import_module("fails_later")
    assert seen == []


def test_package_gives_its_names_lazily() -> None:
    package = importlib.import_module("hf_twilight")
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="'hf_twilight' has no attribute 'no_such_name'"):
        package.no_such_name  # noqa: B018
