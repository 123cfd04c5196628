"""The HLO text of a compiled program (`compiled.as_text()`), read into computations and their instructions.

Source: the printer of XLA, xla/hlo/ir/hlo_instruction.cc.
"""

from __future__ import annotations

import dataclasses
import math
import re

CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
INDEX = re.compile(r"\bindex=(\d+)")
DIMENSIONS = re.compile(r"\bdimensions=\{([\d,]*)\}")
TARGET = re.compile(r'custom_call_target="([^"]*)"')
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^}]*)\})?")
NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in memory: number of elements, bytes with padding, and whether it is in memory on the chip of a TPU."""

    dtype: str
    size: int
    n_bytes: int
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: its results, what it does, the names of its operands, and the rest of the line."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def size(self) -> int:
        """Number of elements of all results."""
        return sum(array.size for array in self.arrays)

    @property
    def target(self) -> str:
        """The target of a custom call."""
        found = TARGET.search(self.rest)
        return found[1] if found else ""

    @property
    def trip_count(self) -> int | None:
        """How often a loop runs its body, if XLA says so."""
        found = TRIP_COUNT.search(self.rest)
        return int(found[1]) if found else None

    def computation(self, role: str) -> str:
        """Return the computation that has this role: "body" and "condition" of a loop."""
        return next(name for found, name in CALLED.findall(self.rest) if found == role)

    @property
    def index(self) -> int | None:
        """Which part of a tuple a get-tuple-element takes; None for other instructions."""
        found = INDEX.search(self.rest) if self.opcode == "get-tuple-element" else None
        return int(found[1]) if found else None

    @property
    def literal(self) -> int | None:
        """The value of a constant whole number; None for other instructions."""
        found = re.match(r"(-?\d+)\)", self.rest) if self.opcode == "constant" else None
        return int(found[1]) if found else None

    @property
    def is_transpose(self) -> bool:
        """Whether it changes the order of sides. XLA also writes transposes that do not."""
        found = DIMENSIONS.search(self.rest) if self.opcode == "transpose" else None
        sides = found[1].split(",") if found else []
        return sides != [str(i) for i in range(len(sides))]

    @property
    def called(self) -> list[str]:
        """The computations of a loop, a conditional, a call or a fusion."""
        found = BRANCHES.search(self.rest)
        return NAME.findall(found[1]) if found else [name for _, name in CALLED.findall(self.rest)]


Computation = dict[str, Instruction]
"""The instructions by name, in the order in which they run. The last is the root."""


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations by name, and the name of the one that runs first."""
    computations: dict[str, Computation] = {}
    entry = root = ""
    lines: Computation = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            lines = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith(" ") and " = " in line:
            instruction, is_root = _instruction(line)
            lines[instruction.name] = instruction
            if is_root:
                root = instruction.name
        elif line == "}" and lines:  # other lines that begin so are inside an attribute of a Pallas kernel
            lines[root] = lines.pop(root)  # the root need not be printed last
    return computations, entry


def _instruction(line: str) -> tuple[Instruction, bool]:
    """Return the instruction of a line `[ROOT] %name = shape opcode(operands), attributes`."""
    left, _, right = line.strip().partition(" = ")
    shape, right = _shape(right)
    opcode, _, right = right.partition("(")
    end = _closing(right)
    is_literal = opcode in ("constant", "parameter")  # a value or a number is in the brackets
    operands = () if is_literal else tuple(NAME.findall(right[:end]))
    arrays = tuple(map(_array, ARRAY.finditer(shape)))
    rest = right if is_literal else right[end:]
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, arrays, opcode.strip(), operands, rest), left.startswith("ROOT ")


def _shape(text: str) -> tuple[str, str]:
    """Divide text into the shape at its start, which is a tuple in brackets or one word, and what follows."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end:].strip()


def _closing(text: str) -> int:
    """Return the index of the bracket that closes the one before the text."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _array(found: re.Match) -> Array:
    """Return an array from its text, such as bf16[50257,768]{1,0:T(8,128)(2,1)S(1)}.

    On a TPU an array is stored in tiles, here of 8 x 128, and its last sides in memory order are padded to whole tiles.
    S(1) and other numbers but 0 and 5 (the host) are memory on the chip.
    """
    dtype, sides, layout = found[1], [int(side) for side in re.findall(r"\d+", found[2])], found[3] or ""
    order, _, more = layout.partition(":")
    padded = [sides[int(i)] for i in re.findall(r"\d+", order)][::-1] or list(sides)  # most minor last
    if tile := re.search(r"T\(([\d,]+)\)", more):
        for i, width in enumerate(reversed(tile[1].split(",")), 1):
            if i <= len(padded):
                padded[-i] = -(-padded[-i] // int(width)) * int(width)
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    space = re.search(r"S\((\d+)\)", more)
    return Array(dtype, math.prod(sides), math.prod(padded) * bits // 8, bool(space) and space[1] not in "05")
