"""Launches of Triton kernels on CPU tensors, run from their PTX: what a GPU would run, but for the last assembler."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from .machine import Machine
from .memory import global_memory
from .program import Program, parse

CAPABILITY = int(os.environ.get("PTX_CAPABILITY", "90"))  # or 80


class _Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def is_active(self) -> bool:
        return True


@contextmanager
def emulated() -> Iterator[None]:
    """Run Triton kernels on CPU tensors as long as this lasts."""

    def prepare(kernel: CompiledKernel) -> None:
        program = _parsed(kernel.asm["ptx"])
        types = kernel.src.signature
        machine = Machine(program, max(16, kernel.metadata.shared))

        def run(x: int, y: int, z: int, *rest: Any) -> None:
            given = rest[-len(types) :]
            bits, tensors = [], []
            for kind, value in zip(types.values(), given, strict=True):
                if kind == "constexpr":
                    continue
                if isinstance(value, torch.Tensor):
                    storage = value.untyped_storage()
                    tensors.append((storage.data_ptr(), storage.nbytes()))
                bits.append(_bits(kind, value))
            if len(program.parameters) != len(bits) + 2:
                raise ValueError(f"{program.name} takes {len(program.parameters)} parameters, got {len(bits)} and 2")
            machine.launch((x, y, z), [*bits, 0, 0], global_memory(tensors))

        kernel.module = kernel.function = 1
        kernel._run = run

    handles = mock.patch.object(CompiledKernel, "_init_handles", prepare)
    with handles, mock.patch.object(triton.runtime.driver, "_active", _Driver()):
        yield


@cache
def _parsed(text: str) -> Program:
    return parse(text)


def _bits(kind: str, value: Any) -> int:
    if kind.startswith("*"):
        return int(value.data_ptr())
    if kind in ("fp32", "f32"):
        return int.from_bytes(struct.pack("<f", float(value)), "little")
    if kind in ("fp64", "f64"):
        return int.from_bytes(struct.pack("<d", float(value)), "little")
    return int(value) % (1 << 64)
