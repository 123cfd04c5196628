"""The settings of `gpt2-generate`: its options, and the settings of single lines of --input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gpt2_jax.generation.settings import Overflow, Settings, TopPRule

if TYPE_CHECKING:
    from gpt2_jax import Tokenizer

IN_A_LINE = "settings"  # the field of a line of --input


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
    allow_special: bool = False
    """Read <|endoftext|> in a prompt as its special id. By default these characters are ordinary text."""
    overflow: Overflow = "error"
    """If a text becomes longer than n_ctx: error rejects it; slide lets the model read only the last tokens."""
    logprobs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Write the log-probability (base e) of each token, and of this many most likely ones, 0 or more.
    They are a table after each sample, or in the samples of --output."""
    n_ids: tyro.conf.Suppress[int | None] = None

    def settings(self, tokenizer: Tokenizer) -> Settings:
        """Return the settings for the library."""
        stops = self.stop_at_eot and tokenizer.eot is not None
        return Settings.among(vars(self) | {"stop_ids": (tokenizer.eot,) if stops else ()})

    def changed(self, line: Mapping[str, Any]) -> Options:
        """Return the options of one line of --input: these, with the line's own "settings".

        Args:
          line: the fields of the line. Names in its "settings" are those of the options, with underscores.

        Raises:
          ValueError: "settings" is not an object, or a name in it is unknown.
        """
        given = line.get(IN_A_LINE)
        if given is None:
            return self
        if not isinstance(given, dict):
            raise ValueError(f'"{IN_A_LINE}" must be an object such as {{"temperature": 0}}, not {given!r:.80}')
        if unknown := given.keys() - set(NAMES):
            raise ValueError(f'"{IN_A_LINE}" has an unknown name, {min(unknown)!r}: it can have {", ".join(NAMES)}')
        for name in ("stop_at_eot", "allow_special"):
            if not isinstance(given.get(name, True), bool):
                raise ValueError(f"{name} must be true or false, not {given[name]!r}")
        if "stop" in given:
            stops = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
            if not isinstance(stops, list):
                raise ValueError(f"stop must be a string or a list of strings, not {stops!r:.80}")
            given = {name: value for name, value in given.items() if name != "stop"} | {"stop_strings": tuple(stops)}
        return dataclasses.replace(self, **given)


NAMES = [
    {"stop_strings": "stop"}.get(field.name, field.name)
    for field in dataclasses.fields(Options)
    if field.name not in ("stop_ids", "n_ids")
]
"""The names that a line's "settings" can have."""


def ignored(line: Mapping[str, Any]) -> list[str]:
    """Return the fields of a line that have the name of a setting, but stand outside its "settings"."""
    return [name for name in NAMES if name in line]
