"""Training a vocabulary: merges equal to the definition's, OpenAI's order and files, the embedded vocabulary."""

import collections
import itertools
import json
import random
from pathlib import Path

import commands
import pytest
import regex
import token_folders
from vocabularies import printable_alphabet

import gpt2_jax
from gpt2_jax.commands import train_tokenizer as command
from gpt2_jax.data.bpe import train_tokenizer, write_tokenizer
from gpt2_jax.tokenizer.openai import SPLIT

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(scope="module")
def text():
    """Words of made-up syllables, most of them frequent, separated by special cases of the splitting pattern."""
    rng = random.Random(3)
    syllables = ["".join(rng.choices("abcdeéβ漢🦊", k=rng.randint(1, 3))) for _ in range(29)]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(199)]
    marks = [" ", " ", " ", "\n", "  ", ", ", "'s ", " 7", "-- ", "\n\n"]
    return "".join(rng.choice(words) + rng.choice(marks) for _ in range(3_001))


@pytest.fixture
def run(capfd):
    return commands.caller(command.main, capfd)


def merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts, i = [], 0
    while i < len(word):
        both = word[i : i + 2] == pair
        parts.append("".join(pair) if both else word[i])
        i += 1 + both
    return tuple(parts)


def by_definition(text: str, n_merges: int) -> list[tuple[str, str]]:
    """Merge the most frequent pair again and again; of equally frequent pairs, the one with the lowest ids."""
    character = {byte: character for character, byte in printable_alphabet().items()}
    ids = {name: i for i, name in enumerate(sorted(character.values()))}
    words = collections.Counter(regex.findall(SPLIT, text))
    words = {tuple(character[byte] for byte in word.encode()): count for word, count in words.items()}
    merges = []
    while len(merges) < n_merges:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids["".join(best)] = len(ids)
        after = collections.Counter()
        for word, count in words.items():
            after[merged(word, best)] += count
        words = after
    return merges


def test_the_merges_are_those_of_the_definition(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    tokenizer = train_tokenizer([tmp_path / "a.txt"], 97)
    assert tokenizer.merges == by_definition(text, 97)


def test_the_ids_are_in_openais_order(tmp_path, text, tokenizer):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    ours = train_tokenizer([tmp_path / "a.txt"], 97)
    assert list(ours.tokens)[:256] == list(tokenizer.tokens)[:256] == list(printable_alphabet())
    assert list(ours.tokens)[256:-1] == ["".join(pair) for pair in ours.merges]
    assert (ours.n_vocab, ours.eot, list(ours.tokens)[-1]) == (256 + 97 + 1, 353, "<|endoftext|>")
    assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode(text)) < len(text.encode()) * 0.7


def test_every_source_gives_the_same(tmp_path, text):
    """Also if a text is cut into pieces at the end of a line."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text, encoding="utf-8", newline="")
    token_folders.write_jsonl(tmp_path / "a.jsonl", [{"body": text}])
    one = train_tokenizer([tmp_path / "texts"], 97)
    assert train_tokenizer([tmp_path / "a.jsonl"], 97, field="body").tokens == one.tokens


def test_runs_of_one_character(tmp_path):
    """They can become the same token in two ways."""
    (tmp_path / "a.txt").write_text(" ".join("-" * n for n in range(1, 70)) * 3)
    tokenizer = train_tokenizer([tmp_path / "a.txt"], 200)
    for n in range(80):
        assert tokenizer.decode(tokenizer.encode("-" * n)) == "-" * n
    assert len(tokenizer.tokens) == 257 + len(tokenizer.merges)


def test_no_merges_and_too_few_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("abab cd")
    assert train_tokenizer([tmp_path / "a.txt"], 0).n_vocab == 257
    assert train_tokenizer([tmp_path / "a.txt"], 50).merges == [("a", "b")]


@pytest.mark.skipif(not CORPUS.is_file(), reason="the text of the embedded model is not here")
def test_the_embedded_vocabulary_made_again(tmp_path, tokenizer, model_dir):
    made = train_tokenizer([CORPUS], 1024)
    assert made.tokens == tokenizer.tokens
    assert made.merges == tokenizer.merges
    write_tokenizer(tmp_path / "v", made)
    assert (tmp_path / "v" / "vocab.bpe").read_bytes() == (model_dir / "vocab.bpe").read_bytes()


def test_the_command(run, tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    done = run(tmp_path / "a.txt", "--output", tmp_path / "v", "--merges", 97)
    assert (done.code, done.out) == (0, f"{tmp_path / 'v'}\n"), done.err
    assert "vocabulary: 354 ids: 256 bytes, 97 merges, <|endoftext|>" in done.err
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["encoder.json", "vocab.bpe"]
    assert gpt2_jax.load_tokenizer(tmp_path / "v").merges == by_definition(text, 97)
    assert (tmp_path / "v" / "vocab.bpe").read_text(encoding="utf-8").startswith("#version: 0.2\n")
    assert json.loads((tmp_path / "v" / "encoder.json").read_text())["<|endoftext|>"] == 353
    again = run(tmp_path / "a.txt", "-o", tmp_path / "v", "--merges", 7)
    assert (again.code, again.out) == (2, "")
    assert "v exists: choose another folder, or replace a vocabulary in it with --overwrite" in again.err
    assert run(tmp_path / "a.txt", "-o", tmp_path / "v", "--merges", 7, "--overwrite").code == 0
    assert gpt2_jax.load_tokenizer(tmp_path / "v").n_vocab == 264


def test_fewer_merges_than_allowed_are_told(run, tmp_path):
    (tmp_path / "a.txt").write_text("abab cd")
    done = run(tmp_path / "a.txt", "-o", tmp_path / "v")
    assert done.code == 0
    assert "1 merge, because no other pair occurs twice (50,000 were allowed)" in done.err


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        (("none.txt",), "no such file or folder: none.txt"),
        (("a.bin",), "a.bin contains token ids, but text is needed"),
        (("empty.txt",), "there is no text in 1 files"),
        (("bad.txt",), "bad.txt is not UTF-8 text: byte 0xff at offset 4"),
        (("a.txt", "--merges", "-1"), "n_merges must be a whole number, 0 or more, not -1"),
        ((), "there is nothing to read"),
    ],
)
def test_a_mistake_is_a_sentence(run, tmp_path, monkeypatch, args, culprit):
    monkeypatch.chdir(tmp_path)
    for name, data in (("a.txt", b"a b"), ("a.bin", b"\1\0"), ("empty.txt", b""), ("bad.txt", b"some\xff")):
        Path(name).write_bytes(data)
    done = run(*args, "-o", "v")
    assert (done.code, done.out) == (2, "")
    assert culprit in done.err
    assert done.err.count("\n") == 1
    assert not Path("v").exists()


def test_other_files_are_not_replaced(tmp_path, tokenizer):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "notes.txt").write_text("three weeks of work")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_tokenizer(tmp_path / "v", tokenizer, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file is a file"):
        write_tokenizer(tmp_path / "file", tokenizer, overwrite=True)
