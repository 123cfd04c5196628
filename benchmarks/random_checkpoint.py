"""Write a checkpoint of a released size with random weights, in OpenAI's layout, to measure on the real shapes.

COMMAND: python benchmarks/random_checkpoint.py 124M DIR     (0.5 GB, 20 s on two CPU cores)
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
    """Size of the model."""
    directory: Annotated[Path, tyro.conf.Positional]
    """Directory to write; it must not exist yet."""
    format: Literal["tensorflow", "huggingface", "orbax"] = "tensorflow"
    """Format: OpenAI's own files, Hugging Face's, or Orbax."""
    seed: int = 0
    """Seed of the weights."""


def main(args: Args) -> None:
    """Write the checkpoint with GPT-2's random initial weights."""
    config = gpt2_jax.SIZES[args.size]
    gpt2_jax.save(args.directory, config, gpt2_jax.init_params(config, jax.random.key(args.seed)), format=args.format)


if __name__ == "__main__":
    main(tyro.cli(Args))
