"""scripts/finetune.py: from a text to a run that generates text; stop and resume; one clear message per mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import commands
import pytest
from strength import full_only

import gpt2_jax
from gpt2_jax.commands import generate, train
from gpt2_jax.training import loop
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.report import Report

TEXT = "".join(f"Then came the {i % 7}th of the {'lords' if i % 3 else 'ladies'}, and spoke.\n" for i in range(61))
# A model that compiles quickly, with the embedded vocabulary.
TINY = ["--model.source", "", "--model.tokenizer", "shakespeare", "--model.n-layer", 1, "--model.n-embd", 8]
TINY += ["--model.n-head", 1, "--model.n-ctx", 31, "--batch-size", 2]
QUIET = ["--monitor.sample-every", 0, "--monitor.no-tensorboard"]


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Call the entry point in this process, in the folder of text.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    with commands.config_of_jax_kept():
        yield commands.caller(train.finetune, capfd)


def last_step(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def assert_refused(done, message):
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    plain = re.sub(r"\x1b\[[0-9;]*m|[│\n ]+", " ", done.err)
    assert re.search(message, plain), plain


def test_from_a_text_to_a_model_that_speaks(run, tmp_path, capfd):
    """The embedded model, in windows of 31 tokens. `generate.py --model RUN` takes the result."""
    (tmp_path / "verdict.toml").write_text(
        "steps = 9\nbatch_size = 1\n[data]\nn_tokens = 7\n[monitor]\nevaluate_every = 2\n"
    )
    options = ["--config", "verdict.toml", "--data.path", "text.txt", "--data.n-tokens", 31, "--steps", 2]
    options += ["--monitor.sample-tokens", 3, "--optimizer.learning-rate", 1e-3]
    done = run(*options)
    assert (done.code, done.out) == (0, "runs/verdict\n"), done.err
    assert "3,553,024 parameters; " in done.err
    folder = tmp_path / "runs" / "verdict"
    told = json.loads((folder / "run.json").read_text())["recipe"]
    assert (told["steps"], told["batch_size"], told["data"]["n_tokens"]) == (2, 1, 31)
    assert told["optimizer"]["learning_rate"] == 1e-3
    assert "to generate text: gpt2-generate --model runs/verdict\n" in done.err
    again = run(*options)
    assert (again.code, again.out) == (0, "runs/verdict\n"), again.err
    assert "all 2 steps are done" in again.err
    spoken = commands.caller(generate.main, capfd)("--model", folder, "--prompt", "Then", "--max-new-tokens", 5)
    assert spoken.code == 0, spoken.err
    assert spoken.out.startswith("Then")
    assert len(spoken.out) > len("Then\n")


def test_a_signal_is_the_status_and_the_same_command_goes_on(run, tmp_path, monkeypatch):
    """SIGTERM after step 2 and SIGINT after step 4, each sent to this process."""
    options = ["--data.path", "text.txt", "--run", "a b", "--steps", 7, *TINY, *QUIET]
    signals, report_step, steps = {2: signal.SIGTERM, 4: signal.SIGINT}, Report.step, []

    def step(report, number, *rest):
        report_step(report, number, *rest)
        steps.append(number)
        if number in signals:
            os.kill(os.getpid(), signals[number])

    monkeypatch.setattr(Report, "step", step)
    for status, n_resumed in ((143, 0), (130, 1), (0, 1)):
        done = run(*options)
        assert (done.code, done.out) == (status, "a b\n"), done.err
        assert done.err.count("resuming after step ") == n_resumed
    assert steps == list(range(1, 8))


@full_only("the test above does it in one process")
def test_a_signal_saves_and_the_same_command_goes_on(run, tmp_path):
    """SIGTERM and Ctrl-C go to the process itself. The statuses are 143 and 130, as in a shell."""
    options = ["--data.path", "text.txt", "--run", "a b", "--steps", 10**9, *TINY, *QUIET]  # it does not end by itself
    options += ["--monitor.evaluate-every", 0, "--monitor.save-every", 0]
    done = [0]
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = [sys.executable, commands.SCRIPTS / "finetune.py", *map(str, options)]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            err = ""
            while not re.search(rf"step {done[-1] + 2:,}/", err):
                line = process.stderr.readline()
                assert line, err
                err += line
            process.send_signal(number)
            out, rest = process.communicate(timeout=120)
        assert (process.returncode, out) == (status, "a b\n"), err + rest
        assert "Traceback" not in err + rest
        assert "--model 'a b'" in rest
        found = re.search(rf"stopped after step ([\d,]+) \(checkpoint saved\): received {number.name}", rest)
        done.append(int(found[1].replace(",", "")))
        assert (f"resuming after step {done[-2]:,}" in err) == (done[-2] > 0)
        kept = {path.name for path in (tmp_path / "a b" / "checkpoints").glob("[0-9]*")}
        assert kept == {str(step) for step in done[-2:] if step}
        assert last_step(tmp_path / "a b") == done[-1]
    assert 0 < done[1] < done[2]
    options[options.index("--steps") + 1] = done[2] + 2
    ended = run(*options)
    assert ended.code == 0, ended.err
    assert f"resuming after step {done[2]:,}" in ended.err
    assert last_step(tmp_path / "a b") == done[2] + 2
    assert gpt2_jax.load(tmp_path / "a b")[0].n_embd == 8


def test_another_text_is_never_taken_for_the_one_that_was_begun_with(run, tmp_path, monkeypatch):
    options = ["--steps", 1, *TINY, *QUIET]
    run("--data.path", "text.txt", "--run", "begun", *options)
    (tmp_path / "other.txt").write_text(TEXT.replace("spoke", "wept"))
    assert_refused(
        run("--data.path", "other.txt", "--run", "begun", *options),
        "begun has a run on a different text from other.txt",
    )
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    assert run("--data.path", "moved.txt", "--run", "begun", *options).code == 0
    assert run("--data.path", "begun/data", "--run", "begun", *options).code == 0
    # A run that was killed before its first step: its tokens are made again.
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "begun" / "data", tmp_path / "killed" / "data")
    monkeypatch.setattr(loop, "check_memory", lambda plan: 1 / 0)  # after the text was read
    for changes in (["--data.path", "other.txt"], ["--data.path", "other.txt", "--data.val-fraction", 0.3]):
        before = (tmp_path / "killed" / "data" / "train.bin").read_bytes()
        with pytest.raises(ZeroDivisionError):
            run(*changes, "--run", "killed", *options)
        assert (tmp_path / "killed" / "data" / "train.bin").read_bytes() != before
    assert not (tmp_path / "killed" / "run.json").exists()


def test_a_start_that_failed_is_corrected_with_another_text(run, tmp_path, monkeypatch):
    """The step did not compile. The tokens of the first text are replaced, unless another process has the run open."""
    (tmp_path / "other.txt").write_text(TEXT.replace("spoke", "wept"))
    options = ["--run", "begun", "--steps", 2, *TINY, *QUIET]

    def refuse(plan):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "lower_train_step", refuse)
        assert_refused(run("--data.path", "text.txt", *options), "no room")
    corrected = ["--data.path", "other.txt", "--seed", 7, *options, "--batch-size", 1]
    before = (tmp_path / "begun" / "data" / "train.bin").read_bytes()
    with Checkpoints(tmp_path / "begun"):
        assert_refused(run(*corrected), "is open in another process")
    assert (tmp_path / "begun" / "data" / "train.bin").read_bytes() == before
    done = run(*corrected)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "begun" / "run.json").read_text())
    assert (told["recipe"]["seed"], told["recipe"]["batch_size"]) == (7, 1)
    assert (tmp_path / "begun" / "data" / "train.bin").read_bytes() != before


def test_back_to_an_earlier_step(run, tmp_path):
    options = ["--data.path", "text.txt", "--run", "begun", "--steps", 3, *TINY, *QUIET, "--monitor.save-every", 1]
    assert run(*options).code == 0
    done = run(*options, "--from-step", 2)
    assert done.code == 0, done.err
    assert "going back to step 2: the later checkpoints, metrics and samples are kept in " in done.err
    assert "resuming after step 2" in done.err
    assert_refused(run(*options, "--from-step", 1), "no checkpoint of step 1; available: steps 2, 3")
    assert_refused(run(*options, "--steps", 1), "begun has done 3 steps, more than steps = 1")


REFUSED = {
    "no text named": ([], "data.path must name text"),
    "no such text": (["--data.path", "no.txt"], "no such file or folder: no.txt"),
    "a text of another kind": (["--data.path", "text.pdf"], "text.pdf is not a file of type .txt, .md, .jsonl"),
    "no recipe": (["--config", "no.toml"], "no.toml"),
    "--config of nothing": (["--config"], "gpt2-finetune: error: argument --config"),
    "a field that is none": (["--config", "field.toml"], "field.toml: optimizer.learning_rat is not a recipe field"),
    "a value of another type": (["--config", "type.toml"], "type.toml: steps must be a whole number, not 'many'"),
    "not TOML": (["--config", "broken.toml"], "broken.toml: .*line 1"),
    "a value out of range": (["--optimizer.learning-rate", -1], "learning_rate must be a number, 0 or more, not -1"),
    "an option that is none": (["--learning-rate", 1], "--learning-rate"),
    "a word for a number": (["--steps", "many"], "many"),
    "no such model": (["--data.path", "text.txt", "--model.source", "no/such/model"], "no such model: 'no/such/model'"),
    "no vocabulary": (["--data.path", "text.txt", "--model.source", ""], "model.tokenizer must name a vocabulary"),
    "windows too long": (["--data.path", "text.txt", "--data.n-tokens", 257], "must not be more than .* n_ctx, 256"),
    "too little memory": (
        ["--data.path", "text.txt", "--batch-size", 1000000],
        "about .* GB on each device, which has .* parameters .* activations .* use less: a larger accumulate",
    ),
    "a folder of other things": (
        ["--data.path", "text.txt", "--run", "other"],
        "other contains files that are not part of a run",
    ),
    "a file": (["--data.path", "text.txt", "--run", "text.txt"], "text.txt is a file"),
}
EARLY = {  # refused before the model is looked for, which does not exist
    "no text named": ([], "data.path must name text"),
    "no such text": (["--data.path", "no.txt"], "no such file or folder: no.txt"),
    "a folder of other things": (["--data.path", "text.txt", "--run", "other"], "files that are not part of a run"),
    "a folder in a file": (
        ["--data.path", "text.txt", "--run", "text.txt/run"],
        "text.txt/run cannot be written: .* is a",
    ),
    "a folder of others": (
        ["--data.path", "text.txt", "--run", "closed/run"],
        "closed/run cannot be written: there is no",
    ),
    "patience without evaluations": (
        ["--data.path", "text.txt", "--monitor.patience", 2, "--monitor.evaluate-every", 0],
        "monitor.patience needs validation losses",
    ),
    "patience without validation text": (
        ["--data.path", "text.txt", "--monitor.patience", 2, "--data.val-fraction", 0],
        "monitor.patience needs validation losses",
    ),
    "open in another process": (["--data.path", "text.txt", "--run", "open"], "is open in another process"),
}


@pytest.mark.parametrize("mistake", EARLY)
def test_what_must_fail_fails_before_weights_are_read(run, tmp_path, mistake, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("three weeks of work")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: access(path, *how) and "closed" not in str(path))
    (tmp_path / "closed").mkdir()
    options, message = EARLY[mistake]
    with Checkpoints(tmp_path / "open"):
        assert_refused(run(*options, "--model.source", "no/such/model"), message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_one_clear_message(run, tmp_path, mistake):
    (tmp_path / "field.toml").write_text("[optimizer]\nlearning_rat = 1e-3\n")
    (tmp_path / "type.toml").write_text('steps = "many"\n')
    (tmp_path / "broken.toml").write_text("steps =\n")
    (tmp_path / "text.pdf").write_text("%PDF")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("three weeks of work")
    before = sorted(tmp_path.rglob("*"))
    options, message = REFUSED[mistake]
    assert_refused(run(*options), message)
    assert sorted(tmp_path.rglob("*")) == before  # and nothing was written


def test_another_recipe_for_a_run_is_refused(run):
    options = ["--data.path", "text.txt", "--run", "begun", "--steps", 1, *TINY, *QUIET]
    assert run(*options).code == 0
    assert_refused(run(*options, "--seed", 3), "other settings: recipe.seed was 0 and is 3")


def test_help_says_units_and_defaults(run):
    done = run("--help")
    assert done.code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m|[│\n ]+", " ", done.out)
    for text in (
        "--config FILE", "--run FOLDER", "(default: runs/NAME of the recipe)",
        "optimizer steps of the whole run, which the learning rate schedule spans.",
        "peak learning rate, 0 or more. (default: 0.0001)",
        "tokens per window, which is one training sequence; 0 means the model's n_ctx.",
        "fraction of the tokens that is kept for validation; 0 or more, less than 1. (default: 0.1)",
    ):  # fmt: skip
        assert text in plain, plain


def test_messages_say_the_name_that_was_called(capfd, tmp_path):
    for main, name in ((train.main, "gpt2-train"), (train.finetune, "gpt2-finetune")):
        call = commands.caller(main, capfd)
        assert call("--config", tmp_path / "no.toml").err.startswith(f"{name}: ")
        assert call("--config").err.startswith(f"usage: {name} ")
        assert f"{name} --help" in call("--steps", "many").err
