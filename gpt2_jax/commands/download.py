"""`gpt2-download`: download OpenAI's GPT-2, but only the files that are missing or wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.commands import _command

SIZES = "124M, 355M, 774M, 1558M"


@dataclasses.dataclass
class Args:
    """Download OpenAI's GPT-2, but only the files that are missing or wrong. Prints the directory of each size."""

    sizes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SIZE...", help_behavior_hint="")]
    """One or more of 124M, 355M, 774M and 1558M.
    Their other names work too: 117M, 345M, 762M, 1542M; gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    models_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the cache)")] = None
    """Put the files into DIR/SIZE, as the books do. By default they go to the cache, where gpt2_jax.load finds them.
    The cache is the folder $GPT2_JAX_CACHE, or else gpt2-jax in $XDG_CACHE_HOME or ~/.cache."""
    base_url: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="URL", help_behavior_hint="(repeatable; default: OpenAI's, then a mirror)"),
    ] = ()
    """Address to download from: the files are at URL/SIZE/FILE. Several addresses are tried in order.
    The environment variable GPT2_JAX_BASE_URL does the same, with commas between addresses."""
    jobs: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """Number of files to download at the same time, 1 or more."""
    verify: bool = True
    """Read every tensor afterwards, so that TensorFlow checks the checksums. Damaged files are downloaded again."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-download", Args, run, argv)


def run(args: Args) -> None:
    """Download each size, and print its directory when it is complete."""
    if not args.sizes:
        raise ValueError(f"name one size or more: {SIZES}")
    from gpt2_jax.checkpoints import released
    from gpt2_jax.release import download

    sizes = []
    for name in args.sizes:
        size = download.size_of(name)
        if size is None:
            raise ValueError(f"no released GPT-2 is called {name!r}: the sizes are {SIZES}")
        sizes.append(size)
    fetch = released.fetch_verified if args.verify else download.fetch
    for size in dict.fromkeys(sizes):
        directory = None if args.models_dir is None else args.models_dir / size
        print(fetch(size, directory, base_urls=args.base_url or None, jobs=args.jobs), flush=True)
