"""The directory that files are fetched into: existing files, a full disk, other processes, damaged weights."""

import _thread
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_release
import misbehaving_server as server_that
import pytest
from fake_release import fetch, path, put, right_names

from gpt2_jax.release import download, known, parallel, transfer
from gpt2_jax.release.known import DATA, FILES, INDEX

RELEASE = fake_release.made_up()
BODY = RELEASE[DATA]
pytestmark = pytest.mark.usefixtures("small_release")


# ---- existing files


def test_nothing_touches_the_network_or_the_directory_when_all_is_right(tmp_path, monkeypatch):
    put(tmp_path, RELEASE)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
    monkeypatch.setattr(download, "transfer", None)
    assert fetch(tmp_path, "http://127.0.0.1:9", files=FILES) == tmp_path
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before


def flipped(body):
    return body[:7] + bytes([body[7] ^ 1]) + body[8:]


DAMAGE = {
    "flipped": flipped,
    "cut": lambda body: body[:-1],
    "longer": lambda body: body + b"\n",
    "empty": lambda body: b"",
    "XML": lambda body: server_that.XML + b" " * (len(body) - len(server_that.XML)),
}
NOT_SEEN = {(name, "flipped") for name in (DATA, INDEX, "model.ckpt.meta")}  # `verify` checks the first two
UNKNOWN_NOT_SEEN = {("model.ckpt.meta", "cut"), ("model.ckpt.meta", "longer"), ("checkpoint", "longer")} | NOT_SEEN
UNKNOWN_NOT_SEEN |= {("checkpoint", "cut"), ("hparams.json", "longer")}  # only the newline at the end


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_fetched_again_and_no_other(tmp_path, server, name, how, known, monkeypatch):
    monkeypatch.setattr(download, "expectations", lambda size: fake_release.expectations(RELEASE, known))
    wrong = DAMAGE[how](RELEASE[name])
    put(tmp_path, RELEASE | {name: wrong})
    fetch(tmp_path, server, files=FILES)
    if (name, how) in (NOT_SEEN if known else UNKNOWN_NOT_SEEN):
        assert server.requests == []
    else:
        assert [asked.path for asked in server.requests] == [path(name)]
        assert right_names(tmp_path, RELEASE) == set(FILES)


def test_a_wrong_file_stays_until_a_right_one_is_there(tmp_path, server):
    put(tmp_path, RELEASE | {"vocab.bpe": b"mine"})
    server.always[path("vocab.bpe")] = server_that.status(404)
    with pytest.raises(OSError, match="404"):
        fetch(tmp_path, server, files=FILES)
    assert (tmp_path / "vocab.bpe").read_bytes() == b"mine"


@pytest.mark.parametrize("wrong", [b'{"n_vocab": 37}', b"[" * 100_000, b"\xff\xfe", b'{"n_vocab": 38, "n_ctx": 11}'])
def test_hparams_must_be_those_of_the_size(tmp_path, wrong):
    (tmp_path / "hparams.json").write_bytes(wrong)
    assert "hparams.json" in known.is_hparams(fake_release.CONFIG)(tmp_path / "hparams.json")
    (tmp_path / "hparams.json").write_text('{"n_vocab":37,"n_ctx":11,"n_embd":15,"n_head":5,"n_layer":2}')
    assert "another model" in known.is_hparams(fake_release.CONFIG)(tmp_path / "hparams.json")


@pytest.mark.parametrize("pointed", ["model.ckpt", "/their/folder/model.ckpt", r"C:\\models\\model.ckpt"])
def test_the_pointer_may_name_the_folder_of_another_machine_but_no_other_files(tmp_path, pointed):
    pointer = tmp_path / "checkpoint"
    pointer.write_text(f'model_checkpoint_path: "{pointed}"\n')
    assert known.is_pointer(pointer) is None
    pointer.write_text(f'model_checkpoint_path: "{pointed}-1000"\n')
    assert "model_checkpoint_path" in known.is_pointer(pointer)


@pytest.mark.parametrize(
    ("part", "starts"),
    [(BODY, []), (BODY + b"x", [None]), (BODY[:-1], [len(BODY) - 1]), (b"", [None])],
    ids=["whole", "longer", "one byte short", "empty"],
)
def test_what_a_killed_process_left_is_used_where_it_can_be(tmp_path, server, part, starts):
    (tmp_path / f"{DATA}.part").write_bytes(part)
    fetch(tmp_path, server)
    assert server.starts(path(DATA)) == starts
    assert right_names(tmp_path, RELEASE) == {DATA}
    assert not (tmp_path / f"{DATA}.part").exists()


# ---- a full disk


def test_a_disk_too_small_is_told_before_anything_is_fetched(tmp_path, server, monkeypatch):
    (tmp_path / f"{DATA}.part").write_bytes(BODY[:1001])
    usage = type(download.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1009, 1009))
    needed = sum(map(len, RELEASE.values())) - 1001
    with pytest.raises(
        OSError, match=f"{re.escape(str(tmp_path))} has no room.*{needed:,} bytes.* 1,009 free"
    ) as caught:
        fetch(tmp_path, server, files=FILES)
    assert caught.value.errno == errno.ENOSPC
    assert server.requests == []
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - needed, needed))
    fetch(tmp_path, server, files=FILES)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_told_and_keeps_what_arrived(tmp_path, server, monkeypatch, number):
    """The disk accepts part of a chunk, as real disks do, and then nothing."""
    real, room = transfer._writable, 10007

    class Nearly:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if not (fits := max(room - self.file.tell(), 0)):
                raise OSError(number, os.strerror(number))
            return self.file.write(data[:fits])

    monkeypatch.setattr(transfer, "_writable", lambda part, mode: Nearly(real(part, mode)))
    with pytest.raises(
        OSError, match=rf"^no room left on the disk while writing {tmp_path}.*free some space"
    ) as caught:
        fetch(tmp_path, server)
    assert caught.value.errno == number
    assert (tmp_path / f"{DATA}.part").read_bytes() == BODY[:room]
    monkeypatch.undo()
    monkeypatch.setattr(download, "expectations", lambda size: fake_release.expectations(RELEASE))
    fetch(tmp_path, server)
    assert server.starts(path(DATA)) == [None, room]
    assert right_names(tmp_path, RELEASE) == {DATA}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_device_that_is_full(tmp_path, server):
    (tmp_path / f"{DATA}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"no room left on the disk while writing {tmp_path}"):
        fetch(tmp_path, server)


def test_a_directory_that_cannot_be_one(tmp_path, server):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a directory"):
        fetch(tmp_path / "file", server)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/file/124M: "):
        fetch(tmp_path / "file" / "124M", server)
    (tmp_path / DATA).mkdir()
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/{DATA}: "):
        fetch(tmp_path, server)


# ---- several processes, and interrupts

TWO = """
import os, sys, fake_release
from gpt2_jax.release import download
files = fake_release.made_up(); download.expectations = lambda size: fake_release.expectations(files)
print("ready", flush=True); sys.stdin.readline()
fake_release.fetch(sys.argv[1], sys.argv[2], files=download.FILES)
"""


def test_two_processes_at_once_fetch_each_file_once(tmp_path, server):
    asked, go_on = threading.Event(), threading.Event()
    server.always[path(DATA)] = lambda handler, body: (asked.set(), go_on.wait(30), server_that.right(handler, body))
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", TWO, tmp_path, server.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support"), "JAX_PLATFORMS": "cpu"},
        )
        for _ in range(2)
    )
    for process in (first, second):
        assert process.stdout.readline() == "ready\n"
    first.stdin.write("go\n")
    first.stdin.flush()
    assert asked.wait(30)
    second.stdin.write("go\n")
    second.stdin.flush()
    told = second.stderr.readline()
    assert told == f"gpt2-jax: another process is fetching into {tmp_path}: waiting for it\n"
    go_on.set()
    assert [process.communicate(timeout=30)[1] for process in (first, second)] == ["", ""]
    assert (first.returncode, second.returncode) == (0, 0)
    assert right_names(tmp_path, RELEASE) == set(FILES)
    assert sorted(asked.path for asked in server.requests) == sorted(map(path, FILES))


def test_an_error_stops_the_other_files_and_what_arrived_of_them_stays(tmp_path, server):
    server.always[path(DATA)] = server_that.stall(1009)
    server.always[path("vocab.bpe")] = server_that.slow(7, 0.1, until=21)  # the other is at its byte 1009 by then
    server.files[path("vocab.bpe")] = RELEASE["vocab.bpe"][:-1] + b"?"
    start = time.monotonic()
    with pytest.raises(OSError, match=r"vocab\.bpe of GPT-2 124M .*wrong file: its sha256 is [0-9a-f]{64} instead"):
        fetch(tmp_path, server, files=[DATA, "vocab.bpe"], timeout=60)
    assert time.monotonic() - start < 30, "nobody waits for the one that stalls"
    assert (tmp_path / f"{DATA}.part").read_bytes() == BODY[:1009]
    server.always.clear()


def test_ctrl_c_stops_at_once_and_frees_the_directory(tmp_path, server, monkeypatch):
    server.script[path(DATA)] = [lambda h, body: (server_that.cut(1009)(h, body), _thread.interrupt_main(),
                                                  h.owner.released.wait())]  # fmt: skip
    monkeypatch.setattr(parallel, "GRACE", 0.1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path, server, timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    fetch(tmp_path, server)
    server.released.set()
    assert right_names(tmp_path, RELEASE) == {DATA}
    threading.Event().wait(0.05)
    assert right_names(tmp_path, RELEASE) == {DATA}


@pytest.mark.parametrize("held", ["no answer yet", "no body yet", "no byte past the end"])
def test_one_that_was_stopped_touches_nothing_any_more(tmp_path, server, held):
    """A stopped thread may wake up later, when another fetch has made progress."""
    stop, asked, go_on, outcome = threading.Event(), threading.Event(), threading.Event(), []

    def late(handler, body):
        if held == "no body yet":
            handler.start = None
            body = handler.right_head(body)
        asked.set()
        go_on.wait(30)
        if held == "no answer yet":
            server_that.ignores_range()(handler, body)
        elif held == "no body yet":
            handler.send(body)
        else:
            server_that.refuses_range(handler, body)

    def run():
        try:
            transfer.transfer(server.url + path(DATA), part, len(BODY), timeout=30, attempts=1, backoff=0, stop=stop,
                              report=lambda *_: None)  # fmt: skip
        except transfer.Stopped:
            outcome.append("stopped")

    server.script[path(DATA)] = [late]
    (part := tmp_path / f"{DATA}.part").write_bytes(BODY[:101])
    thread = threading.Thread(target=run)
    thread.start()
    assert asked.wait(30)
    stop.set()
    part.write_bytes(BODY[:1009])
    go_on.set()
    thread.join()
    assert outcome == ["stopped"]
    assert part.read_bytes() == BODY[:1009]
