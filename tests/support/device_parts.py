"""Parts for benchmarks/device.py that go well or wrong in each way that its command must survive."""

import os
import signal
import subprocess
import sys
from pathlib import Path


def works(job):
    job.headings("what | value")
    job.row("works", 7)


def raises(job):
    works(job)
    job.each({"first": lambda: 1 / 0, "second": lambda: job.row("after the error", 8)})


def cannot_be_imported(job):
    import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]


def is_killed(job):
    works(job)
    os.kill(os.getpid(), signal.SIGKILL)


def exits(job):
    works(job)
    print("a reason")
    os._exit(3)


def hangs(job):
    """Ignore SIGTERM, start a process that hangs too, and write its number."""
    works(job)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    other = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    Path(job.folder / "pid").write_text(f"{os.getpid()} {other.pid}")
    signal.pause()


def has_no_time(job):
    job.until = 0
    job.each({"a case": lambda: None, "next": lambda: None})
