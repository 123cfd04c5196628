"""The options of `gpt2-generate` that choose tokens: the library's settings, with what a command says otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from gpt2_jax.generation.settings import Overflow, Settings, TopPRule

if TYPE_CHECKING:
    from gpt2_jax import Tokenizer


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
