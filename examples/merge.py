"""Fine-tune one model on two texts separately, and merge the results: does it know both? (Ilharco et al. 2022.)

COMMAND: python examples/merge.py     (half a minute on two CPU cores)
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gpt2_jax
from gpt2_jax.commands import example
from gpt2_jax.research import pictures, surgery

TEXTS = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday " * 4,
    "numbers": "one two three four five six seven eight nine ten eleven twelve " * 4,
}


def fine_tune(config: gpt2_jax.GPT2Config, params: dict, ids: list[int], n_steps: int) -> dict:
    """Return params trained on these ids."""
    optimizer, tokens = optax.adam(1e-4), jnp.asarray([ids])

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = gpt2_jax.GPT2(config).apply({"params": params}, tokens[:, :-1]).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(n_steps):
        params, state = step(params, state)
    return params


def main(model: str = "shakespeare", n_steps: int = 30, output: Path = Path("merge.png")) -> None:
    """Print and draw the loss of each mixture of the two fine-tuned models on both texts, in nats a token."""
    config, base = gpt2_jax.load(model)
    ids = [gpt2_jax.load_tokenizer(model).encode(text) for text in TEXTS.values()]
    tuned = [fine_tune(config, base, row, n_steps) for row in ids]
    both = surgery.apply_task_vector(tuned[0], surgery.task_vector(tuned[1], base))
    models = {"base": base, "days": tuned[0], "numbers": tuned[1], "base + both tasks": both}
    models |= {f"{t:.2f} of numbers": surgery.interpolate(*tuned, t) for t in (0.25, 0.5, 0.75)}
    losses = np.array([[-s.logprobs.mean() for s in gpt2_jax.score(config, p, ids)] for p in models.values()])
    for name, row in zip(models, losses, strict=True):
        print(f"{name:>18}: " + ", ".join(f"{text} {loss:.2f}" for text, loss in zip(TEXTS, row, strict=True)))
    pictures.save(pictures.heat_map(losses, list(models), list(TEXTS), title="nats a token", signed=False), output)
    print(f"wrote {output}")


if __name__ == "__main__":
    example.run(main)
