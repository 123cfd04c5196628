"""Instructions and conversations, as the records of a file hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FORMS = '"instruction" and "output", or "messages"'
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's names


class Turn(NamedTuple):
    """An instruction, what it is about, and its answer.

    Attributes:
      instruction: what the user asks.
      input: the text that the instruction is about; "" if there is none.
      answer: the answer; None if the model is to give it.
    """

    instruction: str
    input: str = ""
    answer: str | None = None


class Conversation(NamedTuple):
    """One turn or more. Only the last may lack its answer.

    Attributes:
      turns: the turns in order.
      system: a message to the model before the first turn; "" if there is none.
    """

    turns: tuple[Turn, ...]
    system: str = ""


def is_conversation(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a field that `conversation_of` reads."""
    return any(name in record for name in ("instruction", "messages", "conversations"))


def conversation_of(record: Mapping[str, Any], answered: bool = True) -> Conversation:
    """Return the conversation of a record.

    Args:
      record: {"instruction", "input", "output"}, as in Alpaca's data, where "input" may be missing. Or {"messages":
        [{"role", "content"}, ...]} with the roles system (only first), user and assistant in turn. Or ShareGPT's
        {"conversations": [{"from", "value"}, ...]}. Other fields are not read.
      answered: whether the last turn must have an answer. False leaves out the answer of the last turn.

    Raises:
      ValueError: the record has another form. The message says what is wrong; the name of the record is to be put
        before it.
    """
    if "messages" in record:
        return _from_messages(record["messages"], ("role", "content"), "messages", answered)
    if "conversations" in record:
        return _from_messages(record["conversations"], ("from", "value"), "conversations", answered)
    if "instruction" not in record:
        raise ValueError(f" has no {FORMS}; it has: {', '.join(map(str, record)) or 'none'}")
    if answered and "output" not in record:
        raise ValueError(f' has an "instruction" without its "output"; it has: {", ".join(map(str, record))}')
    instruction, more = _text(record, "instruction"), record.get("input")
    turn = Turn(instruction, "" if more is None else _text(record, "input"))
    return Conversation((turn._replace(answer=_text(record, "output")) if answered else turn,))


def _from_messages(messages: Any, names: tuple[str, str], field: str, answered: bool) -> Conversation:
    if not isinstance(messages, list) or not all(
        isinstance(one, Mapping) and set(names) <= set(one) for one in messages
    ):
        raise ValueError(f': the field "{field}" must be a list of objects, each with "{names[0]}" and "{names[1]}"')
    found = [(ROLES.get(str(one[names[0]]), str(one[names[0]])), _text(one, names[1])) for one in messages]
    system = found.pop(0)[1] if found and found[0][0] == "system" else ""
    if not answered and found and found[-1][0] == "assistant":
        found.pop()
    roles = [role for role, _ in found]
    n_turns = -(-len(found) // 2)
    if not found or roles != (["user", "assistant"] * n_turns)[: len(found)]:
        raise ValueError(
            f': the roles in "{field}" must be user and assistant in turn, not {", ".join(roles) or "none"}'
        )
    if answered and roles[-1] != "assistant":
        raise ValueError(f': "{field}" ends without an answer')
    texts: Sequence[str | None] = [text for _, text in found] + [None] * (len(found) % 2)
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Conversation(tuple(Turn(str(asked), "", answer) for asked, answer in pairs), system)


def _text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f': the field "{name}" is not a text: {record[name]!r:.60}')
    return record[name]
