"""complete_file: after a kill at any point and a second call, the output equals that of an uninterrupted call."""

import functools
import io
import json
import os
import random
import sys
from pathlib import Path

import forks
import pytest
from killed_completer import SETTINGS, fake
from strength import campaign

from gpt2_jax.generation import jsonl
from gpt2_jax.generation.jsonl import complete_file

TEXTS = [
    "To be",
    "",
    "caf\xe9 \U0001f468\u200d\U0001f469",
    "two\nlines",
    "a\u2028b\x85c",
    '"quoted" \\',
    "\ud83d",
    "last",
]


def write_prompts(path: Path, texts=TEXTS) -> Path:
    """One prompt per line: a string, or an object with other fields; blank lines in between, no newline at the end."""
    lines = [
        json.dumps(text) if i % 3 == 1 else json.dumps({"id": [i, None], "prompt": text, "clé": 1.5})
        for i, text in enumerate(texts)
    ]
    path.write_bytes("\n\n \r\n".join(lines).encode())
    return path


@pytest.fixture
def source(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def target(tmp_path):
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "out.jsonl"


@pytest.fixture
def whole(tmp_path, source):
    """The output of an uninterrupted call."""
    (tmp_path / "undisturbed").mkdir()
    target = tmp_path / "undisturbed" / "out.jsonl"
    assert complete_file(source, target, fake(), SETTINGS, 3) == len(TEXTS)
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]
    return target.read_bytes()


def begin(source, target, n_prompts, batch_size=1):
    """Complete this many prompts, and stop like Ctrl-C."""

    def complete(lines, indices):
        if indices[0] >= n_prompts:
            raise KeyboardInterrupt
        return fake()(lines, indices)

    with pytest.raises(KeyboardInterrupt):
        complete_file(source, target, complete, SETTINGS, batch_size)
    return target.with_name("out.jsonl.part")


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


# ---- what is written


def test_a_line_a_prompt_in_order(source, target, tmp_path):
    calls = tmp_path / "calls"
    assert complete_file(source, target, fake(calls), SETTINGS, 3) == len(TEXTS)
    assert calls.read_text().split("\n")[:-1] == ["0 3", "3 3", "6 2"]
    data = target.read_bytes()
    assert data.endswith(b"\n")
    lines = data[:-1].split(b"\n")  # not splitlines: text has other line breaks
    assert len(lines) == len(TEXTS)
    for i, (line, text) in enumerate(zip(lines, TEXTS, strict=True)):
        record = json.loads(line.decode())
        samples = fake()([{"prompt": text}], [i])[0]["samples"]
        given = {} if i % 3 == 1 else {"id": [i, None], "clé": 1.5}
        assert record == {"prompt": text, **given, "samples": samples, "index": i}
    assert "caf\xe9 \U0001f468\u200d\U0001f469".encode() in lines[2]
    assert r"\ud83d" in lines[6].decode()  # a lone surrogate has no UTF-8


@pytest.mark.parametrize("data", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
def test_no_prompts_give_no_lines(tmp_path, target, data):
    (tmp_path / "empty").write_bytes(data)
    assert complete_file(tmp_path / "empty", target, None, {}, 5) == 0
    assert snapshot(target.parent) == {"out.jsonl": b""}


def test_a_byte_order_mark_and_windows_lines(tmp_path, target):
    (tmp_path / "in").write_bytes('\ufeff{"prompt": "a"}\r\n"b"\r\n'.encode())
    assert complete_file(tmp_path / "in", target, fake(), {}, 5) == 2
    assert [json.loads(line)["prompt"] for line in target.read_text(encoding="utf-8").splitlines()] == ["a", "b"]


def test_input_from_a_pipe(target):
    """Like `--input <(command)`: the pipe can be read only once."""
    receive, send = os.pipe()
    os.write(send, b'"a"\n"b"\n')
    os.close(send)
    if not Path(f"/dev/fd/{receive}").exists():
        pytest.skip("this system gives pipes no name")
    assert complete_file(f"/dev/fd/{receive}", target, fake(), {}, 5) == 2
    os.close(receive)


def test_several_fields(tmp_path, source, target):
    def complete(lines, indices):
        return [{"samples": [], "logprobs": [[-0.5]]} for _ in lines]

    complete_file(source, target, complete, SETTINGS, 3, fields=("samples", "logprobs"))
    assert json.loads(target.read_bytes().split(b"\n")[1]) == {
        "prompt": "", "samples": [], "logprobs": [[-0.5]], "index": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("complete", "message"),
    [
        (lambda lines, indices: [{}], "1 results for 3"),
        (lambda lines, indices: [{"samples": [], "text": ""}] * 3, "'text'"),
        (lambda lines, indices: [{"samples": [float("nan")]}] * 3, "JSON"),
    ],
)
def test_results_that_are_none(source, target, complete, message):
    """No result of such a batch is written."""
    with pytest.raises(ValueError, match=message):
        complete_file(source, target, complete, SETTINGS, 3)
    assert target.with_name("out.jsonl.part").read_bytes().count(b"\n") == 1


# ---- rejected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "x"', "line 3 is not JSON"),
        (b"To be", "line 3 is not JSON"),
        (b'{"text": "x"}', '"prompt"'),
        (b'{"prompt": 5}', '"prompt"'),
        (b'{"prompt": ["x"]}', '"prompt"'),
        (b'["x"]', "line 3 is not a prompt"),
        (b"null", "line 3"),
        (b'{"prompt": "x", "index": 5}', 'line 3 .*"index"'),
        (b'{"prompt": "x", "samples": 5}', 'line 3 .*"samples"'),
        (b'{"prompt": "x", "score": NaN}', "line 3"),
        (b'{"prompt": "x", "score": 1e999}', "line 3"),
        (b'"caf\xe9"', "line 3 .*utf-8"),
        (b"[" * 100_000, "line 3"),
        (b"1" * 5000, "line 3"),
        (b'"a" "b"', "line 3"),
    ],
)
def test_a_malformed_line_is_named_before_anything_is_done(tmp_path, target, line, message):
    (tmp_path / "in.jsonl").write_bytes(b'"fine"\n\n' + line + b'\n"fine"\n')
    with pytest.raises(ValueError, match=rf"in\.jsonl, (?s:.)*{message}") as error:
        complete_file(tmp_path / "in.jsonl", target, None, SETTINGS, 3)
    assert "\n" not in str(error.value)
    assert list(target.parent.iterdir()) == []


def test_paths_that_cannot_be(tmp_path, source, target):
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    hard = tmp_path / "hard.jsonl"
    hard.hardlink_to(source)
    before = source.read_bytes()
    refused = [
        (source, source, ValueError, "is the input"), (source, link, ValueError, "is the input"),
        (source, hard, ValueError, "is the input"), (link, source, ValueError, "is the input"),
        (source, tmp_path / "here" / ".." / source.name, ValueError, "is the input"),
        (tmp_path / "missing", target, FileNotFoundError, "no such file"), (tmp_path, target, ValueError, "folder"),
        (source, tmp_path / "here", ValueError, "folder"), (source, tmp_path / "no" / "x", FileNotFoundError, "no"),
    ]  # fmt: skip
    for a, b, kind, message in refused:
        with pytest.raises(kind, match=message):
            complete_file(a, b, None, SETTINGS, 3)
    for name in ("out.jsonl.part", ".out.jsonl.new"):
        source.rename(target.parent / name)
        with pytest.raises(ValueError, match="is the input"):
            complete_file(target.parent / name, target, None, SETTINGS, 3)
        (target.parent / name).rename(source)
    assert source.read_bytes() == before
    for size in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="batch_size"):
            complete_file(source, target, None, SETTINGS, size)
    assert list(target.parent.iterdir()) == []


def test_a_target_that_exists_is_not_touched(source, target, whole):
    for data in (b"", whole, b"three weeks of work"):
        target.write_bytes(data)
        with pytest.raises(ValueError, match=r"out\.jsonl exists.*--output"):
            complete_file(source, target, None, SETTINGS, 3)
        assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == {"out.jsonl": data}


def test_a_target_that_came_beside_unfinished_work_is_not_touched(source, target):
    for n_done in (0, 3):
        part = begin(source, target, n_done)
        lines = part.read_bytes().split(b"\n", 1)[1]
        target.write_bytes(lines)  # not ours: it has the same lines, but not all of them
        before = snapshot(target.parent)
        with pytest.raises(ValueError, match="exists"):
            complete_file(source, target, None, SETTINGS, 3)
        assert snapshot(target.parent) == before
        target.unlink()
        part.unlink()


def test_two_at_once(source, target, whole):
    """The second is rejected, and the first is not affected."""

    def complete(lines, indices):
        with pytest.raises(ValueError, match=r"another process is writing .*out\.jsonl"):
            complete_file(source, target, None, SETTINGS, 3)
        return fake()(lines, indices)

    assert complete_file(source, target, complete, SETTINGS, 3) == len(TEXTS)
    assert target.read_bytes() == whole


# ---- resuming


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_goes_on_with_any_batch_size(tmp_path, source, target, whole, batch_size):
    begin(source, target, 4, batch_size=2)
    calls = tmp_path / "calls"
    assert complete_file(source, target, fake(calls), SETTINGS, batch_size) == len(TEXTS) - 4
    assert target.read_bytes() == whole
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]
    assert calls.read_text().split()[0] == "4"


def test_torn_at_any_byte(source, target, whole):
    """A killed write may leave any length: complete lines are kept, and an incomplete one is computed again."""
    part = begin(source, target, len(TEXTS) - 1)
    data = part.read_bytes()
    n_header = data.index(b"\n") + 1
    at_lines = {i + k for i, byte in enumerate(data) if byte == 10 for k in (0, 1, 2)}
    for end in sorted({*range(n_header, len(data), 13), *at_lines} - {*range(n_header)}):
        part.write_bytes(data[:end])
        n_whole = data[n_header:end].count(b"\n")
        assert complete_file(source, target, fake(), SETTINGS, 3) == len(TEXTS) - n_whole
        assert target.read_bytes() == whole
        target.unlink()


def test_another_input_or_other_settings_are_named(source, target, whole):
    part = begin(source, target, 3)
    before = part.read_bytes()
    other = dict(SETTINGS, temperature=0.7, seed=3)
    del other["top_k"]
    with pytest.raises(
        ValueError, match=r"temperature was 0\.5 and is 0\.7; top_k was 40 and is not set; seed was not set"
    ) as e:
        complete_file(source, target, None, other, 3)
    assert "model" not in str(e.value)
    assert str(part) in str(e.value)
    prompts = source.read_bytes()
    source.write_bytes(prompts + b'\n"one more"')
    with pytest.raises(ValueError, match=r"input's SHA-256 was [0-9a-f]{64} and is [0-9a-f]{64}.*delete"):
        complete_file(source, target, None, SETTINGS, 3)
    assert part.read_bytes() == before
    source.write_bytes(prompts)
    reordered = json.loads(json.dumps(dict(reversed(SETTINGS.items()))))
    assert complete_file(source, target, fake(), reordered, 3) == len(TEXTS) - 3
    assert target.read_bytes() == whole


@pytest.mark.parametrize("data", [b"", b"three weeks of work", b"[1]\n", b'{"prompt": "x"}\n', b"\xff\n", b"{"])
def test_a_part_file_of_something_else_is_not_touched(source, target, data):
    part = target.with_name("out.jsonl.part")
    part.write_bytes(data)
    with pytest.raises(ValueError, match="exists and is not an unfinished output"):
        complete_file(source, target, None, SETTINGS, 3)
    assert part.read_bytes() == data


@pytest.mark.parametrize("line", [b"junk\n", b"\0\0\0\n", b'{"index": 3}\n', b"[]\n", b"\xff\n", b"{}\n"])
def test_a_part_file_with_a_wrong_line_is_named(source, target, line):
    part = begin(source, target, 2)
    data = part.read_bytes() + line
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"part, line 4 .*delete"):
        complete_file(source, target, None, SETTINGS, 3)
    assert part.read_bytes() == data


def test_a_full_disk(source, target, whole, monkeypatch):
    """An error when the part file starts leaves nothing. An error when the target is made leaves only the part file."""

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.os, "fsync", full)
        with pytest.raises(OSError, match="space"):
            complete_file(source, target, None, SETTINGS, 3)
    assert snapshot(target.parent) == {}
    part = begin(source, target, len(TEXTS) - 1)
    with monkeypatch.context() as patch:
        patch.setattr(jsonl.shutil, "copyfileobj", full)
        with pytest.raises(OSError, match="space"):
            complete_file(source, target, fake(), SETTINGS, 3)
    assert snapshot(target.parent).keys() == {part.name}
    assert complete_file(source, target, None, SETTINGS, 3) == 0
    assert target.read_bytes() == whole


# ---- killed


@pytest.fixture(scope="module")
def fork():
    """Complete `source` into `target` in a child that is killed."""
    if not hasattr(os, "fork"):
        pytest.skip("forks")
    with forks.Forks("killed_completer") as run:
        yield lambda source, target, **how: run(source=str(source), target=str(target), **how)


def check_between(target, whole):
    """A killed process leaves nothing, or the first part of the work, or the complete target."""
    part = target.with_name(f"{target.name}.part")
    if part.exists():
        lines = part.read_bytes().split(b"\n", 1)[1]
        assert whole.startswith(lines)
    assert not target.exists() or target.read_bytes() == whole
    beside = {f"{target.name}.part", f".{target.name}.new", f".{target.name}.lock", target.name}
    assert {path.name for path in target.parent.iterdir()} <= beside


def test_killed_before_each_step(fork, tmp_path, target):
    """Killed before each line of the program and each file operation in turn, then called again."""
    source, undisturbed = write_prompts(tmp_path / "three.jsonl", TEXTS[:3]), tmp_path / "whole.jsonl"
    assert complete_file(source, undisturbed, fake(), SETTINGS, 2) == 3
    whole = undisturbed.read_bytes()
    done = fork(source, target, batch_size=2)
    assert (done.error, target.read_bytes()) == ("", whole)
    steps = done.operations
    assert steps > 150, "nothing was watched"
    chosen = campaign(sorted({*range(0, steps, 9), *range(steps - 60, steps, 4)}), range(steps))
    between = 0
    for step in chosen:
        target.unlink()
        assert fork(source, target, batch_size=2, operation=step).killed
        check_between(target, whole)
        done, left = target.exists(), target.with_name("out.jsonl.part").exists()
        between += done and left
        if done and not left:
            with pytest.raises(ValueError, match="exists and is complete"):
                complete_file(source, target, None, SETTINGS, 2)
        else:
            complete_file(source, target, fake(), SETTINGS, 2)
        assert snapshot(target.parent) == {"out.jsonl": whole}, step
    assert between >= 2
    print(f"\nkilled before {len(chosen)} of {steps} steps; {between} between the last rename and the part file's end")


def test_killed_twice(fork, source, target, whole):
    """A resumed process is killed too, at a random step. In the end everything is there, and nothing twice."""
    rng = random.Random(5)
    steps = fork(source, target).operations
    for _ in range(campaign(4, 25)):
        target.unlink()
        while not target.exists():
            fork(source, target, operation=rng.randrange(steps // 2, steps), batch_size=rng.choice([1, 2, 5]))
            check_between(target, whole)
        fork(source, target)
        assert snapshot(target.parent) == {"out.jsonl": whole}


def n_calls(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def has_grown(log: Path, n: int, said) -> bool:
    return n_calls(log) > n


def test_killed_at_random_moments(fork, tmp_path, target):
    """Kills of a process that completes 97 prompts slowly: every prompt is completed, few of them twice."""
    texts = [f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(97)]
    source, log, rng = write_prompts(tmp_path / "many.jsonl", texts), tmp_path / "log", random.Random(11)
    undisturbed = tmp_path / "whole.jsonl"
    assert complete_file(source, undisturbed, fake(rounds=997), SETTINGS, 97) == 97
    whole = undisturbed.read_bytes()
    kills = completed = asked = 0
    while kills < campaign(12, 60):
        # At a random time, or after some more calls, for slow machines.
        how = {"delay": rng.uniform(0, 0.05)}
        if rng.random() < 0.5:
            how = {"until": functools.partial(has_grown, log, n_calls(log) + rng.randrange(40))}
        size = rng.choice([1, 2, 3, 5])
        kills += fork(source, target, log=str(log), batch_size=size, rounds=997, **how).killed
        check_between(target, whole)
        if target.exists():
            fork(source, target)
            completed += 1
            assert snapshot(target.parent) == {"out.jsonl": whole}
            calls = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
            assert {i for first, n in calls for i in range(first, first + n)} == set(range(97))
            asked += sum(n for _, n in calls)
            target.unlink()
            log.unlink()
    assert fork(source, target, log=str(log), batch_size=5).error == ""
    print(f"\n{kills} kills, {completed} completed on the way, {asked} prompts asked for of {97 * completed}")
    assert completed
    assert asked <= 97 * completed + 5 * kills


# ---- the bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_begins_at_what_was_done(source, target, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    begin(source, target, 5)
    assert "5/8" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    complete_file(source, target, fake(), SETTINGS, 3)
    shown = sys.stderr.getvalue()
    assert "5/8" in shown
    assert "8/8" in shown
    assert "0/8" not in shown


def test_no_bar_elsewhere(source, target, capsys, monkeypatch):
    complete_file(source, target, fake(), SETTINGS, 3)
    target.unlink()
    monkeypatch.setattr(sys, "stderr", Terminal())
    complete_file(source, target, fake(), SETTINGS, 3, shown=False)
    assert sys.stderr.getvalue() == ""
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")
