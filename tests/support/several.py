"""Starts several processes that JAX connects, collects what they print, and kills what is left of them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from process_groups import free_port

FLAG = "--xla_force_host_platform_device_count"
LONGEST = 240  # seconds; two cores may have much else to do


class Process:
    """One of them. Its output is read as it comes."""

    def __init__(self, command, env):
        self.out, self.err = [], []
        self._changed, self._n_open = threading.Condition(), 2
        # JAX prints a trace of C++ when a peer dies: bytes of any kind.
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
        self.process = subprocess.Popen(command, env=env, text=True, **how)
        pipes = (self.process.stdout, self.out), (self.process.stderr, self.err)
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in pipes]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe, lines):
        with pipe:
            for line in pipe:
                with self._changed:
                    lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._n_open -= 1
            self._changed.notify_all()

    def wait_for(self, text):
        """Wait until a line of output contains a text, and return that line."""

        def found():
            return next((line for line in [*self.out, *self.err] if text in line), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._n_open == 0, LONGEST)
            assert found(), f"no {text!r} in:\n{''.join(self.err)[-3000:]}"
            return found()

    def wait(self, end):
        """Return the exit status; None if it still runs at a time of the clock."""
        try:
            self.process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return None
        for reader in self._readers:
            reader.join()
        return self.process.returncode


@contextlib.contextmanager
def started(script, *args, n, n_devices, **environment):
    """Start `script.py INDEX N PORT *args` in tests/support for each index, with so many CPU devices each.

    They import the package that this process has imported. At the end of the block, those that still run are killed.
    """
    port = free_port()
    flags = re.sub(rf"{FLAG}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {FLAG}={n_devices}"} | environment
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py"))]
    all_of_them = []
    try:
        for index in range(n):
            all_of_them.append(Process([*command, str(index), str(n), str(port), *map(str, args)], env))
        yield all_of_them
    finally:
        for one in all_of_them:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGKILL)
            one.wait(time.monotonic() + LONGEST)


def ended(all_of_them):
    """Wait for the end of all, which must be without an error. Return the lines of standard output of each."""
    end = time.monotonic() + LONGEST
    for one in all_of_them:
        status = one.wait(end)
        assert status == 0, f"status {status}\n{''.join(one.out)[-3000:]}\n{''.join(one.err)[-3000:]}"
    # Gloo, of which JAX makes collectives on a CPU, writes to standard output, from several threads at once.
    noise = "[Gloo]", "connected peer ranks"
    return [[line.rstrip("\n") for line in one.out if not any(n in line for n in noise)] for one in all_of_them]
