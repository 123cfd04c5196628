"""`gpt2-generate --input --output`: many prompts, from a file or a stream, into another."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gpt2_jax.commands._generate_options import IN_A_LINE, Options, ignored
from gpt2_jax.commands._prompts import descriptor_of
from gpt2_jax.commands._samples import as_json, tokens_as_json, tokens_of_prompt
from gpt2_jax.commands._speaker import Model, Row
from gpt2_jax.files import expanded

if TYPE_CHECKING:
    from gpt2_jax.commands.generate import Args
    from gpt2_jax.data.templates import Template
    from gpt2_jax.processes import Share

SPREAD = 8  # batches of a call if lines have their own settings, so that lines with equal settings can run together
SHOWN = 5  # bad lines whose messages are shown


def complete_file(
    model: Model, args: Args, source: Path, target: Path, share: Share, template: Template | None = None
) -> None:
    """Complete the prompts of `source`, and write them to `target`. One that is not a file is read or written once.

    With a template, lines may have an instruction instead of a prompt.
    """
    lines, start = _Lines(model, args, share, template), time.perf_counter()
    stream, descriptor = is_stream(target), descriptor_of(source)
    if share.count > 1:
        _check_shared(source, target, stream)
    name = "standard input" if descriptor == 0 else expanded(source)
    n_done = (lines.through if stream else lines.into_a_file)(name, descriptor, target)
    if lines.n_bad:
        print(f'lines skipped: {lines.n_bad}; "error" of an output line says why', file=sys.stderr)
    print(f"{n_done} prompts in {time.perf_counter() - start:.1f} s, with loading and compilation", file=sys.stderr)


def is_stream(target: Path) -> bool:
    """Return whether an output is a pipe, a device or anything else that is not a file. Nothing resumes there."""
    if descriptor_of(target) is not None:
        return True
    try:
        mode = expanded(target).stat().st_mode
    except OSError:  # not there yet
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _check_shared(source: Path, target: Path, stream: bool) -> None:
    """Check that several processes can read the prompts and write the results.

    Raises:
      ValueError: one of them is not a file.
    """
    if stream:
        raise ValueError(f"--output {target} is not a file: several processes write their lines into one file together")
    if descriptor_of(source) is not None or (expanded(source).exists() and not expanded(source).is_file()):
        raise ValueError(f"--input {source} is not a file: each of several processes must read all of its lines")


@dataclasses.dataclass
class _Lines:
    """Completes the prompts of lines."""

    model: Model
    args: Args
    share: Share
    template: Template | None = None  # for lines with an instruction
    n_bad: int = 0
    with_settings: bool = False  # whether a line that was checked has its own settings
    noted: set[str] = dataclasses.field(default_factory=set)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the command adds to a line."""
        return ("samples", "prompt_logprobs") if self.args.prompt_logprobs else ("samples",)

    @property
    def batch_size(self) -> int:
        """Lines that are completed at the same time."""
        return max(1, self.args.batch_size // self.args.num_samples)

    @property
    def also(self) -> Callable[[dict[str, Any]], bool] | None:
        """Returns whether an object without a prompt has an instruction; None without a template."""
        from gpt2_jax.data.conversations import is_conversation

        return is_conversation if self.template else None

    def lines_of_a_call(self) -> int:
        """Return how many lines of a file are completed by one call. All lines were checked before."""
        return self.batch_size * (SPREAD if self.with_settings else 1)

    def into_a_file(self, source: str | Path, descriptor: int | None, target: Path) -> int:
        """Complete the lines into a file, or resume that. Return the number of lines that were written."""
        from gpt2_jax.checkpoints.fingerprints import fingerprint
        from gpt2_jax.generation.jsonl import complete_file
        from gpt2_jax.tokenizer import fingerprint as vocabulary

        model = self.model
        settings = dataclasses.asdict(model.settings()) | {"dtype": self.args.dtype}
        settings |= {name: getattr(self.args, name) for name in ("num_samples", "prompt_logprobs")}
        settings |= {"template": dataclasses.asdict(self.template)} if self.template else {}
        settings |= {"allow_special": model.options.allow_special, "vocabulary": vocabulary(model.tokenizer)}
        data = None if descriptor is None else _read(descriptor)
        return complete_file(
            source,
            expanded(target),
            self.complete,
            settings,
            self.lines_of_a_call,
            self.fields,
            model=lambda: fingerprint(*model.weights),
            check=self.check,
            skip=self.skip if self.args.skip_bad_lines else None,
            also=self.also,
            data=data,
            share=self.share,
        )

    def through(self, source: str | Path, descriptor: int | None, target: Path) -> int:
        """Complete the lines into a stream. Return the number of lines that were written."""
        from gpt2_jax.generation.prompt_lines import Reader, read_prompts
        from gpt2_jax.generation.prompt_streams import complete_stream, lines_as_they_come

        def reader() -> Reader:
            skip = self.skip if self.args.skip_bad_lines else None
            return Reader(source, self.fields, self.check, skip, also=self.also)

        with _opened(target) as output, contextlib.ExitStack() as stack:
            if descriptor is None and Path(source).is_file():
                data = Path(source).read_bytes()
                lines = iter([data.split(b"\n")])
                if not self.args.skip_bad_lines:
                    read_prompts(data, reader())  # a bad line ends the command before anything is done
            else:
                opened = os.open(source, os.O_RDONLY) if descriptor is None else os.dup(descriptor)
                stack.callback(os.close, opened)
                lines = lines_as_they_come(opened)
            print("the output is not a file: an interrupted run cannot resume", file=sys.stderr)
            return complete_stream(lines, output, self.complete, reader(), self.batch_size, self.fields)

    def check(self, line: dict[str, Any]) -> None:
        """Raise ValueError if a line cannot be completed. Note fields that look like settings, but are not."""
        from gpt2_jax.generation.prompts import check_fits, check_prompt

        for name in set(ignored(line)) - self.noted:
            self.noted.add(name)
            print(
                f'note: "{name}" of a line has no effect, and is only copied: write it in "{IN_A_LINE}"',
                file=sys.stderr,
            )
        self.with_settings |= line.get(IN_A_LINE) is not None
        row = self.row(line, 0)
        check_prompt(self.model.config, "the prompt", row.ids)
        check_fits(self.model.config, "the prompt", row.ids, row.settings)

    def skip(self, message: str) -> None:
        """Report a bad line."""
        self.n_bad += 1
        if self.n_bad <= SHOWN:
            print(f"skipped: {message}", file=sys.stderr)

    def row(self, line: dict[str, Any], number: int) -> Row:
        """Return what is to be completed."""
        options = self.model.options.changed(line)
        name = f"the prompt with index {number // self.args.num_samples}"
        return Row(self._ids(line, options), self.model.settings(options), number, name)

    def _ids(self, line: dict[str, Any], options: Options) -> list[int]:
        """Return the ids of a line's prompt, or of its instruction."""
        if "prompt" in line or self.template is None:
            return self.model.encode(line["prompt"], options)
        from gpt2_jax.data.conversations import conversation_of

        try:
            return self.template.prompt_ids(self.model.tokenizer, conversation_of(line, answered=False))
        except ValueError as error:
            raise ValueError(f"the line{error}") from error

    def complete(self, lines: list[dict[str, Any]], indices: list[int]) -> list[dict[str, Any]]:
        """Return the new fields of some lines."""
        n, tokenizer = self.args.num_samples, self.model.tokenizer
        first = [self.row(line, i * n) for line, i in zip(lines, indices, strict=True)]
        rows = [dataclasses.replace(row, number=row.number + k) for row in first for k in range(n)]
        samples = [as_json(sample, tokenizer) for sample in self.model.complete(rows)]
        results: list[dict[str, Any]] = [{"samples": samples[i * n : (i + 1) * n]} for i in range(len(lines))]
        if self.args.prompt_logprobs:
            scores = self.model.score([row.ids for row in first], [row.name for row in first])
            for result, row, logprobs in zip(results, first, scores, strict=True):
                tokens = tokens_of_prompt(row.ids, logprobs)
                result["prompt_logprobs"] = tokens_as_json(tokens, tokenizer, top=False)
        return results


def _read(descriptor: int) -> bytes:
    """Return everything that a pipe, a socket or a file still has."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read()


@contextlib.contextmanager
def _opened(target: Path) -> Iterator[BinaryIO]:
    descriptor = descriptor_of(target)
    if str(target) == "-":
        descriptor = 1
    if descriptor == 1:
        sys.stdout.flush()
    with expanded(target).open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb") as file:
        yield file
