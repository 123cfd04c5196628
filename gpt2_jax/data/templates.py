"""Templates: how instructions and answers become text for a model, and which of it is learned.

The parts of a text are encoded one by one: each prompt, each answer, and the id of `<|endoftext|>` after each answer.
So an answer begins at a token boundary, and the ids of a prompt are the same in training and in generation. The
characters `<|endoftext|>` inside a text stay ordinary text.
"""

from __future__ import annotations

import dataclasses
import json
import os
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.data.conversations import Conversation, Turn, conversation_of
from gpt2_jax.data.examples import Example
from gpt2_jax.data.token_files import id_dtype
from gpt2_jax.files import expanded, read_json, replacing_file
from gpt2_jax.recipe import Instruction
from gpt2_jax.tokenizer import Tokenizer, end_of_text

FILE = "template.json"  # in the folder of a run
MARK, VERSION = "gpt2_jax_template", 1


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written as text.

    Attributes:
      name: its name in messages.
      prompt: the text of a turn up to its answer, with the fields {instruction} and {input}.
      prompt_without_input: the same for a turn without input; "" uses `prompt`, with an empty input.
      preamble: the text before the first turn.
      system: what replaces the preamble if a conversation has a system message, with the field {system}.

    Raises:
      ValueError: a text has another field, or lacks {instruction}.
    """

    name: str
    prompt: str
    prompt_without_input: str = ""
    preamble: str = ""
    system: str = "{system}\n\n"

    def __post_init__(self):
        _check_fields("prompt", self.prompt, {"instruction", "input"}, "instruction")
        if self.prompt_without_input:
            _check_fields("prompt_without_input", self.prompt_without_input, {"instruction"}, "instruction")
        _check_fields("system", self.system, {"system"}, "system")

    def texts(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """Return the texts of a conversation, each with whether it is an answer. After an answer its text ends."""
        found, head = [], self.preamble
        if conversation.system:
            head = self.system.format(system=conversation.system)
        for turn in conversation.turns:
            found.append((head + self._turn(turn), False))
            if turn.answer is not None:
                found.append((turn.answer, True))
            head = ""
        return found

    def example(self, tokenizer: Tokenizer, conversation: Conversation, loss_on: str = "answers") -> Example:
        """Return the ids of a conversation, and which are targets of the loss.

        Args:
          tokenizer: encodes the texts.
          conversation: the conversation.
          loss_on: "answers": the answers and the end-of-text id after each. "all": everything.

        Raises:
          ValueError: the vocabulary has no end-of-text token.
        """
        parts = self._parts(tokenizer, conversation)
        counts = [np.full(len(ids), counts or loss_on == "all", np.uint8) for ids, counts in parts]
        ids = [np.asarray(ids, id_dtype(tokenizer.n_vocab)) for ids, _ in parts]
        return Example(np.concatenate(ids), np.concatenate(counts))

    def prompt_ids(self, tokenizer: Tokenizer, asked: str | Conversation, input: str = "") -> list[int]:
        """Return the ids that the model continues with its answer.

        Args:
          tokenizer: encodes the texts.
          asked: an instruction, or a conversation whose last turn has no answer.
          input: the input of the instruction.
        """
        if isinstance(asked, str):
            asked = Conversation((Turn(asked, input),))
        return [i for ids, _ in self._parts(tokenizer, asked) for i in ids]

    def _turn(self, turn: Turn) -> str:
        text = self.prompt if turn.input or not self.prompt_without_input else self.prompt_without_input
        return text.format(instruction=turn.instruction, input=turn.input)

    def _parts(self, tokenizer: Tokenizer, conversation: Conversation) -> list[tuple[list[int], bool]]:
        found = [(list(tokenizer.prefix), False)]
        for text, is_answer in self.texts(conversation):
            ids = tokenizer.encode(text)
            found.append(([*ids, end_of_text(tokenizer, "an answer")] if is_answer else ids, is_answer))
        return found


def _check_fields(name: str, text: Any, known: set[str], needed: str) -> None:
    """Check the {fields} of a text.

    Raises:
      ValueError: there is another field, or the needed one is missing.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, not {text!r}")
    listed = " and ".join(f"{{{field}}}" for field in sorted(known))
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{name} is no template: {error}; a brace that is text is written twice") from error
    for _, field, form, conversion in parts:
        if field is not None and (field not in known or form or conversion):
            shown = f"{field}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise ValueError(f"{name} has the field {{{shown}}}, but can have only {listed}")
    if needed not in {field for _, field, _, _ in parts}:
        raise ValueError(f"{name} must have the field {{{needed}}}: {text!r:.60}")


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="alpaca",
            preamble="Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n",
            prompt="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
            prompt_without_input="### Instruction:\n{instruction}\n\n### Response:\n",
        ),
        Template(
            name="phi3",
            prompt="<|user|>\n{instruction}\n{input}\n<|assistant|>\n",
            prompt_without_input="<|user|>\n{instruction}\n<|assistant|>\n",
            system="<|system|>\n{system}\n",
        ),
        Template(
            name="plain",
            prompt="{instruction}\n{input}\n",
            prompt_without_input="{instruction}\n",
            system="{system}\n",
        ),
    )
}
"""The templates by name: "alpaca" in the shorter form of the build-an-LLM book, "phi3" with markers that are ordinary
text, as in the book's exercise, and "plain". The names are those of `gpt2_jax.recipe.Instruction`."""


def template_of(recipe: Instruction) -> Template:
    """Return the template of a recipe.

    Raises:
      ValueError: `prompt` or `prompt_without_input` has an unknown field, or lacks {instruction}.
    """
    if not recipe.prompt:
        return TEMPLATES[recipe.template]
    return Template("recipe", recipe.prompt, recipe.prompt_without_input)


def save_template(template: Template, folder: str | os.PathLike) -> None:
    """Write a template into the folder of a run, as template.json."""
    fields = {MARK: VERSION} | dataclasses.asdict(template)
    with replacing_file(expanded(folder) / FILE) as temporary:
        temporary.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_template(model: str | os.PathLike | None) -> Template | None:
    """Return the template of a run, or of any folder with a template.json; None if there is none.

    Args:
      model: a run, its folder `best`, or one of its checkpoints. Other names of models have no template.

    Raises:
      ValueError: template.json is malformed.
    """
    folder = expanded(model) if model is not None else Path()
    if model is None or not folder.is_dir():
        return None
    folder = folder.resolve()
    places = {"best": folder.parent, "checkpoints": folder.parents[min(1, len(folder.parents) - 1)]}
    run = places["best"] if folder.name == "best" else places.get(folder.parent.name, folder)
    path = next((place / FILE for place in (folder, run) if (place / FILE).is_file()), None)
    if path is None:
        return None
    fields = read_json(path)
    names = {field.name for field in dataclasses.fields(Template)}
    if not isinstance(fields, dict) or fields.pop(MARK, None) != VERSION or set(fields) != names:
        raise ValueError(f"{path} is not a template of this version")
    try:
        return Template(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is malformed: {error}") from error


def instruction_examples(
    records: Iterable[tuple[Mapping[str, Any], str]], tokenizer: Tokenizer, template: Template, loss_on: str = "answers"
) -> Iterator[Example]:
    """Yield an example for each record.

    Args:
      records: the records, as `conversation_of` reads them, each with its place for messages.
      tokenizer: encodes the texts.
      template: makes a text of each.
      loss_on: what counts in the loss, as in `Template.example`.

    Raises:
      ValueError: a record has another form.
    """
    for record, place in records:
        try:
            conversation = conversation_of(record)
        except ValueError as error:
            raise ValueError(f"{place}{error}") from error
        yield dataclasses.replace(template.example(tokenizer, conversation, loss_on), record=dict(record))
