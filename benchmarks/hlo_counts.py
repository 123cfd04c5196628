"""Counts of kernels, bytes, loops and copies in the HLO text of a compiled program.

HLO is scheduled when XLA prints it: what stands outside of fusions is what runs, and each such instruction reads its
operands from memory and writes its result to memory.

Source: https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator

from hlo_text import Computation, Instruction, parse

# These give names to arrays that are there already, or do something on the host.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
FREE |= {"replica-id", "domain", "add-dependency", "get-dimension-size"}
FREE_TARGETS = {"ConcatBitcast", "AllocateBuffer", "Sharding", "AssumeGatherIndicesInBound"}  # custom calls likewise
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"}
SLICES = {"slice", "dynamic-slice", "gather"}  # read a part of their first operand
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # write a part of their first operand: the operand with the part
# Of these, a part of the result needs a part of the operand of the same size.
SAME_SIZE = {"bitcast", "reshape", "transpose", "copy", "convert", "negate", "add", "subtract", "multiply", "select"}
SAME_SIZE |= {"divide", "maximum", "minimum", "and", "or", "not", "compare", "abs", "exponential", "tanh", "tuple"}
CONTRACTIONS = {"dot", "convolution", "reduce", "custom-call"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What runs: kernels, bytes that they read and write, and copies and transposes of large arrays."""

    kernels: int = 0
    n_bytes: int = 0
    copies: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.kernels + other.kernels, self.n_bytes + other.n_bytes, self.copies + other.copies)

    def __mul__(self, n: int) -> Cost:
        return Cost(self.kernels * n, self.n_bytes * n, self.copies * n)


class Program:
    """The HLO text of a program.

    Args:
      text: from `compiled.as_text()`.
      large: copies and transposes of this many elements or more are counted.
    """

    def __init__(self, text: str, large: float = math.inf):
        self.large = large
        self.computations, self.entry = parse(text)
        self.needed = functools.cache(self._needed)

    def total(self) -> Cost:
        """Return the cost of the whole program."""
        return self.cost(self.entry)

    def split_at_main_loop(self) -> tuple[Cost, Cost]:
        """Return the cost of one turn of the loop that moves most, and of all that runs before and after the loop."""
        loops = [line for line in self.computations[self.entry].values() if line.opcode == "while"]
        turn, loop = max(((self._turn(line), line) for line in loops), key=lambda pair: pair[0].n_bytes)
        others = (self._line(self.entry, line) for line in self.computations[self.entry].values() if line is not loop)
        return turn, sum(others, Cost())

    def count(self, *opcodes: str) -> int:
        """Return how many instructions there are, each counted once however often it runs."""
        return sum(line.opcode in opcodes for line in self._lines())

    def count_collectives(self) -> int:
        """Return the number of collective operations."""
        return self.count(*COLLECTIVES, *(f"{name}-start" for name in COLLECTIVES))

    def count_endless(self) -> int:
        """Return the number of loops whose number of turns XLA does not know."""
        loops = ((name, line) for name in self.computations for line in self.computations[name].values())
        return sum(line.opcode == "while" and self._turns(name, line) is None for name, line in loops)

    def targets(self) -> dict[str, int]:
        """Return the targets of custom calls, and how many calls each has."""
        targets = collections.Counter(line.target for line in self._lines() if line.opcode == "custom-call")
        return {target: n for target, n in targets.items() if target not in FREE_TARGETS}

    def _lines(self) -> Iterator[Instruction]:
        return (line for computation in self.computations.values() for line in computation.values())

    def cost(self, name: str) -> Cost:
        """Return the cost of a computation that is not a fusion."""
        return sum((self._line(name, line) for line in self.computations[name].values()), Cost())

    def _turn(self, loop: Instruction) -> Cost:
        """Return the cost of one turn of a loop."""
        return sum((self.cost(called) for called in loop.called), Cost())

    def _turns(self, name: str, loop: Instruction) -> int | None:
        """Return how often a loop of the computation `name` turns; None if that depends on the data.

        XLA for a TPU does not write it down. It is known if the loop counts from a constant to a constant in ones.
        """
        if loop.trip_count is not None:
            return loop.trip_count
        before = self.computations[name]
        condition, body = (self.computations[loop.computation(role)] for role in ("condition", "body"))
        end = _root(condition)
        if end.opcode != "compare" or "direction=LT" not in end.rest:
            return None
        counter, limit = (_source(condition, operand) for operand in end.operands)
        if counter.index is None or limit.literal is None:
            return None
        carried, result = before[loop.operands[0]], _root(body)
        if not carried.opcode == result.opcode == "tuple":
            return None
        start = _source(before, carried.operands[counter.index])
        step = _source(body, result.operands[counter.index])
        added = {(one.index, one.literal) for one in (_source(body, operand) for operand in step.operands)}
        in_ones = step.opcode == "add" and added == {(counter.index, None), (None, 1)}
        return limit.literal - start.literal if in_ones and start.literal is not None else None

    def _line(self, name: str, line: Instruction) -> Cost:
        """Return the cost of an instruction of the computation `name`."""
        if line.opcode == "while":
            return self._turn(line) * (self._turns(name, line) or 1)
        if line.opcode == "conditional":
            return min((self.cost(branch) for branch in line.called), key=lambda cost: cost.n_bytes)
        if line.opcode in ("call", "async-start"):
            return sum((self.cost(called) for called in line.called), Cost())
        if line.opcode in FREE or line.target in FREE_TARGETS or line.opcode.endswith(("-done", "-update")):
            return Cost()
        if line.opcode.endswith("-start") and line.opcode.removesuffix("-start") not in COLLECTIVES:
            return self._prefetch(name, line)
        n_bytes = self._read(name, line) + self._written(name, line)
        if line.opcode.removesuffix("-start") in COLLECTIVES:
            return Cost(0, n_bytes, 0)
        on_scalars = line.opcode != "fusion" and line.opcode != "custom-call" and line.size <= 1
        return Cost(int(not on_scalars), n_bytes, int(self._is_large_copy(line)))

    def _prefetch(self, name: str, line: Instruction) -> Cost:
        """Return the cost of an asynchronous copy or slice. Its results begin (copy, source) or (source, copy)."""
        source = self.computations[name][line.operands[0]].arrays[0]
        copy = line.arrays[0 if line.opcode == "copy-start" else -2]
        read, written = (0 if array.on_chip else copy.n_bytes for array in (source, copy))
        is_copy = read and written and copy.size >= self.large
        return Cost(0, read + written, int(bool(is_copy)))

    def _is_large_copy(self, line: Instruction) -> bool:
        """Return whether a kernel copies or transposes a large array, and does not also multiply or sum it."""
        inside = [line]
        if line.opcode == "fusion":
            inside = [one for called in line.called for one in self.computations[called].values()]
        moves = any(one.size >= self.large and (one.opcode == "copy" or one.is_transpose) for one in inside)
        return moves and CONTRACTIONS.isdisjoint(one.opcode for one in inside)

    # ---- bytes

    def _read(self, name: str, line: Instruction) -> int:
        """Return the bytes that a kernel reads of its operands: each array once, and only the parts that it uses."""
        computation = self.computations[name]
        parts: dict[str, float] = collections.defaultdict(float)
        for k, operand in enumerate(line.operands):
            parts[_unwrapped(computation, operand)] += self._part(name, line, k, line.size)
        total = 0.0
        for operand, part in parts.items():
            held = computation[operand]
            full = sum(array.n_bytes for array in held.arrays if not array.on_chip)
            total += full * min(1, part / max(held.size, 1))
        return round(total)

    def _written(self, name: str, line: Instruction) -> int:
        """Return the bytes that an instruction writes. Of an array that it updates in place, only the new part."""
        if line.opcode in UPDATES:
            part = self.computations[name][line.operands[UPDATES[line.opcode]]]
            return sum(array.n_bytes for array in line.arrays if not array.on_chip) and _bytes(part)
        if line.opcode == "fusion":
            (called,) = line.called
            lines = self.computations[called]
            root = _root(lines)
            roots = [lines[operand] for operand in root.operands] if root.opcode == "tuple" else [root]
            total = 0
            for one, array in zip(roots, line.arrays, strict=False):
                one = lines[_unwrapped(lines, one.name)]
                in_place = self._in_place(called, one) or one.opcode == "fusion"
                total += 0 if array.on_chip else self._written(called, one) if in_place else array.n_bytes
            return total
        arrays = line.arrays
        if (
            line.opcode == "custom-call" and arrays[1:] and arrays[-1].dtype in ("u8", "s8")
        ):  # workspace of cuDNN, cuBLAS
            arrays = arrays[:-1]
        return sum(array.n_bytes for array in arrays if not array.on_chip)

    def _part(self, name: str, line: Instruction, k: int, needed: float) -> float:
        """Return how many elements of operand k are read to compute `needed` elements of the result."""
        size = self.computations[name][line.operands[k]].size
        if line.opcode in UPDATES and k == 0:
            return 0 if self._in_place(name, line) else size
        if line.opcode == "fusion":
            (called,) = line.called
            parameter = next(
                one.name
                for one in self.computations[called].values()
                if one.opcode == "parameter" and one.rest.startswith(f"{k})")
            )
            return self.needed(called, parameter)
        return min(size, needed) if line.opcode in SAME_SIZE or (line.opcode in SLICES and k == 0) else size

    def _needed(self, name: str, result: str) -> float:
        """Return how many elements of a result a fused computation uses."""
        computation = self.computations[name]
        if result == _root(computation).name:
            return computation[result].size
        users = ((line, k) for line in computation.values() for k, one in enumerate(line.operands) if one == result)
        total = sum(self._part(name, line, k, self.needed(name, line.name)) for line, k in users)
        return min(total, computation[result].size)

    def _in_place(self, name: str, line: Instruction) -> bool:
        """Return whether an update writes into the memory of its first operand.

        It does outside of fusions: XLA copies the operand before, if it must. In a fusion, the first operand must come
        from outside, and the result must go there.
        """
        if line.opcode not in UPDATES:
            return False
        computation = self.computations[name]
        if name not in self._fused:
            return True
        root = _root(computation)
        roots = root.operands if root.opcode == "tuple" else (root.name,)
        goes_out = line.name in (_unwrapped(computation, one) for one in roots)
        return goes_out and computation[_unwrapped(computation, line.operands[0])].opcode == "parameter"

    @functools.cached_property
    def _fused(self) -> set[str]:
        """The computations of fusions."""
        return {called for line in self._lines() if line.opcode == "fusion" for called in line.called}


def _root(computation: Computation) -> Instruction:
    """Return the instruction whose result is that of the computation."""
    return computation[next(reversed(computation))]


def _unwrapped(computation: Computation, name: str, without: tuple[str, ...] = ("bitcast",)) -> str:
    """Return the name of the array that an instruction only gives another shape."""
    while computation[name].opcode in without:
        name = computation[name].operands[0]
    return name


def _source(computation: Computation, name: str) -> Instruction:
    """Return the instruction that makes an array, without copies."""
    return computation[_unwrapped(computation, name, ("bitcast", "copy"))]


def _bytes(line: Instruction) -> int:
    return sum(array.n_bytes for array in line.arrays)
