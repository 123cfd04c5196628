"""Make a small data set of instructions, which the embedded model can learn in three minutes.

    python examples/data/make_instructions.py instructions.json

Each record has an instruction, an input (often empty) and an output, as in Alpaca's data. The tasks are about lists of
words: name the first or the last one or a neighbour of another, find a word, turn the list around, write it in capital
letters. All words are frequent in the text that the embedded model was trained on. The file is the same each time.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

N_RECORDS, SEED = 3000, 0
WORDS = (
    *("king", "queen", "lord", "lady", "prince", "duke", "father", "mother", "brother", "daughter", "son", "wife"),
    *("husband", "child", "friend", "master", "heart", "hand", "eyes", "head", "face", "tongue", "blood", "death"),
    *("life", "soul", "love", "honour", "grace", "crown", "house", "home", "world", "heaven", "earth", "day"),
    *("night", "hour", "time", "word", "news", "power", "peace", "war", "joy", "hope", "fear", "law", "light"),
    *("name", "people"),
)


def record(draw: random.Random) -> dict[str, str]:
    """Return a record. The words of a list are different."""
    first, second, third, other = draw.sample(WORDS, 4)
    asked = draw.choice([first, second, third, other])
    tasks = [
        ("What is the first of {}?", f"It is {first}."),
        ("What is the last of {}?", f"It is {third}."),
        (f"What is before {second} in {{}}?", f"It is {first}."),
        (f"What is after {second} in {{}}?", f"It is {third}."),
        (f"Is the word {asked} in {{}}?", "No, it is not." if asked == other else "Yes, it is."),
        ("Turn around {}.", f"They are {third}, {second}, {first}."),
        ("Write {} in capital letters.", f"They are {first.upper()}, {second.upper()}, {third.upper()}."),
    ]
    task, answer = draw.choice(tasks)
    listed = f"{first}, {second}, {third}"
    if draw.random() < 0.5:
        return {"instruction": task.format(f"the words {listed}"), "input": "", "output": answer}
    return {"instruction": task.format("this list"), "input": f"The words are {listed}.", "output": answer}


def records(n: int = N_RECORDS, seed: int = SEED) -> list[dict[str, str]]:
    """Return n different records."""
    draw, found = random.Random(seed), {}
    while len(found) < n:
        one = record(draw)
        found[one["instruction"], one["input"]] = one
    return list(found.values())


def main() -> None:
    """Write the file that the command names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/data/make_instructions.py FILE")
    path = Path(sys.argv[1])
    path.write_text(json.dumps(records(), indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {N_RECORDS:,} records")


if __name__ == "__main__":
    main()
