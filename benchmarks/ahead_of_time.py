"""Compile this library's programs for accelerators that are not there, and count what the compiled programs will do.

COMMAND: python benchmarks/ahead_of_time.py --target h200 v5e --program decode --size 124M --rows 1 8
         python benchmarks/ahead_of_time.py --target cpu --program train --size 124M --rows 4 --tokens 256 \
             --dtype float32
         python benchmarks/ahead_of_time.py --published --output benchmarks/results/ahead_of_time.md

A TPU needs libtpu, an H200 JAX's CUDA plugin; the script says how to install them. Each program is compiled in its own
process. A decode program takes seconds, a training step of 124M for an accelerator a minute or more on two CPU cores.

It counts kernels, bytes, copies and memory. It cannot tell times. XLA chooses some kernels of a GPU by timing them,
which is not possible here, so a GPU may get others.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import topology
from turns import SIZES, Report

PROGRAMS = ("decode", "prefill", "train")
HEADINGS = (
    "target | program | kernels | MB moved | least MB | once: kernels, MB | large copies | loops, conditionals | "
)
HEADINGS += "collectives | temp MB | args MB | peak MB | attention | compile s"
LEGEND = """\
The programs are `decode` and `prefill` of `gpt2_jax/generation/programs.py`, and the training step with AdamW and a
dropout of {dropout:g}. They were compiled and not run. Decode is greedy. Its figures are of one step; `once` is what a
call of up to 16 steps runs before and after its loop. MB are 10^6 bytes.

- Kernels: fusions, custom calls and single operations on more than one element. Of a conditional, the branch that
  moves least counts: greedy decoding takes it. A loop counts as often as it turns, and once if that is not known.
- MB moved: what the kernels read and write, from the HLO text. A kernel reads each operand once, and of an operand that
  it only slices or gathers from, the slice. An update in place writes the new part. On a TPU arrays have whole tiles,
  and memory on the chip costs nothing: what is prefetched counts when it is read from HBM. A small model can stay on
  the chip from step to step, and move less than the least.
- Least MB of a decode step: the weights without the position table, and the cache ({slots} slots and 16 recent ones of
  each row), each read once, and one slot written. Of prefill: the weights without the embeddings read, and the cache
  written. Of a training step: parameters and moments, each read and written; no activations.
- Devices: they share heads and neurons (the mesh axis `model`). All figures are of one of them.
- Large copies: copies and transposes of at least the elements of one layer's keys, in a step + once.
- Loops, conditionals: loops whose number of turns depends on data, and conditionals, in the whole program. A GPU waits
  for the host at each turn of the former and at each of the latter.
- Peak MB: arguments, outputs that share no memory with arguments, and temporaries. XLA's own figures.
- Attention: how many kernels of Mosaic (Pallas on a TPU), cuDNN or Triton there are; plain means none: XLA's own matrix
  products and softmax."""
ATTENTION = {"tpu_custom_call": "Mosaic", "__cudnn$fmha": "cuDNN", "triton": "Triton"}
PUBLISHED = [  # target, program, size, rows, tokens, dtype, devices
    *(("h200", "decode", "124M", rows, 1024, "bfloat16", 1) for rows in (1, 8)),
    ("h200", "prefill", "124M", 16, 1024, "bfloat16", 1),
    *(("h200", "train", "124M", rows, 1024, "bfloat16", 1) for rows in (8, 32)),
    *(("v5e", "decode", "124M", rows, 1024, "bfloat16", 1) for rows in (1, 8)),
    *(("v5p", "train", "124M", rows, 1024, "bfloat16", 1) for rows in (8, 32)),
    ("v6e", "decode", "124M", 1, 1024, "bfloat16", 1),
    *(("cpu", "decode", "124M", rows, 1024, "float32", 1) for rows in (1, 8)),
    ("cpu", "train", "124M", 4, 256, "float32", 1),
    *((target, "decode", "1558M", 1, 1024, "bfloat16", n) for target in ("h200", "v5e") for n in (1, 4)),
    ("h200", "prefill", "1558M", 4, 1024, "bfloat16", 4),
    ("h200", "train", "124M", 8, 1024, "bfloat16", 4),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
      target: one of topology.TARGETS.
      program: one of PROGRAMS.
      size: one of SIZES, or "tiny": two layers of two heads of the released width, 64.
      rows: rows of a batch.
      tokens: tokens of each row, in prefill and train.
      dtype: dtype of the products; in decode and prefill also of the params.
      slots: slots of the long cache that decode reads.
      dropout: dropout rate, in train.
      devices: devices that share heads and neurons.
    """

    target: str
    program: str
    size: str
    rows: int
    tokens: int
    dtype: str
    slots: int
    dropout: float
    devices: int = 1

    def __str__(self) -> str:
        """Return the program as the table names it."""
        several = "s" * (self.rows > 1)
        shape = f"{self.rows} row{several}" if self.program == "decode" else f"{self.rows} x {self.tokens}"
        together = f", {self.devices} devices" if self.devices > 1 else ""
        return f"{self.program}, {self.size} {self.dtype}, {shape}{together}"

    @property
    def n_positions(self) -> int:
        """Tokens or slots of a row."""
        return self.slots if self.program == "decode" else self.tokens


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--target", nargs="+", choices=topology.TARGETS, default=["cpu"], help="devices to compile for")
    add("--program", nargs="+", choices=PROGRAMS, default=["decode"], help="programs to compile")
    add("--size", choices=("tiny", *SIZES), default="124M", help="tiny has two layers of two heads")
    add("--rows", type=int, nargs="+", default=[1], help="rows of a batch")
    add("--tokens", type=int, default=1024, help="tokens of a row, in prefill and train")
    add("--slots", type=int, default=1024, help="slots of the cache, in decode")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the matrix products")
    add("--dropout", type=float, default=0.0, help="dropout rate, in train")
    add("--devices", type=int, default=1, help=f"devices that share heads and neurons, up to {topology.MOST_DEVICES}")
    add("--published", action="store_true", help="compile the programs of results/ahead_of_time.md instead")
    add("--limit", type=float, default=360, help="seconds after which a program is left out")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    add("--worker", help=argparse.SUPPRESS)  # a case as JSON: compile it in this process
    args = parser.parse_args()
    if min(args.tokens, args.slots, *args.rows) < 1 or not 0 <= args.dropout < 1:
        parser.error("--tokens, --slots and --rows must be 1 or more, and --dropout at least 0 and less than 1")
    if not 1 <= args.devices <= topology.MOST_DEVICES:
        parser.error(f"--devices must be from 1 to {topology.MOST_DEVICES}")
    return args


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the programs to compile."""
    every = itertools.product(
        args.target, args.program, [args.size], args.rows, [args.tokens], [args.dtype], [args.devices]
    )
    for target, program, size, rows, tokens, dtype, n_devices in PUBLISHED if args.published else every:
        yield Case(target, program, size, rows, tokens, dtype, args.slots, args.dropout, n_devices)


def compile_case(case: Case) -> dict[str, Any]:
    """Compile a program, and return what it will do."""
    import abstract_programs
    from hlo_counts import Cost, Program

    lowered = abstract_programs.lower(case, topology.devices(case.target, case.devices))
    begin = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    program = Program(compiled.as_text(), large=abstract_programs.large(case))
    step, once = program.split_at_main_loop() if case.program == "decode" else (program.total(), Cost())
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "step": dataclasses.asdict(step),
        "once": dataclasses.asdict(once),
        "least": abstract_programs.least_bytes(case),
        "loops": program.count_endless(),
        "conditionals": program.count("conditional"),
        "collectives": program.count_collectives(),
        "temp": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "peak": memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes,
        "attention": attention(program.targets()),
        "seconds": seconds,
    }


def attention(targets: dict[str, int]) -> str:
    """Return which attention a program with these custom calls has."""
    known = {
        name: sum(n for target, n in targets.items() if part in target.lower()) for part, name in ATTENTION.items()
    }
    return ", ".join(f"{n} {name}" for name, n in known.items() if n) or "plain"


def in_own_process(case: Case, limit: float) -> dict[str, Any]:
    """Compile a program in a new process, which frees the memory, and may abort.

    Raises:
      RuntimeError: it failed; the message is its last line.
    """
    command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(case))]
    environment = os.environ | topology.environment(case.devices)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not compiled after {limit:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def cells(case: Case, found: dict[str, Any]) -> list[str]:
    """Return the cells of a row."""
    step, once, in_steps = found["step"], found["once"], case.program == "decode"
    return [
        case.target,
        str(case),
        str(step["kernels"]),
        megabytes(step["n_bytes"]),
        megabytes(found["least"]),
        f"{once['kernels']}, {megabytes(once['n_bytes'])}" if in_steps else "",
        f"{step['copies']} + {once['copies']}" if in_steps else str(step["copies"]),
        f"{found['loops']}, {found['conditionals']}",
        str(found["collectives"]),
        *(megabytes(found[name]) for name in ("temp", "arguments", "peak")),
        found["attention"],
        f"{found['seconds']:.0f}",
    ]


def megabytes(n_bytes: int) -> str:
    """Return bytes as MB, to three digits or whole."""
    return f"{n_bytes / 1e6:,.0f}" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.3g}"


def main(args: argparse.Namespace) -> int:
    """Compile the programs and print a Markdown table. Return 2 if a package is missing."""
    if args.worker:
        print(json.dumps(compile_case(Case(**json.loads(args.worker)))))
        return 0
    todo = list(cases(args))
    targets = list(dict.fromkeys(case.target for case in todo))
    if absent := [sentence for sentence in map(topology.missing, targets) if sentence]:
        print("\n".join(absent), file=sys.stderr)
        return 2
    report, left_out = Report(args.output), []
    machine = f"Compiled on {len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}) without an accelerator"
    report.title("Programs compiled ahead of time", ", ".join([machine, *topology.versions(targets)]))
    report.say(LEGEND.format(dropout=args.dropout, slots=args.slots) + "\n")
    report.headings(HEADINGS)
    for case in todo:
        try:
            report.say(f"| {' | '.join(cells(case, in_own_process(case, args.limit)))} |")
        except RuntimeError as error:
            left_out.append(f"{case.target}, {case}: {error}")
    for line in left_out:
        report.say(f"\nLeft out: {line}.")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
