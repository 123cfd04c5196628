"""A downloader that is killed at random times loses no bytes, leaves no wrong file, and ends with right files."""

import functools
import os
import random
from pathlib import Path

import fake_release
import forks
import misbehaving_server as server_that
import pytest
from fake_release import path, right_names
from strength import campaign

from gpt2_jax.release.known import DATA, FILES

KILLS = campaign(10, 50)
DATA_BYTES = 600_011
CHUNK, PAUSE = 1499, 0.001  # the data file takes about 400 pauses
LONGEST = 0.06  # seconds from fork to kill


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_again_and_again(tmp_path):
    release = fake_release.made_up(DATA_BYTES)
    directory = tmp_path / "124M"
    rng = random.Random(11)
    kills = completed = 0
    with server_that.Server(fake_release.served(release)) as server:
        for name in FILES:
            server.always[path(name)] = server_that.slow(CHUNK, PAUSE)
        with forks.Forks("killed_downloader", DATA_BYTES, no_proxy="127.0.0.1") as run:
            fetch = functools.partial(run, directory=str(directory), url=server.url)
            here = 0
            while kills < KILLS:
                # Kill at a random time, or after a number of new bytes, which also works on slow machines.
                by_time = rng.random() < 0.5
                seconds, more = rng.uniform(0, LONGEST), rng.randrange(40_000)
                if by_time:
                    ended = fetch(delay=seconds)
                else:
                    ended = fetch(until=lambda said: bytes_here(directory) > here + more)  # noqa: B023
                assert ended.error == ""
                kills += ended.killed
                there = right_names(directory, release)
                after = bytes_here(directory)
                assert after >= here, "what had arrived is there still"
                assert part_is_a_beginning(directory, release)
                here = after
                if len(there) == len(FILES):  # start again, because there are kills left
                    completed += 1
                    here = 0
                    for name in FILES:
                        (directory / name).unlink()
            ended = fetch()
        assert (ended.killed, ended.error) == (False, "")
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
