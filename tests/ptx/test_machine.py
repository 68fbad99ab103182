"""Small kernels written by hand, and what the machine refuses."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.machine import Machine
from ptx.memory import Fault, global_memory
from ptx.program import parse

HEAD = """
.version 8.0
.target sm_80
.visible .entry planted(
	.param .u64 .ptr .global .align 1 planted_param_0,
	.param .u32 planted_param_1
)
.reqntid 64
{
	.reg .pred %p<4>;
	.reg .b32 %r<20>;
	.reg .b64 %rd<8>;
	.loc 1 1 1
	ld.param.b64 %rd1, [planted_param_0];
	ld.param.b32 %r1, [planted_param_1];
	mov.u32 %r2, %tid.x;   // a comment
	mov.u32 %r3, %ctaid.x;
	mad.wide.s32 %rd2, %r2, 4, %rd1;
	shl.b32 %r4, %r2, 2;
	mov.b32 %r5, global_smem;
	add.s32 %r6, %r5, %r4;
"""
TAIL = """
	ret;
}
"""
NEIGHBOUR = """
	st.shared.b32 [%r6], %r2;
	{barrier}
	xor.b32 %r7, %r4, 128;
	ld.shared.b32 %r8, [%r7];
	st.global.b32 [%rd2], %r8;
"""


def run(body: str, numbers: np.ndarray, blocks: int = 1, extent: int | None = None, argument: int = 0) -> None:
    memory = global_memory([(numbers.ctypes.data, numbers.nbytes if extent is None else extent)])
    Machine(parse(HEAD + body + TAIL), 256).launch((blocks, 1, 1), [numbers.ctypes.data, argument], memory)


def test_warps_exchange_through_shared_memory_behind_a_barrier() -> None:
    numbers = np.zeros(64, np.uint32)
    run(NEIGHBOUR.format(barrier="bar.sync 0;"), numbers)
    assert numbers.tolist() == [i ^ 32 for i in range(64)]


def test_what_no_barrier_orders_is_poison() -> None:
    numbers = np.zeros(64, np.uint32)
    run(NEIGHBOUR.format(barrier="bar.warp.sync -1;"), numbers)
    assert (numbers == 2**32 - 1).any()  # of the warp that read last what the other had written


def test_a_write_that_nothing_orders_is_refused() -> None:
    with pytest.raises(Fault, match="global write of what another warp wrote otherwise"):
        run("st.global.b32 [%rd1], %r2;", np.zeros(64, np.uint32))


def test_equal_writes_and_those_of_blocks_to_places_of_their_own_are_none() -> None:
    numbers = np.zeros(192, np.uint32)
    run("mad.lo.s32 %r7, %r3, 64, 0; mad.wide.s32 %rd3, %r7, 4, %rd2; st.global.b32 [%rd3], 7;", numbers, 3)
    run("st.global.b32 [%rd1], 7;", numbers, 3)
    assert (numbers == 7).all()


def test_blocks_read_nothing_of_each_other() -> None:
    numbers = np.zeros(128, np.uint32)
    body = """
	shl.b32 %r7, %r3, 6;
	mad.wide.s32 %rd3, %r7, 4, %rd2;
	st.global.b32 [%rd3], 1;
	bar.sync 0;
	xor.b32 %r7, %r7, 64;
	mad.wide.s32 %rd4, %r7, 4, %rd2;
	ld.global.b32 %r8, [%rd4];
	add.s32 %r8, %r8, 1;
	bar.sync 0;
	st.global.b32 [%rd3], %r8;
"""
    run(body, numbers, 2)
    assert 0 in numbers  # poison and one


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r7, [%rd2 + 4];", "global access at .* outside of"),
        ("st.shared.b32 [%r6 + 4], %r2;", "shared access at .* of 256 bytes"),
        ("ld.global.b64 %rd3, [%rd2 + -4];", "8 bytes at an address that is no multiple"),
        ("setp.lt.s32 %p1, %r2, 32; @%p1 bra $out; bar.sync 0; $out: ret;", "ended while others wait"),
    ],
)
def test_a_kernel_that_does_what_it_must_not_is_refused(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body, np.zeros(64, np.uint32))


def test_blocks_leave_loops_after_turns_of_their_own() -> None:
    numbers = np.zeros(5 * 64, np.uint32)
    body = """
	shl.b32 %r7, %r3, 6;
	mad.wide.s32 %rd3, %r7, 4, %rd2;
	mov.b32 %r9, 0;
	mov.b32 %r10, %r1;
$again:
	setp.ge.s32 %p1, %r9, %r3;
	@%p1 bra $done;
	add.s32 %r9, %r9, 1;
	add.s32 %r10, %r10, %r9;
	bra.uni $again;
$done:
	setp.gt.u32 %p2, %r2, 59;
	@!%p2 st.global.b32 [%rd3], %r10;
"""
    run(body, numbers, 5, argument=100)
    found = numbers.reshape(5, 64)
    assert found[:, 0].tolist() == [100, 101, 103, 106, 110]
    assert (found[:, :60] == found[:, :1]).all()
    assert not found[:, 60:].any()


def test_asynchronous_copies_are_there_once_they_were_waited_for() -> None:
    body = """
	cp.async.ca.shared.global [%r6], [%rd2], 0x4, {size};
	cp.async.commit_group;
	{wait}
	ld.shared.b32 %r7, [%r6];
	add.s32 %r7, %r7, 1;
	st.global.b32 [%rd2], %r7;
"""
    wait, size = "cp.async.wait_group 0x0;", "4"
    for given, expected in (({"wait": wait, "size": size}, 6), ({"wait": wait, "size": "0"}, 1)):
        numbers = np.full(64, 5, np.uint32)
        run(body.format(**given), numbers)
        assert (numbers == expected).all()
    numbers = np.full(64, 5, np.uint32)
    run(body.format(wait="cp.async.wait_group 0x1;", size=size), numbers)
    assert (numbers == 0xA5A5A5A6).all()  # what shared memory held


def test_matrices_are_loaded_and_stored_by_rows_or_by_columns() -> None:
    body = """
	shl.b32 %r7, %r2, 4;
	setp.lt.s32 %p1, %r2, 32;
	@!%p1 bra $out;
	mov.b32 %r9, 0x00010002;
	mov.b32 %r10, %r2;
	stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r7], {{%r10}};
	bar.warp.sync -1;
	ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r8}}, [%r7];
	st.global.b32 [%rd2], %r8;
$out:
"""
    numbers = np.zeros(64, np.uint32)
    run(body.format(trans=""), numbers)
    assert numbers[:32].tolist() == list(range(32))
    run(body.format(trans=".trans"), numbers)
    given = np.stack([np.arange(32) & 0xFFFF, np.zeros(32, int)], 1).reshape(8, 8)
    assert np.array_equal(numbers[:32].view(np.uint16).reshape(8, 8), given.T)


def test_a_branch_within_a_warp_is_not_known() -> None:
    with pytest.raises(NotImplementedError, match="differently"):
        run("setp.lt.s32 %p1, %r2, 5; @%p1 bra $out; bar.sync 0; $out:", np.zeros(64, np.uint32))
