"""Forms of vocabularies whose files change how a text is read: normalizers, templates, settings, added tokens."""

import json
from pathlib import Path

import checkpoint_forms as forms
from wild_table import vocabulary
from wild_vocabularies import EOT, NEEDS, byte_level, embedded_files, gpt2_tokenizer, write_config

import gpt2_jax

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, LEVEL]}


def template(*pieces: str) -> dict:
    """A post-processor that puts tokens around a text. "A" is the text."""
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "A" else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {EOT: {"id": EOT, "ids": [1280], "tokens": [EOT]}} if EOT in pieces else {}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def edited(name: str, writer: str, settings=None, two_files=False, **changes) -> None:
    """Add a row for a tokenizer.json with changes, beside the settings of tokenizer_config.json."""

    @vocabulary(name, writer, transformers=True)
    def make(folder):
        forms.write_tokenizer_json(folder / "tokenizer.json", gpt2_jax.embedded_model(), **changes)
        if two_files:
            embedded_files(folder)
        if settings is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        write_config(folder, 1281)


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT}
SLOW = {"tokenizer_class": "GPT2Tokenizer", "bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
for suffix, fields in (("", SLOW), ("-fast", FAST)):
    kind = fields["tokenizer_class"]
    edited(f"NFC{suffix}", f"tokenizer.json with NFC, class {kind}", fields, normalizer={"type": "NFC"})
    edited(
        f"lowercase{suffix}", f"tokenizer.json with Lowercase, class {kind}", fields, normalizer={"type": "Lowercase"}
    )
    edited(f"digits{suffix}", f"tokenizer.json that splits digits, class {kind}", fields, pre_tokenizer=DIGITS)
    edited(f"endoftext-first{suffix}", f"a template with `<|endoftext|>` first, class {kind}", fields,
           post_processor=template(EOT, "A"))  # fmt: skip
    edited(f"disagreeing{suffix}", f"a template in tokenizer.json beside vocab.json and merges.txt, class {kind}",
           fields, two_files=True, post_processor=template(EOT, "A", EOT))  # fmt: skip
edited("no-class", "Lowercase in tokenizer.json beside vocab.json and merges.txt, no class named", None, two_files=True,
       normalizer={"type": "Lowercase"})  # fmt: skip
edited(
    "GPT2TokenizerFast",
    "tokenizer_config.json with the class GPT2TokenizerFast",
    FAST | {"tokenizer_class": "GPT2TokenizerFast"},
)
edited("padding-and-truncation", "tokenizer.json with the padding and truncation of a training run", FAST,
       truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
       padding={"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1280,
                "pad_type_id": 0, "pad_token": EOT})  # fmt: skip
edited("regex-split", "a Split with a regular expression of its own before ByteLevel", FAST,
       pre_tokenizer={"type": "Sequence", "pretokenizers": [
           {"type": "Split", "pattern": {"Regex": "\\d{1,3}|\\s+|[^\\s\\d]+"}, "behavior": "Isolated", "invert": False},
           LEVEL | {"use_regex": False}]})  # fmt: skip


def settings(name: str, writer: str, files=("vocab.json",), **fields) -> None:
    """Add a row for a setting of tokenizer_config.json beside vocab.json and merges.txt."""

    @vocabulary(name, writer, transformers=True)
    def make(folder):
        embedded_files(folder)
        if "tokenizer.json" in files:
            forms.write_tokenizer_json(folder / "tokenizer.json", gpt2_jax.embedded_model())
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024} | fields))
        write_config(folder, 1281)


settings("add_prefix_space", "`add_prefix_space` in tokenizer_config.json", add_prefix_space=True)
settings("add_bos_token", "OPT's and Cerebras's `add_bos_token`", add_bos_token=True)
settings("add_eos_token", "`add_eos_token`", add_eos_token=True, tokenizer_class="GPT2Tokenizer")
settings("add_bos_token-fast", "`add_bos_token` beside tokenizer.json", ("tokenizer.json",), add_bos_token=True)

# ---- added tokens


def added(name: str, writer: str, add) -> None:
    """Add a row for tokens that were added with transformers 5."""

    @vocabulary(name, writer, transformers=True, needs=NEEDS)
    def make(folder):
        tokenizer = gpt2_tokenizer()
        add(tokenizer)
        tokenizer.save_pretrained(folder)
        write_config(folder, len(tokenizer))


SPEAKERS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
added(
    "speakers",
    "dialogue models: `<speaker1>`, `<speaker2>` (huggingface/transformers#1043)",
    lambda tok: tok.add_special_tokens(SPEAKERS | {"additional_special_tokens": ["<speaker1>", "<speaker2>"]}),
)
added(
    "pad-added", "`add_special_tokens({'pad_token': '[PAD]'})`", lambda t: t.add_special_tokens({"pad_token": "[PAD]"})
)
added("plain-added", "`add_tokens`: tokens that are not special", lambda tok: tok.add_tokens(["<newline>", "covfefe"]))


def add_flagged(tokenizer) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens(
        [AddedToken("<mask>", lstrip=True), AddedToken("ab", single_word=True), AddedToken("<r>", rstrip=True)]
    )


def add_chat(tokenizer) -> None:
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


added("flagged-added", "added tokens with `lstrip`, `rstrip`, `single_word`", add_flagged)
added("ChatML", "trl's `setup_chat_format`: `<|im_start|>`, a chat template", add_chat)


def legacy(name: str, writer: str, more: dict[str, int], special: dict, **settings) -> None:
    """Add a row for the files of transformers before 4.34: added_tokens.json and special_tokens_map.json."""

    @vocabulary(name, writer, transformers=True)
    def make(folder):
        embedded_files(folder)
        (folder / "added_tokens.json").write_text(json.dumps(more))
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024} | settings))
        write_config(folder, 1281 + len(more))


TOKENS = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
legacy("added_tokens.json", "transformers before 4.34: `[PAD]` in added_tokens.json", {"[PAD]": 1281},
       TOKENS | {"pad_token": "[PAD]"})  # fmt: skip
legacy("speakers-legacy", "the same with speakers (huggingface/transformers#21053)",
       {"<speaker1>": 1281, "<speaker2>": 1282},
       TOKENS | {"additional_special_tokens": ["<speaker1>", "<speaker2>"]})  # fmt: skip
legacy(
    "added-not-special",
    "added_tokens.json with tokens that are not special",
    {"<newline>": 1281, "covfefe": 1282},
    TOKENS,
)


ADDED_BY_FOUR = {  # as transformers 4.55 writes them
    "1280": {"content": EOT} | FLAGS | {"normalized": True},
    "1281": {"content": "<pad>"} | FLAGS,
    "1282": {"content": "<speaker1>"} | FLAGS,
    "1283": {"content": "<newline>"} | FLAGS | {"normalized": True, "special": False},
}


def by_transformers_four(name: str, writer: str, fast: bool) -> None:
    """Add a row for what transformers 4.34 to 4.57 write: each token is in up to four files."""

    @vocabulary(name, writer, transformers=True)
    def make(folder):
        embedded_files(folder)
        more = {fields["content"]: int(i) for i, fields in ADDED_BY_FOUR.items() if i != "1280"}
        special = TOKENS | {"pad_token": "<pad>", "additional_special_tokens": ["<speaker1>"]}
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "errors": "replace",
            "add_bos_token": False,
        }
        settings |= {"added_tokens_decoder": ADDED_BY_FOUR, "model_max_length": int(1e30), "extra_special_tokens": {}}
        (folder / "added_tokens.json").write_text(json.dumps(more))
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
        if fast:
            tokens = [fields | {"id": int(i)} for i, fields in ADDED_BY_FOUR.items()]
            path = folder / "tokenizer.json"
            forms.write_tokenizer_json(path, gpt2_jax.embedded_model(), added_tokens=tokens)
        write_config(folder, 1284)


by_transformers_four(
    "slow-GPT2Tokenizer", "transformers 4.34 to 4.57, the slow tokenizer with added tokens", fast=False
)
by_transformers_four("fast-GPT2Tokenizer", "transformers 4.34 to 4.57, the fast tokenizer with added tokens", fast=True)


# ---- merges that are not canonical, and other kinds of tokenizers


def not_canonical() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges with which "abc" becomes "a", "bc", although the token "abc" can be made from "ab", "c"."""
    letters = json.loads((gpt2_jax.embedded_model() / "encoder.json").read_text(encoding="utf-8"))
    ids = {token: i for i, token in enumerate(token for token in letters if len(token) == 1)}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    for token in [*("".join(pair) for pair in merges), EOT]:
        ids[token] = len(ids)
    return ids, merges


@vocabulary("merges-not-canonical", "merges that make a token in several ways: `b c`, `a b`, `ab c`", transformers=True)
def several_ways(folder):
    ids, merges = not_canonical()
    (folder / "vocab.json").write_text(json.dumps(ids))
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    write_config(folder, len(ids))


@vocabulary("ignore_merges", "`ignore_merges` with these merges, class PreTrainedTokenizerFast", transformers=True)
def ignore_merges(folder):
    ids, merges = not_canonical()
    path = folder / "tokenizer.json"
    tokens = [{"id": ids[EOT], "content": EOT} | FLAGS]
    forms.write_tokenizer_json(path, gpt2_jax.embedded_model(), added_tokens=tokens)
    fields = json.loads(path.read_text(encoding="utf-8"))
    model = fields["model"] | {"ignore_merges": True, "vocab": ids, "merges": merges}
    path.write_text(json.dumps(fields | {"model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps(FAST))
    write_config(folder, len(ids))


@vocabulary("trained-template", "a trained `<s> $A </s>` tokenizer as a fast one", transformers=True, needs=NEEDS)
def trained_template(folder):
    import transformers
    from tokenizers import processors

    tokenizer = byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    pieces = [("<s>", 0), ("</s>", 2)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pieces)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    write_config(folder, tokenizer.get_vocab_size())


def train_words(folder: Path, kind: str) -> None:
    """Write a tokenizer of whole words or pieces of words."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(getattr(models, kind)(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = getattr(trainers, f"{kind}Trainer")(special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(["one two three two one"], trainer=trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_config(folder, tokenizer.get_vocab_size())


@vocabulary("WordLevel", "research models with one token a word", transformers=True, needs=NEEDS)
def word_level(folder):
    train_words(folder, "WordLevel")


@vocabulary(
    "WordPiece",
    "GPT-2 models with a BERT tokenizer",
    transformers=True,
    refused=r"tokenizer\.json.*WordPiece",
    names="`WordPiece`",
)
def word_piece(folder):
    train_words(folder, "WordPiece")


@vocabulary(
    "vocab.txt",
    "Chinese GPT-2 with BERT's vocab.txt (Morizeyao/GPT2-Chinese)",
    transformers=True,
    refused=r"vocab\.txt|BertTokenizer",
    names="`vocab.txt`",
)
def vocab_txt(folder):
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "文"]) + "\n", encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    write_config(folder, 7)
