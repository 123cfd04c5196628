"""Folders and files replaced in one step."""

import os
import time

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
    """Two renames do it then, and the second failing brings the old folder back."""
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
