"""A command of two processes in which one fails: both end soon, the one with its own error, the other with its end."""

import concurrent.futures
import sys
import time

import commands
import pytest
import tiny_runs
from process_groups import ENDED, SECONDS, SOON, Group
from strength import campaign

from gpt2_jax.commands import _processes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="waits for processes by pidfd")
SCRIPT = commands.ROOT / "tests" / "support" / "at_fault.py"
# fmt: off
TRAIN = [
    "--steps", "4", "--batch-size", "4", "--model.source=", "--model.tokenizer", "shakespeare", "--model.n-ctx",
    "13", "--model.n-embd", "48", "--model.n-head", "3", "--model.n-layer", "1", "--data.n-tokens", "11",
    "--data.val-fraction", "0", "--mesh.data", "-1", "--monitor.save-every", "2", "--monitor.sample-every", "3",
    "--monitor.sample-tokens", "3", "--monitor.no-tensorboard", "--run", "run", "--data.path", "text.txt",
]
# fmt: on


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(tiny_runs.TEXT)
    started = Group(tmp_path, SCRIPT)
    yield started
    started.close()


def ends(group):
    """Wait for both. The second must end soon after the first."""

    def end(index):
        return group.end(index, 2 * SECONDS), time.monotonic()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        (first, at), (other, at_other) = pool.map(end, range(2))
    assert abs(at - at_other) < SOON
    return first, other


def test_a_process_that_waits_for_the_result_of_a_failed_one(group):
    """Process 1 reads its own file, which is not there. Process 0 waits for it in Python."""
    for index, file in enumerate(("text.txt", "missing.txt")):
        group.add(*group.address(2, index), file, "--task=perplexity", COMMAND="evaluate")
    first, failed = ends(group)
    message = f"gpt2-evaluate: process 0: another process of this run ended: {_processes.AGAIN}\n"
    assert (first.code, first.out, first.err.splitlines(keepends=True)[-1]) == (75, "", message)
    assert (failed.code, failed.out, failed.err.count("\n")) == (2, "", 1)
    assert failed.err.startswith("gpt2-evaluate: process 1: ")
    assert "missing.txt" in failed.err


NO_SAVE, NO_SPACE = "the checkpoint of step 2 could not be saved", "[Errno 28] no space"
FAULTS = [
    ("disk", 1, (2, 2), (NO_SAVE, NO_SAVE)),
    ("step", 1, (75, 2), (ENDED, "[Errno 5] cannot write")),
    ("bug in samples", 0, (1, 75), (None, ENDED)),
]
MORE_FAULTS = [
    ("disk", 0, (2, 2), (NO_SAVE, NO_SAVE)),
    ("step", 0, (2, 75), ("[Errno 5] cannot write", ENDED)),
    ("samples", 0, (2, 2), (NO_SPACE, NO_SPACE)),
    ("picture", 0, (2, 2), (NO_SPACE, NO_SPACE)),
    ("bug", 0, (1, 75), (None, ENDED)),
]


@pytest.mark.parametrize(("fault", "at", "statuses", "sentences"), campaign(FAULTS, FAULTS + MORE_FAULTS))
def test_a_training_run_that_fails_in_one_process(group, fault, at, statuses, sentences):
    """A failed save in one process: Orbax in the other waits for it for minutes."""
    cache = {"JAX_ENABLE_COMPILATION_CACHE": str(fault != "disk").lower()}  # its files are large, too
    group.start(2, *TRAIN, COMMAND="train", FAULT=fault, AT=str(at), **cache)
    done = ends(group)
    assert tuple(run.code for run in done) == statuses, done
    for index, (run, sentence) in enumerate(zip(done, sentences, strict=True)):
        if sentence is None:
            assert run.err.endswith("RuntimeError: a bug\n")
        else:
            assert run.err.splitlines(keepends=True)[-1].startswith(f"gpt2-train: process {index}: {sentence}")
        assert run.out == ""
    assert done[1].err.count("\n") == 1 or statuses[1] == 1  # process 0 alone reports progress
