"""The model of `gpt2-generate`, told its settings once."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gpt2_jax
from gpt2_jax.commands import _model

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config, Tokenizer
    from gpt2_jax.generation import Completion, Settings
    from gpt2_jax.params import Params


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
        config, params = _model.load(self.name, self.dtype)
        _announce(self.name, config)
        _warn_of_bfloat16(self.dtype)
        return config, params

    def complete(self, texts: Sequence[str], num_samples: int, first: int = 0) -> Iterator[Completion]:
        """Yield `num_samples` completions of each text in turn; the first text draws as number `first`."""
        from gpt2_jax.generation import complete

        rows = [encode(self.tokenizer, text) for text in texts for _ in range(num_samples)]
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            first_row = first * num_samples + start
            yield from complete(*self.weights, some, self.tokenizer, self.settings, first_row)

    def stream(self, text: str, seed: int) -> Generator[str, None, None]:
        """Yield the completion of one text as it comes."""
        settings: dict[str, Any] = dataclasses.asdict(self.settings) | {"seed": seed}
        del settings["logprobs"]
        return gpt2_jax.stream(*self.weights, encode(self.tokenizer, text), self.tokenizer, **settings)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt; the empty one is <|endoftext|>, after which a model begins a text of its own."""
    return tokenizer.encode(text) or [tokenizer.eot]


def _announce(model: str | None, config: GPT2Config) -> None:
    """Say in one line which model runs, and for the embedded one how to get the real ones."""
    more = "" if model else "; for OpenAI's GPT-2 pass --model 124M, which fetches 0.5 GB the first time"
    print(f"model: {_model.title(model)}, {config.n_params:,} parameters{more}", file=sys.stderr)


def _warn_of_bfloat16(dtype: str | None) -> None:
    import jax

    if dtype == "bfloat16" and jax.default_backend() == "cpu":
        print("on a CPU bfloat16 saves memory and takes two to five times as long as float32", file=sys.stderr)
