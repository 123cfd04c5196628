"""What a tied head means: one array at both ends of the model, with a gradient from both ends.

COMMAND: python examples/tied_head.py [--model 124M]     (10 s on two CPU cores)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import gpt2_jax
from gpt2_jax.commands import example


def main(model: str = "shakespeare", text: str = "To be, or not to be, that is the question.") -> None:
    """Print the gradient of the loss with respect to wte: from the embedding, from the head, and from both.

    Args:
      model: a size, a folder or a hub id.
      text: the text of the loss.
    """
    config, params = gpt2_jax.load(model)
    if not config.tie_word_embeddings:
        raise ValueError(f"{model} has an output head of its own: choose a model whose head is tied")
    ids = jnp.asarray([gpt2_jax.load_tokenizer(model).encode(text)])
    if ids.shape[1] < 2:
        raise ValueError("the text needs two tokens or more: the second one is the first that is predicted")
    gpt2 = gpt2_jax.GPT2(config)

    def loss(embedding: jax.Array, head: jax.Array) -> jax.Array:
        h, _ = gpt2.apply({"params": params | {"wte": embedding}}, ids[:, :-1], method="hidden")
        logits = gpt2.apply({"params": params | {"wte": head}}, h, method="unembed")
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    wte = params["wte"]
    ends = dict(zip(("embedding", "head"), jax.jit(jax.grad(loss, argnums=(0, 1)))(wte, wte), strict=True))
    tied = jax.jit(jax.grad(lambda wte: loss(wte, wte)))(wte)
    table = Table(
        "gradient from", "norm", "rows that are not 0", title=f"wte of {model}, {wte.shape}: one array, two uses"
    )
    for name, gradient in {**ends, "both, as in training": tied}.items():
        n_rows = int((gradient != 0).any(-1).sum())
        table.add_row(name, f"{jnp.linalg.norm(gradient):.4f}", f"{n_rows:,} of {len(wte):,}")
    Console().print(table, markup=False)
    apart = abs(tied - ends["embedding"] - ends["head"]).max() / abs(tied).max()
    share = wte.size / config.n_params
    print(f"the two gradients add up to it: {apart:.0e} of its largest value is left")
    print(f"a separate head would add {wte.size:,} parameters, {share:.0%} of the model's {config.n_params:,}")


if __name__ == "__main__":
    example.run(main)
