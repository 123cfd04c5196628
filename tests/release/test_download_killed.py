"""A downloader that is killed at random moments loses nothing, leaves nothing wrong, and ends with right files."""

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_release
import misbehaving_server as server_that
import pytest
from fake_release import path, right_names

from gpt2_jax.release.known import DATA, FILES

KILLS = 50
DATA_BYTES = 600_011
CHUNK, PAUSE = 1499, 0.001  # the data file alone takes some 400 pauses
LONGEST = 0.06  # seconds from fork to kill

# One interpreter imports everything once and forks a downloader for each line; it answers with the child's number, and
# when that has ended with "killed" or the exit status.
HELPER = """
import http.client, os, ssl, sys, threading, urllib.request, warnings
import filelock, rich.progress
import fake_release
from gpt2_jax.release import download
warnings.simplefilter("ignore")  # JAX warns of forks: its threads are not used here
directory, url, data_bytes = sys.argv[1:]
files = fake_release.made_up(int(data_bytes))
download.expectations = lambda size: fake_release.expectations(files)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fake_release.fetch(directory, url, files=download.FILES)
            status = 0
        finally:
            os._exit(status)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), flush=True)
"""

SUPPORT = str(Path(__file__).parents[1] / "support")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_fifty_times(tmp_path):
    release = fake_release.made_up(DATA_BYTES)
    directory = tmp_path / "124M"
    rng = random.Random(11)
    kills = completed = 0
    with server_that.Server(fake_release.served(release)) as server:
        for name in FILES:
            server.always[path(name)] = server_that.slow(CHUNK, PAUSE)
        helper = subprocess.Popen(
            [sys.executable, "-c", HELPER, directory, server.url, str(DATA_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
                "JAX_PLATFORMS": "cpu",
                "no_proxy": "127.0.0.1",
            },
        )
        try:
            assert helper.stdout.readline() == "ready\n"
            here = 0
            while kills < KILLS:
                helper.stdin.write("fetch\n")
                helper.stdin.flush()
                child = int(helper.stdout.readline())
                # At a random time, or once so much more of the data has come, however slow the machine is.
                delay, more = (
                    (rng.uniform(0, LONGEST), DATA_BYTES) if rng.random() < 0.5 else (60, rng.randrange(40_000))
                )
                deadline = time.monotonic() + delay
                while time.monotonic() < deadline and bytes_here(directory) <= here + more:
                    if select.select([helper.stdout], [], [], 0.001)[0]:
                        break  # it has ended
                else:
                    with contextlib.suppress(ProcessLookupError):  # it has ended this moment
                        os.kill(child, signal.SIGKILL)
                outcome = helper.stdout.readline().strip()
                assert outcome in ("killed", "0")
                kills += outcome == "killed"
                there = right_names(directory, release)
                after = bytes_here(directory)
                assert after >= here, "what had arrived is there still"
                assert part_is_a_beginning(directory, release)
                here = after
                if len(there) == len(FILES):  # begin anew: there are kills left
                    completed += 1
                    here = 0
                    for name in FILES:
                        (directory / name).unlink()
            helper.stdin.write("fetch\n")
        finally:
            helper.stdin.close()
            rest = helper.stdout.read()
            helper.wait()
            helper.stdout.close()
        assert rest.split()[1:] == ["0"]
        assert right_names(directory, release) == set(FILES)
        resumed = [start for start in server.starts(path(DATA)) if start]
    assert len(resumed) > KILLS // 3, "kills fell into the middle of the file"
    print(f"{kills} kills, {completed} downloads completed on the way, {len(resumed)} resumed")


def bytes_here(directory: Path) -> int:
    return (directory / DATA).stat().st_size if (directory / DATA).exists() else part_bytes(directory)


def part_bytes(directory: Path) -> int:
    part = directory / f"{DATA}.part"
    return part.stat().st_size if part.exists() else 0


def part_is_a_beginning(directory: Path, release: dict[str, bytes]) -> bool:
    part = directory / f"{DATA}.part"
    return not part.exists() or release[DATA].startswith(part.read_bytes())
