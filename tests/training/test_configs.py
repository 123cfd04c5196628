"""Every recipe in configs/: its head has the command, a small version takes a step, and its full shape is valid."""

import json
import re
import tomllib

import commands
import instructions
import jax
import pytest
from strength import campaign

import gpt2_jax
from gpt2_jax.commands import train
from gpt2_jax.recipe import Recipe, from_dict, to_dict
from gpt2_jax.training import make_plan, make_train_step
from gpt2_jax.training.objective import abstract_batch

CONFIGS = sorted((commands.ROOT / "configs").glob("*.toml"))
QUICK = ("finetune_1558M_lora", "train_shakespeare", "classify_spam")
LORA, NEW, LABELS = (next(path for path in CONFIGS if path.stem == stem) for stem in QUICK)
N_VOCAB = {"shakespeare": 1281}  # else GPT-2's own
SHRUNK = ["--steps", 1, "--batch-size", 2, "--accumulate", 1, "--data.n-tokens", 7, "--optimizer.warmup-steps", 0]
SHRUNK += ["--monitor.sample-every", 0, "--monitor.evaluate-windows", 1]
MESSAGES = "text,label\n" + "".join(f"It was the {i}th time,{'spam' if i % 3 else 'ham'}\n" for i in range(60))
TEXT = "".join(f"It was the {i}th time that he spoke of it.\n" for i in range(997))  # 1/2000 of it is for validation


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request):
    return request.param


def full_config(recipe):
    """The config of the model that a recipe trains; no weights are loaded."""
    model = recipe.model
    if model.source == "shakespeare":
        return gpt2_jax.load_config(gpt2_jax.embedded_model())
    if model.source:
        return gpt2_jax.SIZES[model.source]
    n_vocab = N_VOCAB.get(model.tokenizer, 50257)
    return gpt2_jax.GPT2Config(n_vocab, model.n_ctx, model.n_embd, model.n_head, model.n_layer)


def test_all_are_here():
    assert {path.stem for path in CONFIGS} >= {"finetune_shakespeare", "train_shakespeare", "pretrain_124M"}


def test_its_head_says_the_command(path):
    head = [line for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if line.startswith("#")]
    command = f"python scripts/train.py --config configs/{path.name} --data.path "
    assert any(line.removeprefix("#").strip().startswith(command) for line in head), head


@pytest.mark.parametrize("path", campaign([LORA, NEW, LABELS], CONFIGS), ids=lambda path: path.stem)
def test_it_takes_a_step_when_shrunk_by_options(path, capfd, tmp_path, monkeypatch):
    """The embedded model replaces OpenAI's weights and vocabulary."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_toml(path)
    text = tmp_path / f"text.{'csv' if recipe.objective == 'classification' else 'txt'}"
    text.write_text(MESSAGES if text.suffix == ".csv" else TEXT)
    options = ["--config", path, "--data.path", text.name, "--run", "run", *SHRUNK]
    if recipe.model.source:
        options += ["--model.source", "shakespeare"]
    else:
        options += ["--model.tokenizer", "shakespeare", "--model.n-ctx", 7, "--model.n-embd", 6, "--model.n-head", 3]
        options += ["--model.n-layer", 1]
    if recipe.objective == "instruction":
        instructions.written(tmp_path / "pairs.json")
        options += ["--data.path", "pairs.json", "--data.n-tokens", 0, "--data.test-fraction", 0]
    if recipe.data.val_fraction < 0.01:
        options += ["--data.val-fraction", 0.01]
    with commands.config_of_jax_kept():
        done = commands.caller(train.main, capfd)(*options)
    assert (done.code, done.out) == (0, "run\n"), done.err
    assert "step 1/1: validation loss " in done.err
    config, _ = gpt2_jax.load(tmp_path / "run")
    assert config.n_layer == (4 if recipe.model.source else 1)


@pytest.mark.parametrize(
    "path", campaign([path for path in CONFIGS if path != LORA], CONFIGS), ids=lambda path: path.stem
)
def test_its_full_shape_fits_together(path):
    """A whole step under `jax.eval_shape`, without memory: the state keeps its shapes and dtypes."""
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    recipe = from_dict(Recipe, written | {"mesh": {"data": 1}})
    config = full_config(recipe)
    if recipe.objective == "classification":
        config = config.replace(labels=("ham", "spam"))
    plan = make_plan(config, recipe)
    state = plan.state
    new, metrics = jax.eval_shape(make_train_step(plan), state, abstract_batch(plan))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert {name: leaf.shape for name, leaf in metrics.items()} == dict.fromkeys(
        ("loss", "grad_norm", "learning_rate", "n_tokens", "skipped"), ()
    )
    n_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert n_params == config.n_params
    if recipe.objective == "classification" and recipe.model.source == "124M":
        assert n_params == 124_439_808 + 2 * 768
        trained = sum(leaf.size for leaf in state.trained(plan.trained).values())
        assert trained == 12 * 768**2 + 13 * 768 + 2 * 768 + 2 * 768  # the last block, ln_f and the head
    elif "124M" in path.stem:
        assert n_params == 124_439_808
    elif "1558M" in path.stem:
        assert n_params == 1_557_611_200
        assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < n_params / 100


def test_the_guide_lists_every_field():
    """In the table of its part, with its default."""
    page = (commands.ROOT / "docs" / "guides" / "training.md").read_text(encoding="utf-8")
    table = page.split("## Every setting", 1)[1].split("\n## ", 1)[0]
    parts, part = {"": {}}, ""
    for line in table.splitlines():
        if heading := re.match(r"\| \*\*`\[(\w+)\]`\*\*", line):
            part = heading[1]
            parts[part] = {}
        elif row := re.match(r"\| `(\w+)` \| (.*?[^\\]) \|", line):
            parts[part][row[1]] = row[2]
    defaults = to_dict(Recipe())
    own = {name: value for name, value in defaults.items() if not isinstance(value, dict)}
    assert {name: set(rows) for name, rows in parts.items()} == {
        "": set(own),
        **{name: set(value) for name, value in defaults.items() if isinstance(value, dict)},
    }
    for name, rows in parts.items():
        for field, shown in rows.items():
            default = (defaults[name] if name else own)[field]
            if isinstance(default, bool | int | str) and default not in ("", []):
                wanted = json.dumps(default)
                assert shown.replace("\\|", "|").strip("`") == wanted, f"{name}.{field}"
