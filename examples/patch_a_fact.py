"""Where does the model store a fact that it needs later? Patch a run with another run's activations, one at a time.

COMMAND: python examples/patch_a_fact.py     (15 s on two CPU cores)
         python examples/patch_a_fact.py --model 124M --clean "The Eiffel Tower is in the city of" --corrupted \\
             "The Colosseum is in the city of" --answer " Paris" --wrong " Rome"

Both texts have the same number of tokens, and each answer is one token. By default, after "First Senator", the next
speaker is "Second Senator". The corrupted run has "First Murderer" instead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.commands import example


def main(
    model: str = "shakespeare",
    clean: str = "First Senator:\nO\n\nSecond",
    corrupted: str = "First Murderer:\nO\n\nSecond",
    answer: str = " S",
    wrong: str = " M",
    output: Path = Path("patch_a_fact.png"),
) -> None:
    """Draw how much of the clean run's answer each patch restores: 0 is nothing, 1 is all of it."""
    config, params = gpt2_jax.load(model)
    tokenizer = gpt2_jax.load_tokenizer(model)
    clean_ids, corrupted_ids, answer_ids, wrong_ids = map(tokenizer.encode, (clean, corrupted, answer, wrong))
    n_clean, n_corrupted, n_answer, n_wrong = map(len, (clean_ids, corrupted_ids, answer_ids, wrong_ids))
    if n_clean != n_corrupted or clean_ids == corrupted_ids:
        raise ValueError(f"the texts must differ and have equally many tokens, not {n_clean} and {n_corrupted}")
    if (n_answer, n_wrong) != (1, 1) or answer_ids == wrong_ids:
        raise ValueError(f"the answers must be two different tokens, not texts of {n_answer} and {n_wrong} tokens")
    metric = research.logit_difference(answer_ids[0], wrong_ids[0])
    grid = research.activation_patching(config, params, [corrupted_ids], [clean_ids], metric)
    ends = [metric(research.forward(config, params, [ids])[0].logits[:, -1]) for ids in (corrupted_ids, clean_ids)]
    grid = (np.asarray(grid) - ends[0]) / (ends[1] - ends[0])

    labels = [research.pictures.token_labels(tokenizer, ids) for ids in (corrupted_ids, clean_ids)]
    columns = [f"{a} ← {b}" if a != b else a for a, b in zip(*labels, strict=True)]
    best = grid.argmax(-1)
    for layer, position in enumerate(best):
        print(f"h{layer}/resid_pre: most is restored at {columns[position]!r}, {grid[layer, position]:.2f}")
    title = f"logit of {answer!r} minus logit of {wrong!r}: share that a patch restores"
    names = {"title": title, "row_name": "layer", "column_name": "corrupted ← clean token", "value_name": "share"}
    rows = [f"h{i}" for i in range(config.n_layer)]
    research.pictures.save(research.pictures.heat_map(grid, rows, columns, **names), output)
    print(f"wrote {output}")


if __name__ == "__main__":
    example.run(main)
