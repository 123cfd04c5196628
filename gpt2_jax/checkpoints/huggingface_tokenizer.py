"""Hugging Face's tokenizer files, read as transformers 5 reads them.

tokenizer_config.json decides, by its `tokenizer_class` (or config.json's; without one, GPT2Tokenizer for model_type
"gpt2"). GPT2Tokenizer takes the vocabulary, the merges and the template from tokenizer.json, or from vocab.json and
merges.txt if there is none, and splits text in GPT-2's way, whatever tokenizer.json says. All other classes that
`tokenizers` runs take tokenizer.json as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.checkpoints import huggingface_added
from gpt2_jax.checkpoints.integrity import warn
from gpt2_jax.files import read_json, read_object, read_text
from gpt2_jax.tokenizer import (
    END_OF_TEXT,
    MERGES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCAB_JSON,
    Tokenizer,
    description,
    openai,
    read_merges,
)
from gpt2_jax.tokenizer.huggingface import MODELS, with_added

WHOLE = ("TokenizersBackend", "PreTrainedTokenizer")  # these classes take tokenizer.json as it is
OWN = "GPT2Tokenizer"
NOT_KEPT = {  # fields of tokenizer_config.json that say how its own folder is read
    *("tokenizer_class", "added_tokens_decoder", "add_bos_token", "add_eos_token", "backend", "name_or_path"),
    *("auto_map", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "init_inputs"),
    *("is_local", "local_files_only", "fast_tokenizer_files", "additional_special_tokens", "extra_special_tokens"),
}


class Files(NamedTuple):
    """What a tokenizer is made from.

    Attributes:
      fields: the content of a tokenizer.json, without the tokens that other files add.
      tokens_from, merges_from, first_line: the files and the line of the first merge, for messages.
    """

    fields: dict[str, Any]
    tokens_from: Path
    merges_from: Path
    first_line: int = 1


def read(directory: Path) -> Tokenizer:
    """Read a tokenizer from Hugging Face's files, as `AutoTokenizer.from_pretrained` does.

    Warns:
      UserWarning: files disagree, so that another file than the one that is read gives other ids.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is malformed, files do not belong together, or it is another kind of tokenizer.
    """
    settings = _optional(directory / TOKENIZER_CONFIG)
    config = _optional(directory / "config.json")
    whole = _is_whole(directory, settings, config)
    path = directory / TOKENIZER_JSON
    files = _from_tokenizer_json(path, settings, whole) if path.is_file() else _from_two_files(directory, settings)
    own = files.fields["added_tokens"]
    padding = files.fields.get("padding") if whole else None
    if isinstance(padding, dict) and padding.get("pad_token"):
        settings = {"pad_token": padding["pad_token"]} | settings
    added = huggingface_added.read(directory, settings, own, whole)
    files.fields["added_tokens"] = own if whole else []
    fields = _add(files, added.tokens)
    if not path.is_file():
        fields["post_processor"] = _asked_template(settings, added.names, _ids(fields))
    tokenizer = _make(files, fields, settings)
    huggingface_added.warn_of_other_ids(added, tokenizer, directory)
    tokenizer.eot = tokenizer.eot_of_files = _end_of_text(tokenizer, files, added, config)
    kept = {name: value for name, value in settings.items() if name not in NOT_KEPT}
    own_names = {name: token for name, token in added.names.items() if not name.endswith("_token")}
    extra = own_names or added.extra
    names = {name: token for name, token in added.names.items() if name not in own_names}
    tokenizer.settings = kept | names | ({"extra_special_tokens": extra} if extra else {})
    return tokenizer


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _is_whole(directory: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether the folder's tokenizer class takes tokenizer.json as it is.

    Raises:
      ValueError: it is another class, which does not need tokenizer.json.
    """
    has_json = (directory / TOKENIZER_JSON).is_file()
    source, name = TOKENIZER_CONFIG, settings.get("tokenizer_class")
    if not name:
        source, name = "config.json", config.get("tokenizer_class")
    if not name:
        return has_json and config.get("model_type") != "gpt2"
    if str(name).removesuffix("Fast") == OWN:
        return False
    if str(name).removesuffix("Fast") not in WHOLE:
        if not has_json:
            raise ValueError(
                f"{directory / source} has tokenizer_class = {name!r}, which is not GPT-2's tokenizer, and there is no "
                f"{TOKENIZER_JSON} to read it from"
            )
        warn(
            f"{directory / source} has tokenizer_class = {name!r}, which is not GPT-2's tokenizer: {TOKENIZER_JSON} is "
            "read as it is, and transformers may give other ids",
        )
    return has_json


def _from_two_files(directory: Path, settings: Mapping[str, Any]) -> Files:
    tokens, (merges, first_line) = read_json(directory / VOCAB_JSON), read_merges(directory / MERGES)
    openai.check_names(tokens, directory / VOCAB_JSON)
    fields = _gpt2_fields(tokens, merges, settings)
    return Files(fields, directory / VOCAB_JSON, directory / MERGES, first_line)


def _gpt2_fields(tokens: dict[str, int], merges: list[tuple[str, ...]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a GPT2Tokenizer with this vocabulary."""
    fields = description.description(tokens, [], [])
    fields["pre_tokenizer"] = description.BYTE_LEVEL | {"add_prefix_space": bool(settings.get("add_prefix_space"))}
    fields["model"]["merges"] = merges
    return fields


def _from_tokenizer_json(path: Path, settings: Mapping[str, Any], whole: bool) -> Files:
    fields = read_object(path)
    model = fields.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path} has no model: it is not in the format of Hugging Face's tokenizers library")
    kind = model.setdefault("type", "BPE" if "merges" in model else None)
    if kind not in (MODELS if whole else MODELS[:1]):
        raise ValueError(f"{path} has model.type = {kind!r}: it is not a byte-pair encoding, as GPT-2's tokenizer is")
    openai.check_names(model.get("vocab"), f"{path}: model.vocab")
    merges = model.get("merges", [] if kind != "BPE" else None)
    if not isinstance(merges, list) or set(map(type, merges)) - {str, list}:
        raise ValueError(f"{path}: model.merges must be a list of pairs of tokens")
    model["merges"] = [tuple(pair.split(" ") if isinstance(pair, str) else map(str, pair)) for pair in merges]
    added = fields.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(map(_is_added, added)):
        raise ValueError(f"{path}: added_tokens must be a list of tokens with id and content")
    _warn_of_other_vocabulary(path, model)
    if kind != "BPE":
        del model["merges"]
    if whole:
        if model.get("dropout"):
            warn(f"{path} has model.dropout = {model['dropout']}, which makes ids random: it is left out")
            model["dropout"] = None
        return Files(fields, path, path)
    read = _gpt2_fields(model["vocab"], model["merges"], settings)
    _warn_of_ignored(path, fields, read)
    read |= {"post_processor": fields.get("post_processor"), "added_tokens": added}
    return Files(read, path, path)


def _is_added(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int


def _warn_of_other_vocabulary(path: Path, model: Mapping[str, Any]) -> None:
    """Warn if vocab.json and merges.txt beside tokenizer.json hold another vocabulary."""
    vocab, merges = path.with_name(VOCAB_JSON), path.with_name(MERGES)
    if not vocab.is_file() or not merges.is_file():
        return
    tokens, text = read_json(vocab), read_text(merges)
    body = (text[text.find("\n") + 1 :] if text.startswith("#version") else text).replace("\r\n", "\n").rstrip("\n")
    same = isinstance(tokens, dict) and {**model["vocab"], END_OF_TEXT: tokens.get(END_OF_TEXT)} == tokens
    if not (same or tokens == model["vocab"]) or body != "\n".join(map(" ".join, model["merges"])):
        warn(
            f"{path} does not hold the vocabulary of {VOCAB_JSON} and {MERGES} beside it: {path.name} is read, as "
            "transformers does",
        )


def _warn_of_ignored(path: Path, fields: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Warn of what tokenizer.json asks for and the class GPT2Tokenizer does not do."""
    plain = description.PLAIN_BPE
    asked = {name: fields["model"].get(name) for name in plain if name != "fuse_unk"}
    ignored = [f"model.{name}" for name, value in asked.items() if (value or None) != (plain[name] or None)]
    ignored += ["normalizer"] * bool(fields.get("normalizer"))
    if _splitting(fields.get("pre_tokenizer")) != _splitting(read["pre_tokenizer"]):
        ignored.append("pre_tokenizer")
    if ignored:
        warn(
            f"{path} asks for {', '.join(ignored)}, which the class {OWN} of transformers leaves out, and so does this "
            f'package: set tokenizer_class to "PreTrainedTokenizerFast" in {TOKENIZER_CONFIG} to use it',
        )


def _splitting(pre_tokenizer: Any) -> Any:
    """Return a pre-tokenizer without the fields that do not change ids."""
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    return {"use_regex": True} | {name: value for name, value in pre_tokenizer.items() if name != "trim_offsets"}


def _add(files: Files, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the description after tokens were added, by the library if a token is new."""
    fields, vocabulary = files.fields, files.fields["model"]["vocab"]
    found = {token["content"]: token for token in fields["added_tokens"]} | {
        token["content"]: token for token in tokens
    }
    if "" not in found and found.keys() <= vocabulary.keys():
        ordered = sorted(found, key=vocabulary.__getitem__)
        added = [huggingface_added.complete(found[name]) | {"id": vocabulary[name]} for name in ordered]
        return fields | {"added_tokens": added}
    try:
        return with_added(fields, tokens)
    except ValueError as error:
        raise ValueError(f"{files.tokens_from} cannot be read: {error}") from error


def _ids(fields: Mapping[str, Any]) -> dict[str, int]:
    return fields["model"]["vocab"] | {token["content"]: token["id"] for token in fields["added_tokens"]}


def _asked_template(
    settings: Mapping[str, Any], names: Mapping[str, str], ids: Mapping[str, int]
) -> dict[str, Any] | None:
    """Return the template that add_bos_token and add_eos_token ask for."""
    asked = ((settings.get(f"add_{name}"), names.get(name, "")) for name in ("bos_token", "eos_token"))
    prefix, suffix = ([ids[token]] if wanted and token in ids else [] for wanted, token in asked)
    return description.template(ids, prefix, suffix)


def _make(files: Files, fields: dict[str, Any], settings: Mapping[str, Any]) -> Tokenizer:
    model = fields["model"]
    added = {token["content"]: bool(token["special"]) for token in fields["added_tokens"]}
    merges = [tuple(pair) for pair in model.get("merges", [])]
    template = description.ends_of(fields.get("post_processor"))
    failed = None
    by_pattern = _splitting(fields.get("pre_tokenizer")) == _splitting(description.BYTE_LEVEL)
    if by_pattern and template is not None and _is_plain(fields) and not settings.get("split_special_tokens"):
        try:
            made = Tokenizer(_ids(fields), merges, *files[1:], added=added)
            made.prefix, made.suffix = template
            return made
        except ValueError as error:
            failed = error
    if by_pattern and not model.get("ignore_merges") and not model.get("continuing_subword_prefix"):
        pairs = [pair for pair in merges if len(pair) == 2]
        openai.check_complete(model["vocab"], pairs, added, files.tokens_from, files.merges_from)
    try:
        return Tokenizer.from_description(fields, split_special=bool(settings.get("split_special_tokens")))
    except ValueError as error:
        raise failed or ValueError(f"{files.tokens_from} cannot be read: {error}") from error


def _is_plain(fields: Mapping[str, Any]) -> bool:
    """Return whether text is read as in OpenAI's form, apart from the splitting and the template."""
    model, added = fields["model"], fields["added_tokens"]
    if fields.get("normalizer") or any(model.get(name) for name in _UNUSUAL):
        return False
    if any(token.get(name) for token in added for name in ("single_word", "lstrip", "rstrip")):
        return False
    # Tokens with "normalized" are searched after those without.
    return len({token["normalized"] for token in added}) < 2 or not openai.overlap([t["content"] for t in added])


_UNUSUAL = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")


def _end_of_text(
    tokenizer: Tokenizer, files: Files, added: huggingface_added.Added, config: Mapping[str, Any]
) -> int | None:
    """Return the id that ends a document: `<|endoftext|>`, or the end that the files name. It has a row in the model.

    transformers adds `<|endoftext|>` to a vocabulary without it. Such a token has no row, and no text was ended by it.
    """
    fields = files.fields
    own = END_OF_TEXT in {*fields["model"]["vocab"], *added.stated, *(t["content"] for t in fields["added_tokens"])}
    eos = config.get("eos_token_id")
    candidates = [
        tokenizer.tokens.get(END_OF_TEXT) if own else None,
        tokenizer.tokens.get(added.names.get("eos_token", "")) if added.names_eos else None,
        eos[0] if isinstance(eos, list) and eos else eos,
    ]
    rows = config.get("vocab_size")
    end = min(tokenizer.n_vocab, rows) if type(rows) is int else tokenizer.n_vocab
    return next((i for i in candidates if type(i) is int and 0 <= i < end), None)
