"""scripts/evaluate.py: a table or one JSON object on stdout; one clear message and exit status 2 for any mistake."""

import json
import re
import shutil

import commands
import pytest

from gpt2_jax import evaluate
from gpt2_jax.commands import evaluate as command

VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate.\n"
PASSAGES = ["Give me my robe, put on my crown", "What, ho! my lord, my noble lord", "Long live the king"]
QUESTIONS = [
    ("`` Long live the king ! ''", "The XXXXX is here .", ["king", "bat"], "king"),
    ("He is the king .", "It is n't a XXXXX", ["a", "b", "c"], "b"),
]
QUESTIONS = [dict(zip(("context", "question", "candidates", "answer"), texts, strict=True)) for texts in QUESTIONS]
BOOK = """\
1 `` Long live the king ! ''
2 The XXXXX is here .\tking\t\tking|bat

1 He is the king .
2 It is n't a XXXXX\tb\t\ta|b|c
"""


@pytest.fixture(scope="module")
def main():
    with commands.config_of_jax_kept():
        yield command.main


@pytest.fixture
def run(main, capfd, tmp_path, monkeypatch):
    """Call the entry point in this process, in the folder of the files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "verse.txt").write_text(VERSE)
    for name, lines in (
        ("passages.jsonl", [{"text": text} for text in PASSAGES]),
        ("questions.jsonl", QUESTIONS),
    ):
        (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "book.txt").write_text(BOOK)
    return commands.caller(main, capfd)


def table(out: str) -> dict[str, tuple[str, str]]:
    """Return the table's rows: measure -> (value, how)."""
    rows = [re.fullmatch(r"(\S+(?: \S+)*) {2,}(\S+(?: %)?)  (\S.*?) *", line) for line in out.splitlines()[2:]]
    assert all(rows), out
    return {row[1]: (row[2], row[3]) for row in rows}


def close(values: dict) -> dict:
    """Return the same values, to compare up to rounding."""
    return {name: pytest.approx(of, rel=1e-6) if isinstance(of, float) else of for name, of in values.items()}


def assert_refused(done: commands.Run, culprit: str) -> None:
    assert (done.code, done.out) == (2, ""), done
    lines = [line for line in done.err.splitlines() if not line.startswith("model: ")]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("gpt2-evaluate: ")
    assert re.search(culprit, lines[0]), lines[0]


# ---- what is printed


def test_perplexity(run, shakespeare, tokenizer):
    """stdout has the library's numbers, each with its convention. stderr names the model."""
    done = run("--task", "perplexity", "verse.txt")
    assert done.code == 0, done.err
    expected = evaluate.perplexity(*shakespeare, tokenizer, VERSE)
    assert table(done.out) == {
        "perplexity": (f"{expected.perplexity:.6g}", expected.conventions["perplexity"]),
        "bits per byte": (
            f"{expected.bits_per_byte:.6g}",
            "nats / ln 2 / bytes (the first token of each document has no nats)",
        ),
        "nats": (f"{expected.nats:.6g}", "sum of -ln p of the scored tokens"),
        "stride": ("128", expected.conventions["stride"]),
        "documents": ("1", "each scored on its own"),
        "tokens": (str(expected.tokens), "scored tokens: all except the first of each document"),
        "words": ("15", "of the text, separated by white space"),
        "lines": ("2", "newlines of the text"),
        "bytes": (str(len(VERSE)), "of the text in UTF-8"),
    }
    assert done.err == "model: the embedded Shakespeare model, 3,553,024 parameters, float32\n"


def test_perplexity_by_other_conventions(run, shakespeare, tokenizer, model_dir):
    more = {"stride": 31, "per": "word", "bos": True, "detokenizer": "wikitext"}
    options = ["--stride", 31, "--per", "word", "--bos", "--detokenizer", "wikitext", "--model", model_dir]
    done = run("--task", "perplexity", "passages.jsonl", *options, "--limit", 2, "--json")
    assert done.code == 0, done.err
    got = json.loads(done.out)
    expected = vars(evaluate.perplexity(*shakespeare, tokenizer, PASSAGES[:2], **more))
    about = {"task": "perplexity", "file": "passages.jsonl", "model": str(model_dir), "dtype": "float32"}
    assert got == about | close(expected)
    assert (got["documents"], got["words"]) == (2, 15)


def test_lambada(run, shakespeare, tokenizer):
    done = run("--task", "lambada", "passages.jsonl")
    assert done.code == 0, done.err
    expected = evaluate.lambada(*shakespeare, tokenizer, PASSAGES)
    rows = table(done.out)
    assert rows["accuracy"] == (f"{100 * expected.accuracy:.2f} %", expected.conventions["accuracy"])
    assert rows["accuracy with stop word filter"][0] == f"{100 * expected.accuracy_with_stop_word_filter:.2f} %"
    assert rows["perplexity per word"][0] == f"{expected.perplexity_per_word:.6g}"
    assert {name.replace(" ", "_") for name in rows} == expected.conventions.keys()
    got = json.loads(run("--task", "lambada", "passages.jsonl", "--json", "--limit", 1).out)
    assert got["passages"] == 1
    assert got["nats"] == pytest.approx(evaluate.lambada(*shakespeare, tokenizer, PASSAGES[:1]).nats)


def test_cloze_in_both_layouts(run, shakespeare, tokenizer):
    questions = [evaluate.Question(**question) for question in QUESTIONS]
    for detokenizer in ("none", "ptb"):
        expected = vars(evaluate.cloze(*shakespeare, tokenizer, questions, detokenizer=detokenizer))
        for name in ("questions.jsonl", "book.txt"):
            done = run("--task", "cloze", name, "--detokenizer", detokenizer, "--json")
            assert done.code == 0, done.err
            got = json.loads(done.out)
            assert {name: got[name] for name in expected} == close(expected)
    rows = table(run("--task", "cloze", "book.txt").out)
    assert rows["accuracy by chance"][0] == "41.67 %"
    assert rows["questions"][0] == "2"


def test_bfloat16(run, shakespeare, tokenizer):
    got = json.loads(run("--task", "perplexity", "verse.txt", "--dtype", "bfloat16", "--json").out)
    expected = evaluate.perplexity(*shakespeare, tokenizer, VERSE)
    assert got["dtype"] == "bfloat16"
    assert got["nats"] != expected.nats
    assert got["nats"] == pytest.approx(expected.nats, rel=0.01)


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        (("perplexity", "nowhere.txt"), "no such file: nowhere.txt"),
        (("lambada", "."), ". is a folder"),
        (("perplexity", "empty.txt"), "empty.txt is empty"),
        (("perplexity", "short.txt"), "too short to score"),
        (("perplexity", "latin1.txt"), "latin1.txt is not UTF-8"),
        (("lambada", "verse.txt"), "verse.txt, line 1 is not JSON"),
        (("lambada", "broken.jsonl"), "broken.jsonl, line 3 is not JSON"),
        (("lambada", "questions.jsonl"), r'questions.jsonl, line 1 must be an object with a string "text"'),
        (("lambada", "strings.jsonl"), r'strings.jsonl, line 2 must be an object with a string "text"'),
        (("lambada", "word.jsonl"), r"passages\[0\] \(from 0\) has no space before its last word"),
        (("cloze", "passages.jsonl"), r'passages.jsonl, line 1 must be {"context": "...", "question": "... XXXXX'),
        (("cloze", "answer.jsonl"), r"answer.jsonl, line 1 has the answer 'c', which is not one of its candidates"),
        (("cloze", "number.txt"), r"number.txt, line 2 must begin with 2, its sentence number"),
        (("cloze", "fields.txt"), r"fields.txt, line 2 must have the answer and the candidates"),
        (("cloze", "end.txt"), r"end.txt ends with sentences that have no question after them"),
        (("perplexity", "verse.txt", "--stride", 257), "stride must be a whole number, from 1 to 256, not 257"),
        (("perplexity", "verse.txt", "--limit", 0), "--limit must be 1 or more, not 0"),
        (("lambada", "passages.jsonl", "--stride", 5), "--stride is for --task perplexity, not lambada"),
        (("cloze", "questions.jsonl", "--bos"), "--bos is for --task perplexity, not cloze"),
        (("lambada", "passages.jsonl", "--per", "word"), "--per is for --task perplexity, not lambada"),
        (("lambada", "passages.jsonl", "--detokenizer", "ptb"), "--detokenizer is for --task perplexity or cloze"),
        (("perplexity", "verse.txt", "--model", "nothing-here"), "nothing-here"),
    ],
    ids=str,
)
def test_mistakes(run, tmp_path, args, culprit):
    question = QUESTIONS[1] | {"candidates": ["a", "b"], "answer": "c"}
    for name, data in {
        "empty.txt": b" \n",
        "short.txt": b"K",
        "latin1.txt": "caf\xe9".encode("latin-1"),
        "broken.jsonl": b'{"text": "a b"}\n\n{"text": "a\n',
        "strings.jsonl": b'{"text": "a b"}\n"a b"\n',
        "word.jsonl": b'{"text": "word"}\n',
        "answer.jsonl": json.dumps(question).encode(),
        "number.txt": b"1 He is here .\n3 It is a XXXXX\ta\t\ta|b\n",
        "fields.txt": b"1 He is here .\n2 It is a XXXXX\ta\n",
        "end.txt": b"1 He is here .\n2 It is a XXXXX\n",
    }.items():
        (tmp_path / name).write_bytes(data)
    task, file, *options = args
    assert_refused(run("--task", task, file, *options), culprit)


def test_wrong_options(run):
    for args in (("verse.txt",), ("--task", "squad", "verse.txt"), ("--task", "lambada"), ("--no-such-option",)):
        done = run(*args)
        assert (done.code, done.out) == (2, ""), done
        assert "Traceback" not in done.err


def test_a_model_without_a_vocabulary(run, tmp_path, model_dir):
    shutil.copytree(model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("vocab.bpe", "encoder.json"))
    assert_refused(run("--task", "perplexity", "verse.txt", "--model", "model"), r"encoder\.json")


# ---- as a process


def test_help_names_every_option(run):
    done = run("--help")
    assert done.code == 0
    options = ["--task", "--model", "--stride", "--detokenizer", "--per", "--bos", "--dtype", "--limit", "--json"]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    assert [option for option in options if option not in plain] == []


def test_on_a_terminal_a_bar_comes_and_goes(tmp_path):
    """The table then fits in the terminal's width, and nothing is cut."""
    pytest.importorskip("pty", reason="no such terminals here")
    (tmp_path / "verse.txt").write_text(VERSE)
    args = ("--task", "perplexity", "verse.txt")
    with commands.OnATerminal("evaluate", *args, cwd=tmp_path, COLUMNS="79") as user:
        user.until("perplexity.*100%")
        assert user.end() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", user.shown)
    assert max(len(line.rsplit("\r", 1)[-1]) for line in plain.splitlines()) <= 79
    assert re.search(r"\bbytes +81 ", plain)
