"""The inspector's numbers are compared with NumPy's in float64 and with published counts; vocabulary; strict JSON."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax import inspection
from gpt2_jax.inspection import plot
from gpt2_jax.params import flatten

CONFIG = tiny_models.CONFIG
EMPTY = dict.fromkeys(("mean", "std", "min", "max", "norm"))
RELEASED = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}


@pytest.fixture
def params():
    return tiny_models.random_params(CONFIG, 11)


def expected_statistics(array) -> dict:
    """Compute the statistics with NumPy's functions, without chunks."""
    wide = np.asarray(array).astype(np.float64)
    return {"mean": wide.mean(), "std": wide.std(), "min": wide.min(), "max": wide.max(), "norm": np.linalg.norm(wide)}


def strict(report) -> dict:
    """Return the report as JSON gives it back. NaN and Infinity, which are not JSON, fail the test."""
    return json.loads(json.dumps(report, allow_nan=False), parse_constant=pytest.fail)


# ---- one tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_statistics_are_numpys(dtype):
    """Over more than two chunks with different means and widths, in every dtype a model may have."""
    rng = np.random.default_rng(7)
    half = inspection.CHUNK + 19
    array = np.concatenate([rng.normal(50, 0.5, half), rng.normal(-3, 2, half + 2)]).astype(jnp.dtype(dtype))
    found = inspection.describe_tensor(jnp.asarray(array) if dtype != "float64" else array)
    assert (found["shape"], found["dtype"], found["count"]) == ([2 * half + 2], dtype, 2 * half + 2)
    assert (found["nan"], found["infinite"]) == (0, 0)
    for name, value in expected_statistics(array).items():
        assert found[name] == pytest.approx(value, rel=1e-11), name


def test_a_small_spread_about_a_large_mean():
    """E[x²] - E[x]², without deviations from the mean, would lose this."""
    array = 1e8 + np.random.default_rng(3).normal(size=(31, 37))
    assert inspection.describe_tensor(array)["std"] == pytest.approx(array.std(), rel=1e-7)


@given(st.lists(st.floats(width=32), max_size=23), st.integers(1, 5))
def test_values_that_are_not_finite_are_counted_and_left_out(values, chunk):
    """For any chunk size, the statistics are those of the finite values, or None if there are none."""
    array = np.array(values, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "CHUNK", chunk)
        found = strict(inspection.describe_tensor(array))
    finite = [value for value in values if math.isfinite(value)]
    assert found["count"] == len(values)
    assert found["nan"] == sum(map(math.isnan, values))
    assert found["infinite"] == sum(map(math.isinf, values))
    scale = max(map(abs, finite), default=0)
    expected = expected_statistics(np.array(finite)) if finite else EMPTY
    assert {name: found[name] for name in EMPTY} == {
        name: value if value is None else pytest.approx(value, rel=1e-9, abs=1e-9 * scale)
        for name, value in expected.items()
    }


def test_numbers_beyond_float64_are_null():
    """Squares of such values overflow. The statistics are None, without a warning."""
    found = strict(inspection.describe_tensor(np.array([1e300, -1e300, 3.0])))
    assert (found["min"], found["max"]) == (-1e300, 1e300)
    assert (found["std"], found["norm"]) == (None, None)
    assert (found["nan"], found["infinite"]) == (0, 0)


def test_a_tensor_looked_at_closely(params):
    """Statistics, quantiles as NumPy's in float64, and the values at the corners."""
    array = np.asarray(params["wte"])
    found = strict(inspection.examine_tensor(params, "wte"))
    assert (found["name"], found["shape"], found["thirds"]) == ("wte", [37, 12], None)
    assert found["norm"] == pytest.approx(np.linalg.norm(array.astype(np.float64)), rel=1e-12)
    quantiles = {float(q): value for q, value in found["quantiles"].items()}
    assert {0.001, 0.25, 0.5, 0.75, 0.999} <= quantiles.keys()
    assert list(quantiles.values()) == pytest.approx(np.quantile(array.astype(np.float64), list(quantiles)), rel=1e-12)
    assert found["rows"]["first"] == {"first": array[0, :3].tolist(), "last": array[0, -3:].tolist()}
    assert found["rows"]["last"] == {"first": array[36, :3].tolist(), "last": array[36, -3:].tolist()}


@pytest.mark.parametrize("leaf", ["w", "b"])
def test_the_thirds_of_c_attn(params, leaf):
    """The columns are those of q, k and v, in this order."""
    array = np.asarray(params["h1"]["attn"]["c_attn"][leaf])
    thirds = inspection.examine_tensor(params, f"h1/attn/c_attn/{leaf}")["thirds"]
    assert list(thirds) == ["q", "k", "v"]
    for i, third in enumerate(thirds.values()):
        own = array[..., 12 * i : 12 * (i + 1)]
        assert third["shape"] == list(own.shape)
        assert {name: third[name] for name in EMPTY} == pytest.approx(expected_statistics(own), rel=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_quantiles_of_narrow_values(params, dtype):
    narrow = params | {"wpe": params["wpe"].astype(dtype).at[3, 5].set(jnp.nan)}
    values = np.asarray(narrow["wpe"]).astype(np.float64)
    found = strict(inspection.examine_tensor(narrow, "wpe"))
    assert found["nan"] == 1
    expected = np.nanquantile(values, [float(q) for q in found["quantiles"]])
    assert list(found["quantiles"].values()) == pytest.approx(expected, rel=1e-12)


def test_a_tensor_of_nothing_finite(params):
    """Every statistic is None, and so are values of a row that are not finite."""
    found = strict(inspection.examine_tensor(params | {"wpe": jnp.full((41, 12), jnp.inf)}, "wpe"))
    assert set(found["quantiles"].values()) == {None}
    assert found["rows"]["last"]["last"] == [None] * 3
    assert {name: found[name] for name in EMPTY} == EMPTY


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("h0/attn/c_atn/w", "h0/attn/c_attn/w"),
        ("model/h1/mlp/c_fc/b", "h1/mlp/c_fc/b"),
        ("h.1.mlp.c_proj.weight", "h1/mlp/c_proj/w"),
        ("wpe.weight", "wpe"),
        ("", "h0/"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(params, asked, meant):
    with pytest.raises(ValueError, match=re.escape(meant)) as refusal:
        inspection.examine_tensor(params, asked)
    assert repr(asked) in str(refusal.value)


# ---- counts and memory


@pytest.mark.parametrize("size", RELEASED)
def test_counts_of_the_released_sizes(size):
    """Counts of the shapes, of the closed form, of the evaluated formula, and the published count are equal."""
    config = gpt2_jax.SIZES[size]
    found = strict(inspection.count_parameters(config, gpt2_jax.abstract_params(config)))
    assert found["counted"] == found["closed_form"] == RELEASED[size]
    assert found["agree"] is True
    assert sum(part["counted"] for part in found["parts"]) == RELEASED[size]
    letters = {letter: of["value"] for letter, of in found["symbols"].items()}
    assert letters == {"V": 50257, "C": 1024, "D": config.n_embd, "L": config.n_layer}
    assert evaluated(found["formula"], letters) == RELEASED[size]
    for part in found["parts"]:
        assert evaluated(part["formula"], letters) == part["counted"] == part["closed_form"], part


def test_an_untied_head_is_a_part_of_its_own():
    config = CONFIG.replace(tie_word_embeddings=False)
    found = strict(inspection.count_parameters(config, gpt2_jax.abstract_params(config)))
    head = config.n_vocab * config.n_embd
    assert found["counted"] == found["closed_form"] == CONFIG.n_params + head
    assert found["agree"] is True
    letters = {letter: of["value"] for letter, of in found["symbols"].items()}
    assert evaluated(found["formula"], letters) == CONFIG.n_params + head
    parts = {part["part"]: (part["counted"], evaluated(part["formula"], letters)) for part in found["parts"]}
    assert parts["lm_head"] == parts["wte"] == (head, head)


def evaluated(formula: str, letters: dict[str, int]) -> int:
    """Evaluate the formula as a reader would."""
    return eval(formula.replace("·", "*").replace("²", "**2"), {}, letters)


def test_a_count_that_does_not_agree_is_said(params):
    """A parameter that moves from one part to another is detected too."""
    params["h1"]["mlp"]["c_fc"]["b"], params["ln_f"]["b"] = params["ln_f"]["b"], params["h1"]["mlp"]["c_fc"]["b"]
    found = inspection.count_parameters(CONFIG, params)
    assert found["counted"] == found["closed_form"] == CONFIG.n_params
    assert found["agree"] is False


@pytest.mark.parametrize("size", RELEASED)
def test_memory_of_the_released_sizes(size):
    """By hand: 4 or 2 bytes per parameter, 2 · L · C · D numbers in the cache, 16 or 8 bytes per parameter to train."""
    config, n = gpt2_jax.SIZES[size].replace(param_dtype="float16"), RELEASED[size]
    found = strict(inspection.memory(config))
    numbers = 2 * config.n_layer * 1024 * config.n_embd
    assert found["inference"] == {
        "float32": {"weights": 4 * n, "cache": 4 * numbers, "total": 4 * (n + numbers)},
        "bfloat16": {"weights": 2 * n, "cache": 2 * numbers, "total": 2 * (n + numbers)},
    }
    assert found["training"] == {
        "float32": {"weights": 4 * n, "gradients": 4 * n, "moments": 8 * n, "total": config.adam_bytes},
        "bfloat16": {"weights": 2 * n, "gradients": 2 * n, "moments": 4 * n, "total": 8 * n},
    }
    assert found["training"]["float32"]["total"] == 16 * n


# ---- the whole report


def test_the_report_on_the_embedded_model(model_dir, shakespeare, tokenizer):
    """Every section is compared with the loader, the tokenizer and the files."""
    _, params = shakespeare
    found = strict(inspection.inspect(model_dir))
    assert (found["directory"], found["form"], found["size"]) == (str(model_dir), "tensorflow", None)
    assert found["hyperparameters"] == json.loads((model_dir / "hparams.json").read_text())
    assert (found["param_dtype"], found["finite"]) == ("float32", True)
    assert found["parameters"]["counted"] == 3_553_024
    assert found["memory"]["inference"]["float32"]["cache"] == 4 * 2 * 4 * 256 * 256
    flat = flatten(params)
    assert {tensor["name"] for tensor in found["tensors"]} == flat.keys()
    assert len(found["tensors"]) == 52
    for tensor in found["tensors"]:
        array = np.asarray(flat[tensor["name"]])
        assert (tensor["shape"], tensor["count"]) == (list(array.shape), array.size)
        for name, value in expected_statistics(array).items():
            assert tensor[name] == pytest.approx(value, rel=1e-9, abs=1e-12), (tensor["name"], name)
    assert {file["name"]: file["bytes"] for file in found["files"]} == {
        path.name: path.stat().st_size for path in model_dir.iterdir()
    }
    vocabulary = found["vocabulary"]
    assert (vocabulary["missing"], vocabulary["n_ids"], vocabulary["end_of_text"]) == (None, 1281, 1280)
    assert (vocabulary["n_merges"], vocabulary["first_merges"][:2]) == (1024, [["Ġ", "t"], ["h", "e"]])
    assert vocabulary["last_merges"][-1] == (model_dir / "vocab.bpe").read_text("utf-8").split("\n")[-2].split(" ")
    assert vocabulary["first_tokens"][0] == {"id": 0, "token": "!", "text": "!"}
    assert vocabulary["last_tokens"][-1] == {"id": 1280, "token": "<|endoftext|>", "text": "<|endoftext|>"}
    assert vocabulary["last_tokens"][0] == {"id": 1276, "token": "Ġplease", "text": " please"}
    assert tokenizer.encode(" please") == [1276]


def test_the_shape_of_a_release_is_recognised(monkeypatch, tmp_path, params):
    """Only the hyperparameters count: dtype and dropout do not."""
    monkeypatch.setattr(inspection, "SIZES", {"tiny": CONFIG.replace(embd_pdrop=0.3)})
    gpt2_jax.save(tmp_path / "model", CONFIG, params, "orbax")
    assert inspection.inspect(tmp_path / "model")["size"] == "tiny"


def test_variants_are_reported(tmp_path):
    """The head is listed with the embeddings, and the picture of the weights has it."""
    config = CONFIG.replace(activation_function="gelu", tie_word_embeddings=False)
    gpt2_jax.save(tmp_path / "model", config, gpt2_jax.init_params(config, jax.random.key(0)), "orbax")
    found = strict(inspection.inspect(tmp_path / "model"))
    assert found["variants"] == {"activation_function": "gelu", "tie_word_embeddings": False}
    assert [tensor["name"] for tensor in found["tensors"]][:3] == ["wte", "wpe", "lm_head"]
    assert found["parameters"]["agree"] is True
    axes = plot.draw(*gpt2_jax.load(tmp_path / "model")).axes
    assert any(text.get_text().startswith("lm_head, RMS 0.02") for text in axes[0].get_legend().get_texts())


@pytest.mark.parametrize("form", ["huggingface", "orbax"])
def test_a_model_of_another_form_without_a_vocabulary(tmp_path, params, form):
    """`missing` says why there is no vocabulary. Progress follows the order of the tensors."""
    gpt2_jax.save(tmp_path / "model", CONFIG, params, form)
    seen = []

    def track(named):
        for pair in named:
            seen.append(pair[0])
            yield pair

    found = strict(inspection.inspect(tmp_path / "model", track))
    assert found["form"] == form
    assert seen == [tensor["name"] for tensor in found["tensors"]]
    assert seen[:2] == ["wte", "wpe"]
    assert seen[2:] == [name for name in flatten(params) if name not in ("wte", "wpe")]
    assert "no vocabulary" in found["vocabulary"].pop("missing")
    assert set(found["vocabulary"].values()) == {None}


def test_a_vocabulary_that_does_not_fit_is_reported(tmp_path, params, tokenizer):
    """The weights are still reported."""
    gpt2_jax.save(tmp_path / "model", CONFIG, params, "orbax")
    tokenizer.to_files(tmp_path / "model" / "encoder.json", tmp_path / "model" / "vocab.bpe")
    found = inspection.inspect(tmp_path / "model")
    assert "1281" in found["vocabulary"]["missing"]
    assert found["parameters"]["counted"] == CONFIG.n_params


def test_values_that_are_not_finite_in_a_model(tmp_path, params):
    """The loader's warning names the tensor. The report counts the values, and is still valid JSON."""
    params["h1"]["ln_2"]["g"] = params["h1"]["ln_2"]["g"].at[:2].set(jnp.nan).at[3].set(-jnp.inf)
    gpt2_jax.save(tmp_path / "model", CONFIG, params, "orbax")
    with pytest.warns(UserWarning, match="h1/ln_2/g"):
        found = strict(inspection.inspect(tmp_path / "model"))
    assert found["finite"] is False
    bad = {t["name"]: (t["nan"], t["infinite"]) for t in found["tensors"] if t["nan"] or t["infinite"]}
    assert bad == {"h1/ln_2/g": (2, 1)}
