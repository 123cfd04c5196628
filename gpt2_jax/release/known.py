"""Known facts about the released files: names, addresses, sizes and checksums."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.files import sha256_of
from gpt2_jax.release.transfer import is_markup, length
from gpt2_jax.tokenizer import OPENAI_FILES

ENCODER, MERGES = OPENAI_FILES
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
FILES = ("checkpoint", ENCODER, "hparams.json", DATA, INDEX, "model.ckpt.meta", MERGES)
MIRRORS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
)
"""OpenAI's own server, and a copy by a book's community. The address of a file is `{mirror}/{size}/{file}`."""

_ALIASES = {"124M": ("117M", "gpt2"), "355M": ("345M", "gpt2-medium"), "774M": ("762M", "gpt2-large")}
_ALIASES["1558M"] = ("1542M", "gpt2-xl")
_CANONICAL = {name.lower(): size for size, others in _ALIASES.items() for name in (size, *others)}
_BYTES = {
    "124M": {"checkpoint": 77, "hparams.json": 90, INDEX: 5215, "model.ckpt.meta": 471155},
    "355M": {"checkpoint": 77, "hparams.json": 91, INDEX: 10399, "model.ckpt.meta": 926519},
}
_INDEX_END = bytes.fromhex("57fb808b247547db")  # the magic number at the end of a TensorFlow table


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is known of a file in advance: its size in bytes, and a check that returns what is wrong, or None."""

    size: int | None = None
    check: Callable[[Path], str | None] | None = None

    def wrong(self, path: Path) -> str | None:
        """Return what is wrong with the file at `path` in a few words, or None."""
        if not path.is_file():
            return "it is not there"
        if (here := length(path)) == 0 or here != (here if self.size is None else self.size):
            return f"it has {here} bytes" + ("" if self.size is None else f" instead of {self.size}")
        with path.open("rb") as file:
            if is_markup(file.read(4096)):
                return "it is a page (HTML or XML)"
        return self.check(path) if self.check else None


def has_sha256(digest: str) -> Callable[[Path], str | None]:
    """Return a check that a file has this SHA-256."""

    def check(path: Path) -> str | None:
        found = sha256_of(path)
        return None if found == digest else f"its sha256 is {found} instead of {digest}"

    return check


def is_hparams(config: GPT2Config) -> Callable[[Path], str | None]:
    """Return a check that a file is the hparams.json of this config."""

    def check(path: Path) -> str | None:
        try:
            found = GPT2Config.from_hparams(json.loads(path.read_text(encoding="utf-8-sig")))
        except (ValueError, RecursionError) as error:
            return f"it is not an hparams.json: {error}"
        return None if found == config else f"it describes another model: {found.to_hparams()}"

    return check


def is_pointer(path: Path) -> str | None:
    """Check that a `checkpoint` file points to the files in its folder."""
    match = re.search(rb'^model_checkpoint_path: "(?:.*[/\\])?model\.ckpt"', path.read_bytes(), re.MULTILINE)
    return None if match else 'it holds no line model_checkpoint_path: "model.ckpt"'


def is_index(path: Path) -> str | None:
    """Check that an index is complete: it ends as TensorFlow's tables do."""
    return None if path.read_bytes().endswith(_INDEX_END) else "it does not end as a TensorFlow index does"


def expectations(size: str) -> dict[str, Expected]:
    """Return what is known in advance of each file of a size. The data file holds only float32 numbers."""
    known = _BYTES.get(size, {})
    encoder_json = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    vocab_bpe = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    return {
        "checkpoint": Expected(known.get("checkpoint"), is_pointer),
        ENCODER: Expected(1042301, has_sha256(encoder_json)),
        "hparams.json": Expected(known.get("hparams.json"), is_hparams(SIZES[size])),
        DATA: Expected(4 * SIZES[size].n_params),
        INDEX: Expected(known.get(INDEX), is_index),
        "model.ckpt.meta": Expected(known.get("model.ckpt.meta")),
        MERGES: Expected(456318, has_sha256(vocab_bpe)),
    }


def size_of(name: str) -> str | None:
    """Return the standard name of a released size ("1558M" for "gpt2-xl" and "1542m"), or None."""
    return _CANONICAL.get(name.lower()) if isinstance(name, str) else None


def base_addresses(base_urls: Sequence[str] | None) -> tuple[str, ...]:
    """Return the checked addresses to try, without a final slash: `base_urls`, $GPT2_JAX_BASE_URL or MIRRORS."""
    if base_urls is None:
        base_urls = os.environ.get("GPT2_JAX_BASE_URL", "").split(",")
        base_urls = [base for base in base_urls if base.strip()] or MIRRORS
    bases = [base_urls] if isinstance(base_urls, str) else base_urls
    bases = tuple(str(base).strip().rstrip("/") for base in bases)
    if not bases:
        raise ValueError("no base address to fetch from: give one, like https://example.org/models")
    for base in bases:
        try:
            parts = urlsplit(base)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and "@" not in base
        except ValueError:
            usable = False
        if not usable or not base.isascii() or not base.isprintable() or any(c in base for c in " ?#"):
            raise ValueError(f"{base!r} is not a base address: it must look like https://example.org/models")
    return bases
