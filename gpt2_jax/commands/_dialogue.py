"""A dialogue with a model that was trained on instructions: `gpt2-generate --interactive` on such a run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gpt2_jax.commands._interactive import QUOTES, print_stream
from gpt2_jax.data.conversations import Conversation, Turn

if TYPE_CHECKING:
    from gpt2_jax.commands._speaker import Model
    from gpt2_jax.data.templates import Template

RESET = "/reset"
GREETING = (
    f"Type an instruction. One of several lines begins and ends with {QUOTES}.\n"
    f"The model reads the earlier turns too; {RESET} begins anew. Ctrl-C stops an answer, Ctrl-D ends the program."
)


class Dialogue:
    """Answers instructions, each with the turns before it. An answer that is stopped is not kept."""

    def __init__(self, model: Model, template: Template):
        self.model, self.template = model, template
        self.turns: list[Turn] = []

    def reply(self, text: str, seed: int) -> None:
        """Print the answer to an instruction while it is generated."""
        if text.strip() == RESET:
            self.turns.clear()
            print("[a new dialogue]", file=sys.stderr)
            return
        turn = Turn(text)
        answer = print_stream(self.model, self._prompt(turn), seed)
        self.turns.append(turn._replace(answer=answer))

    def _prompt(self, turn: Turn) -> list[int]:
        """Return the ids of the dialogue up to the next answer. The oldest turns are dropped if they do not fit."""
        config, n_new, n_dropped = self.model.config, self.model.options.max_new_tokens, 0
        while True:
            ids = self.template.prompt_ids(self.model.tokenizer, Conversation((*self.turns, turn)))
            if len(ids) + n_new <= config.n_ctx or not self.turns:
                break
            del self.turns[0]
            n_dropped += 1
        if n_dropped:
            what = "oldest turn is" if n_dropped == 1 else f"{n_dropped} oldest turns are"
            print(f"[the {what} dropped: the model reads {config.n_ctx} tokens]", file=sys.stderr)
        return ids
