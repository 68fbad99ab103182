"""PTX as Triton writes it, parsed: instructions whose operands are numbers of registers."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field, replace

import numpy as np

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_PARAM = re.compile(r"\.param\s+\.(\w+)[^,]*?\s(\w+)\s*(?:,|$)")
_LABEL = re.compile(r"(\$?[\w$]+):\s*")
_GUARD = re.compile(r"@(!?)(%?[\w]+)\s+")
_ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_WAITS = ("cp.async.commit", "cp.async.wait", "wgmma.fence", "wgmma.commit", "wgmma.wait", "fence")
_WIDTHS = {"pred": 0, "b8": 16, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "u32": 32, "u64": 64}

DTYPES = {0: np.dtype(np.bool_), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: the operation with all its suffixes.
        outputs, inputs: numbers of registers; -1 of an output that nobody wants. Constants are registers.
        guard: the predicate, -1 if there is none; ``negated`` if it must not hold.
        offset: of the address; the place that a branch goes to; the number of a parameter, or of groups to wait for.
        source: offset of the address that a copy reads.
        line: of the PTX, for people.
    """

    name: str
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    guard: int = -1
    negated: bool = False
    offset: int = 0
    source: int = 0
    line: str = ""


@dataclass
class Program:
    """A kernel: its instructions, the widths of its registers in bits, constants by register, parameters' types."""

    name: str
    parameters: list[tuple[str, str]]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    constants: dict[int, int] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Program:
    """Parse the one kernel of ``text``.

    Raises:
        ValueError: a statement that is none this reader knows.
    """
    text = _COMMENT.sub("", text)
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("there must be one .entry in the PTX, found none")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    program = Program(
        entry[1], [(m[1], m[2]) for m in _PARAM.finditer(entry[2].strip())], int(threads[1]) if threads else 0
    )
    _Reader(program, text[entry.end() :]).read()
    return program


class _Reader:
    def __init__(self, program: Program, body: str) -> None:
        self.program, self.body = program, body
        self.names: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[int, str]] = []

    def read(self) -> None:
        place, depth = 0, 1
        body = self.body
        while depth:
            while body[place].isspace():
                place += 1
            if body[place] == "{":
                place, depth = place + 1, depth + 1
            elif body[place] == "}":
                place, depth = place + 1, depth - 1
            elif label := _LABEL.match(body, place):
                self.labels[label[1]] = len(self.program.instructions)
                place = label.end()
            elif body.startswith((".loc", ".file", ".pragma"), place):
                place = body.index("\n", place)
            else:
                end = body.index(";", place)
                self.statement(" ".join(body[place:end].split()))
                place = end + 1
        for at, target in self.branches:
            self.program.instructions[at] = replace(self.program.instructions[at], offset=self.labels[target])

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in names.split(","):
                stem = re.fullmatch(r"\s*(%?\w+)(?:<(\d+)>)?\s*", name)
                if stem is None:
                    raise ValueError(f"a register must be declared, got {text}")
                whole = [f"{stem[1]}{i}" for i in range(int(stem[2]))] if stem[2] else [stem[1]]
                for one in whole:
                    self.names[one] = self.register(_WIDTHS[kind[1:]])
            return
        guard, negated, line = -1, False, text
        if found := _GUARD.match(text):
            guard, negated, text = self.names[found[2]], found[1] == "!", text[found.end() :]
        name, _, rest = text.partition(" ")
        self.instruction(name, _operands(rest), guard, negated, line)

    def instruction(self, name: str, operands: list[str], guard: int, negated: bool, line: str) -> None:
        stem = name.split(".")[0]
        offset = source = 0
        outputs, inputs = list[int](), list[int]()
        if stem == "bra":
            self.branches.append((len(self.program.instructions), operands[0]))
        elif stem in ("bar", "ret", "exit") or name.startswith(_WAITS):
            offset = int(operands[0], 0) if operands else 0
        elif name.startswith("ld.param"):
            offset = int(re.search(r"_param_(\d+)", operands[1])[1])  # type: ignore[index]
            outputs = self.numbers(operands[0], 0)
        else:
            # a store's and an asynchronous copy's operands are all read
            first = 0 if stem in ("st", "stmatrix", "cp") else 1
            outputs = self.numbers(operands[0], 0) if first else []
            inputs = list(outputs) if stem == "wgmma" else []  # it adds to what is there
            width = _width(name)
            for operand in operands[first:]:
                if address := _ADDRESS.fullmatch(operand):
                    place = int(address[2] or "0", 0)
                    if inputs and stem == "cp":
                        source = place
                    else:
                        offset = place
                    inputs.append(self.number(address[1], 64))
                else:
                    inputs.extend(self.numbers(operand, width))
        self.program.instructions.append(
            Instruction(name, tuple(outputs), tuple(inputs), guard, negated, offset, source, line)
        )

    def numbers(self, operand: str, width: int) -> list[int]:
        if operand.startswith("{"):
            return [self.number(x.strip(), width) for x in operand[1:-1].split(",")]
        if "|" in operand:
            return [self.number(x.strip(), width) for x in operand.split("|")]
        return [self.number(operand, width)]

    def number(self, name: str, width: int) -> int:
        """The register of a name, or of a constant of ``width`` bits."""
        if name == "_":
            return -1
        if name in self.names:
            return self.names[name]
        if name.startswith("%"):
            self.names[name] = self.program.special[name] = self.register(32)
            return self.names[name]
        if name == "global_smem":
            return self.constant(0, 32)
        return self.constant(_constant(name), width)

    def constant(self, value: int, width: int) -> int:
        key = f"{value}:{width}"
        if key not in self.names:
            self.names[key] = self.register(width)
            self.program.constants[self.names[key]] = value
        return self.names[key]

    def register(self, width: int) -> int:
        self.program.widths.append(width)
        return len(self.program.widths) - 1


def _operands(text: str) -> list[str]:
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            found.append(text[start:place].strip())
            start = place + 1
    return [*found, text[start:].strip()] if text.strip() else []


def _constant(text: str) -> int:
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?\d+\.\d*", text):
        return int.from_bytes(struct.pack("<f", float(text)), "little")
    if text in ("true", "false"):
        return int(text == "true")
    return int(text.rstrip("U"), 0)


def _width(name: str) -> int:
    """Bits of an instruction's inputs, by its last type."""
    kinds = [part for part in name.split(".") if re.fullmatch(r"[subf]\d+(x2)?|bf16(x2)?|pred", part)]
    if not kinds:
        return 32
    last = kinds[-1]
    if last == "pred":
        return 0
    bits = int(re.search(r"\d+", last)[0]) * (2 if last.endswith("x2") else 1)  # type: ignore[index]
    return max(16, bits)
