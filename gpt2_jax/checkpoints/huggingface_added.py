"""Tokens that Hugging Face's files add to a vocabulary, and names of special tokens, as transformers 5 reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.checkpoints.integrity import warn
from gpt2_jax.files import read_object
from gpt2_jax.tokenizer import ADDED_TOKENS, END_OF_TEXT, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, Tokenizer

Token = dict[str, Any]  # as in tokenizer.json, without an id

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), END_OF_TEXT)  # of the class GPT2Tokenizer
_FLAGS = ("single_word", "lstrip", "rstrip")


class Added(NamedTuple):
    """Tokens to add.

    Attributes:
      tokens: the tokens, in the order in which they are added.
      stated: {token: id} as the files state them; the library may give a token another id.
      names: {"eos_token": token, ...}.
      names_eos: whether a file names the end-of-text token.
      extra: special tokens without a name.
    """

    tokens: list[Token]
    stated: dict[str, int]
    names: dict[str, str]
    names_eos: bool
    extra: list[str]


def read(directory: Path, settings: Mapping[str, Any], own: Sequence[Token], whole: bool) -> Added:
    """Read the tokens of tokenizer_config.json, or of special_tokens_map.json and added_tokens.json.

    Args:
      directory: the folder.
      settings: the content of tokenizer_config.json.
      own: the added tokens of tokenizer.json.
      whole: whether tokenizer.json is taken as it is. If not, its added tokens are added in their turn.

    Raises:
      ValueError: a file is malformed.
    """
    named = {name: value for name, value in settings.items() if _is_name(name, value)}
    extra, older = settings.get("extra_special_tokens"), settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | extra, older
    extra = extra or older
    _check((*(value for value in named.values() if value is not None), *extra), directory / TOKENIZER_CONFIG)
    if "added_tokens_decoder" in settings:
        by_id = _by_id(settings["added_tokens_decoder"], directory / TOKENIZER_CONFIG)
    else:
        named, extra = _with_map(directory / SPECIAL_TOKENS_MAP, named, extra)
        special = [named.get(name) for name in NAMES]
        by_id = _legacy(
            directory / ADDED_TOKENS, {_content(token) for token in special if token and not _is_typed(token)}
        )
        by_id |= {token["id"]: complete(token) for token in own}
    names_eos = bool(named.get("eos_token"))
    named = named if whole else DEFAULTS | named
    ordered = [name for name in (*NAMES, *(name for name in named if name not in NAMES)) if named.get(name)]
    names = {name: _content(named[name]) for name in ordered}
    tokens = [token for _, token in sorted(by_id.items())]
    known = {token["content"] for token in (*(own if whole else ()), *tokens)}
    later = [named[name] for name in ordered] + extra
    for value in (value for i, value in enumerate(later) if value not in later[:i]):
        if _content(value) not in known:  # of a token with several descriptions, the last counts
            fields = {"special": True} | value if isinstance(value, dict) else {"content": value, "special": True}
            tokens.append(complete(fields))
    tokens = [token | {"special": token["special"] or token["content"] in names.values()} for token in tokens]
    stated = {token["content"]: i for i, token in by_id.items()}
    return Added(tokens, stated, names, names_eos, [_content(token) for token in extra])


def _is_name(name: str, value: Any) -> bool:
    return name in NAMES or (name.endswith("_token") and (isinstance(value, str) or _is_typed(value)))


def _is_typed(value: Any) -> bool:
    """Return whether this is an added token as transformers writes it into tokenizer_config.json."""
    return isinstance(value, dict) and "__type" in value


def _check(values: Iterable[Any], path: Path) -> None:
    """Check that values are special tokens, as strings or objects.

    Raises:
      ValueError: one is not.
    """
    for value in values:
        try:
            _content(value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _content(value: Any) -> str:
    """Return the text of a special token: a str, or a dict with "content".

    Raises:
      ValueError: it is neither.
    """
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"a special token must be a string or an object with content, not {value!r}")
    return text


def complete(token: Mapping[str, Any]) -> Token:
    """Return an added token with all its fields, and without its id.

    Raises:
      ValueError: it has no content.
    """
    special = bool(token.get("special"))
    flags = {name: bool(token.get(name)) for name in _FLAGS}
    normalized = bool(token.get("normalized", not special))
    return {"content": _content(dict(token)), **flags, "normalized": normalized, "special": special}


def _by_id(value: Any, path: Path) -> dict[int, Token]:
    try:
        return {int(i): complete(token) for i, token in value.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: added_tokens_decoder must map ids to tokens: {error}") from error


def _with_map(path: Path, named: dict[str, Any], extra: list) -> tuple[dict[str, Any], list]:
    """Return the names and the other special tokens after special_tokens_map.json was read."""
    found = read_object(path) if path.is_file() else {}
    more = found.get("extra_special_tokens") or (not extra and found.get("additional_special_tokens")) or []
    if isinstance(more, dict):
        found, more = found | more, []
    own = {name: value for name, value in found.items() if _is_name(name, value)}
    _check((*own.values(), *more), path)
    return named | own, [*extra, *(token for token in more if token not in extra)]


def _legacy(path: Path, special: set[str]) -> dict[int, Token]:
    """Return {id: token} of added_tokens.json."""
    found = read_object(path) if path.is_file() else {}
    if not all(type(i) is int for i in found.values()):
        raise ValueError(f"{path} must map each added token to its id")
    return {i: complete({"content": token, "special": token in special}) for token, i in found.items()}


def warn_of_other_ids(added: Added, tokenizer: Tokenizer, directory: Path) -> None:
    """Warn if the library gives a token another id than the files say."""
    other = {token: i for token, i in added.stated.items() if token and tokenizer.tokens.get(token) != i}
    for token, i in list(other.items())[:1]:
        more = f", and {len(other) - 1} more tokens" if len(other) > 1 else ""
        warn(
            f"{directory} gives {token!r} the id {i}, but its id is {tokenizer.tokens.get(token)} in transformers, and "
            f"here too{more}: added tokens get the next free ids",
        )
