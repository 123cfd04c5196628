"""scripts/generate.py keeps compiled programs: the second run of a command compiles nothing."""

import os
import subprocess
import sys
import textwrap

import commands
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from strength import full_only

from gpt2_jax.commands._model import keep_compiled

FOLDER = "jax_compilation_cache_dir"

# Runs the script with each line of arguments, and prints how many programs were needed and how many were in the cache.
COUNTING = """
    import collections, runpy, sys
    import jax

    counts = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
    script, *lines = sys.argv[1:]
    for line in lines:
        sys.argv = [script, *line.split("|")]
        runpy.run_path(script, run_name="__main__")
    asked = counts["/jax/compilation_cache/compile_requests_use_cache"]
    print(asked, counts["/jax/compilation_cache/cache_hits"], file=sys.stderr)
"""


@pytest.fixture
def count(tmp_path):
    """count(*lines) -> (programs needed, programs in the cache, other lines of stderr)."""

    def run(*lines, **env):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(COUNTING), str(commands.SCRIPTS / "generate.py"), *lines],
            cwd=tmp_path,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        *said, counts = done.stderr.splitlines()
        asked, found = map(int, counts.split())
        return asked, found, said

    return run


def test_the_second_run_compiles_nothing(count, tmp_path):
    """Another prompt of similar length and other settings of the three kinds of sampling compile nothing either.

    The messages are the same.
    """
    cache = {"GPT2_JAX_CACHE": str(tmp_path / "cache")}
    command = "--prompt|ROMEO:|--max-new-tokens|20"
    asked, found, said = count(command, f"{command}|--top-k|3", f"{command}|--temperature|0", **cache)
    assert asked > found == 0
    assert len(said) == 6
    kept = sorted(path.name for path in (tmp_path / "cache" / "compiled").glob("*-cache"))
    assert len(kept) == asked
    asked, found, said = count(
        command,
        "--prompt|What light|--max-new-tokens|18|--seed|7|--temperature|0.5|--top-k|5|--top-p|0.9|--min-p|0.1",
        "--prompt|O|--max-new-tokens|20|--temperature|0|--repetition-penalty|1.3|--top-p-rule|common|--no-stop-at-eot",
        **cache,
    )
    assert asked == found > 0
    assert len(said) == 6
    assert {line.split(" ")[0] for line in said} == {"model:", "20", "18"}
    assert sorted(path.name for path in (tmp_path / "cache" / "compiled").glob("*-cache")) == kept


@full_only("test_it_does_without_a_folder does it in this process")
def test_a_folder_that_cannot_be_written(count, tmp_path):
    """The command works, and there is no warning for each program."""
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    unwritable = {"GPT2_JAX_CACHE": str(tmp_path / "file" / "cache"), "GPT2_JAX_KEEP_COPY": "0"}
    _, found, said = count("--prompt|ROMEO:|--max-new-tokens|1", **unwritable)
    assert found == 0
    assert [line.split(" ")[0] for line in said] == ["model:", "1"]


# ---- the function


@pytest.fixture
def _none_yet():
    with commands.config_of_jax_kept():
        reset_cache()  # without it, JAX uses the settings of its first compilation
        jax.config.update(FOLDER, None)
        yield


@pytest.mark.usefixtures("_none_yet")
def test_it_takes_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))
    keep_compiled()
    assert getattr(jax.config, FOLDER) == str(tmp_path / "cache" / "compiled")


@pytest.mark.usefixtures("_none_yet")
@pytest.mark.parametrize("enabled", [True, False])
def test_what_jax_was_told_counts(tmp_path, monkeypatch, enabled):
    """JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE; JAX reads them into these options at import."""
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))
    jax.config.update(FOLDER, str(tmp_path / "mine"))
    jax.config.update("jax_enable_compilation_cache", enabled)
    keep_compiled()
    assert getattr(jax.config, FOLDER) == str(tmp_path / "mine")
    jax.jit(lambda x: x * 3)(np.float32(7))
    assert len(list(tmp_path.glob("mine/*-cache"))) == int(enabled)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("_none_yet")
def test_it_does_without_a_folder(tmp_path, monkeypatch):
    """There is no home folder, or the cache folder is read-only."""
    monkeypatch.setattr("gpt2_jax.commands._model.os.access", lambda path, mode: False)
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path))
    keep_compiled()
    assert getattr(jax.config, FOLDER) is None
    monkeypatch.undo()

    def homeless():
        raise RuntimeError("no home")

    for name in ("GPT2_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("gpt2_jax.files.Path.home", homeless)
    keep_compiled()
    assert getattr(jax.config, FOLDER) is None


@pytest.mark.usefixtures("_none_yet")
def test_a_program_that_a_killed_process_left_incomplete_is_removed(tmp_path, monkeypatch, recwarn):
    """With it, JAX would keep nothing, and warn about each program. A new file may be that of a running process."""
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path))
    folder = tmp_path / "compiled"
    folder.mkdir()
    for name in ("old-cache", "whole-cache", "whole-atime", "new-cache"):
        (folder / name).write_bytes(bytes(8))
        if not name.startswith("new"):
            os.utime(folder / name, (1e9, 1e9))
    keep_compiled()
    assert sorted(path.name for path in folder.iterdir()) == ["new-cache", "whole-atime", "whole-cache"]
    (folder / "new-cache").unlink()
    jax.jit(lambda x: x * 5)(np.float32(7))
    assert len(list(folder.glob("*-cache"))) == 2
    assert not [one for one in recwarn if "compilation cache" in str(one.message)]


def test_calling_the_script_here_changes_nothing_for_others():
    """This is the purpose of `config_of_jax_kept`."""
    before = {name: value for name, value in jax.config.values.items() if "cache" in name}
    with commands.config_of_jax_kept():
        keep_compiled()
        assert {name: value for name, value in jax.config.values.items() if "cache" in name} != before
    assert {name: value for name, value in jax.config.values.items() if "cache" in name} == before
