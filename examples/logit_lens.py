"""Read every layer's residual stream like the last one: at which layer does the model know the next token?

COMMAND: python examples/logit_lens.py     (10 s on two CPU cores)
         python examples/logit_lens.py --model 124M --text "The Eiffel Tower is in the city of"
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.commands import example


def main(
    model: str = "shakespeare",
    text: str = "First Murderer:\nO\n\nSecond Murderer:",
    output: Path = Path("logit_lens.png"),
) -> None:
    """Draw the logit lens of a text, and print how well each layer predicts it.

    Args:
      model: a size, a folder or a hub id.
      text: the text to read.
      output: the picture, .png, .svg or .pdf.
    """
    config, params = gpt2_jax.load(model)
    tokenizer = gpt2_jax.load_tokenizer(model)
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError("the text needs two tokens or more: the second one is the first that is predicted")
    lens = research.logit_lens(config, params, [ids])
    table = Table("read from", "mean log-probability of the next token", "median rank", title=f"{model}: {text!r}")
    for name, logprobs_T, ranks_T in zip(lens.names, lens.next_logprobs[:, 0], lens.next_ranks[:, 0], strict=True):
        table.add_row(name, f"{np.nanmean(logprobs_T):.2f}", f"{np.median(ranks_T[:-1]):.0f}")
    Console().print(table, markup=False)
    research.pictures.save(research.pictures.lens_picture(lens, tokenizer, ids), output)
    print(f"wrote {output}")


if __name__ == "__main__":
    example.run(main)
