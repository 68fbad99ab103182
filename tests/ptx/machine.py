"""A GPU in numpy: runs the blocks of a launch, and the warps of a block between barriers, in an order of a seed.

Warps of one number, one of each block, are run together: an instruction computes on the lanes of all that are at it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .memory import Fault, Memory, Who, shared_memory
from .operations import LANES, accumulated, function_of, left_matrix, numbers_of, unpacked
from .program import DTYPES, Instruction, Program

Lanes = Any
_TOGETHER = 64  # blocks
_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8,
          "f64": 8, "s64": 8}  # fmt: skip
_LANE = np.arange(LANES)
_ROW, _PAIR = _LANE // 4, _LANE % 4  # of a matrix of 8 x 8, whose lanes hold two neighbours each


class Machine:
    """Runs launches of one program.

    Args:
        program: what ``program.parse`` read.
        shared_bytes: of a block.
        seed: of the order of blocks and warps.
    """

    def __init__(self, program: Program, shared_bytes: int, seed: int = 0) -> None:
        self.program, self.shared_bytes = program, shared_bytes
        self.random = np.random.default_rng(seed)

    def launch(self, grid: tuple[int, int, int], arguments: list[int], memory: Memory) -> None:
        """Run a grid of blocks.

        Args:
            grid: blocks along x, y, z.
            arguments: bits of each parameter.
            memory: what the kernel may touch.
        Raises:
            Fault: the kernel does what no kernel may.
            NotImplementedError: an instruction that is not known here.
        """
        places = np.array(list(itertools.product(range(grid[2]), range(grid[1]), range(grid[0]))), np.uint32)
        order = self.random.permutation(len(places))
        with np.errstate(all="ignore"):
            for begin in range(0, len(places), _TOGETHER):
                numbers = order[begin : begin + _TOGETHER]
                self._run(numbers, places[numbers][:, ::-1], grid, arguments, memory)

    def _run(
        self, numbers: Lanes, places: Lanes, grid: tuple[int, int, int], arguments: list[int], memory: Memory
    ) -> None:
        shared = shared_memory(self.shared_bytes * len(numbers), self.shared_bytes)
        count, epoch = self.program.threads // LANES, 0
        teams = [_Team(self.program, i, numbers, places, grid, arguments, memory, shared) for i in range(count)]
        while not teams[0].is_done.all():
            for at in self.random.permutation(count):
                teams[at].run(epoch)
            if any((team.is_done != teams[0].is_done).any() for team in teams):
                raise Fault(f"{self.program.name}: a warp ended while others wait at a barrier")
            epoch += 1


class _Team:
    """The warps of one number of some blocks."""

    def __init__(
        self, program: Program, number: int, blocks: Lanes, places: Lanes, grid: tuple[int, int, int],
        arguments: list[int], memory: Memory, shared: Memory,
    ) -> None:  # fmt: skip
        self.program, self.arguments, self.memory, self.shared = program, arguments, memory, shared
        self.number, self.count = number, len(blocks)
        lanes = self.count * LANES
        self.registers = [np.zeros(lanes, DTYPES[width]) for width in program.widths]
        for at, value in program.constants.items():
            width = program.widths[at]
            self.registers[at] = np.full(lanes, value % (1 << width) if width else bool(value), DTYPES[width])
        for name, at in program.special.items():
            self.registers[at] = self.special(name, places, grid)
        self.at, self.is_done = np.zeros(self.count, np.int64), np.zeros(self.count, np.bool_)
        self.is_waiting = self.is_done.copy()
        warps = program.threads // LANES
        self.block = np.repeat(blocks, LANES).astype(np.int32)
        self.warp = 1 + self.block * warps + number
        self.slot = np.repeat(np.arange(self.count), LANES).astype(np.uint64)
        self.epoch, self.warps = 0, warps
        self.all = np.ones(lanes, np.bool_)
        self.copies: list[tuple[Lanes, Any]] = []  # asynchronous ones: whose, and what is to be done; None ends a group

    def special(self, name: str, places: Lanes, grid: tuple[int, int, int]) -> Lanes:
        stem, _, axis = name[1:].partition(".")
        at, lanes = "xyz".find(axis), self.count * LANES
        lane = np.tile(np.arange(LANES, dtype=np.uint32), self.count)
        if stem == "tid":
            return lane + np.uint32(LANES * self.number) if axis == "x" else np.zeros(lanes, np.uint32)
        if stem == "laneid":
            return lane
        if stem == "ctaid":
            return np.repeat(places[:, at], LANES)
        values = {"nctaid": grid, "ntid": (self.program.threads, 1, 1)}
        if stem not in values:
            raise NotImplementedError(f"no such special register here: {name}")
        return np.full(lanes, values[stem][at], np.uint32)

    def run(self, epoch: int) -> None:
        """Run every block's warp until its next barrier, or its end."""
        self.epoch = epoch
        self.is_waiting = self.is_done.copy()
        while not self.is_waiting.all():
            self.advance()

    def advance(self) -> None:
        """Run the warps that are farthest behind until they branch apart, or meet others."""
        free = ~self.is_waiting
        at = int(self.at[free].min())
        here = free & (self.at == at)
        others = set(self.at[free & ~here].tolist())
        lanes = np.repeat(here, LANES)
        is_whole = bool(here.all())
        instructions = self.program.instructions
        while True:
            if at >= len(instructions):
                self.end(here)
                return
            instruction = instructions[at]
            at += 1
            try:
                active = self.active(instruction, lanes, is_whole)
                name = instruction.name
                if name.startswith("bar"):
                    if name != "bar.warp.sync":
                        self.at[here] = at
                        self.is_waiting |= here
                        return
                elif name.startswith(("bra", "ret", "exit")):
                    taken = self.whole_warps(active, lanes) & here
                    if name.startswith("bra"):
                        self.at[here] = at
                        self.at[taken] = instruction.offset
                    else:
                        self.at[here] = at
                        self.end(taken)
                    if taken.any():
                        return
                else:
                    self.step(instruction, active)
            except Exception as error:
                error.add_note(f"{self.program.name}, warp {self.number}: {instruction.line}")
                raise
            if at in others:
                self.at[here] = at
                return

    def end(self, which: Lanes) -> None:
        self.is_done |= which
        self.is_waiting |= which

    def active(self, instruction: Instruction, lanes: Lanes, is_whole: bool) -> Lanes:
        if instruction.guard < 0:
            return self.all if is_whole else lanes
        guard = self.registers[instruction.guard]
        guard = ~guard if instruction.negated else guard
        return guard if is_whole else guard & lanes

    def whole_warps(self, active: Lanes, lanes: Lanes) -> Lanes:
        """Of which blocks all lanes are active; Triton's branches are those of whole warps."""
        some, every = active.reshape(-1, LANES).any(1), (active | ~lanes).reshape(-1, LANES).all(1)
        if (some & ~every).any():
            raise NotImplementedError("a branch that lanes of one warp take differently")
        return some

    def step(self, instruction: Instruction, active: Lanes) -> None:
        name, registers = instruction.name, self.registers
        inputs = [registers[i] for i in instruction.inputs]
        special = _SPECIAL.get(name[:3])
        if special is not None:
            results = special(self, instruction, inputs, active)
        else:
            found = function_of(name)(*inputs)
            results = found if isinstance(found, tuple) else (found,)
            if len(instruction.outputs) > len(results):
                results = unpacked(results[0], len(instruction.outputs))
        for register, result in zip(instruction.outputs, results, strict=True):
            if register >= 0:
                result = result.astype(registers[register].dtype, copy=False)
                registers[register] = result if active is self.all else np.where(active, result, registers[register])

    def who(self, active: Lanes) -> Who:
        if active is self.all:
            return Who(self.warp, self.block, self.slot, self.epoch, self.warps)
        return Who(self.warp[active], self.block[active], self.slot[active], self.epoch, self.warps)

    def load(self, instruction: Instruction, inputs: list[Lanes], active: Lanes) -> Sequence[Lanes]:
        """Loads, and those of matrices and parameters."""
        name, many = instruction.name, len(instruction.outputs)
        if name.startswith("ldmatrix"):
            return self.load_matrices(instruction, inputs, active)
        if name.startswith("ld.param"):
            bits = self.program.widths[instruction.outputs[0]]
            return [np.full(len(self.all), self.arguments[instruction.offset] % (1 << bits), DTYPES[bits])]
        kind = name.rsplit(".", 1)[1]
        memory = self.shared if "shared" in name else self.memory
        address = _address(inputs[0], instruction.offset)
        found = memory.load(address, _BYTES[kind], many, active, self.who(active))
        if kind[0] == "s":
            found = found.view(f"i{_BYTES[kind]}")
        return [found[:, i] for i in range(many)]

    def store(self, instruction: Instruction, inputs: list[Lanes], active: Lanes) -> Sequence[Lanes]:
        name = instruction.name
        if name.startswith("stmatrix"):
            return self.store_matrices(instruction, inputs, active)
        numbers = np.stack([x.astype(f"u{_BYTES[name.rsplit('.', 1)[1]]}", copy=False) for x in inputs[1:]], 1)
        memory = self.shared if "shared" in name else self.memory
        memory.store(_address(inputs[0], instruction.offset), numbers, active, self.who(active))
        return ()

    def copy(self, instruction: Instruction, inputs: list[Lanes], active: Lanes) -> Sequence[Lanes]:
        """Asynchronous copies happen when they are waited for, as late as they may.

        Blocks that run together wait for their own: what others began stays begun.
        """
        name = instruction.name
        if name == "cp.async.commit_group":
            self.copies.append((active, None))
        elif name.startswith("cp.async.wait"):
            self.finish(active, instruction.offset if name == "cp.async.wait_group" else -1)
        else:
            target, source = _address(inputs[0], instruction.offset), _address(inputs[1], instruction.source)
            size = int(inputs[2][0])
            there = active if len(inputs) < 4 else active & (inputs[3] == size)
            if len(inputs) > 3 and (active & (inputs[3] != size) & (inputs[3] != 0)).any():
                raise NotImplementedError("an asynchronous copy of a part")

            def run(which: Lanes) -> None:
                found = self.memory.load(source, 1, size, there & which, self.who(there & which))
                self.shared.store(target, found, active & which, self.who(active & which))

            self.copies.append((active, run))
        return ()

    def finish(self, active: Lanes, groups: int) -> None:
        """Copy what ``active`` lanes began, but for their last ``groups`` groups; -1: everything."""
        later = np.zeros(len(active), np.int64)  # groups that end after an entry
        kept = list[tuple[Lanes, Any]]()
        due = list[tuple[Lanes, Any]]()
        for whose, run in reversed(self.copies):
            if run is None:
                later += whose
                kept.append((whose, run))
                continue
            ready = whose & active & ((later > groups) if groups >= 0 else True)
            if ready.any():
                due.append((ready, run))
            if (whose & ~ready).any():
                kept.append((whose & ~ready, run))
        for ready, run in reversed(due):
            run(ready)
        self.copies = kept[::-1] if any(run is not None for _, run in kept) else []

    def load_matrices(self, instruction: Instruction, inputs: list[Lanes], active: Lanes) -> Sequence[Lanes]:
        """Matrices of 8 x 8 numbers of 16 bits; lanes ``8 i ..`` of the addresses are the rows of matrix ``i``."""
        found, many = [], len(instruction.outputs)
        gives = active & np.tile(8 * many > _LANE, self.count)
        address = _address(inputs[0], instruction.offset)
        rows = self.shared.load(address, 2, 8, gives, self.who(gives)).reshape(self.count, LANES, 8)
        for i in range(many):
            matrix = rows[:, 8 * i : 8 * i + 8]
            matrix = matrix.transpose(0, 2, 1) if ".trans" in instruction.name else matrix
            low, high = (matrix[:, _ROW, 2 * _PAIR + half].astype(np.uint32) for half in range(2))
            found.append((low | (high << np.uint32(16))).reshape(-1))
        return found

    def store_matrices(self, instruction: Instruction, inputs: list[Lanes], active: Lanes) -> Sequence[Lanes]:
        """The way back from ``load_matrices``."""
        many = len(inputs) - 1
        rows = np.zeros((self.count, LANES, 8), np.uint16)
        for i, x in enumerate(inputs[1:]):
            matrix = rows[:, 8 * i : 8 * i + 8]
            matrix = matrix.transpose(0, 2, 1) if ".trans" in instruction.name else matrix
            for half in range(2):
                matrix[:, _ROW, 2 * _PAIR + half] = (x >> np.uint32(16 * half)).reshape(-1, LANES).astype(np.uint16)
        gives = active & np.tile(8 * many > _LANE, self.count)
        self.shared.store(_address(inputs[0], instruction.offset), rows.reshape(-1, 8), gives, self.who(gives))
        return ()

    def warpgroup(self, instruction: Instruction, inputs: list[Lanes], active: Lanes) -> Sequence[Lanes]:
        """Products of four warps, each of sixteen rows of the first matrix; done when they begin, not waited for."""
        name = instruction.name
        if not name.startswith("wgmma.mma_async"):
            return ()
        kind, columns = name.rsplit(".", 1)[1], 2 * len(instruction.outputs)
        sums, rest = inputs[: len(instruction.outputs)], inputs[len(instruction.outputs) :]
        if len(rest) < 8:  # both matrices lie in shared memory
            left = self.matrix(rest[0], 16, 16 * (self.number % 4), False, kind, active)
            second, keeps, *signs = rest[1:]
        else:
            left = left_matrix(tuple(rest[:4]), kind)
            second, keeps, *signs = rest[4:]
        turns = [bool(x[0]) for x in signs[2:]]  # of numbers of 16 bits: whether matrices lie by columns
        if len(turns) == 2 and turns[0]:
            raise NotImplementedError("a first matrix that lies by columns")
        right = self.matrix(second, columns, 0, bool(turns) and turns[-1], kind, active)
        kept = tuple(np.where(keeps != 0, x, np.uint32(0)) for x in sums)
        return accumulated(left @ right.transpose(0, 2, 1), kept)

    def matrix(self, descriptor: Lanes, rows: int, first: int, is_turned: bool, kind: str, active: Lanes) -> Lanes:
        """Rows from ``first`` on of a matrix in shared memory, 32 bytes of each, ``[block, rows, columns]``.

        Rows of 128, 64 or 32 bytes, eight a group, whose pieces of 16 change places within it (the manual's swizzling
        modes); of a turned one they are the columns.
        """
        found = descriptor.reshape(self.count, LANES)[:, :1]
        mode = int(found[active.reshape(self.count, LANES)[:, 0]][0, 0]) >> 62
        if not mode:
            raise NotImplementedError("a matrix that is not swizzled")
        width = 256 >> mode
        start, leading, stride = (((found.view(np.int64) >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
        if is_turned:
            column, piece = np.divmod(np.arange(16 * rows // 8), rows // 8)
            place = start + column // 8 * stride + column % 8 * width
            place = place + piece // (width // 16) * leading + piece % (width // 16) * 16
        else:
            row, piece = np.divmod(np.arange(2 * rows), 2)
            place = start + (row + first) // 8 * stride + (row + first) % 8 * width + piece * 16
        place ^= (place >> 3) & (width - 16)
        many = place.shape[1]
        takes = np.repeat(active.reshape(self.count, LANES)[:, 0], many)
        who = Who(
            *(np.repeat(x.reshape(self.count, LANES)[:, 0], many)[takes] for x in (self.warp, self.block, self.slot)),
            self.epoch, self.warps,
        )  # fmt: skip
        halves = self.shared.load(place.reshape(-1).astype(np.uint64), 2, 8, takes, who)
        if is_turned:
            return numbers_of(halves.reshape(self.count, 16, rows), kind).transpose(0, 2, 1)
        return numbers_of(halves, kind).reshape(self.count, rows, -1)


def _address(register: Lanes, offset: int) -> Lanes:
    return register.astype(np.uint64) + np.uint64(offset % (1 << 64))


_SPECIAL = {
    "ld.": _Team.load, "ldm": _Team.load, "st.": _Team.store, "stm": _Team.store, "cp.": _Team.copy,
    "wgm": _Team.warpgroup, "fen": _Team.warpgroup,
}  # fmt: skip
