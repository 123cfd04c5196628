"""Prompts from a stream: the same lines as from a file, however they arrive."""

import io
import json
import os
import threading

import hypothesis
import hypothesis.strategies as st
import pytest
from killed_completer import fake

from gpt2_jax.generation.jsonl import complete_file
from gpt2_jax.generation.prompt_lines import Reader
from gpt2_jax.generation.prompt_streams import complete_stream, lines_as_they_come

TEXTS = st.text(max_size=5)
LINE = st.one_of(
    TEXTS.map(json.dumps),
    st.fixed_dictionaries({"prompt": TEXTS, "id": st.integers() | st.none()}).map(json.dumps),
    st.sampled_from(["", "  ", "{", "[1]", '{"prompt": 3}', '{"prompt": "x", "index": 1}', '"a" "b"', "\ufeff"]),
)


def through_a_pipe(data: bytes, sizes: list[int]):
    """Return what a reader of a pipe gets if the data is written in pieces of these sizes."""
    reading, writing = os.pipe()

    def write():
        rest, some = data, iter(sizes)
        while rest:
            n = next(some, len(rest))
            os.write(writing, rest[:n])
            rest = rest[n:]
        os.close(writing)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield from lines_as_they_come(reading)
    finally:
        thread.join()
        os.close(reading)


@hypothesis.given(st.lists(LINE, max_size=8), st.lists(st.integers(1, 9), max_size=9), st.booleans(), st.integers(1, 4))
def test_a_stream_gives_the_lines_of_a_file(tmp_path_factory, lines, sizes, ended, batch_size):
    """In any pieces, with or without a newline at the end; bad lines become records of their errors in both."""
    folder, data = tmp_path_factory.mktemp("lines"), ("\n".join(lines) + "\n" * ended).encode()
    (folder / "in").write_bytes(data)
    told = []
    n_lines = complete_file(folder / "in", folder / "out", fake(), {}, 3, skip=told.append)
    output, messages = io.BytesIO(), []
    reader = Reader(folder / "in", ("samples",), skip=messages.append)
    assert complete_stream(through_a_pipe(data, sizes), output, fake(), reader, batch_size) == n_lines
    assert output.getvalue() == (folder / "out").read_bytes()
    assert messages == told
    records = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [record["index"] for record in records] == list(range(n_lines))
    assert [record["error"] for record in records if "error" in record] == told
    numbers = [record["line"] for record in records if "error" in record]
    assert all(f"line {number} " in message for number, message in zip(numbers, told, strict=True))


def test_lines_before_a_bad_one_are_completed():
    output = io.BytesIO()
    with pytest.raises(ValueError, match="somewhere, line 4 is not JSON"):
        complete_stream([[b'"a"', b'"b"', b'"c"', b"{", b'"d"']], output, fake(), Reader("somewhere"), 2)
    assert [json.loads(line)["prompt"] for line in output.getvalue().splitlines()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="batch_size"):
        complete_stream([], output, fake(), Reader("x"), 0)


def test_a_long_line_takes_linear_time():
    """It arrives in hundreds of pieces, which are joined once."""
    (line,) = (line for some in through_a_pipe(b"x" * 20_000_000, []) for line in some)
    assert len(line) == 20_000_000


def test_the_check_of_a_prompt_names_its_line(tmp_path):
    def check(fields):
        if fields["prompt"] == "b":
            raise ValueError("not b")

    (tmp_path / "in").write_text('"a"\n\n"b"\n')
    with pytest.raises(ValueError, match="in, line 3: not b"):
        complete_file(tmp_path / "in", tmp_path / "out", None, {}, 3, check=check)
    assert complete_file(tmp_path / "in", tmp_path / "out", fake(), {}, 3, check=check, skip=lambda message: None) == 2
    assert json.loads((tmp_path / "out").read_text().splitlines()[1]) == {
        "line": 3, "error": f"{tmp_path / 'in'}, line 3: not b", "index": 1,
    }  # fmt: skip
