"""Makers of vocabularies by the libraries that people use: trained, described, and written to folders."""

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vocabularies
from tokenizers import (
    AddedToken,
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

EOT = "<|endoftext|>"
ROOT = Path(__file__).parents[2]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CONFIG = {"n_positions": 8, "n_embd": 4, "n_head": 2, "n_layer": 1}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


@functools.cache
def corpus() -> list[str]:
    text = (ROOT / "examples" / "the-verdict.txt").read_text(encoding="utf-8")
    return [
        *text.split("\n"),
        "Zürich 1234 5678",
        "def f(x):\n    return x",
        "Привет, мир!",
        "漢字 かな",
        "<user> hi </user>",
    ]


@functools.cache
def embedded() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens and merges of the embedded model."""
    return openai_files(ROOT / "models" / "shakespeare")


def openai_files(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens and merges in OpenAI's two files."""
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return json.loads((folder / "encoder.json").read_text(encoding="utf-8")), [tuple(line.split(" ")) for line in lines]


def trained(
    special: list[str], size: int = 700, texts: Sequence[str] = (), min_frequency: int = 2, **options: Any
) -> ByteLevelBPETokenizer:
    """A vocabulary as the examples of Hugging Face train it."""
    tokenizer = ByteLevelBPETokenizer(**options)
    tokenizer.train_from_iterator(
        texts or corpus(), vocab_size=size, min_frequency=min_frequency, special_tokens=special, show_progress=False
    )
    return tokenizer


def course(size: int = 500, texts: Sequence[str] = (), special: Sequence[str] = (), **model: Any) -> Tokenizer:
    """The tokenizer of chapter 6 of Hugging Face's course: no initial alphabet, so that bytes are missing."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = list(special) or [EOT, *filter(None, [model.get("unk_token")])]
    inside = {name: value for name, value in model.items() if name == "continuing_subword_prefix"}
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=names, show_progress=False, **inside)
    tokenizer.train_from_iterator(texts or corpus(), trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def described(**changes: Any) -> dict[str, Any]:
    """The content of a tokenizer.json for the embedded vocabulary, with changes."""
    tokens, merges = embedded()
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    fields = json.loads(tokenizer.to_str())
    model = changes.pop("model", {})
    return {**fields, **changes, "model": {**fields["model"], **model}}


def template(before: list[str], after: list[str], ids: dict[str, int]) -> dict[str, Any]:
    def special(names: list[str]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]

    single = [*special(before), {"Sequence": {"id": "A", "type_id": 0}}, *special(after)]
    known = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {*before, *after}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def write(folder: Path, n_vocab: int = 0, **files: Any) -> Path:
    """Write config.json of a GPT-2, and other JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config": CONFIG | {"model_type": "gpt2", "vocab_size": n_vocab or 1281}} | files
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def two_files(folder: Path, tokens=None, merges=None, **files: Any) -> Path:
    own_tokens, own_merges = embedded()
    tokens, merges = tokens or own_tokens, own_merges if merges is None else merges
    write(folder, len(tokens), vocab=tokens, **files)
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    return folder


def model_saved(folder: Path, special: list[str], **files: Any) -> Path:
    tokenizer = trained(special)
    write(folder, tokenizer.get_vocab_size(), **files)
    tokenizer.save_model(str(folder))
    return folder


def saved(folder: Path, tokenizer: Any, **files: Any) -> Path:
    write(folder, tokenizer.get_vocab_size(), **files)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content, **plain, **flags}


def released() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens and merges of OpenAI's release."""
    return openai_files(vocabularies.real_vocabulary_dir())


def hub_layout(folder: Path) -> Path:
    """The four files of the released GPT-2 on the hub."""
    tokens, merges = released()
    end = {"id": tokens[EOT], **added(EOT, normalized=True, special=True)}
    fields = described(added_tokens=[end], model={"vocab": tokens, "merges": [" ".join(pair) for pair in merges]})
    fields["post_processor"] = BYTE_LEVEL | {"trim_offsets": False}
    return two_files(folder, tokens, merges, tokenizer=fields, tokenizer_config={"model_max_length": 1024})


def released_and_more(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The released tokens without `<|endoftext|>`, continued to `size` by merges of two words; and all merges."""
    tokens, merges = released()
    words = [token for token in tokens if token.isalpha() and token.isascii()]
    draw, names = random.Random(7), dict.fromkeys(token for token in tokens if token != EOT)
    while len(names) < size:
        left, right = draw.choice(words), draw.choice(words)
        if left + right not in names and left + right not in SPECIALS:
            merges.append((left, right))
            names[left + right] = None
    return list(names), merges


def of_64000(folder: Path) -> Path:
    """The released vocabulary, continued, with special tokens in front."""
    names, merges = released_and_more(64_000 - len(SPECIALS))
    return two_files(folder, {token: i for i, token in enumerate([*SPECIALS, *names])}, merges)


def sentencepiece_like(folder: Path) -> Path:
    """A BPE with bytes as a fallback, whose words begin with U+2581."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = fields["added_tokens"][:3]  # bytes are not written in a text
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return saved(folder, tokenizer, tokenizer_config=FAST)


def word_level() -> Tokenizer:
    words = sorted({word for line in corpus() for word in line.split()})
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", EOT, *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(EOT, special=True)])
    return tokenizer


def not_canonical() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges "bc", "ab", "ab c": in "abc" only "bc" merges. tiktoken finds the whole token."""
    tokens, _ = embedded()
    alphabet = [token for token in tokens if len(token) == 1]
    more = [("b", "c"), ("a", "b"), ("ab", "c"), ("\u0120", "a"), ("d", "d"), ("dd", "d"), ("d", "dd")]
    names = dict.fromkeys([*alphabet, *(left + right for left, right in more), EOT])
    return {token: i for i, token in enumerate(names)}, more


def unordered() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids that do not follow the merges, as after a vocabulary was sorted."""
    tokens, merges = embedded()
    return {token: i for i, token in enumerate(sorted(tokens))}, merges


def bytes_missing() -> dict[str, Any]:
    fields = described(model={"unk_token": EOT})
    gone = {"!", "\u0102", "z"}
    names = [token for token in fields["model"]["vocab"] if not gone & set(token)]
    fields["model"]["vocab"] = {token: i for i, token in enumerate(names)}
    fields["model"]["merges"] = [pair for pair in fields["model"]["merges"] if not gone & set("".join(pair))]
    fields["added_tokens"][0]["id"] = fields["model"]["vocab"][EOT]
    return fields
