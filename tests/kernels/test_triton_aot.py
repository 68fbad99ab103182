"""Kernels for GPUs that are not here: compiled, and what their machine code takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
PLANTED = """
import triton, triton.language as tl
from twilight_kernels._triton_aot import AotCase

@triton.jit
def product(a, b, out, depth, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, 64)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for first in range(0, depth, 64):
        left, right = tl.load(a + row * depth + first + column), tl.load(b + row * depth + first + column)
        total += tl.dot(left, tl.trans(right))
    tl.store(out + row * SIZE + tl.arange(0, SIZE)[None, :], total)

@triton.jit
def chained(a, b, out, depth, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, 64)[None, :]
    left = tl.load(a + row * 64 + column)
    total = tl.zeros((SIZE, 64), tl.float32)
    if depth % 128 > 0:
        right = tl.load(b + row * 64 + column)
        total = tl.dot(tl.dot(left, tl.trans(right)).to(right.dtype), right)
    for first in range(0, depth, SIZE):
        right = tl.load(b + (first + row) * 64 + column)
        weights = tl.dot(left, tl.trans(right))
        total = total * tl.sum(weights, 1)[:, None] + tl.dot(weights.to(right.dtype), right)
    tl.store(out + row * 64 + column, total)

def case(size, kernel=product, **options):
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "depth": "i32:16"}
    return AotCase("planted", kernel, types, {"SIZE": size}, **options)
"""


def run(code: str, folder: Path) -> Any:
    """Run ``code`` where Triton compiles (it interprets in this process) and return what it prints as JSON."""
    paths = os.pathsep.join((str(folder), str(FOLDER)))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_measure_tells_what_must_not_ship(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    code = """
import json
from twilight_kernels._triton_aot import measure
from planted import chained, case
found = {
    "good": measure(case(64), 80), "spilling": measure(case(128, max_registers=64), 80),
    "large": measure(case(128, num_stages=7), 80), "impossible": measure(case(128, max_registers=64), 90),
    "flowing": measure(case(128), 90), "waiting": measure(case(128, chained), 90),
}
print(json.dumps({name: [usage.registers, usage.shared_bytes, usage.fault] for name, usage in found.items()}))
"""
    found = run(code, tmp_path)
    registers, shared, fault = found["good"]
    assert 32 <= registers <= 255
    assert shared >= 2 * 64 * 64 * 2  # a tile of each operand
    assert fault is None
    assert found["spilling"][2].startswith("spills ")
    assert found["large"][2] == f"needs {6 * 2 * 128 * 64 * 2} bytes of shared memory, for sm_80 it may be {99 * 1024}"
    assert found["flowing"][2] is None
    assert found["waiting"][2] == "waits for each product of tensor cores"
    assert "registers" in found["impossible"][2].lower() or "spills" in found["impossible"][2]  # as ptxas decides


def test_measure_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    code = """
import dataclasses, json
from twilight_kernels._triton_aot import measure
from planted import case
said = []
for wrong, capability in ((dataclasses.replace(case(64), constexprs={}), 80), (case(64), 75)):
    try:
        measure(wrong, capability)
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    missing, unknown = run(code, tmp_path)
    assert missing.startswith("a case must give every argument of product, got ['a', 'b', 'depth', 'out'] for ")
    assert unknown == "capability must be one of 80, 90, 100, got 75"


def test_one_configuration_of_each_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """All configurations at all capabilities take minutes: ``hf-twilight bench aot``."""
    code = """
import json
from twilight_kernels._triton_aot import cases, measure
first = {case.kernel.__name__: case for case in reversed(cases()) if 90 not in case.spared}
print(json.dumps({case.name: measure(case, 90).fault for case in first.values()}))
"""
    faults = run(code, tmp_path)
    assert {name: fault for name, fault in faults.items() if fault} == {}
