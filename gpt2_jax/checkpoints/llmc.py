"""llm.c's model files: a header of 256 int32 with the config, then the weights of all layers one after another.

The file has no checksums: a changed weight cannot be found. The linear layers are (out, in). The embedding is padded to
a multiple of 128 rows, which llm.c never reads; they are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2_jax.checkpoints.integrity import DamagedError, Leaves
from gpt2_jax.config import GPT2Config

MAGIC, N_HEADER = 20240326, 256
OTHER_MAGICS = (20240327, 20240328, 20240520, 20240522, 20240527, 20240801)  # states, tokenizers, tokens, questions
DTYPES = {3: "float32", 5: "bfloat16"}  # by the version in the header
LAYERS = (  # per layer, in the order of the file; each is there for all layers before the next one begins
    "ln_1/g", "ln_1/b", "attn/c_attn/w", "attn/c_attn/b", "attn/c_proj/w", "attn/c_proj/b", "ln_2/g", "ln_2/b",
    "mlp/c_fc/w", "mlp/c_fc/b", "mlp/c_proj/w", "mlp/c_proj/b",
)  # fmt: skip


def is_model(path: Path) -> bool:
    """Say whether a file begins like a model of llm.c."""
    return _begins_with(path, MAGIC)


def is_of_llmc(path: Path) -> bool:
    """Say whether a file begins like any file of llm.c: a model, a tokenizer, tokens or the state of a run."""
    return _begins_with(path, MAGIC, *OTHER_MAGICS)


def _begins_with(path: Path, *magics: int) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) in [magic.to_bytes(4, "little") for magic in magics]


def read(path: Path) -> tuple[GPT2Config, Leaves]:
    """Read a model file.

    Returns:
      config, leaves. Each leaf is read when it is requested.

    Raises:
      DamagedError: the header is malformed, or the file has another length than the header says.
      ValueError: the version is not supported.
    """
    config, n_rows = _read_header(path)
    n_bytes = 4 * N_HEADER + config.param_dtype.itemsize * sum(
        math.prod(shape) for _, shape in _tensors(config, n_rows)
    )
    if path.stat().st_size != n_bytes:
        raise DamagedError(f"{path} is damaged: it has {path.stat().st_size:,} bytes, but should have {n_bytes:,}")
    return config, _leaves(path, config, n_rows)


def read_config(path: Path) -> GPT2Config:
    """Read the config from the header of a model file.

    Raises:
      DamagedError, ValueError: as in `read`.
    """
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[GPT2Config, int]:
    """Return the config, and the number of rows of the padded embedding."""
    with path.open("rb") as file:
        content = file.read(4 * N_HEADER)
    if len(content) < 4 * N_HEADER:
        raise DamagedError(f"{path} is damaged: it ends inside its header")
    magic, version, n_ctx, n_vocab, n_layer, n_head, n_embd, n_rows = (
        int(n) for n in np.frombuffer(content, "<i4")[:8]
    )
    if magic != MAGIC:
        raise DamagedError(f"{path} does not begin like a model file of llm.c")
    if version not in DTYPES:
        raise ValueError(
            f"{path} has llm.c's version {version}; only versions 3 (float32) and 5 (bfloat16) can be read: write the "
            "file with llm.c's newest train_gpt2.py"
        )
    try:
        config = GPT2Config(n_vocab, n_ctx, n_embd, n_head, n_layer, param_dtype=DTYPES[version])
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if n_rows < n_vocab:
        raise DamagedError(f"{path} is damaged: it says that {n_vocab} ids are padded to {n_rows}")
    return config, n_rows


def _tensors(config: GPT2Config, n_rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the stored shape of each parameter, in the order of the file."""
    d = config.n_embd
    out = {"attn/c_attn": 3 * d, "mlp/c_fc": 4 * d}
    yield "wte", (n_rows, d)
    yield "wpe", (config.n_ctx, d)
    for name in LAYERS:
        module, _, leaf = name.rpartition("/")
        width = out.get(module, d)
        shape = (width, 4 * d if module == "mlp/c_proj" else d) if leaf == "w" else (width,)
        yield from ((f"h{i}/{name}", shape) for i in range(config.n_layer))
    yield "ln_f/g", (d,)
    yield "ln_f/b", (d,)


def _leaves(path: Path, config: GPT2Config, n_rows: int) -> Leaves:
    dtype = config.param_dtype
    with path.open("rb") as file:
        file.seek(4 * N_HEADER)
        for name, shape in _tensors(config, n_rows):
            n = math.prod(shape)
            array = np.frombuffer(file.read(n * dtype.itemsize), dtype)
            if array.size != n:
                raise DamagedError(f"{path} is damaged: it ends inside {name}")
            array = array.reshape(shape)[: config.n_vocab] if name == "wte" else array.reshape(shape)
            yield name, array.T if name.endswith("/w") else array
            del array  # before the next one is read
