"""`gpt2-generate`: continue prompts."""

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
    """Settings with the defaults of the command. Fields without a description have that of `Settings`."""

    max_new_tokens: int = 128
    """Most new tokens per sample, 0 or more; a stop may end a sample earlier.
    Prompt and new tokens must fit in the model's n_ctx tokens, unless --overflow is slide."""
    top_k: int = 40
    top_p_rule: TopPRule = "original"
    """original leaves out the token that crosses p, like OpenAI's code; common keeps it, like most libraries."""
    stop_ids: tyro.conf.Suppress[Sequence[int]] = ()
    stop_strings: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="stop")] = ()
    """End a sample before this string. In a shell, a blank line is $'\\n\\n'."""
    stop_at_eot: bool = True
    """End a sample when the model ends its text with <|endoftext|>."""
    overflow: Overflow = "error"
    """If a text becomes longer than n_ctx: error rejects it; slide lets the model read only the last tokens."""
    logprobs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Write the log-probability (base e) of each token, and of this many most likely ones, 0 or more.
    They are a table after each sample, or in the samples of --output."""

    n_ids: tyro.conf.Suppress[int | None] = None

    def settings(self, tokenizer: Tokenizer) -> Settings:
        """Return the settings for the library."""
        return Settings.among(vars(self) | {"stop_ids": (tokenizer.eot,) if self.stop_at_eot else ()})


@dataclasses.dataclass
class Args:
    """Continue prompts with GPT-2. Prompts and continuations go to standard output, messages to standard error."""

    model: _model.ModelOption = None
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to continue; write --prompt=-x if it begins with a dash. If it is empty, the model starts a new text.
    Without a prompt, standard input is the prompt if it is a pipe or a file. Otherwise the prompt is empty."""
    prompt_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A UTF-8 file with one prompt: its whole text, without one newline at the end. - means standard input."""
    input: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """A file with many prompts: JSON lines, each {"prompt": "..."} or a string. Needs --output."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """The file for the samples of --input: JSON lines in order, with the input's fields, "samples" and "index".
    If the process is killed, run the same command again: it resumes."""
    interactive: bool = False
    """Read prompts from the terminal, with a history. Ctrl-C stops a sample, Ctrl-D ends the program."""
    num_samples: int = 1
    """Continuations of each prompt, 1 or more, each with its own random draws."""
    dtype: _model.DtypeOption = None
    """Dtype of weights and matrix products. bfloat16 needs half the memory, but more time on a CPU."""
    echo: bool = True
    """Write the prompt before its continuation."""
    batch_size: int = 16
    """Samples to compute at the same time, 1 or more.
    A larger batch takes less time in total and more memory. The text is the same."""
    sampling: Annotated[Options, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    gc.set_threshold(10**6)  # tracing a model makes hundreds of thousands of objects, and almost none become garbage
    atexit.register(gc.freeze)  # without these two lines, collecting garbage takes a quarter of a short run
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
    if texts:  # before weights are loaded: that can take long
        check_prompts(config, [encode(tokenizer, text) for text in texts], settings)
    model = Model(args.model, args.dtype, tokenizer, settings, args.batch_size)
    if args.interactive:
        converse(model, args.sampling.seed, args.echo)
    elif args.input and args.output:
        _complete_file(model, args, config, expanded(args.input), expanded(args.output))
    else:
        _complete_prompts(model, args, texts)


def _check(args: Args) -> None:
    """Reject options that do not work together."""
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
        raise ValueError("--prompt-file - reads all of standard input: it can be given only once")
    if sys.stdin is None and (args.interactive or "-" in map(str, args.prompt_file)):
        raise ValueError("standard input is closed: prompts cannot be read from it")
    if (args.input is None) != (args.output is None):
        raise ValueError("--input and --output need each other: prompts come from one, samples go to the other")


def _prompts(prompts: Sequence[str], files: Sequence[Path]) -> Iterator[str]:
    """Yield the prompts, then the files' texts. Without any: standard input if it is a pipe or a file, else ""."""
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
    except (AttributeError, OSError, ValueError):  # no standard input
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _complete_prompts(model: Model, args: Args, texts: list[str]) -> None:
    """Print all samples. A single sample is streamed if standard output is a terminal."""
    _ = model.weights  # loaded before the time is taken
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
    print(f"{n_new} tokens in {time.perf_counter() - start:.1f} s, with compilation", file=sys.stderr)


def _complete_file(model: Model, args: Args, config: GPT2Config, source: Path, target: Path) -> None:
    """Complete the prompts of one file, and write them to another."""
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
    if source.is_file() and not target.exists():  # a pipe can be read only once: its batches are checked later
        check([record["prompt"] for record in read_prompts(source.read_bytes(), source)])
    n_done = complete_file(source, target, complete, settings, batch_size)
    print(f"{n_done} prompts in {time.perf_counter() - start:.1f} s, with loading and compilation", file=sys.stderr)
