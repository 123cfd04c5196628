"""scripts/inspect_checkpoint.py: only the report on stdout, complete at any width; one message and exit status 2."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import jax.numpy as jnp
import pytest
import rich.console
import tiny_models

import gpt2_jax
from gpt2_jax import inspection
from gpt2_jax.commands import inspect as command
from gpt2_jax.commands._inspect_report import print_report

SCRIPT = commands.SCRIPTS / "inspect_checkpoint.py"
CONFIG = tiny_models.CONFIG
ESCAPE = "\x1b"


@pytest.fixture
def run(capfd):
    """Call the entry point in this process. Its output, also that of C++ code, is captured at the file descriptors."""

    return commands.caller(command.main, capfd)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Return the folder of a very small model without a vocabulary. Its name contains markup of rich."""
    directory = tmp_path_factory.mktemp("models") / "[b]tiny :key:"
    gpt2_jax.save(directory, CONFIG, tiny_models.random_params(CONFIG, 29), "huggingface")
    return directory


@pytest.fixture(scope="module")
def embedded(model_dir):
    """Return the library's report on the embedded model."""
    return inspection.inspect(model_dir)


def strict(text: str) -> dict:
    return json.loads(text, parse_constant=pytest.fail)


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def printed(found, width: int) -> str:
    """Return the output of print_report on a terminal of this width, without colors."""
    out = io.StringIO()
    console = rich.console.Console(file=out, width=width, force_terminal=True, markup=False, highlight=False)
    print_report(found, console)
    assert ESCAPE in out.getvalue()
    return re.sub(rf"{ESCAPE}\[[0-9;]*m", "", out.getvalue())


def assert_report(lines: list[list[str]], found: dict, digits: int) -> None:
    """Every tensor and every count of a report is in its table."""
    table = [line for line in lines if len(line) > 1 and line[1].startswith("(") and line[-1][-1].isdigit()]
    for tensor, line in zip(found["tensors"], table, strict=True):
        assert line[0] == tensor["name"]
        statistics = [f"{tensor[name]:.{digits}g}" for name in ("mean", "std", "min", "max")]
        assert line[-5:] == [f"{tensor['count']:,}", *statistics]
        assert " ".join(line[1:]).startswith("(" + ", ".join(map(str, tensor["shape"])) + ")")
    for name, value in found["hyperparameters"].items():
        assert any(line[:2] == [name, f"{value:,}"] for line in lines)
    for part in found["parameters"]["parts"]:
        (line,) = [line for line in lines if line[:2] == [part["part"], f"{part['counted']:,}"]]
        assert line[3] == f"{part['closed_form']:,}"
    assert ["all", f"{found['parameters']['counted']:,}", f"{found['parameters']['closed_form']:,}"] in lines
    for use in found["memory"].values():
        assert any(line[1::3] == [f"{sizes['total']:,}" for sizes in use.values()] for line in lines)
    for file in found["files"]:
        assert any(line[:2] == [file["name"], f"{file['bytes']:,}"] for line in lines)


# ---- what is printed


def test_the_report_in_a_pipe(tmp_path, embedded):
    """From another folder: plain text, nothing cut or wrapped, every number of the library's report."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "40", "FORCE_COLOR": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ESCAPE not in done.stdout
    assert "…" not in done.stdout
    assert_report(words(done.stdout), embedded, digits=4)
    assert "The count agrees with the closed form" in done.stdout
    assert "Every value is finite." in done.stdout
    assert ["1,279", "ory", "'ory'"] in words(done.stdout)
    merges = [["1", "Ġ", "t", "Ġt"], ["1,024", "or", "y", "ory"]]
    assert all(merge in words(done.stdout) for merge in merges)
    assert "<|endoftext|> is 1,280" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("width", "digits"), [(80, 3), (100, 4), (160, 4)])
def test_the_report_on_a_terminal(embedded, width, digits):
    """It fits in the width, and no name or number of a table is cut."""
    text = printed(embedded, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert_report(words(text), embedded, digits)


def test_the_largest_release_fits_on_80_columns():
    """It has the longest names and counts, with the widest possible statistics."""
    config = gpt2_jax.SIZES["1558M"]
    widest = {"mean": -1.23e-05, "std": 0.000123, "min": -0.0123, "max": 0.0123, "norm": 1.0, "nan": 0, "infinite": 0}
    flat = gpt2_jax.params.flatten(gpt2_jax.abstract_params(config))
    tensors = [
        {"name": name, "shape": list(leaf.shape), "dtype": "float32", "count": leaf.size} | widest
        for name, leaf in flat.items()
    ]
    found = {
        "directory": "models/1558M", "form": "tensorflow", "size": "1558M", "param_dtype": "float32", "finite": True,
        "files": [{"name": "model.ckpt.data-00000-of-00001", "bytes": 6_230_444_800, "used": True, "purpose": "all"}],
        "hyperparameters": config.to_hparams(), "variants": {}, "memory": inspection.memory(config), "tensors": tensors,
        "parameters": inspection.count_parameters(config, gpt2_jax.abstract_params(config)),
        "vocabulary": {"missing": "none"},
    }  # fmt: skip
    text = printed(found, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert_report(words(text), found, digits=3)
    found["variants"] = {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"}
    text = printed(found, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert ["activation_function", "gelu", "differs"] in [line[:3] for line in words(text)]
    assert ["total", "24,921,779,200", "23.21", "GiB", "12,460,889,600", "11.61", "GiB"] in words(text)


def test_a_model_without_a_vocabulary(run, tiny):
    done = run(tiny)
    assert (done.code, done.err) == (0, "")
    assert "No vocabulary" in done.out
    assert done.out.startswith(f"{tiny}: huggingface format\n")


def test_values_that_are_not_finite_are_said(run, tmp_path):
    """They are in the report, and there is no warning with a source line. The statistics leave them out."""
    params = tiny_models.random_params(CONFIG, 31)
    params["h1"]["mlp"]["c_fc"]["b"] = params["h1"]["mlp"]["c_fc"]["b"].at[:2].set(jnp.nan).at[3].set(jnp.inf)
    params["wpe"] = jnp.full((41, 12), jnp.nan)
    gpt2_jax.save(tmp_path / "model", CONFIG, params, "orbax")
    done = run(tmp_path / "model")
    assert (done.code, done.err) == (0, "")
    assert "NOT FINITE: h1/mlp/c_fc/b holds 2 NaN and 1 infinite values" in done.out
    assert "NOT FINITE: wpe holds 492 NaN and 0 infinite values" in done.out
    assert done.out.count("NOT FINITE") == 2
    assert "Every value is finite" not in done.out
    assert ["wpe", "(41,", "12)", "float32", "492", *["none"] * 4] in words(done.out)
    (found,) = [t for t in strict(run(tmp_path / "model", "--json").out)["tensors"] if t["name"] == "wpe"]
    assert (found["nan"], found["mean"]) == (492, None)


def test_a_count_that_does_not_agree_is_said(embedded):
    wrong = embedded | {"parameters": embedded["parameters"] | {"agree": False}}
    assert "DOES NOT AGREE" in printed(wrong, 100)


def test_json_is_the_librarys_report(run, model_dir, embedded, tiny):
    """stdout is only one strict JSON object."""
    for source, found in ((model_dir, embedded), (tiny, inspection.inspect(tiny))):
        done = run(source, "--json")
        assert (done.code, done.err) == (0, "")
        assert strict(done.out) == found


def test_one_tensor(run, model_dir, shakespeare):
    """The whole tensor and its thirds, quantiles and corners; JSON has the same."""
    found = inspection.examine_tensor(shakespeare[1], "h0/attn/c_attn/w")
    done = run(model_dir, "--tensor", "h0/attn/c_attn/w")
    assert (done.code, done.err) == (0, "")
    lines = words(done.out)
    names = ("mean", "std", "min", "max", "norm")
    assert ["whole", "tensor", *(f"{found[name]:.6g}" for name in names)] in lines
    for part, third in found["thirds"].items():
        assert [part, *(f"{third[name]:.6g}" for name in names)] in lines
        assert [part, "(256,", "256)", "65,536", "float32"] in lines
    assert ["99.9", "%", f"{found['quantiles']['0.999']:.6g}"] in lines
    corner = [f"{value:.8g}" for value in found["rows"]["last"]["first"]]
    assert ["last", "row,", "first", "values", *corner] in lines
    assert strict(run(model_dir, "--tensor", "h0/attn/c_attn/w", "--json").out) == found
    assert "thirds" not in run(model_dir, "--tensor", "wpe").out


def test_a_picture_beside_the_report(run, tiny, tmp_path):
    """Its name goes to stderr, so stdout has only the report."""
    done = run(tiny, "--json", "--plot", tmp_path / "weights.png")
    assert done.code == 0
    assert strict(done.out) == inspection.inspect(tiny)
    assert "weights.png" in done.err
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_an_ascii_terminal(tiny):
    """A character that it cannot show becomes a question mark."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tiny)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"L?(4?D? + 4?D)" in done.stdout


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_reader_who_has_seen_enough(tiny, option):
    """`| head -1`: no traceback and no message."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tiny), *option], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # before the first line is written
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


# ---- mistakes


def assert_refused(done: commands.Run, culprit: str) -> None:
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("gpt2-inspect: ")
    assert re.search(culprit, done.err), done.err
    assert "Traceback" not in done.err


def test_bad_input(run, tiny, tmp_path):
    """One message names what was wrong. stdout is empty."""
    assert_refused(run(tmp_path / "nowhere"), "nowhere")
    assert_refused(run(tmp_path), re.escape(str(tmp_path)))
    assert_refused(run(tiny, "--tensor", "h0/attn/c_atn/w"), "h0/attn/c_attn/w")
    assert_refused(run(tiny, "--tensor", "h0/attn/c_atn/w", "--json"), "h0/attn/c_attn/w")
    assert_refused(run(tmp_path / "nowhere", "--plot", "weights.gif"), r"\.png, \.svg, \.pdf")  # before a long loading
    assert_refused(run(tiny, "--plot", tmp_path / "none" / "weights.png"), "none")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "hparams.json").write_text('{"n_vocab": 7}')
    assert_refused(run(tmp_path), "not complete")


def test_options_that_do_not_exist(run):
    assert run("--tensors", "wte").code == 2
    assert run("one", "two").code == 2


def test_interruption(run, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert run() == (130, "", "")


def test_progress_only_for_large_models_on_a_terminal(run, tiny, monkeypatch):
    """A pipe gets no progress bar, and neither does a small model, which is done at once."""
    for terminal, large, shown in ((False, 0, False), (True, command.LARGE, False), (True, 0, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(command, "LARGE", large)
        done = run(tiny)
        assert done.code == 0
        assert ("tensors" in done.err) == shown
        assert shown or done.err == ""
