"""The data that examples/data makes: the same for each seed, in the form that the recipes read."""

import csv
import subprocess
import sys

from commands import ROOT


def made(path, *options):
    script = ROOT / "examples" / "data" / "make_spam.py"
    subprocess.run([sys.executable, script, path, *options], check=True, capture_output=True, timeout=60)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_spam_is_the_same_for_each_seed_and_has_both_labels(tmp_path):
    few = ("--ham", "200", "--spam", "30")
    rows = made(tmp_path / "one.csv", *few)
    assert rows == made(tmp_path / "again.csv", *few)
    assert rows != made(tmp_path / "other.csv", *few, "--seed", "1")
    assert [sum(row["label"] == label for row in rows) for label in ("ham", "spam")] == [200, 30]
    assert all(row["text"].strip() and "{" not in row["text"] for row in rows)
    texts = [" ".join(row["text"].lower() for row in rows if row["label"] == label) for label in ("ham", "spam")]
    assert all(word in text for word in ("call", "won", "your", "free") for text in texts)
