"""Folders with the vocabularies that people have, by the libraries that people use, and texts that break tokenizers."""

import functools
import json
import random
from collections.abc import Callable, Sequence
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
    folder = ROOT / "models" / "shakespeare"
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return json.loads((folder / "encoder.json").read_text(encoding="utf-8")), [tuple(line.split(" ")) for line in lines]


def trained(special: list[str], size: int = 700) -> ByteLevelBPETokenizer:
    """A vocabulary as the examples of Hugging Face train it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        corpus(), vocab_size=size, min_frequency=2, special_tokens=special, show_progress=False
    )
    return tokenizer


def course(**model: Any) -> Tokenizer:
    """The tokenizer of Hugging Face's course: no initial alphabet, so that bytes are missing."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [EOT, *filter(None, [model.get("unk_token")])]
    inside = {name: value for name, value in model.items() if name == "continuing_subword_prefix"}
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False, **inside)
    tokenizer.train_from_iterator(corpus(), trainer)
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


def hub_layout(folder: Path, directory: Path) -> Path:
    """The four files of the released GPT-2 on the hub."""
    tokens = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    lines = (directory / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [tuple(line.split(" ")) for line in lines]
    end = {"id": tokens[EOT], **added(EOT, normalized=True, special=True)}
    fields = described(added_tokens=[end], model={"vocab": tokens, "merges": lines})
    fields["post_processor"] = BYTE_LEVEL | {"trim_offsets": False}
    return two_files(folder, tokens, merges, tokenizer=fields, tokenizer_config={"model_max_length": 1024})


def of_64000(folder: Path) -> Path:
    """The released vocabulary, continued by merges of two words, with special tokens in front."""
    directory = vocabularies.real_vocabulary_dir()
    tokens = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    lines = (directory / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [tuple(line.split(" ")) for line in lines]
    words = [token for token in tokens if token.isalpha() and token.isascii()]
    draw, names = random.Random(7), [*SPECIALS, *(token for token in tokens if token != EOT)]
    known = set(names)
    while len(names) < 64_000:
        left, right = draw.choice(words), draw.choice(words)
        if left + right not in known:
            merges.append((left, right))
            names.append(left + right)
            known.add(left + right)
    return two_files(folder, {token: i for i, token in enumerate(names)}, merges)


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


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content, **plain, **flags}


ODD_TOKENS = {
    "1281": added("<sp 1>", lstrip=True),
    "1282": added("[PAD]", special=True, rstrip=True),
    "1283": added("thee", single_word=True, normalized=True),
    "1284": added("<sp"),
    "1285": added("\u00e9t\u00e9", normalized=True),
    "1286": added("<|end|>", special=True, lstrip=True, rstrip=True),
}
PLAIN_TOKENS = {"1281": added("<user>"), "1282": added("<user>x", special=True), "1283": added("thou")}
OVERLAPPING = {"1281": added("ab<", normalized=True), "1282": added("<c>"), "1283": added("b<c", special=True)}
LOWER = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}
DIGITS = {
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
}
PREFIX = {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}
IDENTITY = template([], [], {})
FIRST = template([EOT], [], {EOT: 1280})
ROUND = template([EOT], [EOT], {EOT: 1280})
MAP = {
    "pad_token": "[PAD]",
    "eos_token": {"content": "<e>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": True},
    "additional_special_tokens": ["<x>", "<y>"],
}
NAMED = {
    "bos_token": {"__type": "AddedToken", **{k: v for k, v in added(EOT).items() if k != "special"}},
    "pad_token": "<|pad|>", "image_token": "<img>", "additional_special_tokens": ["<a>", "<b>"],
}  # fmt: skip


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


Maker = Callable[[Path], Path]


def config(**fields: Any) -> Maker:
    """vocab.json, merges.txt and a tokenizer_config.json."""
    return lambda path: two_files(path, tokenizer_config=fields)


def fast(settings: dict[str, Any] | None = None, **changes: Any) -> Maker:
    """tokenizer.json and a tokenizer_config.json with the class that takes it as it is."""
    return lambda path: write(path, tokenizer=described(**changes), tokenizer_config=FAST | (settings or {}))


def slow(settings: dict[str, Any] | None = None, **changes: Any) -> Maker:
    """tokenizer.json and perhaps a tokenizer_config.json, for the class GPT2Tokenizer."""
    files = {} if settings is None else {"tokenizer_config": settings}
    return lambda path: write(path, tokenizer=described(**changes), **files)


def files(**contents: Any) -> Maker:
    """vocab.json, merges.txt and other JSON files."""
    return lambda path: two_files(path, **contents)


OF_TRAINED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
NO_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"))
PADDED = {
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    },
}  # fmt: skip
WITHOUT_END = {"model_type": "gpt2", "vocab_size": 1280, **CONFIG}

FORMS: dict[str, Maker] = {
    "hub layout": lambda path: hub_layout(path, vocabularies.real_vocabulary_dir()),
    "two files": two_files,
    "special first, save_model": lambda path: model_saved(path, SPECIALS),
    "special first, save": lambda path: saved(path, trained(SPECIALS)),
    "special first, named": lambda path: model_saved(path, SPECIALS, tokenizer_config=OF_TRAINED),
    "special first, fast": lambda path: saved(path, trained(SPECIALS), tokenizer_config=FAST | {"eos_token": "</s>"}),
    "pad and end of text first": lambda path: model_saved(path, ["<pad>", EOT]),
    "end of text first": lambda path: saved(path, trained([EOT])),
    "no special tokens": lambda path: model_saved(path, []),
    "no special tokens, fast": lambda path: saved(path, trained([]), tokenizer_config=FAST),
    "course": lambda path: saved(path, course(), tokenizer_config=FAST | {"eos_token": EOT}),
    "course, unk": lambda path: saved(path, course(unk_token="<unk>"), tokenizer_config=FAST | {"unk_token": "<unk>"}),
    "course, prefix inside words": lambda path: saved(
        path, course(continuing_subword_prefix="##"), tokenizer_config=FAST
    ),
    "course, GPT2Tokenizer": lambda path: saved(path, course()),
    "64,000 ids": of_64000,
    "bytes missing": lambda path: write(path, tokenizer=bytes_missing(), tokenizer_config=FAST),
    "bytes missing, GPT2Tokenizer": lambda path: write(path, tokenizer=bytes_missing()),
    "normalizer": fast(**LOWER),
    "normalizer, GPT2Tokenizer": slow(**LOWER),
    "digits": fast(**DIGITS),
    "digits, GPT2Tokenizer": slow(**DIGITS),
    "prefix space": config(add_prefix_space=True),
    "prefix space, fast": fast(**PREFIX),
    "prefix space, not in tokenizer_config.json": slow({"add_prefix_space": False}, **PREFIX),
    "identity template": slow(post_processor=IDENTITY),
    "end of text before": slow(post_processor=FIRST),
    "end of text around, fast": fast(post_processor=ROUND),
    "template beside two files": lambda path: two_files(path, tokenizer=described(post_processor=FIRST)),
    "bos and eos asked": config(tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_eos_token=True),
    "bos asked, tokenizer.json": slow({"add_bos_token": True}),
    "bos and a prefix space": config(add_bos_token=True, add_prefix_space=True),
    "not canonical": lambda path: two_files(path, *not_canonical()),
    "not in order": lambda path: two_files(path, *unordered()),
    "ignore merges": lambda path: fast(model={"ignore_merges": True, "merges": embedded()[1][:200]})(path),
    "byte fallback": sentencepiece_like,
    "words": lambda path: saved(path, word_level(), tokenizer_config=FAST),
    "added_tokens.json": files(added_tokens={"[PAD]": 1281, "<speaker1>": 1282}),
    "added tokens with other ids": files(added_tokens={"[PAD]": 1290, "<speaker1>": 1281}),
    "added_tokens_decoder": config(added_tokens_decoder=PLAIN_TOKENS),
    "added tokens that strip": config(added_tokens_decoder=ODD_TOKENS),
    "added tokens that overlap": config(added_tokens_decoder=OVERLAPPING),
    "added tokens, fast": fast({"added_tokens_decoder": ODD_TOKENS}),
    "added tokens, tokenizer.json": slow(added_tokens=[{"id": int(i), **token} for i, token in PLAIN_TOKENS.items()]),
    "special_tokens_map.json": files(special_tokens_map=MAP),
    "special_tokens_map.json, fast": lambda path: write(
        path, tokenizer=described(), special_tokens_map=MAP, tokenizer_config=FAST
    ),
    "named tokens": config(**NAMED),
    "extra special tokens": config(extra_special_tokens={"v": "<v>"}),
    "special tokens split": config(split_special_tokens=True),
    "special tokens split, fast": fast({"split_special_tokens": True}, **DIGITS),
    "truncation and padding": fast(**PADDED),
    "no class": lambda path: write(path, tokenizer=described(**LOWER), config=CONFIG | {"vocab_size": 1281}),
    "class in config.json": lambda path: write(
        path, tokenizer=described(**LOWER), config=CONFIG | FAST | {"model_type": "gpt2", "vocab_size": 1281}
    ),
    "no end of text": lambda path: two_files(
        path, {t: i for t, i in embedded()[0].items() if t != EOT}, config=WITHOUT_END, tokenizer_config=NO_NAMES
    ),
}


def word_level() -> Tokenizer:
    words = sorted({word for line in corpus() for word in line.split()})
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", EOT, *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(EOT, special=True)])
    return tokenizer


def hostile_texts(count: int, seed: int, tokens: Sequence[str] = ()) -> list[str]:
    """Texts of special characters, parts of special tokens, long runs, digits and scripts; the same for a seed."""
    draw = random.Random(seed)
    pieces = [
        *vocabularies.SNIPPETS,
        *SPECIALS,
        *tokens,
        "abc",
        "ddd",
        "abc ddd",
        "THE the",
        "12345",
        "\u2581",
        "<0x0A>",
    ]
    pieces += [token[:cut] for token in (*tokens, EOT, "<pad>") for cut in (1, -1)]
    pieces += [
        "ab<c>",
        "\u00e9t\u00e9",
        "e\u0301te\u0301",
        "thee",
        "methee",
        "<sp 1>",
        "[PAD]",
        "<user>x",
        "thou",
        "\u0130",
        "\u1e9e",
    ]

    def piece() -> str:
        kind = draw.random()
        if kind < 0.75:
            return draw.choice(pieces)
        if kind < 0.85:
            return chr(draw.choice([draw.randrange(0x80), draw.randrange(0x3000), draw.randrange(0xE000, 0x30000)]))
        if kind < 0.9:
            return draw.choice("a 0\n!é") * draw.randrange(1, 40)
        return draw.choice(["  ", " ", "\n"]) + draw.choice(pieces)

    return [
        "".join(piece() for _ in range(draw.randrange(12))).encode("utf-8", "replace").decode() for _ in range(count)
    ]


NAMES = ["[PAD]", "<s>", "</s>", "<unk>", EOT, "the", "<x>", "<x", "x>", "\u00e9", "hello", " hi", "a b", "\n", "t"]


def random_folder(folder: Path, seed: int) -> Path:
    """A folder in which any files name, add and declare any tokens, the same for a seed."""
    draw = random.Random(seed)
    tokens, merges = embedded()
    merges = merges[:120]
    ends = [token for token in ("<s>", "</s>", EOT, "[PAD]") if draw.random() < 0.3]
    bytes_and_merges = [*(token for token in tokens if len(token) == 1), *(left + right for left, right in merges)]
    names = [
        *ends,
        *bytes_and_merges,
        *(token for token in (EOT, "<unk>") if draw.random() < 0.4 and token not in ends),
    ]
    ids = {token: i for i, token in enumerate(names)}

    def some(share: float, value: Callable[[], Any]) -> Any:
        return value() if draw.random() < share else None

    def described_token(content: str) -> dict[str, Any]:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return added(content, **{flag: draw.random() < 0.2 for flag in flags})

    def name() -> Any:
        content = draw.choice(NAMES)
        typed = {key: value for key, value in described_token(content).items() if key != "special"}
        return content if draw.random() < 0.8 else {"__type": "AddedToken", **typed}

    def own_tokens() -> list[dict[str, Any]]:
        known = [token for token in ids if token in NAMES]
        more = draw.sample([token for token in NAMES if token not in ids], 2)
        numbered = [*((ids[token], token) for token in sorted(known, key=ids.__getitem__)), *enumerate(more, len(ids))]
        return [{"id": i, **described_token(token)} for i, token in numbered]

    config = {
        **{key: some(0.25, name) for key in ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")},
        "added_tokens_decoder": some(0.3, lambda: {str(draw.randrange(400)): described_token(draw.choice(NAMES))}),
        "additional_special_tokens": some(0.2, lambda: draw.sample(NAMES, 2)),
        **{f"add_{key}": some(0.15, lambda: draw.random() < 0.7) for key in ("bos_token", "eos_token", "prefix_space")},
        "tokenizer_class": draw.choice([None, "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"]),
    }
    contents = {
        "tokenizer_config": {key: value for key, value in config.items() if value is not None},
        "special_tokens_map": some(0.3, lambda: {"pad_token": draw.choice(NAMES), "eos_token": draw.choice(NAMES)}),
        "added_tokens": some(0.2, lambda: {token: draw.randrange(400) for token in draw.sample(NAMES, 2)}),
    }
    if draw.random() < 0.6 or config["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        changes = {**(some(0.2, lambda: LOWER) or {}), **(some(0.2, lambda: draw.choice([DIGITS, PREFIX])) or {})}
        if (end := next((token for token in ids if token in NAMES), None)) and draw.random() < 0.3:
            changes["post_processor"] = template([end], some(0.3, lambda: [end]) or [], ids)
        model = {"vocab": ids, "merges": merges}
        contents["tokenizer"] = described(added_tokens=own_tokens(), model=model, **changes)
    given = {key: value for key, value in contents.items() if value is not None}
    return two_files(folder, ids, merges, **given)
