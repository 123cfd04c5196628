"""Files of commit ffacce7 are still read, and its runs resume: see tests/fixtures/before/README.md."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.params import flatten
from gpt2_jax.recipe import to_dict

BEFORE = Path(__file__).resolve().parents[1] / "fixtures" / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text(encoding="utf-8"))
RUNS = {"plain": "tokens", "lora": "pairs"}  # {run: the text that it trains on}
TIMES = ("seconds", "tokens_per_second", "mfu")


def digest(leaf) -> str:
    return hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()


def digests(params) -> dict[str, str]:
    return {name: digest(leaf) for name, leaf in flatten(params).items()}


def records(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def rounds_as_then() -> bool:
    """Whether XLA gives the same bits here as on the machine where the files were made."""
    x_TD = jnp.asarray(np.sin(np.arange(1536) * 0.37).reshape(96, 16), "float32")
    w_DF = jnp.asarray(np.sin(np.arange(1024) * 0.37).reshape(16, 64), "float32")

    def loss(x, w):
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
        h = jax.nn.gelu(x @ w, approximate=True)
        return -jax.nn.log_softmax(h @ w.T)[:, 3].mean()

    same = digest(jax.jit(jax.grad(loss, 1))(x_TD, w_DF)) == EXPECTED["canary"]
    return same and jax.__version__ == EXPECTED["jax"] and jax.default_backend() == "cpu"


@pytest.fixture(params=RUNS)
def name(request):
    return request.param


@pytest.fixture
def run(tmp_path, name) -> Path:
    """A copy of the run, which a test may resume."""
    with zipfile.ZipFile(BEFORE / f"{name}.zip") as archive:
        archive.extractall(tmp_path / name)
    return tmp_path / name


def test_its_models_are_loaded(run, name):
    config, params = gpt2_jax.load(run)
    assert digests(params) == EXPECTED[name]["stopped"]["best"]
    assert (config.n_vocab, config.n_ctx, config.n_embd, config.n_head) == (280, 32, 12, 2)
    newest, params = gpt2_jax.load(run / "checkpoints" / "3")
    if name == "plain" or rounds_as_then():  # LoRA's matrices are merged while they are read
        assert digests(params) == EXPECTED[name]["stopped"]["checkpoint"]
    assert newest == config == gpt2_jax.load_config(run)


def test_its_vocabulary_is_loaded(run):
    tokenizer = gpt2_jax.load_tokenizer(run)
    text, ids = (EXPECTED["tokenizer"][key] for key in ("text", "ids"))
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_it_goes_on_to_where_it_would_have_come_without_a_stop(run, name):
    expected = EXPECTED[name]["finished"]
    tokenizer = gpt2_jax.load_tokenizer(run)
    data = training.open_prepared(BEFORE / RUNS[name], tokenizer)
    with jax.default_matmul_precision(None if jax.default_backend() == "cpu" else "float32"):
        plan = training.make_plan(gpt2_jax.load_config(run), training.Recipe.from_toml(BEFORE / f"{name}.toml"))
        fitted = training.fit(plan, None, data, run, tokenizer)
    assert (fitted.step, fitted.best_step) == (expected["step"], expected["best_step"])
    metrics, samples = records(run / "metrics.jsonl"), records(run / "samples.jsonl")
    if rounds_as_then():
        assert digests(fitted.params) == expected["params"]
        assert digests(gpt2_jax.load(run)[1]) == expected["best"]
        assert fitted.best_loss == expected["best_loss"]
        assert metrics == expected["metrics"]
        assert samples == expected["samples"]
        return
    found = flatten(fitted.params)
    with np.load(BEFORE / f"{name}.npz") as arrays:
        assert found.keys() == set(arrays)
        for leaf, array in arrays.items():
            np.testing.assert_allclose(found[leaf], array, rtol=1e-5, atol=1e-6, err_msg=leaf)
    assert [one.keys() for one in metrics] == [one.keys() for one in expected["metrics"]]
    for one, other in zip(metrics, expected["metrics"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert [one["step"] for one in samples] == [one["step"] for one in expected["samples"]]


def test_its_text_is_read(run, name):
    data = training.open_prepared(BEFORE / RUNS[name], gpt2_jax.load_tokenizer(run))
    data.check()
    for split, expected in EXPECTED["data"][RUNS[name]].items():
        tokens = getattr(data, split)
        ids, counts = tokens.read(0, tokens.n_tokens)
        assert {"n_tokens": tokens.n_tokens, "ids": digest(ids), "counts": digest(counts)} == expected


def _with_later_fields(fields, defaults=None):
    """Return the fields of an earlier version, and the defaults of those that came later."""
    defaults = to_dict(training.Recipe()) if defaults is None else defaults
    return {
        name: _with_later_fields(fields.get(name, {}), default)
        if isinstance(default, dict)
        else fields.get(name, default)
        for name, default in defaults.items()
    }


def test_a_recipe_with_every_field_means_the_same():
    recipe = training.Recipe.from_toml(BEFORE / "every_field.toml")
    expected = _with_later_fields(EXPECTED["every_field"])
    assert json.loads(json.dumps(dataclasses.asdict(recipe))) == expected
