"""Continue prompts with GPT-2. `python scripts/generate.py --help` shows the options."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import gc
import io
import math
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config, Tokenizer
    from gpt2_jax.generation import Completion, Settings
    from gpt2_jax.params import Params

# gpt2_jax, and jax with it, is imported once the arguments are known to be good: `--help` and a typo answer at once.


@dataclasses.dataclass
class Args:
    """Continue prompts with GPT-2: prompt and continuation go to standard output, all else to standard error."""

    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: embedded)")] = None
    """A size, 124M, 355M, 774M or 1558M (fetched if it is not there yet); an id of the Hugging Face hub ("owner/name");
    or a directory with OpenAI's TensorFlow checkpoint, with Hugging Face's files, or saved by gpt2_jax."""
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
    max_new_tokens: int = 128
    """Most tokens to add, 0 or more; the prompt and they must fit in the model's n_ctx tokens, but for --overflow."""
    temperature: float = 1.0
    """Divides the logits, 0 or more: below 1 is safer text, above 1 wilder; 0 takes the most likely token (greedy)."""
    top_k: int = 40
    """Draw from the k most likely tokens alone; 0 means all."""
    top_p: float = 1.0
    """Of those, draw from the most likely whose probabilities add up to p, above 0 to 1; 1 means all."""
    top_p_rule: Literal["original", "common"] = "original"
    """original leaves out the token that crosses p, as OpenAI's code; common keeps it, as most libraries."""
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the most likely, 0 to 1; 0 means all."""
    repetition_penalty: float = 1.0
    """Makes tokens that stand in the text already less likely, above 1 (1.2 say); 1 means not."""
    seed: int = 0
    """Seed of the draws, 0 to 4294967295: the same seed and settings give the same text."""
    num_samples: int = 1
    """Continuations of each prompt to write, 1 or more, each different."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End a sample before this string; a shell writes a blank line as $'\\n\\n'."""
    stop_at_eot: bool = True
    """End a sample where the model ends its text, with <|endoftext|>."""
    overflow: Literal["error", "slide"] = "error"
    """When a text outgrows the model's n_ctx tokens: refuse, or let the model see the last tokens alone."""
    logprobs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Write a table after each sample: every token's log-probability (base e) and this many alternatives, 0 or more."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: the checkpoint's)"),
    ] = None
    """Dtype of weights and matrix products; bfloat16 takes half the memory."""
    echo: bool = True
    """Write the prompt before its continuation."""
    batch_size: int = 16
    """Samples to compute at a time, 1 or more: more are faster in all and take more memory; the text is the same."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one line on standard error and exit status 2."""
    gc.set_threshold(10**6)  # tracing a model makes objects by the hundred thousand, next to none of them garbage:
    atexit.register(gc.freeze)  # looking for it, on the way and at the end, took a quarter of a short run
    args = tyro.cli(Args, prog="gpt2-generate", description=Args.__doc__, args=argv)
    try:
        run(args)
    except BrokenPipeError:  # whoever read the output has seen enough: `gpt2-generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
    except (ValueError, OSError) as error:
        print(f"gpt2-generate: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: Args) -> None:
    """Load the model, generate, print.

    Raises:
      ValueError, OSError: bad input; nothing has been written to standard output.

    """
    _check(args)
    texts = None if args.interactive or args.input else list(_prompts(args))
    import gpt2_jax
    from gpt2_jax.compilation import keep_compiled
    from gpt2_jax.generation.settings import check_prompts

    keep_compiled()
    directory = gpt2_jax.embedded_model() if args.model is None else args.model
    config, tokenizer = gpt2_jax.load_config(directory), gpt2_jax.load_tokenizer(directory)
    settings = _settings(args, tokenizer).check(config, tokenizer)
    if texts is not None:  # before the weights: those can take long
        check_prompts(config, [_encode(tokenizer, text) for text in texts], settings)
    model = Model(args.model, args.dtype, tokenizer, settings, args.batch_size)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?" instead of failing
    if args.interactive:
        _converse(model, args)
    elif args.input:
        _complete_file(model, args, config)
    else:
        _complete_prompts(model, args, texts)


@dataclasses.dataclass
class Model:
    """A model, whose weights are read when it first speaks."""

    name: str | None
    dtype: str | None
    tokenizer: Tokenizer
    settings: Settings
    batch_size: int

    @functools.cached_property
    def weights(self) -> tuple[GPT2Config, Params]:
        """The config and the params."""
        import gpt2_jax

        directory = gpt2_jax.embedded_model() if self.name is None else self.name
        config, params = gpt2_jax.load(directory, **({} if self.dtype is None else {"dtype": self.dtype}))
        _announce(self.name, config)
        _warn_of_bfloat16(self.dtype)
        return (config if self.dtype is None else config.replace(compute_dtype=self.dtype)), params

    def complete(self, texts: Sequence[str], num_samples: int, first: int = 0) -> Iterator[Completion]:
        """Yield `num_samples` completions of each text in turn; the first text draws as number `first`."""
        from gpt2_jax.generation import complete

        rows = [_encode(self.tokenizer, text) for text in texts for _ in range(num_samples)]
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            first_row = first * num_samples + start
            yield from complete(*self.weights, some, self.tokenizer, self.settings, first_row)

    def stream(self, text: str, seed: int) -> Iterator[str]:
        """Yield the completion of one text as it comes."""
        import gpt2_jax

        settings = dataclasses.asdict(self.settings) | {"seed": seed}
        del settings["logprobs"]
        return gpt2_jax.stream(*self.weights, _encode(self.tokenizer, text), self.tokenizer, **settings)


# ---- what to do


def _check(args: Args) -> None:
    """Refuse options that do not go together."""
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    ways = {"--prompt": args.prompt, "--prompt-file": args.prompt_file, "--input": args.input}
    given = [way for way, value in ways.items() if value]
    if args.interactive and (given or args.num_samples > 1 or args.logprobs is not None):
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


def _prompts(args: Args) -> Iterator[str]:
    """Yield the prompts: those given, or standard input if it is a pipe or a file, or the empty one."""
    from gpt2_jax.files import expanded

    yield from args.prompt
    for path in args.prompt_file:
        if str(path) == "-":
            yield _decode(sys.stdin.buffer.read(), "standard input")
        else:
            yield _decode(expanded(path).read_bytes(), str(path))
    if not args.prompt and not args.prompt_file:
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


def _is_terminal(stream: io.TextIOBase | None) -> bool:
    return stream is not None and stream.isatty()  # None where it was closed: `gpt2-generate >&-`


def _settings(args: Args, tokenizer: Tokenizer) -> Settings:
    from gpt2_jax.generation import Settings

    return Settings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        top_p_rule=args.top_p_rule,
        stop_ids=(tokenizer.eot,) if args.stop_at_eot else (),
        stop_strings=args.stop,
        overflow=args.overflow,
        logprobs=args.logprobs,
    )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text) or [tokenizer.eot]


def _announce(model: str | None, config: GPT2Config) -> None:
    """Say in one line which model runs, and for the embedded one how to get the real ones."""
    size = f"{config.n_params:,} parameters"
    if model is not None:
        print(f"model: {model}, {size}", file=sys.stderr)
    else:
        print(
            f"model: the embedded Shakespeare model, {size}; for OpenAI's GPT-2 pass --model 124M, which fetches "
            "0.5 GB the first time",
            file=sys.stderr,
        )


def _warn_of_bfloat16(dtype: str | None) -> None:
    import jax

    if dtype == "bfloat16" and jax.default_backend() == "cpu":
        print("on a CPU bfloat16 saves memory and takes two to five times as long as float32", file=sys.stderr)


# ---- the three ways to run


def _complete_prompts(model: Model, args: Args, texts: list[str]) -> None:
    """Print all samples; a single one as it comes, if someone is watching."""
    _ = model.weights  # not part of the time
    start, n_new = time.perf_counter(), 0
    if len(texts) * args.num_samples == 1 and args.logprobs is None and _is_terminal(sys.stdout):
        _print_stream(model, args, texts[0], args.seed)
        return
    for i, completion in enumerate(model.complete(texts, args.num_samples)):
        text, sample = texts[i // args.num_samples], i % args.num_samples
        if args.num_samples * len(texts) > 1:
            prompt = f"prompt {i // args.num_samples + 1} of {len(texts)}, " if len(texts) > 1 else ""
            print(f"--- {prompt}sample {sample + 1} of {args.num_samples}", file=sys.stderr, flush=True)
        print((text if args.echo else "") + completion.text, flush=True)
        if args.logprobs is not None:
            print(_table(completion, model.tokenizer), flush=True)
        n_new += len(completion.ids)
    print(f"{n_new} tokens in {time.perf_counter() - start:.1f} s, compilation included", file=sys.stderr)


def _print_stream(model: Model, args: Args, text: str, seed: int) -> None:
    pieces = model.stream(text, seed)
    try:
        print(text if args.echo else "", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        pieces.close()
        print(flush=True)


def _converse(model: Model, args: Args) -> None:
    """Read prompts and speak until the end of the input; each text draws with the next seed."""
    _ = model.weights  # before the first prompt
    with _history():
        print("Type a prompt; Ctrl-C stops a sample, Ctrl-D ends.", file=sys.stderr)
        seed = args.seed
        while True:
            try:
                text = input("> " if _is_terminal(sys.stdin) else "")
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print("\nCtrl-D ends.", file=sys.stderr)
                continue
            try:
                _print_stream(model, args, text, seed)
            except KeyboardInterrupt:
                print("[stopped]", file=sys.stderr)
            except ValueError as error:  # a prompt that does not fit, say
                print(f"gpt2-generate: {error}", file=sys.stderr)
            seed = (seed + 1) % 2**32


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let the arrow keys bring back earlier prompts, those of earlier runs too."""
    from gpt2_jax.files import cache_dir

    try:
        import readline
    except ImportError:  # Windows has its own history
        yield
        return
    path = cache_dir() / "history"
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):  # a folder that cannot be written: no history next time, and nothing else
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def _complete_file(model: Model, args: Args, config: GPT2Config) -> None:
    """Complete the prompts of a file into another."""
    from gpt2_jax.files import expanded
    from gpt2_jax.generation.jsonl import complete_file, read_prompts
    from gpt2_jax.generation.settings import check_fits

    source, target = expanded(args.input), expanded(args.output)

    def check(texts: list[str], first: int = 0) -> None:
        for i, text in enumerate(texts, start=first):
            check_fits(config, f"{source}: prompt {i} (from 0)", _encode(model.tokenizer, text), model.settings)

    def complete(texts: list[str], first: int) -> list[dict[str, Any]]:
        check(texts, first)
        samples = [_record(sample, model.tokenizer) for sample in model.complete(texts, args.num_samples, first)]
        return [{"samples": samples[i : i + args.num_samples]} for i in range(0, len(samples), args.num_samples)]

    settings = dataclasses.asdict(model.settings) | {"num_samples": args.num_samples}
    is_folder = args.model is not None and expanded(args.model).is_dir()
    model_name = str(expanded(args.model).resolve()) if is_folder else args.model or "embedded"
    settings |= {"model": model_name, "dtype": args.dtype}
    start = time.perf_counter()
    batch_size = max(1, args.batch_size // args.num_samples)
    if source.is_file() and not target.exists():  # a pipe can be read but once: there each batch is checked in its turn
        check([record["prompt"] for record in read_prompts(source.read_bytes(), source)])
    n_done = complete_file(source, target, complete, settings, batch_size)
    print(f"{n_done} prompts in {time.perf_counter() - start:.1f} s, loading and compilation included", file=sys.stderr)


# ---- what a sample looks like


def _record(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a sample as a line of JSON has it."""
    record = {"text": completion.text, "finish_reason": "stop" if completion.stopped else "length"}
    if completion.logprobs is not None:
        record["logprobs"] = [
            {"token": token, "logprob": logprob, "top": [{"token": name, "logprob": value} for name, value in top]}
            for token, logprob, top in _by_token(completion, tokenizer)
        ]
    return record


def _by_token(completion: Completion, tokenizer: Tokenizer) -> Iterator[tuple[str, float, list[tuple[str, float]]]]:
    """Yield each token, its log-probability, and the alternatives with theirs."""
    logprobs = completion.logprobs
    for i, token in enumerate(completion.ids):
        top = zip(logprobs.top_ids[i].tolist(), logprobs.top[i].tolist(), strict=True)
        yield tokenizer.decode([token]), float(logprobs.chosen[i]), [(tokenizer.decode([j]), value) for j, value in top]


def _table(completion: Completion, tokenizer: Tokenizer) -> str:
    """Return a line a token: log-probability, probability, token, alternatives."""
    lines = ["logprob       p  token             alternatives"]
    for token, logprob, top in _by_token(completion, tokenizer):
        alternatives = "  ".join(f"{name!r} {math.exp(value):.1%}" for name, value in top)
        lines.append(f"{logprob:7.3f} {math.exp(logprob):7.1%}  {token!r:16}  {alternatives}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
