"""The forms of vocabularies that people have: what is in the folder of each."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vocabulary_makers import (
    BYTE_LEVEL,
    CONFIG,
    EOT,
    FAST,
    SPECIALS,
    added,
    bytes_missing,
    course,
    described,
    embedded,
    hub_layout,
    model_saved,
    not_canonical,
    of_64000,
    saved,
    sentencepiece_like,
    template,
    trained,
    two_files,
    unordered,
    word_level,
    write,
)

import gpt2_jax

TEXT = "O Romeo,  Romeo! 1597 <|endoftext|>\n\n\u6f22\u5b57 \U0001f98a abc"


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
    "hub layout": hub_layout,
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
    "bytes missing": lambda path: write(path, 1274, tokenizer=bytes_missing(), tokenizer_config=FAST),
    "bytes missing, GPT2Tokenizer": lambda path: write(path, 1274, tokenizer=bytes_missing()),
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


def load(folder: Path, name: str) -> gpt2_jax.Tokenizer:
    """The tokenizer of a form, which is made in `folder`. Its warnings are tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gpt2_jax.load_tokenizer(FORMS[name](folder / "form"))


def small_model(n_vocab: int) -> tuple[gpt2_jax.GPT2Config, Any]:
    config = gpt2_jax.GPT2Config(n_vocab=n_vocab, n_ctx=8, n_embd=4, n_head=2, n_layer=1)
    import jax

    return config, gpt2_jax.init_params(config, jax.random.key(0))
