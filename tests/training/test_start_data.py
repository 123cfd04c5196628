"""`start_data`: text is read as the recipe says, once; a run of an earlier version keeps the text that it read."""

import hashlib
import json

import numpy as np
import pytest
import tiny_runs
import training_steps as ts
from token_folders import expected_ids, held

from gpt2_jax import training
from gpt2_jax.checkpoints import runs
from gpt2_jax.commands import train
from gpt2_jax.tokenizer import fingerprint


def recipe_for(path, **settings):
    return tiny_runs.small(data={"path": str(path), "val_fraction": 0.0} | settings)


def test_text_is_read_as_the_recipe_says(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes('{"text": "caf\xe9<|endoftext|>bar"}\n{"body": 1}\n'.encode("cp1252"))
    folder = tmp_path / "run" / "data"
    settings = {"encoding": "cp1252", "end_of_text": "split", "skip_bad_rows": True}
    data = training.start_data(recipe_for(tmp_path / "a.jsonl", **settings), tokenizer, folder)
    assert held(data.train) == expected_ids(tokenizer, ["caf\xe9", "bar"])
    before = (folder / "train.bin").stat().st_mtime_ns
    training.start_data(recipe_for(tmp_path / "a.jsonl", **settings), tokenizer, folder)
    assert (folder / "train.bin").stat().st_mtime_ns == before
    data = training.start_data(
        recipe_for(tmp_path / "a.jsonl", **settings | {"end_of_text": "text"}), tokenizer, folder
    )
    assert held(data.train) == tokenizer.encode("caf\xe9<|endoftext|>bar")


def test_a_run_of_an_earlier_version_keeps_its_text(tmp_path, tokenizer):
    """It read only the .txt files of a folder, and recorded nothing about encodings."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("Some words.")
    folder, recipe = tmp_path / "run" / "data", recipe_for(tmp_path / "corpus")
    data = training.start_data(recipe, tokenizer, folder)
    digest = hashlib.sha256(b"Some words.").hexdigest()
    origin = {
        "text": hashlib.sha256(f".txt  {digest}\n".encode()).hexdigest(),
        "tokenizer": fingerprint(tokenizer), "val_fraction": 0.0, "split": "auto", "seed": recipe.seed,
    }  # fmt: skip
    assert json.loads((folder / "origin.json").read_text()).items() >= origin.items()
    (folder / "origin.json").write_text(json.dumps(origin))
    before = (folder / "train.bin").stat().st_mtime_ns
    training.start_data(recipe, tokenizer, folder)  # a run that was stopped before its first step
    assert (folder / "train.bin").stat().st_mtime_ns == before
    runs.write_run(tmp_path / "run", ts.config_of(recipe), recipe, {"sha256": data.digests()}, tokenizer)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n')  # it took a step
    (tmp_path / "corpus" / "README.md").write_text("That was left out.")
    assert held(training.start_data(recipe, tokenizer, folder).train) == tokenizer.encode("Some words.")
    (tmp_path / "corpus" / "a.txt").write_text("Other words.")
    with pytest.raises(ValueError, match="has a run on a different text from"):
        training.start_data(recipe, tokenizer, folder)


def test_a_marker_in_the_text_is_told_when_a_run_begins(tmp_path, tokenizer, capfd):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>three")
    for began, path, advice in (
        (True, tmp_path / "a.txt", "if they separate documents, pass --data.end-of-text split\n"),
        (True, tmp_path / "run" / "data", "prepare the text again with --end-of-text split\n"),
        (False, tmp_path / "a.txt", ""),
    ):
        recipe = recipe_for(path)
        data = training.start_data(recipe, tokenizer, tmp_path / "run" / "data")
        train._tell_about(data.manifest, recipe, began)
        told = capfd.readouterr().err
        assert told.endswith(advice) if began else told == ""
        assert told.count("the text has the characters <|endoftext|> 2 times") == began
    train._tell_about(data.manifest, recipe_for(tmp_path / "run" / "data", end_of_text="split"), False)
    assert capfd.readouterr().err == "the prepared text is used as it is: it has end_of_text text\n"


def test_a_file_of_llmc_is_trained_on(tmp_path, tokenizer):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 999
    ids = np.arange(999) % 1281
    (tmp_path / "a.bin").write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    data = training.start_data(recipe_for(tmp_path / "a.bin"), tokenizer, tmp_path / "run" / "data")
    assert held(data.train) == ids.tolist()
