"""The model of `gpt2-generate`: its weights, its completions, and streamed text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gpt2_jax
from gpt2_jax.commands import _interrupts, _model

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config, Tokenizer
    from gpt2_jax.commands._generate_options import Options
    from gpt2_jax.generation import Completion, Settings
    from gpt2_jax.params import Params


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt to complete.

    Attributes:
      ids: its ids.
      settings: checked settings.
      number: the number of the row. Its random draws depend on the seed and on this number.
      name: what errors call the prompt.
    """

    ids: list[int]
    settings: Settings
    number: int
    name: str


@dataclasses.dataclass
class Model:
    """A model whose weights are loaded when they are first used."""

    name: str | None
    dtype: str | None
    config: GPT2Config
    tokenizer: Tokenizer
    options: Options
    batch_size: int
    mesh: _model.Mesh = dataclasses.field(default_factory=_model.Mesh)

    @functools.cached_property
    def weights(self) -> tuple[GPT2Config, Params]:
        """The config and the params. Loading them prints a line on standard error."""
        import jax

        config, params = _model.load(self.name, self.dtype, self.mesh)
        more = "" if self.name else "; for OpenAI's GPT-2 use --model 124M (downloads 0.5 GB the first time)"
        print(f"model: {_model.title(self.name)}, {config.n_params:,} parameters{more}", file=sys.stderr)
        if self.dtype == "bfloat16" and jax.default_backend() == "cpu":
            print("on a CPU, bfloat16 saves memory but takes two to five times as long as float32", file=sys.stderr)
        _interrupts.check()
        return config, params

    def settings(self, options: Options | None = None) -> Settings:
        """Return checked settings: of these options, or of the command's."""
        return (options or self.options).settings(self.tokenizer).check(self.config, self.tokenizer)

    def encode(self, text: str, options: Options | None = None) -> list[int]:
        """Return the ids of a prompt."""
        return self.tokenizer.prompt(text, (options or self.options).allow_special)

    def complete(self, rows: Sequence[Row]) -> Iterator[Completion]:
        """Yield the completion of each row, in order. Rows with equal settings run together."""
        from gpt2_jax.generation import complete

        groups: dict[Settings, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.settings, []).append(i)
        done: dict[int, Completion] = {}
        n_yielded = 0
        for settings, group in groups.items():
            for start in range(0, len(group), self.batch_size):
                _interrupts.check()
                batch = group[start : start + self.batch_size]
                ids, numbers = [rows[i].ids for i in batch], [rows[i].number for i in batch]
                with _named([rows[i].name for i in batch]):
                    done |= zip(batch, complete(*self.weights, ids, self.tokenizer, settings, numbers), strict=True)
                while n_yielded in done:
                    yield done.pop(n_yielded)
                    n_yielded += 1

    def score(self, rows: Sequence[list[int]], names: Sequence[str]) -> list[Sequence[float]]:
        """Return the log-probabilities of each row's tokens, except of the first. Errors call the rows by `names`."""
        long = [i for i, row in enumerate(rows) if len(row) > 1]
        with _named([names[i] for i in long]):
            scores = iter(gpt2_jax.score(*self.weights, [rows[i] for i in long]) if long else [])
        return [next(scores).logprobs.tolist() if len(row) > 1 else [] for row in rows]

    def stream(self, ids: Sequence[int], seed: int) -> Generator[str, None, None]:
        """Yield the completion of one prompt, in pieces, while it is generated."""
        settings: dict[str, Any] = dataclasses.asdict(self.settings()) | {"seed": seed}
        del settings["logprobs"]
        return gpt2_jax.stream(*self.weights, ids, self.tokenizer, **settings)


@contextlib.contextmanager
def _named(names: Sequence[str]) -> Iterator[None]:
    """Let an error that begins with "prompts[b]", the prompt's place in its batch, begin with the prompt's name."""
    try:
        yield
    except ValueError as error:
        if place := re.match(r"prompts\[(\d+)\]", str(error)):
            raise ValueError(f"{names[int(place[1])]}{str(error)[place.end() :]}") from error
        raise
