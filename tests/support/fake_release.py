"""A release of seven small files, what the downloader knows of them, and how the tests fetch it."""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

import gpt2_jax
from gpt2_jax.release import download, known

CONFIG = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=11, n_embd=15, n_head=3, n_layer=2)
POINTER = b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
INDEX_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def made_up(data_bytes: int = 4 * CONFIG.n_params) -> dict[str, bytes]:
    """Seven files with odd sizes, without HTML and runs of zeros. The weights are not a real checkpoint."""
    rng = np.random.default_rng(7)
    return {
        "checkpoint": POINTER,
        "encoder.json": json.dumps({f"token{i}": i for i in range(311)}).encode(),
        "hparams.json": json.dumps(CONFIG.to_hparams()).encode(),
        known.DATA: rng.bytes(data_bytes),
        known.INDEX: rng.bytes(1499) + INDEX_END,
        "model.ckpt.meta": rng.bytes(2003),
        "vocab.bpe": b"#version: 0.2\n" + b"a b\n" * 509,
    }


def embedded() -> dict[str, bytes]:
    """The embedded model's files, with a checkpoint that TensorFlow can read."""
    return {name: (gpt2_jax.embedded_model() / name).read_bytes() for name in known.FILES}


def expectations(files: dict[str, bytes], sizes: bool = True) -> dict[str, download.Expected]:
    """What is known in advance: as for 124M, or as for the sizes whose small files have no known size."""

    def size(name: str) -> int | None:
        return len(files[name]) if sizes or name in ("encoder.json", "vocab.bpe", known.DATA) else None

    config = gpt2_jax.GPT2Config.from_hparams(json.loads(files["hparams.json"]))
    checks = {
        "checkpoint": known.is_pointer,
        "hparams.json": known.is_hparams(config),
        known.INDEX: known.is_index,
    }
    for name in ("encoder.json", "vocab.bpe"):
        checks[name] = known.has_sha256(hashlib.sha256(files[name]).hexdigest())
    return {name: download.Expected(size(name), checks.get(name)) for name in files}


def use(monkeypatch, files: dict[str, bytes]) -> None:
    """Make the downloader treat these files as the released ones, and fetch them from a server on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "expectations", lambda size: expectations(files))


def served(files: dict[str, bytes], size: str = "124M") -> dict[str, bytes]:
    return {path(name, size): body for name, body in files.items()}


def put(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (directory / name).write_bytes(body)


def right_names(directory: Path, files: dict[str, bytes]) -> set[str]:
    """The file names in the directory. Fail if a file of the release has wrong bytes."""
    there = set()
    for name, body in files.items():
        with contextlib.suppress(FileNotFoundError):
            assert (directory / name).read_bytes() == body, f"{name} is wrong under its final name"
            there.add(name)
    return there


def path(name: str, size: str = "124M") -> str:
    """The path of a file on a server."""
    return f"/{size}/{name}"


def fetch(directory, *servers, files=(known.DATA,), timeout=5.0, attempts=3, backoff=0.0, **options) -> Path:
    """`download.fetch` from these servers (or addresses), without waiting between attempts."""
    bases = [getattr(server, "url", server) for server in servers]
    options = {"progress": False, "timeout": timeout, "attempts": attempts, "backoff": backoff} | options
    return download.fetch("124M", directory, files, bases, **options)
