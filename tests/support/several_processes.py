"""Several processes that divide work: as threads of one process, or real ones that JAX connects."""

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import commands
from process_groups import free_port

from gpt2_jax.processes import Share


class Texts:
    """A Link of the threads of one process. It keeps the names that were put, in order."""

    def __init__(self):
        self.texts, self.names, self._changed = {}, [], threading.Condition()

    def put(self, name: str, text: str) -> None:
        with self._changed:
            if name in self.texts:
                raise ValueError(f"{name} is there already")
            self.texts[name] = text
            self.names.append(name)
            self._changed.notify_all()

    def get(self, name: str, seconds: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: name in self.texts, seconds)
            return self.texts.get(name)

    def delete(self, name: str) -> None:
        with self._changed:
            del self.texts[name]


def in_threads(count: int, function: Callable[[Share], object], link: Texts | None = None) -> list:
    """Call a function with each share at the same time. Return the results or errors by index."""
    link = link or Texts()

    def call(index: int) -> object:
        try:
            return function(Share(index, count, link))
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


MAIN = """
import sys

import jax

index, count, port, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
from gpt2_jax.commands import evaluate, generate

try:
    {"evaluate": evaluate, "generate": generate}[command].main(sys.argv[5:])
finally:
    jax.distributed.shutdown()
"""


@contextlib.contextmanager
def started(count: int, command: str, *args: object, cwd: Path, **env: str) -> Iterator[list[subprocess.Popen]]:
    """Start a command in several processes that JAX connects. Those that are left at the end are killed."""
    port = free_port()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", MAIN, *map(str, (i, count, port, command, *args))], cwd=cwd, env=env, **pipes
        )
        for i in range(count)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


def run_command(script: str, *args: object, each: Sequence[Sequence[object]] = ((), ())) -> list[commands.Run]:
    """Run a script as a user does, in one process for each list of its own arguments. Return what each did."""
    address = f"--processes.coordinator=127.0.0.1:{free_port()}"
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = *args, address, f"--processes.count={len(each)}"
    children = []
    try:
        for index, own in enumerate(each):
            words = [commands.SCRIPTS / script, *options, f"--processes.index={index}", *own]
            children.append(subprocess.Popen([sys.executable, *map(str, words)], **pipes))
        ends = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [commands.Run(child.returncode, *end) for child, end in zip(children, ends, strict=True)]
