"""Forms of vocabularies that Hugging Face's libraries train and save."""

import json
from pathlib import Path

import checkpoint_forms as forms
import vocabulary_makers as makers
import wild_model
from wild_table import vocabulary

import gpt2_jax

NEEDS = ("torch", "transformers")
EOT = makers.EOT
ROBERTA = makers.SPECIALS  # the order of Hugging Face's examples for RoBERTa
TEXT = [
    "The king and the queen went to the castle, and the 3 knights followed them in 1599.",
    "Schöne Grüße aus München! Wir öffnen die Tür und gehen über die Straße.",
    "def encode(self, text):\n    return [self.ids[token] for token in self.split(text)]\n",
    "  To be, or not to be: that is the question.\n\n'Tis nobler in the mind to suffer; don't we know it?",
]


def write_config(folder: Path, n_vocab: int, **changes) -> None:
    """Write a config.json with as many rows as the vocabulary has ids."""
    fields = wild_model.hf_fields(wild_model.flat_model(), vocab_size=n_vocab, bos_token_id=0, eos_token_id=0)
    (folder / "config.json").write_text(json.dumps(fields | changes))


def embedded_files(folder: Path, names=("vocab.json", "merges.txt")) -> None:
    """Copy the embedded vocabulary of 1,281 ids under Hugging Face's names."""
    forms.copy_vocabulary(gpt2_jax.embedded_model(), folder, names)


def gpt2_tokenizer(**options):
    """transformers' own GPT-2 tokenizer with the embedded vocabulary."""
    import transformers

    ids, merges = makers.embedded()
    return transformers.GPT2Tokenizer(vocab=ids, merges=merges, **options)


def byte_level(special: list[str], n_vocab: int = 420, **options):
    """A ByteLevelBPETokenizer, trained as in Hugging Face's examples."""
    return makers.trained(special, n_vocab, TEXT, min_frequency=1, **options)


# ---- OpenAI's two files, under Hugging Face's names and by transformers 5


@vocabulary("vocab.json+merges.txt", "transformers 1 to 4, the hub's older folders", transformers=True)
def two_files(folder):
    embedded_files(folder)
    write_config(folder, 1281)


@vocabulary("CRLF", "vocab.json and merges.txt that Git on Windows wrote", transformers=True)
def windows(folder):
    embedded_files(folder)
    merges = (folder / "merges.txt").read_bytes()
    (folder / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    write_config(folder, 1281)


@vocabulary("no-version-line", "a merges.txt that begins with a merge and ends without a newline", transformers=True)
def no_version_line(folder):
    embedded_files(folder)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    (folder / "merges.txt").write_text("\n".join(lines[1:]).rstrip("\n"), encoding="utf-8")
    write_config(folder, 1281)


@vocabulary("ids-with-a-gap", "`<|endoftext|>` at a round id above the others", transformers=True)
def ids_with_a_gap(folder):
    embedded_files(folder)
    ids, _ = makers.embedded()
    (folder / "vocab.json").write_text(json.dumps(ids | {EOT: 1300}))
    write_config(folder, 1301)


@vocabulary("no-config", "a folder with a tokenizer and no config.json", transformers=True)
def no_config(folder):
    forms.write_tokenizer_json(folder / "tokenizer.json", gpt2_jax.embedded_model())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')


@vocabulary("hub-tokenizer", "the hub's `openai-community/gpt2`: all four files", transformers=True)
def hub_tokenizer(folder):
    embedded_files(folder)
    forms.write_tokenizer_json(folder / "tokenizer.json", gpt2_jax.embedded_model())
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    write_config(folder, 1281)


@vocabulary("tokenizer.json", "tokenizer.json alone, merges as strings", transformers=True)
def one_file(folder):
    forms.write_tokenizer_json(folder / "tokenizer.json", gpt2_jax.embedded_model())
    write_config(folder, 1281)


@vocabulary("tokenizer.json-pairs", "tokenizers 0.20 and later: merges as pairs", transformers=True)
def pairs(folder):
    forms.write_tokenizer_json(folder / "tokenizer.json", gpt2_jax.embedded_model(), pairs=True)
    write_config(folder, 1281)


@vocabulary("GPT2Tokenizer", "transformers 5, `GPT2Tokenizer(...).save_pretrained`", transformers=True, needs=NEEDS)
def transformers_five(folder):
    gpt2_tokenizer().save_pretrained(folder)
    write_config(folder, 1281)


@vocabulary("DialoGPT-Trainer", "DialoGPT's layout, saved again by a Trainer", transformers=True, needs=NEEDS)
def dialogpt_trainer(folder):
    import transformers

    embedded_files(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    write_config(folder, 1281)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


@vocabulary("our-export-again", "our export, opened and saved by transformers 5", transformers=True, needs=NEEDS)
def our_export_again(folder):
    import transformers

    params = forms.nested(wild_model.flat_model())
    tokenizer = gpt2_jax.load_tokenizer(gpt2_jax.embedded_model())
    gpt2_jax.save(folder / "export", wild_model.CONFIG, params, format="huggingface", tokenizer=tokenizer)
    transformers.AutoTokenizer.from_pretrained(folder / "export").save_pretrained(folder)
    write_config(folder, 1281)


# ---- vocabularies that people trained


def trained(name: str, writer: str, special: list[str], how: str, n_vocab: int = 420, **options) -> None:
    """Add a row for a ByteLevelBPETokenizer that was stored by `save` or `save_model`."""

    @vocabulary(name, writer, transformers=True)
    def make(folder):
        tokenizer = byte_level(special, n_vocab, **options)
        if how == "save":
            tokenizer.save(str(folder / "tokenizer.json"))
        else:
            tokenizer.save_model(str(folder))
        write_config(folder, tokenizer.get_vocab_size())


trained("RoBERTa-specials", "`ByteLevelBPETokenizer.save`: `<s> <pad> </s> <unk> <mask>` first", ROBERTA, "save")
trained("german-gpt2", "`ByteLevelBPETokenizer.save_model` (stefan-it/german-gpt2#3)", ROBERTA, "save_model")
trained("german-gpt2-endoftext", "the same with `<|endoftext|>` (stefan-it/german-gpt2#13)", [*ROBERTA, EOT], "save")
trained("pad-endoftext", "`<pad>` and `<|endoftext|>` first, `save_model`", ["<pad>", EOT], "save_model")
trained("no-endoftext", "`save` without special tokens (huggingface/tokenizers#361)", [], "save")
trained("no-endoftext-model", "`save_model` without special tokens", [], "save_model")
trained("CodeParrot", "CodeParrot and ProtGPT2: `<|endoftext|>` has id 0, `save_model`", [EOT], "save_model")
trained("nl-token", "a special `<nl>` in the text (huggingface/tokenizers#166)", ["<unk>", "<s>", "<nl>"], "save")
trained("NFKC-lowercase", "`ByteLevelBPETokenizer(lowercase=True, unicode_normalizer='nfkc')`", [EOT], "save",
        lowercase=True, unicode_normalizer="nfkc")  # fmt: skip
trained(
    "trained-prefix-space", "`ByteLevelBPETokenizer(add_prefix_space=True)`", ROBERTA, "save", add_prefix_space=True
)


def course(name: str, writer: str, wrapper: str, **special) -> None:
    """Add a row for the tokenizer of chapter 6 of Hugging Face's course, which lacks the bytes that its text lacks."""

    @vocabulary(name, writer, transformers=True, needs=NEEDS)
    def make(folder):
        import transformers

        unknown = {"unk_token": "<unk>"} if "unk_token" in special else {}
        tokenizer = makers.course(300, TEXT, [*unknown.values(), EOT], **unknown)
        wrapped = getattr(transformers, wrapper)(tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, **special)
        wrapped.save_pretrained(folder)
        write_config(folder, tokenizer.get_vocab_size())


course("course", "Hugging Face's course, chapter 6: bytes are missing", "PreTrainedTokenizerFast")
course("course-unk", "the same with `<unk>` for missing bytes", "PreTrainedTokenizerFast", unk_token="<unk>")


@vocabulary(
    "train_new_from_iterator", "the course, chapter 7: a new vocabulary for GPT-2", transformers=True, needs=NEEDS
)
def train_new_from_iterator(folder):
    tokenizer = gpt2_tokenizer().train_new_from_iterator(TEXT, 400, show_progress=False)
    tokenizer.save_pretrained(folder)
    write_config(folder, len(tokenizer))


@vocabulary("64000-ids", "a vocabulary of 64,000 ids, vocab.json and merges.txt", transformers=True)
def many_ids(folder):
    names, merges = makers.released_and_more(63_999)
    makers.two_files(folder, {token: i for i, token in enumerate([*names, EOT])}, merges)
    write_config(folder, 64_000)


@vocabulary(
    "cut-merges", "a merges.txt cut short, `<|endoftext|>` with id 0", transformers=True,
    refused=r"merges\.txt|vocab\.json", names="a token that no merge makes",
)  # fmt: skip
def cut_merges(folder):
    byte_level([EOT]).save_model(str(folder))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[: len(lines) // 2]) + "\n", encoding="utf-8")
    write_config(folder, 420)
