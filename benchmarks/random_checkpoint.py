"""Write a checkpoint of a released size with random weights, in OpenAI's layout: the real shapes to measure on.

COMMAND: python benchmarks/random_checkpoint.py 124M /somewhere/124M     (0.5 GB, 20 s on two CPU cores)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

import gpt2_jax


@dataclasses.dataclass
class Args:
    """Write a checkpoint of a released size with random weights (no vocabulary)."""

    size: Annotated[Literal["124M", "355M", "774M", "1558M"], tyro.conf.Positional]
    """Which."""
    directory: Annotated[Path, tyro.conf.Positional]
    """Where: a directory that does not exist yet."""
    format: Literal["tensorflow", "huggingface", "orbax"] = "tensorflow"
    """In which form: OpenAI's own files, Hugging Face's, or Orbax."""
    seed: int = 0
    """Seed of the weights."""


def main(args: Args) -> None:
    """Write the checkpoint, with the original's initial values for weights."""
    config = gpt2_jax.SIZES[args.size]
    gpt2_jax.save(args.directory, config, gpt2_jax.init_params(config, jax.random.key(args.seed)), format=args.format)


if __name__ == "__main__":
    main(tyro.cli(Args))
