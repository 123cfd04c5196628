"""A run that is killed many times, also during saves, ends with the same bits as a run that was never killed."""

import os
import random
from pathlib import Path

import forks
import killed_fit
import numpy as np
import pytest
from killed_fit import CONFIG, N_STEPS, RECIPE
from strength import campaign
from tiny_runs import records
from train_states import assert_same

import gpt2_jax
from gpt2_jax.params import flatten
from gpt2_jax.training import make_plan
from gpt2_jax.training.checkpoints import Checkpoints

N_KILLS = campaign(3, 12)


def last_state(run: Path):
    return Checkpoints(run).restore(make_plan(CONFIG, RECIPE).state)


def what_is_there(run: Path) -> set[str]:
    """The kinds of unfinished files that the last kill left: of a checkpoint or of the best model."""
    kinds = {"saving": ".saving", "best": ".best.", "deleted": ".deleted"}
    names = [path.name for folder in (run, run / "checkpoints") if folder.is_dir() for path in folder.iterdir()]
    return {kind for kind, part in kinds.items() if any(part in name for name in names)}


def assert_same_runs(run: Path, straight: Path) -> None:
    """State, metrics and best model are equal to the bit, each step is reported once, and no other files exist."""
    assert_same(last_state(run), last_state(straight))
    assert int(last_state(run).step) == N_STEPS
    assert records(run) == records(straight)
    best = [flatten(gpt2_jax.load(folder / "best")[1]) for folder in (run, straight)]
    for name, leaf in best[0].items():
        np.testing.assert_array_equal(leaf, best[1][name], name)
    # Unfinished files of killed processes have hidden names. They are removed a day later.
    shown = [{path.name for path in folder.iterdir() if not path.name.startswith(".")} for folder in (run, straight)]
    assert shown[0] == shown[1]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {".lock", str(N_STEPS - 3), str(N_STEPS)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a trainer for each round")
def test_killed_again_and_again_a_run_ends_as_if_it_never_was(tmp_path):
    killed_fit.write_text(tmp_path / "data")
    with forks.Forks("killed_fit", tmp_path / "data", tmp_path / "cache") as fork:

        def train(run: Path, **how) -> forks.Ended:
            ended = fork(run=str(run), folder=run, **how)
            assert ended.error == ""
            return ended

        straight, runs, rng = tmp_path / "straight", [tmp_path / "run0"], random.Random(11)
        whole = train(straight)
        losses = [[line for line in records(straight) if name in line] for name in ("loss", "val_loss")]
        assert [line["step"] for line in losses[0]] == list(range(1, N_STEPS + 1))
        assert [line["step"] for line in losses[1]] == list(range(0, N_STEPS + 1, 8))
        assert len({line["loss"] for line in losses[0]}) == N_STEPS
        seen, kept = set(), []
        while len(kept) < N_KILLS:
            # Most kills come during a save, because nearly all file operations belong to saves.
            some = rng.uniform(0, 0.3)
            by_time = len(kept) % 4 == 3
            how = {"delay": some * whole.seconds} if by_time else {"operation": int(some * whole.operations)}
            if train(runs[-1], **how).killed:
                seen |= what_is_there(runs[-1])
                kept.append(Checkpoints(runs[-1]).latest() or 0)
            else:  # the run has finished: kill a new one
                runs.append(tmp_path / f"run{len(runs)}")
        assert not train(runs[-1]).killed
    print(f"newest checkpoint after each kill: step {kept}; kinds of unfinished files: {sorted(seen)}")
    assert "saving" in seen  # some kills came during saves
    assert len(set(kept)) > campaign(1, 3)  # and at different steps
    for run in runs:
        assert_same_runs(run, straight)
