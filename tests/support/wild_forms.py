"""Every form of GPT-2 that is tried: the rows of docs/guides/forms.md. Run this file to print the table."""

# The order of these imports is the order of the table.
# ruff: noqa: I001, F401
import wild_weights
import wild_arithmetic
import wild_tensorflow
import wild_jax
import wild_torch
import wild_vocabularies
import wild_tokenizer_files
import wild_folders

from wild_table import FORMS, Form

TITLES = {"both": "Whole folders", "weights": "Weights", "vocabulary": "Vocabularies"}
HEAD = "| Form | Written by | Opens here | Opens in transformers 5 | Equal |\n|---|---|---|---|---|"


def table(kind: str) -> str:
    """The rows of one kind, in Markdown."""
    rows = [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row.cells)} |" for row in FORMS if row.kind == kind
    ]
    return "\n".join([HEAD, *rows])


if __name__ == "__main__":
    print("\n\n".join(f"## {title}\n\n{table(kind)}" for kind, title in TITLES.items()))
