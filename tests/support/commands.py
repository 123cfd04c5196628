"""Run the commands in this process, or as a user does, by their scripts."""

import codecs
import contextlib
import importlib
import json
import os
import re
import reprlib
import selectors
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import pytest
import tyro
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from gpt2_jax.commands import _command
from gpt2_jax.commands.start import MAINS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENTRY_POINTS = PROJECT["scripts"]  # {installed command: "module:function"}


class Run(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def caller(main, capfd):
    """Return call(*args) -> Run in this process. Output of C++ code is captured too, at the file descriptors."""

    def call(*args) -> Run:
        capfd.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return Run(code or 0, out, err)

    return call


def report(run, *args, code: int = 0) -> dict:
    """Return what a command called by `run` writes with --json, which must be strict JSON."""
    done = run(*args, "--json")
    assert done.code == code, done.err
    return json.loads(done.out, parse_constant=pytest.fail)


def tree(folder: Path) -> set[str]:
    """Return the paths of all files and folders in a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def in_a_process(name: str, *args, cwd: Path, python: tuple[str, ...] = (), **env: str) -> Run:
    """Run scripts/NAME.py as a user types it, from a directory that is not the repository."""
    done = subprocess.run(
        [sys.executable, *python, str(SCRIPTS / f"{name}.py"), *map(str, args)],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"} | env,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def parse(command: str, *arguments: str) -> Any:
    """Parse arguments with a command's own parser, from the root of the repository. Nothing is run.

    The command is an installed one or a script: gpt2-train, scripts/train.py. A wrong option raises SystemExit.
    """
    if command.startswith("scripts/"):
        name = re.search(r"from \S+ import (\w+)", (ROOT / command).read_text(encoding="utf-8"))[1]
    else:
        name = ENTRY_POINTS[command].split(":")[1]
    module, function = MAINS[name].split(".")
    parsed = []

    def call(prog, args_type, run, argv=None, *, start=None, **_how):
        parsed.append(tyro.cli(args_type, prog=prog, args=argv, **({} if start is None else {"default": start()})))

    with mock.patch.object(_command, "call", call), contextlib.chdir(ROOT):
        getattr(importlib.import_module(f"gpt2_jax.commands.{module}"), function)(list(arguments))
    return parsed[0]


class OnATerminal:
    """scripts/NAME.py in a process whose standard input, output and error are a terminal.

    Its output is collected as it arrives. `until` waits for a pattern in the output that was not matched yet.
    """

    def __init__(self, name: str, *args, cwd: Path, seconds: float = 120, **env: str):
        import pty  # not on Windows

        self.terminal, theirs = pty.openpty()
        self.seconds, self.shown, self.n_seen = seconds, "", 0
        self._selector = selectors.DefaultSelector()  # select.select takes no file descriptor above 1023
        self._selector.register(self.terminal, selectors.EVENT_READ)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        # The first terminal that a session leader opens becomes its controlling terminal, so Ctrl-C sends SIGINT.
        start = ["sh", "-c", f'exec "$0" "$@" <{os.ttyname(theirs)} >{os.ttyname(theirs)} 2>&1']
        self.process = subprocess.Popen(
            [*start, sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, args)],
            cwd=cwd,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8", "TERM": "xterm"} | env,
            start_new_session=True,
        )
        self._theirs = theirs  # kept open: reads fail on a terminal that no process has open

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._selector.close()
        os.close(self.terminal)
        os.close(self._theirs)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def more(self, seconds: float) -> str:
        """Return the next output, or an empty string after the timeout."""
        if not self._selector.select(seconds):
            return ""
        text = self._decoder.decode(os.read(self.terminal, 2**16)).replace("\r\n", "\n")
        self.shown += text
        return text

    def until(self, pattern: str) -> str:
        """Wait until a regular expression matches the new output. Return the new output up to the end of the match."""
        deadline = time.monotonic() + self.seconds
        while not (found := re.search(pattern, self.shown[self.n_seen :])):
            running = self.process.poll() is None
            if (not self.more(0.1) and not running) or time.monotonic() > deadline:
                seen = reprlib.repr(self.shown[self.n_seen :])
                raise AssertionError(f"{pattern!r} is not in {seen} (running: {running})")
        new = self.shown[self.n_seen : self.n_seen + found.end()]
        self.n_seen += found.end()
        return new

    def until_idle(self) -> None:
        """Wait until there is no output for a moment: a prompt is shown before the program handles Ctrl-C."""
        while self.more(0.5):
            pass

    def end(self) -> int:
        """Wait for the end, and return the exit status."""
        code = self.process.wait(self.seconds)
        while self.more(0.05):
            pass
        return code


@contextlib.contextmanager
def config_of_jax_kept():
    """Undo the process-wide settings of `main`, because all tests share this process."""
    names = [
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def on_eight_devices(code: str, *args) -> object:
    """Run Python code in a process with eight CPU devices, in the tests folder. Parse its last line of output."""
    flags = os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # jax 0.12 prints its own line first
