"""`gpt2-generate`: prompts continued."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import gpt2_jax
from gpt2_jax.commands import _command, _model
from gpt2_jax.commands._speaker import Model, as_json, converse, encode, logprob_table, print_stream
from gpt2_jax.files import expanded
from gpt2_jax.generation.settings import Overflow, Settings, TopPRule

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config, Tokenizer


@dataclasses.dataclass(frozen=True)
class Options(Settings):
    """Settings whose defaults are the command's; what is not described here says what `Settings` says."""

    max_new_tokens: int = 128
    """Most tokens to add, 0 or more; the prompt and they must fit in the model's n_ctx tokens, but for --overflow."""
    top_k: int = 40
    top_p_rule: TopPRule = "original"
    """original leaves out the token that crosses p, as OpenAI's code; common keeps it, as most libraries."""
    stop_ids: tyro.conf.Suppress[Sequence[int]] = ()
    stop_strings: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="stop")] = ()
    """End a sample before this string; a shell writes a blank line as $'\\n\\n'."""
    stop_at_eot: bool = True
    """End a sample where the model ends its text, with <|endoftext|>."""
    overflow: Overflow = "error"
    """When a text outgrows the model's n_ctx tokens: refuse, or let the model see the last tokens alone."""
    logprobs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Write a table after each sample: every token's log-probability (base e) and this many alternatives, 0 or more."""

    def settings(self, tokenizer: Tokenizer) -> Settings:
        """Return them as the library takes them."""
        return Settings.among(vars(self) | {"stop_ids": (tokenizer.eot,) if self.stop_at_eot else ()})


@dataclasses.dataclass
class Args:
    """Continue prompts with GPT-2: prompt and continuation go to standard output, all else to standard error."""

    model: _model.ModelOption = None
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to continue (--prompt=-x if it begins with a dash); the empty one lets the model begin a text of its own.
    Without any, standard input is the prompt if it is a pipe or a file."""
    prompt_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A UTF-8 file whose whole text, but for one newline at its end, is a prompt; - is standard input."""
    input: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Prompts by the thousand: a file of JSON lines, each {"prompt": "..."} or a string; needs --output."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Where the samples of --input go: JSON lines in the same order, with "samples" beside what the input's line had.
    Killed, the same command goes on where it was."""
    interactive: bool = False
    """Read prompts from the terminal, with a history; Ctrl-C stops a sample, Ctrl-D ends."""
    num_samples: int = 1
    """Continuations of each prompt to write, 1 or more, each different."""
    dtype: _model.DtypeOption = None
    """Dtype of weights and matrix products; bfloat16 takes half the memory."""
    echo: bool = True
    """Write the prompt before its continuation."""
    batch_size: int = 16
    """Samples to compute at a time, 1 or more: more are faster in all and take more memory; the text is the same."""
    sampling: Annotated[Options, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    gc.set_threshold(10**6)  # tracing a model makes objects by the hundred thousand, next to none of them garbage:
    atexit.register(gc.freeze)  # looking for it, on the way and at the end, took a quarter of a short run
    _command.call("gpt2-generate", Args, run, argv, text=True)


def run(args: Args) -> None:
    """Load the model, generate, print."""
    _check(args)
    texts = [] if args.interactive or args.input else list(_prompts(args.prompt, args.prompt_file))
    from gpt2_jax.generation.prompts import check_prompts

    _model.keep_compiled()
    directory = _model.source(args.model)
    config, tokenizer = gpt2_jax.load_config(directory), gpt2_jax.load_tokenizer(directory)
    settings = args.sampling.settings(tokenizer).check(config, tokenizer)
    if texts:  # before the weights: those can take long
        check_prompts(config, [encode(tokenizer, text) for text in texts], settings)
    model = Model(args.model, args.dtype, tokenizer, settings, args.batch_size)
    if args.interactive:
        converse(model, args.sampling.seed, args.echo)
    elif args.input and args.output:
        _complete_file(model, args, config, expanded(args.input), expanded(args.output))
    else:
        _complete_prompts(model, args, texts)


def _check(args: Args) -> None:
    """Refuse options that do not go together."""
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    ways = {"--prompt": args.prompt, "--prompt-file": args.prompt_file, "--input": args.input}
    given = [way for way, value in ways.items() if value]
    if args.interactive and (given or args.num_samples > 1 or args.sampling.logprobs is not None):
        other = given[0] if given else "--num-samples" if args.num_samples > 1 else "--logprobs"
        raise ValueError(f"--interactive reads prompts from the terminal and cannot be given with {other}")
    if args.input and len(given) > 1:
        raise ValueError(f"--input has its own prompts and cannot be given with {given[0]}")
    if [str(path) for path in args.prompt_file].count("-") > 1:
        raise ValueError("--prompt-file - reads all of standard input: it can be given once")
    if sys.stdin is None and (args.interactive or "-" in map(str, args.prompt_file)):
        raise ValueError("standard input is closed: there is nothing to read prompts from")
    if (args.input is None) != (args.output is None):
        raise ValueError("--input and --output go together: prompts from one file, samples to the other")


def _prompts(prompts: Sequence[str], files: Sequence[Path]) -> Iterator[str]:
    """Yield the prompts given, then the files' texts; without any, standard input if it is a pipe or a file, or ""."""
    yield from prompts
    for path in files:
        if str(path) == "-":
            yield _decode(sys.stdin.buffer.read(), "standard input")
        else:
            yield _decode(expanded(path).read_bytes(), str(path))
    if not prompts and not files:
        yield _decode(sys.stdin.buffer.read(), "standard input") if _stdin_has_text() else ""


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _stdin_has_text() -> bool:
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is no standard input
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _complete_prompts(model: Model, args: Args, texts: list[str]) -> None:
    """Print all samples; a single one as it comes, if someone is watching."""
    _ = model.weights  # not part of the time
    start, n_new = time.perf_counter(), 0
    watched = sys.stdout is not None and sys.stdout.isatty()
    if len(texts) * args.num_samples == 1 and args.sampling.logprobs is None and watched:
        print_stream(model, texts[0], args.sampling.seed, args.echo)
        return
    for i, completion in enumerate(model.complete(texts, args.num_samples)):
        text, sample = texts[i // args.num_samples], i % args.num_samples
        if args.num_samples * len(texts) > 1:
            prompt = f"prompt {i // args.num_samples + 1} of {len(texts)}, " if len(texts) > 1 else ""
            print(f"--- {prompt}sample {sample + 1} of {args.num_samples}", file=sys.stderr, flush=True)
        print((text if args.echo else "") + completion.text, flush=True)
        if args.sampling.logprobs is not None:
            print(logprob_table(completion, model.tokenizer), flush=True)
        n_new += len(completion.ids)
    print(f"{n_new} tokens in {time.perf_counter() - start:.1f} s, compilation included", file=sys.stderr)


def _complete_file(model: Model, args: Args, config: GPT2Config, source: Path, target: Path) -> None:
    """Complete the prompts of a file into another."""
    from gpt2_jax.generation.jsonl import complete_file, read_prompts
    from gpt2_jax.generation.prompts import check_fits

    def check(texts: list[str], first: int = 0) -> None:
        for i, text in enumerate(texts, start=first):
            check_fits(config, f"{source}: prompt {i} (from 0)", encode(model.tokenizer, text), model.settings)

    def complete(texts: list[str], first: int) -> list[dict[str, Any]]:
        check(texts, first)
        samples = [as_json(sample, model.tokenizer) for sample in model.complete(texts, args.num_samples, first)]
        return [{"samples": samples[i : i + args.num_samples]} for i in range(0, len(samples), args.num_samples)]

    settings = dataclasses.asdict(model.settings) | {"num_samples": args.num_samples}
    name = args.model or "embedded"
    if args.model and expanded(args.model).is_dir():
        name = str(expanded(args.model).resolve())
    settings |= {"model": name, "dtype": args.dtype}
    start = time.perf_counter()
    batch_size = max(1, args.batch_size // args.num_samples)
    if source.is_file() and not target.exists():  # a pipe can be read but once: there each batch is checked in its turn
        check([record["prompt"] for record in read_prompts(source.read_bytes(), source)])
    n_done = complete_file(source, target, complete, settings, batch_size)
    print(f"{n_done} prompts in {time.perf_counter() - start:.1f} s, loading and compilation included", file=sys.stderr)
