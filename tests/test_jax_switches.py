"""The main calls under JAX's switches: they work, with the results that they have without the switch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_runs
from strength import campaign

import gpt2_jax
from gpt2_jax import evaluate, research
from gpt2_jax.params import flatten
from gpt2_jax.research import trees
from gpt2_jax.training import fit, make_plan, prepare

CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=40, n_embd=12, n_head=2, n_layer=1)
KEY, RUN_PARAMS = jax.random.key(5), tiny_runs.params()  # made without a switch: these calls are the caller's own
PROMPTS = [[1, 2, 3], [4]]
TOKENS = [[1, 2, 3, 4, 5]]
TEXT = "To be, or not to be, that is the question: whether it is nobler in the mind."
EDITS = [
    research.add("h0/attn/z", 0.5, positions=2, heads=1),
    research.scale("h0/mlp/out", 0.3, positions=slice(1, 3)),
    research.replace("ln_f/out", np.ones(12), positions=[0]),
]
SWITCHES = {
    "transfer_guard": functools.partial(jax.transfer_guard, "disallow"),
    "rank_promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
    "strict_dtypes": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "debug_nans": functools.partial(jax.debug_nans, True),
    "debug_infs": functools.partial(jax.debug_infs, True),
    "x64": functools.partial(jax.enable_x64, True),
    "threefry": functools.partial(jax.threefry_partitionable, False),
    "leaks": jax.checking_leaks,
    "matmul_highest": functools.partial(jax.default_matmul_precision, "highest"),
}
PRECISIONS = campaign(["bfloat16"], ["float32", "default", "high", "bfloat16", "tensorfloat32"])
SAMPLED = {"seed": 3, "top_k": 40, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.2, "overflow": "slide"}


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory):
    with tiny_runs.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def params():
    return tiny_models.random_params(CONFIG, 0, scale=0.3)


def model_calls(config, params, folder):
    """Loading and saving, the forward pass, its gradient, and new params."""
    gpt2_jax.save(folder, config, params)
    loaded_config, loaded = gpt2_jax.load(folder)
    assert loaded_config.replace(compute_dtype=config.compute_dtype) == config
    tokens = jax.device_put(np.array(TOKENS, np.int32))
    mask = jax.device_put(np.array([[False, True, True, True, True]]))

    forward = jax.jit(gpt2_jax.GPT2(config).apply)

    def loss(params):
        return gpt2_jax.GPT2(config).apply({"params": params}, tokens).logits[..., 3].mean()

    return {
        "loaded": flatten(loaded)["h0/mlp/c_fc/w"],
        "logits": forward({"params": params}, tokens).logits,
        "masked": forward({"params": params}, tokens, mask).logits,
        "cached": forward({"params": params}, tokens, None, gpt2_jax.init_cache(config, 1, 8)).logits,
        "gradient": jax.jit(jax.grad(loss))(params)["h0"]["attn"]["c_attn"]["w"],
        "new params": gpt2_jax.init_params(config, KEY)["wte"],
    }


def generation_calls(config, params, tokenizer, n_new=45):
    generate = functools.partial(gpt2_jax.generate, config, params, PROMPTS)
    ids, logprobs = generate(n_new, **SAMPLED, logprobs=2)
    text = "".join(gpt2_jax.stream(config, params, [1, 2], tokenizer, n_new // 3, stop_strings=["zzz"]))
    return {
        "greedy": generate(n_new // 3, temperature=0),
        "sampled": ids,
        "plain": generate(n_new // 3, seed=7, edits=EDITS[0].replace(positions=None)),
        "text": text,
        "logprobs": logprobs[1].chosen,
        "alternatives": logprobs[0].top_ids.tolist(),
        "score": gpt2_jax.score(config, params, [TOKENS[0] * 20])[0].logprobs,
        "perplexity": np.log(evaluate.perplexity(config, params, tokenizer, TEXT).perplexity),
    }


def research_calls(config, params):
    out, captured = research.forward(config, params, TOKENS, capture=".", edits=EDITS)
    lens = research.logit_lens(config, params, TOKENS)
    other = [TOKENS[0][::-1]]
    metric = research.logit_difference(3, 4)
    circuit = research.ov_circuit(config, params, 0, 0)
    return {
        "edited": out.logits,
        **captured,
        "lens": lens.next_logprobs,
        "lens ids": np.asarray(lens.ids).tolist(),
        "patching": research.activation_patching(config, params, TOKENS, other, metric),
        "attribution patching": research.attribution_patching(config, params, TOKENS, other, metric)["h0/resid_pre"],
        "attribution": research.logit_attribution(config, params, TOKENS, answers=3).flat()[1],
        "heads": research.head_scores(config, params, TOKENS).previous,
        "circuit": circuit.dense(),
        "folded": research.fold_layer_norm(config, params)["h0"]["attn"]["c_attn"]["b"],
        "averaged": trees.average([params, params])["wpe"],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(tiny_runs.TEXT)
    return prepare([folder / "text.txt"], folder / "tokens", tokenizer, val_fraction=0.2, split="tail", shown=False)


def training_calls(data, tokenizer, folder):
    """A run of two steps with dropout, an evaluation, samples and a checkpoint."""
    monitor = {"evaluate_every": 2, "sample_every": 2, "sample_tokens": 5, "prompts": ["The "], "tensorboard": False}
    recipe = tiny_runs.small(steps=2, model={"dropout": 0.1}, monitor=monitor)
    fitted = fit(make_plan(tiny_runs.CONFIG, recipe), RUN_PARAMS, data, folder, tokenizer)
    samples = (folder / "samples.jsonl").read_text()
    return {"loss": fitted.best_loss, "params": flatten(gpt2_jax.load(folder)[1])["wte"], "samples": samples}


def same(found, expected, tolerance):
    """Check that results are equal to `tolerance`; the loss of a run, which is 7.1, to twice this.

    Float32 numbers of this size are 4.8e-7 apart.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, list | str):
            assert found[name] == value, name
        else:
            bound = 2 * tolerance if name == "loss" else tolerance
            np.testing.assert_allclose(
                np.asarray(found[name], np.float64), np.asarray(value, np.float64), rtol=0, atol=bound, err_msg=name
            )


def all_calls(config, params, data, tokenizer, folder):
    return {
        **model_calls(config, params, folder / "saved"),
        **generation_calls(config, params, tokenizer),
        **research_calls(config, params),
        **training_calls(data, tokenizer, folder / "run"),
    }


@pytest.fixture(scope="module")
def plain(params, data, tokenizer, tmp_path_factory):
    return all_calls(CONFIG, params, data, tokenizer, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("switch", SWITCHES)
def test_results_do_not_depend_on_the_switch(params, data, tokenizer, plain, tmp_path, switch):
    """Equal ids and texts, and numbers equal up to the rounding of sums in another order."""
    with SWITCHES[switch]():
        found = all_calls(CONFIG, params, data, tokenizer, tmp_path)
    same(found, plain, tolerance=6e-7)  # measured 1.5e-7, of trained params, and 6.9e-7, of the loss


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_does_not_depend_on_the_precision_of_products(params, plain, tmp_path, precision):
    """All other calls compute their products as the model does."""
    with jax.default_matmul_precision(precision):
        found = model_calls(CONFIG, params, tmp_path)
    same(found, {name: plain[name] for name in found}, tolerance=6e-7)


def test_calls_with_jit_disabled(params, tokenizer, tmp_path):
    """Every operation is then a call of its own, which takes long: fewer tokens, without runs and patches.

    (Its one training step takes two minutes, so it is not here.)
    """

    def calls(folder):
        gpt2_jax.save(folder, CONFIG, params)
        out, captured = research.forward(CONFIG, params, TOKENS, capture=".", edits=EDITS)
        return {
            **flatten(gpt2_jax.load(folder)[1]),
            **generation_calls(CONFIG, params, tokenizer, n_new=6),
            **captured,
            "edited": out.logits,
            "lens": research.logit_lens(CONFIG, params, TOKENS, edits=EDITS).logprobs,
        }

    plain = calls(tmp_path / "plain")
    with jax.disable_jit():
        found = calls(tmp_path / "found")
    same(found, plain, tolerance=4e-6)  # measured 9.5e-7, of log-probabilities down to -9


@pytest.mark.parametrize("switch", ["rank_promotion", "strict_dtypes"])
def test_bfloat16_under_the_rules_of_promotion(params, tokenizer, tmp_path, switch):
    """Arrays of several dtypes meet: compute_dtype, float32 sums and params."""
    config = CONFIG.replace(compute_dtype="bfloat16")
    plain = {**model_calls(config, params, tmp_path / "plain"), **research_calls(config, params)}
    with SWITCHES[switch]():
        found = {**model_calls(config, params, tmp_path / "found"), **research_calls(config, params)}
        assert len(gpt2_jax.generate(config, params, PROMPTS, 5)[1]) == 5
    same(found, plain, tolerance=0)


def test_the_callers_switches_are_as_before_and_hold_between_pieces(params, tokenizer):
    """Also in the middle of a stream, and after one that was not read to its end."""
    with jax.numpy_rank_promotion("raise"), jax.threefry_partitionable(False):
        pieces = gpt2_jax.stream(CONFIG, params, [1, 2], tokenizer, 20)
        next(pieces)
        assert jax.config.jax_numpy_rank_promotion == "raise"
        assert not jax.config.jax_threefry_partitionable
        with pytest.raises(ValueError, match="rank"):
            jnp.ones(2) + jnp.ones((2, 2))
        pieces.close()
        with pytest.raises(ValueError, match="n_ctx"):
            gpt2_jax.generate(CONFIG, params, PROMPTS, 99)
        assert jax.config.jax_numpy_rank_promotion == "raise"
