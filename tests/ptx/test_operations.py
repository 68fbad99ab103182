"""What single instructions compute, beside Python's integers and torch's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.operations import LANES, function_of


def bits(*numbers: float, kind: type = np.uint32) -> np.ndarray:
    """A register whose lanes hold ``numbers``, over and over."""
    return np.resize(np.array(numbers, kind), LANES).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[kind().itemsize])


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("add.s32", [bits(2**32 - 1), bits(2)], 1),
        ("mul.wide.s32", [bits(2**32 - 3), bits(5)], 2**64 - 15),
        ("mul.hi.u32", [bits(2**31), bits(6)], 3),
        ("mad.lo.s32", [bits(7), bits(2**32 - 1), bits(10)], 3),
        ("div.s32", [bits(2**32 - 7), bits(2)], 2**32 - 3),
        ("rem.s32", [bits(2**32 - 7), bits(2)], 2**32 - 1),
        ("shr.s32", [bits(2**32 - 8), bits(1)], 2**32 - 4),
        ("shr.u32", [bits(2**31), bits(32)], 0),
        ("bfe.u32", [bits(0b110100), bits(2), bits(3)], 0b101),
        ("bfe.s32", [bits(0b110100), bits(2), bits(3)], 2**32 - 3),
        ("lop3.b32", [bits(0b1100), bits(0b1010), bits(0xFFFFFFF0), bits(0xE4)], 0b1010),  # c ? a : b
        ("lop3.b32", [bits(0b1100), bits(0b1010), bits(0b0110), bits(0x96)], 0b0000),  # a ^ b ^ c
        ("prmt.b32", [bits(0x33221180), bits(0x77665544), bits(0x7080)], 0x7780FF80),
        ("max.s32", [bits(2**32 - 1), bits(0)], 0),
        ("setp.ne.f32", [bits(np.nan, kind=np.float32), bits(1.0, kind=np.float32)], 0),
        ("setp.neu.f32", [bits(np.nan, kind=np.float32), bits(1.0, kind=np.float32)], 1),
        ("max.f32", [bits(np.nan, kind=np.float32), bits(1.0, kind=np.float32)], 0x3F800000),
        ("cvt.rzi.s32.f32", [bits(-2.7, kind=np.float32)], 2**32 - 2),
        ("cvt.rna.tf32.f32", [bits(0x3F801000)], 0x3F802000),  # ties away from zero
        ("cvt.rn.f16.f32", [bits(1 + 2**-11, kind=np.float32)], 0x3C00),  # ties to even
        ("cvt.rn.bf16x2.f32", [bits(1.0, kind=np.float32), bits(2.0, kind=np.float32)], 0x3F804000),
        ("cvt.s32.s8", [bits(0x180, kind=np.uint16)], 2**32 - 128),
        ("mul.rn.f16x2", [bits(0x3C004000), bits(0x40013800)], 0x40013C00),  # 1 * (2 + 2**-9), 2 * 0.5
        ("fma.rn.f32", [bits(1 + 2**-12, kind=np.float32)] * 2 + [bits(-1.0, kind=np.float32)], 0x3A000400),
    ],
)  # fmt: skip
def test_an_instruction_computes_what_the_manual_says(name: str, inputs: list[np.ndarray], expected: int) -> None:
    found = function_of(name)(*inputs)
    assert found.shape == (LANES,)
    assert set(found.tolist()) == {expected}


def test_halves_of_bfloat16_are_rounded_as_torch_does() -> None:
    numbers = torch.randn(LANES) * torch.logspace(-38, 38, LANES)
    found = function_of("cvt.rn.bf16.f32")(numbers.numpy().view(np.uint32))
    assert np.array_equal(found, numbers.bfloat16().view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize(
    ("name", "amount", "clamp", "expected"),
    [
        ("shfl.sync.bfly.b32", 2, 31, [2, 3, 0, 1, 6, 7]),
        ("shfl.sync.up.b32", 1, 0, [0, 0, 1, 2, 3, 4]),
        ("shfl.sync.down.b32", 1, 31, [1, 2, 3, 4, 5, 6]),
        ("shfl.sync.idx.b32", 5, 31, [5] * 6),
    ],
)
def test_lanes_shuffle_within_their_warp(name: str, amount: int, clamp: int, expected: list[int]) -> None:
    lanes = np.arange(2 * LANES, dtype=np.uint32)
    given = (np.full(2 * LANES, x, np.uint32) for x in (amount, clamp, 2**32 - 1))
    found = function_of(name)(lanes, *given).reshape(2, LANES)
    assert found[0, :6].tolist() == expected
    assert (found[1] == found[0] + LANES).all()


@pytest.mark.parametrize(("kind", "depth"), [("f16", 16), ("f16", 8), ("bf16", 16), ("tf32", 8)])
def test_a_matrix_product_is_that_of_its_fragments(kind: str, depth: int) -> None:
    """Fragments are laid out here as the manual's figures have them: by element, where ``_mma`` goes by register."""
    torch.manual_seed(0)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    a, b = (torch.randint(-8, 9, shape).to(dtype) / 8 for shape in ((16, depth), (depth, 8)))
    c = torch.randn(16, 8)
    each = 1 if kind == "tf32" else 2  # numbers of a register

    def lane_of(row: int, column: int) -> tuple[int, int, int]:
        """Lane, register among eight rows by ``4 * each`` columns, and place in it."""
        return row % 8 * 4 + column % (4 * each) // each, column // (4 * each), column % each

    left = np.zeros((depth // (4 * each) * 2, LANES, each), np.float64)
    right = np.zeros((depth // (4 * each), LANES, each), np.float64)
    for row in range(16):
        for column in range(depth):
            lane, many, place = lane_of(row, column)
            left[2 * many + row // 8, lane, place] = a[row, column]
    for row in range(depth):
        for column in range(8):
            lane, many, place = lane_of(column, row)
            right[many, lane, place] = b[row, column]
    held = torch.zeros(4, LANES)
    for row in range(16):
        for column in range(8):
            held[2 * (row // 8) + column % 2, row % 8 * 4 + column // 2] = c[row, column]
    registers = [torch.from_numpy(x).to(dtype).view(torch.int32)[:, 0].numpy().view(np.uint32) for x in (*left, *right)]
    name = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    found = function_of(name)(*registers, *held.numpy().view(np.uint32))
    exact = a.double() @ b.double() + c.double()
    for row in range(16):
        for column in range(8):
            number = found[2 * (row // 8) + column % 2].view(np.float32)[row % 8 * 4 + column // 2]
            assert number == pytest.approx(float(exact[row, column]), abs=1e-6)


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"brev\.b32"):
        function_of("brev.b32")
