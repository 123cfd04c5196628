"""run.json: what it holds, and what may change when a run is resumed."""

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies as st
from tiny_models import CONFIG

from gpt2_jax.checkpoints.runs import FREE, Run, check_resumable, read_run, write_run
from gpt2_jax.recipe import Classification, Data, Instruction, Lora, Mesh, Model, Monitor, Optimizer, Recipe

DATA = {"name": "plays", "sha256": {"train.bin": "0a1b"}, "n_tokens": 1009}
RECIPE = Recipe(optimizer=Optimizer(learning_rates=(("wte", 0.5), (".*", 1.0))), monitor=Monitor(prompts=("Ünï\n", "")))
CHANGES = {  # another valid value for each field of a recipe
    "steps": 7, "epochs": 2.5, "batch_size": 16, "accumulate": 2, "seed": 5, "compute_dtype": "bfloat16", "remat": True,
    "attention": "plain", "model": Model(dropout=0.2), "data": Data(n_tokens=17),
    "objective": "classification", "classification": Classification(pooling="mean"),
    "instruction": Instruction(loss_on="all"), "optimizer": Optimizer(weight_decay=0.0), "lora": Lora(rank=3),
    "mesh": Mesh(data=3), "monitor": Monitor(save_every=3),
}  # fmt: skip
MAY = {"steps", "epochs", "accumulate", "remat", "attention", "mesh", "monitor"}


def test_what_is_written_is_read(tmp_path, tokenizer):
    config = CONFIG.replace(param_dtype="bfloat16", n_vocab=tokenizer.n_vocab)
    assert write_run(tmp_path / "a b" / "r[1]", config, RECIPE, DATA, tokenizer) is False
    run = read_run(tmp_path / "a b" / "r[1]")
    assert (run.config, run.recipe, run.data) == (config, RECIPE, DATA)
    assert {path.name for path in (tmp_path / "a b" / "r[1]").iterdir()} == {"run.json", "encoder.json", "vocab.bpe"}
    told = json.loads((tmp_path / "a b" / "r[1]" / "run.json").read_text(encoding="utf-8"))
    assert told["gpt2_jax_run"] == 1
    assert told["config"]["n_embd"] == CONFIG.n_embd
    unset = {"attention", "labels", "pooling"}
    assert set(told["config"]) == {field.name for field in dataclasses.fields(CONFIG)} - unset


def test_attention_is_written_with_the_recipe_alone_and_only_if_it_is_set(tmp_path):
    """Versions before the field read the runs of those who leave it alone, and the models of all."""
    for attention, written in (("auto", {}), ("plain", {"attention": "plain"})):
        recipe = Recipe(attention=attention)
        write_run(tmp_path / attention, CONFIG.replace(attention=attention), recipe, DATA)
        told = json.loads((tmp_path / attention / "run.json").read_text(encoding="utf-8"))
        assert "attention" not in told["config"]
        assert {name: told["recipe"][name] for name in told["recipe"] if name == "attention"} == written
        assert read_run(tmp_path / attention).recipe == recipe


def test_later_fields_of_lora_are_written_only_if_they_are_set(tmp_path):
    """Versions before these fields read the runs of those who leave them alone."""
    later = {"dropout": 0.1, "ranks": (("c_fc", 3),), "full": "ln_f"}
    for name, lora in (("plain", Lora(rank=3)), ("set", Lora(rank=3, **later))):
        write_run(tmp_path / name, CONFIG, Recipe(lora=lora), DATA)
        told = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))["recipe"]["lora"]
        assert told.keys() - {"rank", "alpha", "targets"} == (later.keys() if name == "set" else set())
        assert read_run(tmp_path / name).recipe == Recipe(lora=lora)


def test_every_field_of_a_recipe_has_a_change_here():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("field", CHANGES)
def test_a_resumed_run_may_change_what_is_to_come_alone(tmp_path, field):
    before = Recipe()
    write_run(tmp_path, CONFIG, before, DATA)
    now = dataclasses.replace(before, **{field: CHANGES[field]})
    if field in MAY:
        assert write_run(tmp_path, CONFIG, now, DATA) is True
        assert read_run(tmp_path).recipe == now
        return
    with pytest.raises(ValueError, match=rf"other settings: recipe\.{field}.* was .* and is ") as error:
        write_run(tmp_path, CONFIG, now, DATA)
    assert "\n" not in str(error.value)
    assert read_run(tmp_path).recipe == before


def test_all_that_differs_is_listed(tmp_path, tokenizer):
    write_run(tmp_path, CONFIG, Recipe(), DATA, tokenizer)
    now = Recipe(seed=3, optimizer=Optimizer(learning_rate=0.5), steps=3)
    other = DATA | {"sha256": {"train.bin": "ffff"}}
    with pytest.raises(ValueError, match="other settings") as error:
        write_run(tmp_path, CONFIG.replace(n_layer=3), now, other)
    listed = (
        "config.n_layer was 2 and is 3", "recipe.seed was 0 and is 3", "tokenizer was",
        "recipe.optimizer.learning_rate was 0.0001 and is 0.5", 'data.sha256.train.bin was "0a1b" and is "ffff"',
    )  # fmt: skip
    assert all(text in str(error.value) for text in listed)
    assert "steps" not in str(error.value)


def test_data_may_have_moved(tmp_path):
    write_run(tmp_path, CONFIG, Recipe(data=Data(path="here")), DATA)
    assert write_run(tmp_path, CONFIG, Recipe(data=Data(path="there")), DATA | {"name": "other"})


def test_free_names_are_whole_names():
    assert not FREE.fullmatch("recipe.steps2")
    assert not FREE.fullmatch("config.n_layer")
    assert not FREE.fullmatch("data.sha256.path")


def test_a_folder_of_other_things_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("three years of work")
    with pytest.raises(FileExistsError, match=r"files that are not part of a run \(thesis\.tex\)"):
        write_run(tmp_path, CONFIG, Recipe(), DATA)
    with pytest.raises(FileExistsError, match="is a file"):
        write_run(tmp_path / "thesis.tex", CONFIG, Recipe(), DATA)
    (tmp_path / "run.json").write_text('{"of": "another program"}')
    with pytest.raises(FileExistsError, match=r"run\.json, thesis\.tex"):
        write_run(tmp_path, CONFIG, Recipe(), DATA)
    assert (tmp_path / "run.json").read_text() == '{"of": "another program"}'
    with pytest.raises(FileNotFoundError, match="is not a training run's folder"):
        read_run(tmp_path)


def test_a_run_killed_as_it_began_is_begun_again(tmp_path, tokenizer):
    """Kills between steps: with prepared text, a partial run.json, or no vocabulary yet."""
    (tmp_path / "data").mkdir()
    (tmp_path / f".run.json.{'0a' * 16}").write_text('{"gpt2')
    assert write_run(tmp_path, CONFIG, Recipe(), DATA, tokenizer) is False
    (tmp_path / "vocab.bpe").unlink()
    assert write_run(tmp_path, CONFIG, Recipe(), DATA, tokenizer) is True
    assert (tmp_path / "vocab.bpe").is_file()


def test_a_users_notes_in_a_run_stay(tmp_path):
    write_run(tmp_path, CONFIG, Recipe(), DATA)
    (tmp_path / "notes.txt").write_text("note")
    assert write_run(tmp_path, CONFIG, Recipe(), DATA) is True
    assert (tmp_path / "notes.txt").read_text() == "note"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda told: told.update(gpt2_jax_run=2), "version 2"),
        (lambda told: told.pop("recipe"), "must hold a config and a recipe"),
        (lambda told: told["recipe"].update(speed=3), "speed is not a recipe field"),
        (lambda told: told["config"].update(n_head=5), "n_head"),
        (lambda told: told["config"].pop("n_ctx"), "n_ctx"),
    ],
)
def test_a_malformed_run_json_is_told(tmp_path, change, what):
    write_run(tmp_path, CONFIG, Recipe(), DATA)
    told = json.loads((tmp_path / "run.json").read_text())
    change(told)
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=rf"run\.json .*{what}"):
        read_run(tmp_path)


@hypothesis.given(st.binary(max_size=40))
def test_a_run_json_of_anything_is_told(tmp_path_factory, junk):
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_bytes(b'{"gpt2_jax_run": 1, ' + junk)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_run(folder)


def test_the_check_alone():
    old = Run(CONFIG, Recipe(), DATA, None)
    check_resumable("run", old, dataclasses.replace(old, recipe=Recipe(steps=3)))
    with pytest.raises(ValueError, match=r"recipe\.seed was 0 and is 1"):
        check_resumable("run", old, dataclasses.replace(old, recipe=Recipe(seed=1)))
