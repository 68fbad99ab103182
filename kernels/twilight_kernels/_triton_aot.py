"""Compile Triton kernels for GPUs that are not here, and read what the machine code takes of a chip.

Each ``_triton_*`` module lists the configurations that matter in ``aot_cases()``. Compilation needs no GPU; what it
tells (registers, shared memory, spills) is exact for the compiler that is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
# bytes that one block may opt in to; sm_80 has 163 KB, but sm_86, sm_89 and sm_120 run the same tiles and have 99
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TENSOR_COLUMNS = 512
_ALIGNED = 16  # what ":16" after a type promises: the launcher passes multiples of it
_USED = {name: re.compile(rf"\b{name}:(\d+)") for name in ("REG", "STACK", "LOCAL")}


@dataclass(frozen=True)
class AotCase:
    """One kernel at one configuration.

    Args:
        name: of the configuration, for people.
        kernel: what ``triton.jit`` made.
        signature: type of each argument that is no constant, as ``"*bf16"`` or ``"i32"``; ``":16"`` after it says
            that the launcher passes multiples of 16, as Triton finds out by itself at a launch (pointers always are).
        constexprs: the constants.
        num_warps, num_stages: as launched.
        max_registers: of a thread, as launched with ``maxnreg``; None leaves it to the compiler.
        fuses: as launched with ``enable_fp_fusion``.
        spared: capabilities that it is not launched at.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    fuses: bool = True
    spared: tuple[int, ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a compiled case takes.

    Attributes:
        registers, spill_bytes: of a thread; spills go to memory.
        shared_bytes, tensor_columns: of a block; tensor memory is Blackwell's, 512 columns a multiprocessor.
        is_serial: each product of tensor cores is waited for before the next, by ptxas' choice (sm_90).
        error: why it does not compile, None if it does.
    """

    name: str
    kernel: str
    capability: int
    num_warps: int
    num_stages: int
    registers: int = 0
    shared_bytes: int = 0
    spill_bytes: int = 0
    tensor_columns: int = 0
    is_serial: bool = False
    error: str | None = None

    @property
    def fault(self) -> str | None:
        """Why the case must not ship, None if it may."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes a thread"
        limit = SHARED_LIMIT[self.capability]
        if self.shared_bytes > limit:
            return f"needs {self.shared_bytes} bytes of shared memory, for sm_{self.capability} it may be {limit}"
        if self.tensor_columns > _TENSOR_COLUMNS:
            return f"needs {self.tensor_columns} columns of tensor memory, there are {_TENSOR_COLUMNS}"
        if self.is_serial:
            return "waits for each product of tensor cores"
        return None


def cases() -> list[AotCase]:
    """Every configuration that a module of this package lists, in order of modules."""
    found: list[AotCase] = []
    folder = str(Path(__file__).parent)
    for module in sorted(info.name for info in pkgutil.iter_modules([folder])):
        if module.startswith("_triton_") and module != Path(__file__).stem:
            listed = getattr(importlib.import_module(f".{module}", __package__), "aot_cases", None)
            found.extend(listed() if listed else [])
    return found


def measure(case: AotCase, capability: int) -> Usage:
    """Compile a case for a compute capability, as 90, and say what it takes.

    What does not compile is told by ``Usage.error``.

    Raises:
        ValueError: an unknown capability, or arguments that are not the kernel's.
        RuntimeError: Triton interprets kernels in this process.
    """
    if capability not in SHARED_LIMIT:
        raise ValueError(f"capability must be one of {', '.join(map(str, SHARED_LIMIT))}, got {capability}")
    source, options = _source(case)
    place = case.name, case.kernel.__name__, capability, case.num_warps, case.num_stages
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the whole program when ptxas rejects it
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # the compiler's own kinds, unnamed and changing between versions
        return Usage(*place, error=_first_line(error))
    used = _resources(compiled.asm["cubin"])
    columns = int(getattr(compiled.metadata, "tmem_size", None) or 0)
    spilled = used["STACK"] + used["LOCAL"]
    is_serial = "wgmma" in compiled.asm["ptx"] and _is_serial(compiled.asm["cubin"])
    return Usage(*place, used["REG"], int(compiled.metadata.shared), spilled, columns, is_serial)


def _source(case: AotCase) -> tuple[ASTSource, dict[str, Any]]:
    if not hasattr(case.kernel, "cache_key"):
        raise RuntimeError("Triton interprets kernels in this process; unset TRITON_INTERPRET to compile them")
    given = {**case.signature, **case.constexprs}
    if set(given) != set(case.kernel.arg_names):
        raise ValueError(
            f"a case must give every argument of {case.kernel.__name__}, got {sorted(set(given))} for "
            f"{sorted(case.kernel.arg_names)}"
        )
    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        kind = case.signature.get(name, "constexpr")
        signature[name] = kind.split(":")[0]
        if kind.startswith("*") or kind.endswith(f":{_ALIGNED}"):
            attributes[(index,)] = [["tt.divisibility", _ALIGNED]]
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options["enable_fp_fusion"] = case.fuses
    if case.max_registers:
        options["maxnreg"] = case.max_registers
    return ASTSource(case.kernel, signature, dict(case.constexprs), attributes), options


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "fatal" in line] or [line for line in lines if "error" in line.lower()]
    return f"{type(error).__name__}: {(telling or lines or [''])[0].strip()}"


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes of the one kernel in a cubin; kernels keep nothing but spills on a stack."""
    told = _dump(cubin, "--dump-resource-usage")
    found = {name: pattern.search(told) for name, pattern in _USED.items()}
    if not all(found.values()):
        raise RuntimeError(f"cuobjdump must tell the registers of a kernel, got {told}")
    return {name: int(match.group(1)) for name, match in found.items() if match}


def _is_serial(cubin: bytes) -> bool:
    """Whether asynchronous products begin one by one: they are issued in runs if ptxas could prove that they may be."""
    code = _dump(cubin, "--dump-sass")
    return code.count(" WARPGROUP.ARRIVE") >= code.count(" HGMMA")


def _dump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([os.fspath(tool), what, os.fspath(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump must read what ptxas wrote, got {done.stdout}{done.stderr}")
    return done.stdout
