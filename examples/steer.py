"""Steer a sample: add the difference of two texts' activations to the residual stream during generation.

COMMAND: python examples/steer.py     (20 s on two CPU cores)
         python examples/steer.py --model 124M --layer 6 --prompt "I think that" --toward "Love" --away "Hate"

(Turner et al. 2023, "Activation Addition".)
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.commands import example


def main(
    model: str = "shakespeare",
    layer: int = 2,
    prompt: str = "JULIET:\n",
    toward: str = "love, sweet love, my love, dear love",
    away: str = "blood, war, death, the dead, murder",
    strengths: tuple[float, ...] = (0.0, 1.5, 3.0),
    max_new_tokens: int = 48,
    seed: int = 1,
) -> None:
    """Print samples with the same seed. The direction from `away` to `toward` is added at several strengths."""
    config, params = gpt2_jax.load(model)
    tokenizer = gpt2_jax.load_tokenizer(model)
    name = f"h{layer}/resid_pre"
    means = []
    for text in (toward, away):
        _, seen = research.forward(config, params, [tokenizer.encode(text)], capture=f"^{name}$")
        means.append(seen[name][0].mean(0))
    direction = means[0] - means[1]
    table = Table("strength", "sample", "its log-probability without steering", title=f"{name} + strength * direction")
    ids = tokenizer.encode(prompt)
    for strength in strengths:  # compiled once: the value is traced
        edit = research.add(name, strength * direction)
        new = gpt2_jax.generate(config, params, [ids], max_new_tokens, 0.7, seed=seed, edits=edit)[0]
        likely = gpt2_jax.score(config, params, [ids + new], first=[len(ids)])[0].logprobs.mean()
        sample = " / ".join(line.strip() for line in tokenizer.decode(new).splitlines() if line.strip())
        table.add_row(f"{strength:+.1f}", sample, f"{likely:.2f} nats a token")
        table.add_section()
    Console().print(table, markup=False)


if __name__ == "__main__":
    example.run(main)
