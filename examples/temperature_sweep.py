"""The temperature sweep of the build-an-LLM books: the next token's probabilities and draws at several temperatures.

COMMAND: python examples/temperature_sweep.py     (10 s on two CPU cores)
         python examples/temperature_sweep.py --model 124M --prompt "Every effort moves you"
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
    prompt: str = "LADY",
    temperatures: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 5.0),
    n_draws: int = 1000,
    k: int = 8,
    output: Path = Path("temperature_sweep.png"),
) -> None:
    """Print how often each of the k most likely tokens is drawn and its probability. Plot the probabilities."""
    if k < 1 or min(temperatures, default=0) <= 0:
        raise ValueError("k must be 1 or more, and all temperatures must be above 0")
    config, params = gpt2_jax.load(model)
    tokenizer = gpt2_jax.load_tokenizer(model)
    ids = tokenizer.encode(prompt)
    out, _ = research.forward(config, params, [ids])
    logits = np.asarray(out.logits[0, -1], np.float64)
    top = np.argsort(-logits)[:k]
    labels = research.pictures.token_labels(tokenizer, top)
    rows, table = [], Table("T", *labels, title=f"after {prompt!r}: share of {n_draws} draws, probability")
    for temperature in temperatures:
        weights = np.exp((logits - logits.max()) / temperature)
        rows.append((weights / weights.sum())[top])
        drawn = np.ravel(gpt2_jax.generate(config, params, [ids] * n_draws, 1, temperature))
        shares = [f"{np.mean(drawn == i):.0%}, {p:.0%}" for i, p in zip(top, rows[-1], strict=True)]
        table.add_row(str(temperature), *shares)
    Console().print(table, markup=False)
    names = {"row_name": "temperature", "column_name": "next token", "value_name": "probability"}
    figure = research.pictures.heat_map(rows, temperatures, labels, title=f"after {prompt!r}", **names)
    research.pictures.save(figure, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    example.run(main)
