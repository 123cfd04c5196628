"""Running the scripts: in this process, loaded from their path as nothing may import them, or as a user does."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"


class Run(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def loaded(name: str):
    """Give the module of scripts/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where tyro and dataclasses look up the annotations
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


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
