"""Running the commands: in this process, or as a user does, by their scripts."""

import codecs
import contextlib
import json
import os
import re
import reprlib
import select
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


class Run(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def caller(main, capfd):
    """Return call(*args) -> Run in this process; what C++ writes is caught too, at the file descriptors."""

    def call(*args) -> Run:
        capfd.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return Run(code or 0, out, err)

    return call


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


class OnATerminal:
    """scripts/NAME.py as a user has it before them: a process whose input, output and errors are a terminal.

    What it writes is gathered as it comes; `until` waits for something in what was not waited for yet.
    """

    def __init__(self, name: str, *args, cwd: Path, seconds: float = 120, **env: str):
        import pty  # not on Windows

        self.terminal, theirs = pty.openpty()
        self.seconds, self.shown, self.n_seen = seconds, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        # A session's leader gets the first terminal it opens as its own, whose Ctrl-C is a SIGINT.
        start = ["sh", "-c", f'exec "$0" "$@" <{os.ttyname(theirs)} >{os.ttyname(theirs)} 2>&1']
        self.process = subprocess.Popen(
            [*start, sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, args)],
            cwd=cwd,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8", "TERM": "xterm"} | env,
            start_new_session=True,
        )
        self._theirs = theirs  # kept open: a terminal that nobody has open gives errors

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.terminal)
        os.close(self._theirs)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def more(self, seconds: float) -> str:
        """Return what is shown next, and nothing if nothing comes for so long."""
        if not select.select([self.terminal], [], [], seconds)[0]:
            return ""
        text = self._decoder.decode(os.read(self.terminal, 2**16)).replace("\r\n", "\n")
        self.shown += text
        return text

    def until(self, pattern: str) -> str:
        """Wait until a regular expression matches what is new; return what is new up to its end."""
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
        """Wait until nothing is shown for a moment: a prompt stands there before the program listens for Ctrl-C."""
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
    """Undo what `main` sets for the whole process, which is the command's in life, and here that of all tests."""
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
    """Run Python code in a process that has eight CPU devices, from the folder of the tests; read its last line."""
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
    return json.loads(done.stdout.splitlines()[-1])  # jax 0.12 prints a line of its own before
