"""benchmarks/processes.py: its tables for a tiny model, in one process and in two."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import gpt2_jax

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "benchmarks" / "processes.py"
SMALL = ["--devices", "2", "--batch", "2", "--tokens", "7", "--new-tokens", "3", "--rounds", "2", "--steps", "1"]


def run(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(COMMAND), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_all_layouts_compute_the_same(tmp_path):
    config = gpt2_jax.GPT2Config(n_vocab=67, n_ctx=19, n_embd=8, n_head=2, n_layer=1)
    gpt2_jax.save(tmp_path / "tiny", config, gpt2_jax.init_params(config, jax.random.key(0)))
    done = run("--model", tmp_path / "tiny", *SMALL, "--output", tmp_path / "tables.md")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == (tmp_path / "tables.md").read_text()
    assert "Left out" not in done.stdout
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [row[0] for row in cells] == ["tiny, 1 x 2", "tiny, 2 x 1"] * 3
    one, two = cells[:2]
    losses = [[float(loss) for loss in row[-1].split()] for row in (one, two)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)  # printed with five decimals
    assert (one[2], float(two[2]) > 0) == ("", True)
    assert int(one[3]) == int(two[3]) > 0
    assert float(two[6]) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --model DIR or --random SIZE"),
        (["--model", "x", "--devices-per-process", "3"], "each of --devices-per-process must divide --devices"),
        (["--model", "x", "--batch", "6"], "--batch must be a multiple of --accumulate times --devices"),
        (["--model", "x", "--rounds", "0"], "all numbers must be 1 or more"),
    ],
)
def test_wrong_arguments_exit_with_2(words, message):
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
