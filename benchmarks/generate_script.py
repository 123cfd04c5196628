"""Wall time of the whole command: scripts/generate.py against the equivalent transformers script; they take turns.

COMMAND: python benchmarks/generate_script.py --random 124M --vocabulary DIR     (needs the `parity` extra)

DIR contains GPT-2's encoder.json and vocab.bpe. A --model with its own vocabulary does not need it. Both commands get
the same weights and prompt, and add 40 tokens by greedy decoding. Each run is a new process: imports, loading and
compilation count. The first run fills the caches on disk and is reported separately.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro

SCRIPT = Path(__file__).parents[1] / "scripts" / "generate.py"
THEIRS = """\
import sys
import torch
import transformers

directory, prompt, n_new = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
model = transformers.AutoModelForCausalLM.from_pretrained(directory)
inputs = tokenizer(prompt, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=n_new, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(ids[0]))
"""


@dataclasses.dataclass
class Args:
    """Time scripts/generate.py against the equivalent transformers script, each as a whole process."""

    model: Path | None = None
    """A checkpoint in any form."""
    random: Literal["124M", "355M", "774M", "1558M"] | None = None
    """Or random weights of this size."""
    vocabulary: Path | None = None
    """Directory of encoder.json and vocab.bpe (default: the model's own)."""
    form: Literal["tensorflow", "huggingface", "orbax"] = "tensorflow"
    """Checkpoint format for our command. `--model 124M` fetches OpenAI's. Theirs reads Hugging Face's."""
    prompt: str = "The first thing that anyone noticed about the town was"
    """The text to continue."""
    max_new_tokens: int = 40
    """Tokens to add."""
    rounds: int = 5
    """Turns each command takes."""


def write_models(args: Args, ours: Path, theirs: Path) -> None:
    """Write weights and vocabulary in the format that each command reads (called in a separate process)."""
    import jax

    import gpt2_jax

    if args.random:
        config = gpt2_jax.SIZES[args.random]
        params = gpt2_jax.init_params(config, jax.random.key(0))
    else:
        config, params = gpt2_jax.load(args.model, dtype="float32")
    tokenizer = gpt2_jax.load_tokenizer(args.vocabulary or args.model)
    gpt2_jax.save(theirs, config, params, format="huggingface", tokenizer=tokenizer)
    gpt2_jax.save(ours, config, params, format=args.form, tokenizer=tokenizer)


def run(command: list[str], scratch: Path) -> tuple[float, str]:
    """Run a command outside the repository; return its time in seconds and its standard output."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=scratch, capture_output=True, encoding="utf-8", check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{' '.join(command[:2])} failed:\n{done.stderr}")
    return seconds, done.stdout.strip()


def measure(args: Args, scratch: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds of each command, first run first, and its output."""
    ours, theirs = scratch / "ours", scratch / "theirs"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(write_models, args, ours, theirs).result()
    (scratch / "theirs.py").write_text(THEIRS, encoding="utf-8")
    knobs = ["--prompt", args.prompt, "--max-new-tokens", str(args.max_new_tokens), "--temperature", "0"]
    commands = {
        "scripts/generate.py": [sys.executable, str(SCRIPT), "--model", str(ours), *knobs],
        "transformers": [sys.executable, "theirs.py", str(theirs), args.prompt, str(args.max_new_tokens)],
    }
    seconds, output = {name: [] for name in commands}, {}
    for _ in range(1 + args.rounds):
        for name, command in commands.items():
            took, output[name] = run(command, scratch)
            seconds[name].append(took)
    return seconds, output


def main(args: Args) -> None:
    """Measure and print a Markdown table."""
    if (args.model is None) == (args.random is None):
        sys.exit("give either --model DIR or --random SIZE")
    if args.random and not args.vocabulary:
        sys.exit("random weights have no vocabulary: give --vocabulary DIR with encoder.json and vocab.bpe")
    if args.rounds < 1:
        sys.exit(f"--rounds must be 1 or more, not {args.rounds}")
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        # Caches of weights and compiled programs start empty, and are deleted at the end.
        os.environ |= {"GPT2_JAX_CACHE": f"{scratch}/cache", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        seconds, output = measure(args, Path(scratch))
    pairs = zip(*(times[1:] for times in seconds.values()), strict=True)
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "transformers"))
    print(f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {packages}")
    print(f"load average at the start: {busy:.1f}")
    model = args.random or args.model.name
    print(f"{model}, greedy, {args.max_new_tokens} new tokens; a first run and {args.rounds} later ones")
    print(f"transformers' time divided by ours, median over the later runs: {ratio:.2f}\n")
    print("| command | first run s | later runs s | fastest-slowest |")
    print("|---|---|---|---|")
    for name, (first, *later) in seconds.items():
        print(f"| {name} | {first:.2f} | {statistics.median(later):.2f} | {min(later):.2f}-{max(later):.2f} |")
    print(f"\nThe texts are {'equal' if len(set(output.values())) == 1 else 'not equal'}.")


if __name__ == "__main__":
    main(tyro.cli(Args))
