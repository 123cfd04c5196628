"""Continue a prompt with GPT-2. `python scripts/generate.py --help` shows the options."""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config

# gpt2_jax, and jax with it, is imported once the arguments are known to be good: `--help` and a typo answer at once.


@dataclasses.dataclass
class Args:
    """Continue a prompt with GPT-2: prompt and continuation go to standard output, all else to standard error."""

    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: embedded)")] = None
    """A size, 124M, 355M, 774M or 1558M (fetched if it is not there yet); an id of the Hugging Face hub; or a directory
    with a TensorFlow checkpoint in OpenAI's layout, with Hugging Face's files, or saved by gpt2_jax."""
    prompt: str = ""
    """The text to continue (--prompt=-x for one that begins with a dash). The empty prompt means <|endoftext|>: the
    model begins a text of its own."""
    max_new_tokens: int = 128
    """Tokens to add, 0 or more; the prompt and they must fit in the model's n_ctx tokens together."""
    temperature: float = 1.0
    """Divides the logits, 0 or more: below 1 is safer text, above 1 wilder; 0 takes the most likely token (greedy)."""
    top_k: int = 40
    """Draw from the k most likely tokens alone; 0 means all."""
    top_p: float = 1.0
    """Of those, draw from the most likely whose probabilities add up to at most p, above 0 to 1; 1 means all."""
    seed: int = 0
    """Seed of the draws, 0 to 4294967295: the same seed and settings give the same text."""
    num_samples: int = 1
    """Continuations of the prompt to write, 1 or more, each different."""


def _announce(model: str | None, config: GPT2Config) -> None:
    """Say in one line which model runs, and for the embedded one how to get the real ones."""
    size = f"{config.n_params:,} parameters"
    if model is not None:
        print(f"model: {model}, {size}", file=sys.stderr)
    else:
        print(
            f"model: the embedded Shakespeare model, {size}; for OpenAI's GPT-2 pass --model 124M, which fetches "
            "0.5 GB the first time",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one line on standard error and exit status 2."""
    args = tyro.cli(Args, prog="gpt2-generate", description=Args.__doc__, args=argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"gpt2-generate: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: Args) -> None:
    """Load the model, generate, print.

    Raises:
      ValueError, OSError: bad input; nothing has been written to standard output.

    """
    if args.num_samples < 1:
        raise ValueError(f"--num-samples must be 1 or more, not {args.num_samples}")
    import gpt2_jax
    from gpt2_jax.generate import check_arguments

    model = gpt2_jax.embedded_model() if args.model is None else args.model
    tokenizer = gpt2_jax.load_tokenizer(model)
    prompts = [tokenizer.encode(args.prompt) or [tokenizer.eot]] * args.num_samples
    settings = (args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    check_arguments(gpt2_jax.load_config(model), prompts, *settings)  # before the weights: those can take long
    config, params = gpt2_jax.load(model)
    _announce(args.model, config)
    start = time.perf_counter()
    rows = gpt2_jax.generate(config, params, prompts, *settings)
    seconds = time.perf_counter() - start

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?" instead of failing
    for i, row in enumerate(rows, start=1):
        if args.num_samples > 1:
            print(f"--- sample {i} of {args.num_samples}", file=sys.stderr, flush=True)
        print(args.prompt + tokenizer.decode(row), flush=True)
    n_new = args.num_samples * args.max_new_tokens
    print(f"{n_new} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


if __name__ == "__main__":
    main()
