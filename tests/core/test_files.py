"""Replacing folders and files in one step, what is flushed before, what may be replaced, and locks."""

import errno
import os
import subprocess
import sys
import threading
import time

import filelock
import pytest

from gpt2_jax import files


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_cache_folder_is_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "own"))
    assert files.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("GPT2_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "gpt2-jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_dir() == tmp_path / "home" / ".cache" / "gpt2-jax"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with files.replacing(tmp_path / "link") as new:
        (new / "a").write_text("7")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["a"]
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("without", ["the system call", "the second rename"])
def test_where_names_cannot_be_exchanged_at_once(tmp_path, monkeypatch, without):
    """Then two renames are used. If the second fails, the old folder comes back."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: None)
    monkeypatch.setattr(files.sys, "platform", "elsewhere")
    model = tmp_path / "model"
    model.mkdir()
    (model / "old").write_text("")
    if without == "the second rename":
        rename, done = type(model).rename, []

        def fail_once(self, target):
            done.append(target)
            if len(done) == 2:
                raise PermissionError("not now")
            return rename(self, target)

        monkeypatch.setattr(type(model), "rename", fail_once)
        with pytest.raises(PermissionError, match="not now"), files.replacing(model) as new:
            (new / "new").write_text("")
        assert names(model) == ["old"]
    else:
        with files.replacing(model) as new:
            (new / "new").write_text("")
        assert names(model) == ["new"]
    assert names(tmp_path) == ["model"]


def test_what_killed_processes_left_long_ago_is_cleared(tmp_path):
    old, fresh, other = (tmp_path / f".{name}.{digit * 32}" for name, digit in (("m", "a"), ("m", "b"), ("n", "c")))
    for path in (old, fresh, other):
        path.mkdir()
        (path / "part").write_text("")
    (tmp_path / f".m.{'d' * 32}").write_text("")
    (tmp_path / ".m.mine").write_text("")
    before = time.time() - files.ABANDONED - 7
    for path in (old, other, tmp_path / f".m.{'d' * 32}", tmp_path / ".m.mine"):
        os.utime(path, (before, before))
    with files.replacing(tmp_path / "m"):
        pass
    assert names(tmp_path) == sorted([fresh.name, other.name, ".m.mine", "m"])


def test_a_file_is_replaced_or_left(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing_file(path) as new:  # noqa: PT012
        new.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with files.replacing_file(path) as new:
        new.write_text("new")
    assert (path.read_text(), names(tmp_path)) == ("new", ["file"])


def test_a_file_may_be_written_under_a_name_of_ones_own(tmp_path):
    with files.replacing_file(tmp_path / "file", tmp_path / ".file.new") as new:
        assert new == tmp_path / ".file.new"
        new.write_text("new")
    assert names(tmp_path) == ["file"]


def flushed_before(monkeypatch, path):
    """Return a list that gets, for each fsync, its inode and the inode that `path` has at that time."""
    flushed, real = [], os.fsync

    def fsync(descriptor):
        real(descriptor)
        flushed.append((os.fstat(descriptor).st_ino, path.stat().st_ino if path.exists() else None))

    monkeypatch.setattr(files.os, "fsync", fsync)
    return flushed


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_its_folder_after(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    old = path.stat().st_ino
    flushed = flushed_before(monkeypatch, path)
    with files.replacing_file(path) as new:
        new.write_text("new")
    assert flushed == [(path.stat().st_ino, old), (tmp_path.stat().st_ino, path.stat().st_ino)]


@pytest.mark.parametrize("there", [True, False])
def test_all_of_a_folder_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch, there):
    path, old = tmp_path / "model", None
    if there:
        path.mkdir()
        old = path.stat().st_ino
    flushed = flushed_before(monkeypatch, path)
    with files.replacing(path) as new:
        (new / "weights").write_text("1")
        (new / "params" / "d").mkdir(parents=True)
        (new / "params" / "d" / "0").write_text("2")
    *first, last = flushed
    assert {inode for inode, _ in first} == {found.stat().st_ino for found in [path, *path.rglob("*")]}
    assert {at for _, at in first} == {old}
    assert last == (tmp_path.stat().st_ino, path.stat().st_ino)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_folders_made_for_one_that_is_not_written_are_removed(tmp_path, error):
    """As after SIGTERM, when a command writes to runs/verdict/data."""
    (tmp_path / "there").mkdir()
    for name in ("there/new/deep/model", "other/model", "model"):
        with pytest.raises(error), files.replacing(tmp_path / name):
            raise error
        assert [path.name for path in tmp_path.rglob("*")] == ["there"]

    def stopped_beside_other_work():
        with files.replacing(tmp_path / "new" / "deep" / "model"):
            (tmp_path / "new" / "mine.txt").write_text("kept")
            raise error

    with pytest.raises(error):
        stopped_beside_other_work()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "new", "there"]


def test_what_cannot_be_flushed_takes_no_name(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    (tmp_path / "model").mkdir()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"), files.replacing_file(tmp_path / "file") as new:
        new.write_text("new")
    with pytest.raises(OSError, match="no space"), files.replacing(tmp_path / "model") as new:
        (new / "weights").write_text("new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file", "model"]
    assert names(tmp_path / "model") == []


# ---- what may be replaced


def test_what_may_be_replaced(tmp_path):
    def check(folder, overwrite=True):
        files.check_replaceable(folder, "a poem", lambda names: names - {"poem"}, overwrite)

    check(tmp_path / "absent", overwrite=False)
    (tmp_path / "folder").mkdir()
    check(tmp_path / "folder", overwrite=False)
    (tmp_path / "folder" / "poem").write_text("")
    check(tmp_path / "folder")
    with pytest.raises(FileExistsError, match=r"folder exists: .* replace a poem in it with --overwrite"):
        check(tmp_path / "folder", overwrite=False)
    for i in range(7):
        (tmp_path / "folder" / f"{i}").write_text("")
    with pytest.raises(FileExistsError, match=r"not part of a poem \(0, 1, 2, 3, 4 and 2 more\): choose another"):
        check(tmp_path / "folder")
    with pytest.raises(FileExistsError, match="poem is a file: choose another name"):
        check(tmp_path / "folder" / "poem")


# ---- locks

HOLDER = """
import sys
from pathlib import Path
from gpt2_jax import files
with files.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a lock, and the lock's path."""
    path = tmp_path / ".lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        yield path, process
        process.kill()


def test_a_lock_refuses_while_another_process_holds_it_and_ends_with_that(holder):
    path, process = holder
    error = ValueError("busy")
    with pytest.raises(ValueError, match="busy") as caught, files.lock(path, error):
        pass
    assert caught.value is error
    process.kill()
    process.wait()
    with files.lock(path, error), pytest.raises(ValueError, match="busy"), files.lock(path, error):
        pass
    with pytest.raises(ZeroDivisionError), files.lock(path, error):
        raise ZeroDivisionError
    with files.lock(path, error):
        pass


def test_a_lock_waits_and_says_so(holder, capsys):
    path, process = holder
    threading.Timer(0.3, process.stdin.close).start()
    start = time.monotonic()
    with files.lock(path, waiting="waiting for the other"):
        assert time.monotonic() - start > 0.2
    assert capsys.readouterr() == ("", "waiting for the other\n")
    with files.lock(path, waiting="waiting for the other"):
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", files.NO_LOCKS)
def test_on_a_file_system_without_locks_nobody_is_kept_out(tmp_path, monkeypatch, number):
    def acquire(*args, **kwargs):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with files.lock(tmp_path / ".lock", ValueError("busy")), files.lock(tmp_path / ".lock", ValueError("busy")):
        pass
    number = errno.EACCES
    with pytest.raises(PermissionError, match="no locks here"), files.lock(tmp_path / ".lock", ValueError("busy")):
        pass


def test_an_interrupt_while_the_folder_is_made_leaves_nothing(tmp_path, monkeypatch):
    """Python handles a signal when the system call has returned."""
    mkdir = os.mkdir

    def interrupted(path, *args):
        mkdir(path, *args)
        if "new" in str(path):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", interrupted)
        with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "new"):
            pass
    assert not list(tmp_path.iterdir())
