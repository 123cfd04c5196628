"""Commands whose standard streams are closed, or read by nobody: no traceback, and nothing in the wrong place."""

import json
import os
import shlex
import subprocess
import sys

import commands
import pytest
from strength import campaign

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a shell of POSIX")
VERDICT, SHAKESPEARE = commands.ROOT / "examples" / "the-verdict.txt", commands.ROOT / "models" / "shakespeare"

# {script: (arguments, status)}
SHORT = {
    "activations": (["text.txt", "--capture=h0/mlp/out", "--output=new"], 0),
    "evaluate": (["--task=perplexity", "text.txt", "--json"], 0),
    "generate": (["--prompt=x", "--max-new-tokens=2"], 0),
    "inspect_checkpoint": ([SHAKESPEARE, "--tensor=h0/ln_1/g"], 0),
    "convert": ([SHAKESPEARE, "new", "--format=huggingface"], 0),
    "prepare_data": (["text.txt", "--output=new"], 0),
    "train_tokenizer": (["text.txt", "--output=new", "--merges=5"], 0),
    "doctor": (["--json"], 0),
    "download": (["no-such-size"], 2),
    "train": (["--run=new", "--data.path=text.txt", "--steps=1", "--batch-size=1"], 0),
}
CHOSEN = campaign(["inspect_checkpoint", "train_tokenizer", "download"], list(SHORT))


def shell(script, redirection, cwd):
    """Run a command with a redirection of the shell. Return its status, output and error."""
    words = [sys.executable, str(commands.SCRIPTS / f"{script}.py"), *map(str, SHORT[script][0])]
    (cwd / "text.txt").write_text(VERDICT.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    subprocess.run(["rm", "-rf", str(cwd / "new")], check=True)
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(words)} {redirection}"],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", CHOSEN)
def test_closed(script, tmp_path):
    status = SHORT[script][1]
    code, out, err = shell(script, ">&-", tmp_path)
    assert (code, out) == (status, "")
    assert "Traceback" not in err
    code, out, err = shell(script, "2>&-", tmp_path)
    assert (code, err) == (status, "")
    if "--json" in SHORT[script][0]:
        assert json.loads(out)
    elif status == 0:
        assert "model:" not in out
        assert out.strip()
    else:
        assert out == ""
    if script == "train_tokenizer":
        assert {path.name for path in (tmp_path / "new").iterdir()} == {"encoder.json", "vocab.bpe"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /dev/full")
def test_messages_that_nobody_reads(tmp_path):
    """The work goes on, and its result is written: a message is less than a result."""
    for redirection in ("2> >(exit 0)", "2>/dev/full"):
        assert shell("train_tokenizer", redirection, tmp_path)[:2] == (0, "new\n")


def test_a_result_without_messages(tmp_path):
    """The messages do not go to standard output in its place."""
    code, out, _ = shell("evaluate", "2>&-", tmp_path)
    assert code == 0
    assert json.loads(out)["tokens"] > 0
