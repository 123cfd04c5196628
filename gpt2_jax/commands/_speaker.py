"""The model of `gpt2-generate`: its samples as JSON and as a table, streamed text, and the interactive mode."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gpt2_jax
from gpt2_jax.commands import _command, _model
from gpt2_jax.files import cache_dir

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config, Tokenizer
    from gpt2_jax.generation import Completion, Settings
    from gpt2_jax.params import Params


@dataclasses.dataclass
class Model:
    """A model whose weights are loaded when they are first used."""

    name: str | None
    dtype: str | None
    tokenizer: Tokenizer
    settings: Settings
    batch_size: int

    @functools.cached_property
    def weights(self) -> tuple[GPT2Config, Params]:
        """The config and the params. Loading them prints a line on standard error."""
        import jax

        config, params = _model.load(self.name, self.dtype)
        more = "" if self.name else "; for OpenAI's GPT-2 use --model 124M (downloads 0.5 GB the first time)"
        print(f"model: {_model.title(self.name)}, {config.n_params:,} parameters{more}", file=sys.stderr)
        if self.dtype == "bfloat16" and jax.default_backend() == "cpu":
            print("on a CPU, bfloat16 saves memory but takes two to five times as long as float32", file=sys.stderr)
        return config, params

    def complete(self, texts: Sequence[str], num_samples: int, first: int = 0) -> Iterator[Completion]:
        """Yield `num_samples` completions of each text, in order.

        `first` is the number of the first text. The random draws of a text depend on its number.
        """
        from gpt2_jax.generation import complete

        rows = [encode(self.tokenizer, text) for text in texts for _ in range(num_samples)]
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            first_row = first * num_samples + start
            yield from complete(*self.weights, some, self.tokenizer, self.settings, first_row)

    def stream(self, text: str, seed: int) -> Generator[str, None, None]:
        """Yield the completion of one text, in pieces, while it is generated."""
        settings: dict[str, Any] = dataclasses.asdict(self.settings) | {"seed": seed}
        del settings["logprobs"]
        return gpt2_jax.stream(*self.weights, encode(self.tokenizer, text), self.tokenizer, **settings)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt. An empty prompt becomes `<|endoftext|>`, after which a model starts a new text."""
    return tokenizer.prompt(text)


def as_json(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a sample as a JSON object."""
    record: dict[str, Any] = {"text": completion.text, "finish_reason": "stop" if completion.stopped else "length"}
    if completion.logprobs is not None:
        record["logprobs"] = [
            {"token": token, "logprob": logprob, "top": [{"token": name, "logprob": value} for name, value in top]}
            for token, logprob, top in _by_token(completion, tokenizer)
        ]
    return record


def _by_token(completion: Completion, tokenizer: Tokenizer) -> Iterator[tuple[str, float, list[tuple[str, float]]]]:
    """Yield each token, its log-probability, and the alternatives with their log-probabilities."""
    logprobs = completion.logprobs
    if logprobs is None:
        return
    for i, token in enumerate(completion.ids):
        top = zip(logprobs.top_ids[i].tolist(), logprobs.top[i].tolist(), strict=True)
        yield tokenizer.decode([token]), float(logprobs.chosen[i]), [(tokenizer.decode([j]), value) for j, value in top]


def logprob_table(completion: Completion, tokenizer: Tokenizer) -> str:
    """Return a table with one line per token: log-probability, probability, token, alternatives."""
    lines = ["logprob       p  token             alternatives"]
    for token, logprob, top in _by_token(completion, tokenizer):
        alternatives = "  ".join(f"{name!r} {math.exp(value):.1%}" for name, value in top)
        lines.append(f"{logprob:7.3f} {math.exp(logprob):7.1%}  {token!r:16}  {alternatives}".rstrip())
    return "\n".join(lines)


def print_stream(model: Model, text: str, seed: int, echo: bool) -> None:
    """Print the completion of one text while it is generated. If `echo` is True, print the text itself first."""
    pieces = model.stream(text, seed)
    try:
        print(text if echo else "", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        pieces.close()
        print(flush=True)


def converse(model: Model, seed: int, echo: bool) -> None:
    """Read prompts and print a completion of each, until the input ends. Each prompt draws with the next seed."""
    _ = model.weights  # before the first prompt
    with _history():
        print("Type a prompt. Ctrl-C stops a sample, Ctrl-D ends the program.", file=sys.stderr)
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print("\nCtrl-D ends the program.", file=sys.stderr)
                continue
            try:
                print_stream(model, text, seed, echo)
            except KeyboardInterrupt:
                print("[stopped]", file=sys.stderr)
            except ValueError as error:  # for example, a prompt that does not fit
                _command.report("gpt2-generate", error)
            seed = (seed + 1) % 2**32


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let the arrow keys recall earlier prompts, also those of earlier runs."""
    try:
        import readline
    except ImportError:  # Windows has its own history
        yield
        return
    path = cache_dir() / "history"
    with contextlib.suppress(OSError):  # no history yet
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):  # the folder cannot be written: the history is not saved
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
