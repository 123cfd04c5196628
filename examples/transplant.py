"""Transpose one matrix of every block, as a loader with the wrong orientation would: which mistakes are detected?

COMMAND: python examples/transplant.py [--model 124M]     (10 s on two CPU cores)

Three of a block's four matrices are not square: there the shapes are refused. attn/c_proj is square: nothing fails, and
the model's text makes no sense.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

import gpt2_jax
from gpt2_jax.commands import example
from gpt2_jax.params import flatten, unflatten
from gpt2_jax.research import surgery

MATRICES = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"


def main(model: str = "shakespeare", text: str = TEXT, max_new_tokens: int = 24) -> None:
    """Print what each transposed matrix does to a model.

    Args:
      model: a size, a folder or a hub id.
      text: the text whose perplexity is measured, and which the model continues.
      max_new_tokens: how many tokens the model adds.
    """
    config, params = gpt2_jax.load(model)
    tokenizer = gpt2_jax.load_tokenizer(model)
    ids = tokenizer.encode(text)
    table = Table("transposed", "shape", "perplexity", "continuation", title=f"{model}: one matrix of every block")
    for name in ("nothing", *MATRICES):
        edited, shape = params, ""
        if name in MATRICES:
            shape = str(params["h0"][name.split("/")[0]][name.split("/")[1]]["w"].shape)
            transposed = {key: w.T for key, w in surgery.select(params, rf"{name}/w$").items()}
            edited = unflatten(flatten(params) | transposed)
        try:
            perplexity = f"{gpt2_jax.score(config, edited, [ids])[0].perplexity:.1f}"
            said = repr(tokenizer.decode(gpt2_jax.generate(config, edited, [ids], max_new_tokens, temperature=0)[0]))
        except ValueError as error:  # shapes are checked before anything is computed
            if name == "nothing":  # another argument is wrong
                raise
            perplexity, said = "refused", str(error).splitlines()[1].strip()
        table.add_row(name, shape, perplexity, said)
    Console().print(table, markup=False)


if __name__ == "__main__":
    example.run(main)
