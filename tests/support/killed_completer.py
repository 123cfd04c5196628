"""Completes a file of prompts. test_jsonl.py kills it, also before each line of the modules that write."""

import hashlib
import os
from pathlib import Path

import filelock  # noqa: F401  once, before the forks
import forks

from gpt2_jax import files
from gpt2_jax.generation import jsonl, jsonl_shares, part_files
from gpt2_jax.processes import Share

SETTINGS = {"temperature": 0.5, "stop": ("\n", "caf\xe9"), "model": "124M", "top_k": 40}


def fake(log=os.devnull, rounds=1):
    """Completes prompts from only the prompt and its index, and takes some time. Each call adds a line to `log`."""

    def complete(lines, indices):
        with Path(log).open("a") as file:
            file.write(f"{indices[0]} {len(lines)}\n")
        answers = []
        for i, line in zip(indices, lines, strict=True):
            prompt = line["prompt"]
            digest = prompt.encode(errors="backslashreplace")
            for _ in range(rounds):
                digest = hashlib.sha256(digest + b"%d" % i).digest()
            answers.append({"samples": [f"{prompt} \U0001f98a\n{digest.hex()}", "\xe9" * (i % 3)]})
        return answers

    return complete


def work(say, source, target, log=os.devnull, batch_size=3, rounds=1, index=0, count=1):
    complete = fake(log, rounds)
    say()
    jsonl.complete_file(source, target, complete, SETTINGS, batch_size, share=Share(index, count))


if __name__ == "__main__":
    forks.serve(work, lines_of=(jsonl.__file__, jsonl_shares.__file__, part_files.__file__, files.__file__))
