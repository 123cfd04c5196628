"""A file of prompts over several processes: the file of one process, also after interruptions and by other numbers."""

import contextlib
import json
import os
import shutil
import threading

import forks
import killed_completer
import pytest
import several_processes
from killed_completer import fake
from strength import campaign

from gpt2_jax import files, processes, progress
from gpt2_jax.generation import jsonl, jsonl_shares, part_files
from gpt2_jax.processes import Share

SETTINGS = {"temperature": 0.5}
N = 23  # prompts, in batches of 3


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(jsonl_shares, "WAIT", 0.01)


@pytest.fixture
def source(tmp_path):
    """Return prompts with a blank line and a bad one."""
    lines = [json.dumps({"prompt": f"caf\xe9 {i}" * (i % 5), "id": i}, ensure_ascii=i % 2 == 0) for i in range(N - 1)]
    path = tmp_path / "in"
    path.write_text("\n".join([*lines[:4], "", "{bad", *lines[4:]]), encoding="utf-8")
    return path


def run(source, target, share=None, complete=None, settings=SETTINGS, model=lambda: "sha", size=3, **more):
    skip = lambda message: None  # noqa: E731
    share = share or Share()
    complete = complete or fake()
    return jsonl.complete_file(source, target, complete, settings, size, model=model, skip=skip, share=share, **more)


@pytest.fixture
def whole(source, tmp_path):
    """Return the bytes that one process writes."""
    run(source, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "whole").unlink()
    return data


def interrupted(at):
    """A `complete` that is interrupted at its call with number `at`, from 0."""
    calls = iter(range(10**6))

    def complete(lines, indices):
        if next(calls) == at:
            raise KeyboardInterrupt
        return fake()(lines, indices)

    return complete


class Interrupted(Exception):
    """A KeyboardInterrupt of a thread, as a result."""


def results(count, source, target, stops=None, **more):
    """Run connected processes. stops: {index: call that is interrupted}. Return what each returned or raised."""

    def one(share):
        try:
            return run(source, target, share, interrupted((stops or {}).get(share.index, -1)), **more)
        except KeyboardInterrupt as stop:
            raise Interrupted from stop

    return several_processes.in_threads(count, one)


@pytest.mark.parametrize("count", [2, 3, 11])
def test_the_file_of_one_process(source, whole, tmp_path, count):
    """Process 0 returns the number of all lines, the others theirs. Nothing else is left. A second run is refused."""
    log = tmp_path / "log"
    found = several_processes.in_threads(count, lambda share: run(source, tmp_path / "out", share, fake(log)))
    assert (tmp_path / "out").read_bytes() == whole
    starts = [[start for start in range(0, N, 3) if start // 3 % count == i] for i in range(count)]
    assert found == [N, *(sum(min(3, N - start) for start in some) for some in starts[1:])]
    run(source, tmp_path / "again", None, fake(alone := tmp_path / "alone"))
    assert sorted(log.read_text().split("\n")) == sorted(alone.read_text().split("\n"))  # the batches of one process
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "again", "log", "alone"}
    for error in results(count, source, tmp_path / "out"):
        assert "exists and is complete: delete it" in str(error)


@pytest.mark.parametrize("counts", [(3, 3), (3, 2, 1), (1, 3, 2), (2, 1, 1, 2), (3, 1)])
@pytest.mark.parametrize("torn", [0, 1, 40])
def test_interrupted_and_gone_on_with(source, whole, tmp_path, counts, torn):
    """By any number of processes. Finished batches of all are kept, and a kill may have torn the last line."""
    target, log = tmp_path / "out", tmp_path / "log"
    for k, count in enumerate(counts[:-1]):
        # Later processes may find little to do: the others have gone on until they noticed.
        found = results(count, source, target, {count - 1: int(k == 0 or count == 1)})
        assert isinstance(found[-1], Interrupted)
        for error in found[:-1]:
            assert isinstance(error, processes.PeerError)
            assert str(error) == f"the process with index {count - 1} was interrupted"
        paths = sorted(path for path in tmp_path.iterdir() if ".part" in path.name)
        assert paths
        assert not target.exists()
        if torn and len(paths[k % len(paths)].read_bytes().splitlines()) > 1:
            data = paths[k % len(paths)].read_bytes()
            paths[k % len(paths)].write_bytes(data[:-torn])
    before = done(target)
    several_processes.in_threads(counts[-1], lambda share: run(source, target, share, fake(log)))
    assert target.read_bytes() == whole
    again = {int(line.split()[0]) // 3 for line in log.read_text().splitlines()}
    if set(counts) != {1}:  # one process alone begins in the middle of a batch
        finished = {start // 3 for start in range(0, N, 3) if before >= set(range(start, min(start + 3, N)))}
        assert again == set(range(8)) - finished
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "log"}


def done(target):
    """Return the indices of all whole lines in part files."""
    found = set()
    for path in target.parent.glob("out.part*"):
        _, *lines, _ = path.read_bytes().split(b"\n")
        found |= {json.loads(line)["index"] for line in lines}
    return found


def test_one_that_ended_is_started_again_alone(source, whole, tmp_path, capsys):
    """If nothing connects the processes, the others wait, and process 0 says for which."""
    target, waits, failed = tmp_path / "out", threading.Event(), threading.Event()

    first = []

    def one(share):
        share = Share(share.index, share.count)
        if share.index == 0:
            first.append(threading.get_ident())
        if share.index == 1:
            with pytest.raises(KeyboardInterrupt):
                run(source, target, share, interrupted(1))
            failed.set()
            assert waits.wait(60)
        return run(source, target, share)

    sleep = jsonl_shares.time.sleep

    def sleeps(seconds):
        if failed.is_set() and threading.get_ident() in first:
            waits.set()
        sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl_shares.time, "sleep", sleeps)
        found = several_processes.in_threads(3, one)
    assert found == [N, 5, 6]
    assert target.read_bytes() == whole
    assert "waiting for processes with index 1" in capsys.readouterr().err


def test_an_error_elsewhere_ends_a_process_before_its_next_batch(source, tmp_path):
    link, calls, begun = several_processes.Texts(), [], threading.Event()

    def one(share):
        def complete(lines, indices):
            if share.index == 1:
                assert begun.wait(60)
                raise ValueError("no weights here")
            begun.set()
            assert link.get(processes.FAILED, 60)
            calls.append(indices)
            return fake()(lines, indices)

        return run(source, tmp_path / "out", share, complete)

    first, second = several_processes.in_threads(2, one, link)
    assert (type(first), type(second)) == (processes.PeerError, ValueError)
    assert str(first) == "the process with index 1 failed: no weights here"
    assert calls == [[0, 1, 2]]


def test_killed_while_it_finishes(source, whole, tmp_path, monkeypatch):
    """The target is there, and any of the part files. The next run removes what is left, whatever its number."""
    target, kept = tmp_path / "out", tmp_path / "kept"
    results(1, source, target, {0: 1})
    with monkeypatch.context() as patch:
        patch.setattr(jsonl_shares._Lines, "remove", lambda lines: shutil.copytree(tmp_path, kept))
        results(2, source, target)
    parts = sorted(path.name for path in kept.iterdir() if ".part" in path.name)
    assert parts == ["out.part", "out.part-0-of-2", "out.part-1-of-2"]
    for left in (parts, parts[1:], parts[1:2], parts[2:]):  # that of one process is removed first
        for count in (1, 2, 3):
            for name in parts:
                (tmp_path / name).unlink(missing_ok=True)
            for name in left:
                shutil.copyfile(kept / name, tmp_path / name)
            assert results(count, source, target, settings=SETTINGS) == [0] * count
            assert target.read_bytes() == whole
            assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "kept"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_before_each_step(tmp_path, monkeypatch):
    """Process 0, while it completes its share and puts the lines of both in order; then the same call again."""
    (tmp_path / "in").write_text('"a"\n"b"\n"c"\n"d"\n"e"\n')
    (tmp_path / "here").mkdir()
    target, other = tmp_path / "here" / "out", tmp_path / "here" / "out.part-1-of-2"
    with monkeypatch.context() as patch:
        patch.setattr(jsonl_shares._Lines, "remove", lambda lines: None)
        several_processes.in_threads(2, complete := lambda share: again(tmp_path / "in", target, share))
    whole, theirs = target.read_bytes(), other.read_bytes()
    between = 0

    def only_the_other():
        for path in target.parent.iterdir():
            path.unlink()
        other.write_bytes(theirs)

    with forks.Forks("killed_completer") as fork:
        request = {"source": str(tmp_path / "in"), "target": str(target), "batch_size": 2, "count": 2}
        only_the_other()
        done = fork(**request)
        assert (done.error, target.read_bytes()) == ("", whole)
        steps = done.operations
        assert steps > 200, "nothing was watched"
        for step in campaign(sorted({*range(0, steps, 13), *range(steps - 60, steps, 4)}), range(steps)):
            only_the_other()
            assert fork(**request, operation=step).killed
            left = [path for path in target.parent.iterdir() if ".part" in path.name]
            between += target.exists() and bool(left)
            if target.exists() and not left:
                with pytest.raises(ValueError, match="exists and is complete"):
                    complete(Share(0, 2))
            else:
                complete(Share(0, 2))
            assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == {"out": whole}, step
    assert between >= 2


def again(source, target, share):
    return jsonl.complete_file(source, target, fake(), killed_completer.SETTINGS, 2, share=share)


@pytest.mark.parametrize("change", ["a line", "one more line", "one line less"])
def test_another_target_is_not_taken_for_the_result(source, tmp_path, monkeypatch, change):
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(jsonl_shares._Lines, "remove", lambda lines: None)
        results(2, source, target)
    lines = target.read_bytes().splitlines(keepends=True)
    changed = {"a line": [*lines[:-1], b"other\n"], "one more line": [*lines, b"x"], "one line less": lines[:-1]}
    target.write_bytes(b"".join(changed[change]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for error in results(2, source, target):
        assert "exists and is complete: delete it" in str(error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"} == before


def test_other_work_is_refused(source, tmp_path):
    """Other settings, another input, other weights, and lines that were not written there. Nothing is changed."""
    target = tmp_path / "out"
    results(3, source, target, {2: 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tmp_path / "other"
    other.write_text('"a"')

    def refused(culprit, count, source=source, **more):
        for error in results(count, source, target, **more):
            assert culprit in str(error), error
        names = {"in", "other"} | before.keys()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in names - {"other"}} == before

    for count in (1, 2, 3):
        refused("temperature was 0.5 and is 1", count, settings={"temperature": 1})
        refused("the input's SHA-256 was", count, source=other)
        refused("model's SHA-256 was sha and is new", count, model=lambda: "new")
    part = tmp_path / "out.part-1-of-3"
    for wrong in (b"{}\n", b'{"index": 23}\n', b'{"index": "1"}\n', b"\xff\n"):
        whole_lines = before[part.name]
        part.write_bytes(whole_lines + wrong)
        (error,) = results(1, source, target)
        n = whole_lines.count(b"\n") + 1
        assert f"out.part-1-of-3, line {n} is not what was written there" in str(error)
    part.write_bytes(b"mine\n")
    assert "is not an unfinished output" in str(results(2, source, target)[1])


def test_weights_of_another_process_are_noticed(source, tmp_path):
    """Each process checks its own; process 0 checks that all are the same, before it writes the target."""

    def one(share):
        return run(source, tmp_path / "out", share, model=lambda: f"weights {share.index}")

    first, second = several_processes.in_threads(2, one)
    assert "other weights: the model's SHA-256 was weights 1 and is weights 0" in str(first)
    assert isinstance(second, processes.PeerError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_no_two_processes_have_the_same_share(source, tmp_path, index):
    """Process 0 has the lock of a process that works alone."""
    busy = [f"another process is writing {tmp_path / 'out'}:", f"{tmp_path / 'out'} as the one with index 1:"]
    with part_files.alone(tmp_path / "out", index, 2 if index else 1):
        errors = results(2, source, tmp_path / "out")
    assert busy[index] in str(errors[index])
    assert isinstance(errors[1 - index], processes.PeerError)


def test_process_0_shows_the_whole(source, tmp_path, monkeypatch):
    """Its bar counts the lines of all processes. The others show none."""
    bars_shown, updates = [], []

    class Bars:
        def update(self, title, n_done, n):
            updates.append((n_done, n))

    @contextlib.contextmanager
    def bars(*columns, shown, **more):
        bars_shown.append(shown)
        yield Bars() if shown is not False else progress.Bars(None)

    monkeypatch.setattr(progress, "bars", bars)
    results(3, source, tmp_path / "out", {0: 1})
    n_before = len(done(tmp_path / "out"))
    updates.clear()
    bars_shown.clear()  # one that noticed the interruption before its first batch made no bar
    results(3, source, tmp_path / "out")
    assert sorted(map(str, bars_shown)) == ["False", "False", "None"]
    assert updates[0] == (n_before, N)
    assert updates[-1] == (N, N)
    assert updates == sorted(updates)


def test_one_process_leaves_the_files_that_it_did(source, tmp_path, monkeypatch):
    """It neither imports nor uses the module for several."""
    monkeypatch.setitem(__import__("sys").modules, "gpt2_jax.generation.jsonl_shares", None)
    names, replacing = [], files.replacing_file
    monkeypatch.setattr(files, "replacing_file", lambda *args: names.append([a.name for a in args]) or replacing(*args))
    run(source, tmp_path / "out")
    assert names == [["out.part", ".out.new"], ["out", ".out.new"]]
