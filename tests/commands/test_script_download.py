"""scripts/download.py: only the directories on stdout; one message and exit status 2 for a failure."""

import os
import subprocess
import sys
from pathlib import Path

import checkpoint_forms as forms
import commands
import fake_release
import misbehaving_server as server_that
import pytest
from fake_release import path, right_names
from strength import full_only

from gpt2_jax.checkpoints import released
from gpt2_jax.commands import download as command
from gpt2_jax.release.known import DATA, FILES, INDEX

SCRIPT = commands.SCRIPTS / "download.py"
OPTIONS = ["--models-dir", "--base-url", "--jobs", "--verify", "--no-verify"]


@pytest.fixture(scope="module", autouse=True)
def _tensorflow():
    """Import TensorFlow once, and let its own warnings pass."""
    forms.import_tensorflow()


@pytest.fixture(scope="module")
def model():
    return fake_release.embedded()


@pytest.fixture
def server(model, monkeypatch):
    fake_release.use(monkeypatch, model)
    files = fake_release.served(model) | fake_release.served(model, "1558M")
    with server_that.Server(files) as running:
        yield running


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Call the entry point in this process, in an empty folder. All output is captured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))

    return commands.caller(command.main, capfd)


def in_a_process(*args: object, code: str = "", **env: str) -> commands.Run:
    """Run the command in a process of its own. `code` runs first, in the same process."""
    start = f"import runpy, sys; sys.argv = sys.argv[1:]\n{code}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, str(SCRIPT), *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "no_proxy": "127.0.0.1"} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    return commands.Run(done.returncode, done.stdout, done.stderr)


def test_the_files_go_to_the_cache_and_its_directory_is_printed(run, server, model, tmp_path):
    done = run("124M", "--base-url", server.url)
    assert done == commands.Run(0, f"{tmp_path / 'cache' / 'models' / '124M'}\n", "")
    assert right_names(tmp_path / "cache" / "models" / "124M", model) == set(FILES)
    n_requests = len(server.requests)
    assert run("117M", "--base-url", server.url) == done
    assert len(server.requests) == n_requests


def test_the_books_layout_and_several_sizes_under_any_names(run, server, model, tmp_path):
    done = run("--models-dir", "gpt2", "--jobs", 1, "--base-url", f"{server.url}/", "GPT2", "gpt2-xl", "124M")
    assert done == commands.Run(0, f"{Path('gpt2/124M')}\n{Path('gpt2/1558M')}\n", "")
    for size in ("124M", "1558M"):
        assert right_names(tmp_path / "gpt2" / size, model) == set(FILES)
    assert len(server.requests) == 2 * len(FILES)


def test_addresses_are_tried_in_turn_from_options_or_the_environment(run, server, model, tmp_path, monkeypatch):
    done = run("124M", "--models-dir", "a", "--base-url", f"{server.url}/none", "--base-url", server.url)
    assert (done.code, done.err) == (0, "")
    monkeypatch.setenv("GPT2_JAX_BASE_URL", f"{server.url}/none,{server.url}")
    assert run("124M", "--models-dir", "b") == commands.Run(0, f"{Path('b/124M')}\n", "")
    assert right_names(tmp_path / "b" / "124M", model) == set(FILES)
    assert len({asked.path for asked in server.requests}) == 2 * len(FILES)


def test_damaged_weights_are_fetched_again_unless_told_not_to_look(run, server, model, tmp_path):
    directory = tmp_path / "m" / "124M"
    wrong = model[DATA][:1000] + b"!!!!" + model[DATA][1004:]
    fake_release.put(directory, model | {DATA: wrong})
    assert run("124M", "--models-dir", "m", "--base-url", server.url, "--no-verify").code == 0
    assert (directory / DATA).read_bytes() == wrong
    assert server.requests == []
    assert run("124M", "--models-dir", "m", "--base-url", server.url).code == 0
    assert right_names(directory, model) == set(FILES)
    assert sorted(asked.path for asked in server.requests) == [path(DATA), path(INDEX)]


def test_a_failure_is_one_sentence_with_the_address_and_exit_2(run, server, model, tmp_path):
    server.always[path("vocab.bpe")] = server_that.page(content_type="text/plain")
    done = run("gpt2", "--base-url", server.url)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("gpt2-download: cannot fetch vocab.bpe of GPT-2 124M")
    assert f"{server.url}/124M/vocab.bpe: " in done.err
    assert "GPT2_JAX_BASE_URL" in done.err
    assert done.err.count("\n") == 1
    right_names(tmp_path / "cache" / "models" / "124M", model)


BAD = {
    "no size": ((), "gpt2-download: name one size or more: 124M, 355M, 774M, 1558M\n"),
    "unknown": (("124M", "125M"), "gpt2-download: no released GPT-2 is called '125M': the sizes are 124M, "),
    "address": (("124M", "--base-url", "example.org"), "gpt2-download: 'example.org' is not a base address: "),
    "jobs": (("124M", "--jobs", "0"), "gpt2-download: jobs must be a whole number, 1 or more, not 0\n"),
    "jobs in words": (("124M", "--jobs", "two"), ""),
    "file": (("124M", "--models-dir", str(SCRIPT)), f"gpt2-download: cannot write {SCRIPT}/124M: "),
}


@pytest.mark.parametrize(("args", "told"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_nothing_is_fetched(run, server, args, told, tmp_path):
    address = () if "--base-url" in args else ("--base-url", server.url)
    done = run(*args, *(address if args else ()))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(told)
    assert not told or done.err.count("\n") == 1
    assert "Traceback" not in done.err
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_130(run, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(released, "fetch_verified", interrupted)
    assert run("124M") == commands.Run(130, "", "")


def test_help_says_everything_without_importing_jax():
    done = in_a_process("--help", code="sys.modules['jax'] = sys.modules['numpy'] = sys.modules['tensorflow'] = None")
    assert done.code == 0, done.err
    assert all(word in done.out for word in [*OPTIONS, "SIZE", "124M", "1558M", "gpt2-xl", "GPT2_JAX_BASE_URL"])


@full_only("the tests above do it in this process")
def test_as_a_process_of_its_own(server, model, tmp_path):
    inject = f"sys.path.insert(0, {str(commands.ROOT / 'tests' / 'support')!r})"
    inject += "; import fake_release; files = fake_release.embedded()"
    inject += "; fake_release.download.expectations = lambda size: fake_release.expectations(files)"
    done = in_a_process("345M", code=inject, GPT2_JAX_CACHE=str(tmp_path), GPT2_JAX_BASE_URL=server.url)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert f"{server.url}/355M/" in done.err
    assert "404 Not Found" in done.err
    done = in_a_process("gpt2", code=inject, GPT2_JAX_CACHE=str(tmp_path), GPT2_JAX_BASE_URL=server.url)
    assert done == commands.Run(0, f"{tmp_path / 'models' / '124M'}\n", "")
    assert right_names(tmp_path / "models" / "124M", model) == set(FILES)
