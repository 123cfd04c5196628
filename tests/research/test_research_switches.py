"""Every public function of the research package under JAX's switches: the results are those without the switch."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax import tree

from gpt2_jax import load_tokenizer, research
from gpt2_jax.research import surgery

SWITCHES = {
    "rank_promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
    "strict_dtypes": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "debug_nans": functools.partial(jax.debug_nans, True),
}
CONFIG = tiny_models.CONFIG
TOKENS, SOURCE = np.random.default_rng(4).integers(0, CONFIG.n_vocab, (2, 2, 6))
MASK = np.array([[False, True, True, True, True, False], [True] * 6])
BYTES = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)  # ids in the smallest dtype
STREAM = np.random.default_rng(5).normal(size=(2, 3, CONFIG.n_embd)).astype(np.float32)
EDITS = [
    research.add("h0/attn/z", 0.5, positions=2, heads=1),
    research.scale("h1/mlp/out", 0.3, positions=slice(1, 3)),
    research.replace("h1/attn/out", np.ones(12), positions=[0]),
]
KEY = jax.random.key(1)
METRIC = research.logit_difference([1, 2], 3)
MADE = {"AXES", "BRANCHES", "pictures", "surgery"}  # data and modules
MADE |= {"Difference", "CausalTrace", "Edit", "Eraser", "Probe", "StoredActivations", "Translators"}  # results
MADE |= {"activation_names", "answer_probability", "logit_difference", "open_activations"}  # and the edits, made above:
MADE |= {"add", "patch", "replace", "scale"}


def calls(config, params):
    """Return {name of a public function: calls of it}; the names of surgery are in it too."""
    model, other = (config, params), tree.map(lambda leaf: leaf * 0.5, params)
    patching = functools.partial(research.activation_patching, *model, TOKENS, SOURCE)
    means = {f"h{i}/mlp/out": STREAM[0, 0] for i in range(2)}
    circuit = research.ov_circuit(*model, 0, 1)
    return {
        "forward": [lambda: research.forward(*model, TOKENS, MASK, capture=".", edits=EDITS)],
        "logit_lens": [
            lambda: research.logit_lens(*model, TOKENS, MASK, edits=EDITS),
            lambda: research.logit_lens(*model, BYTES, names="resid_mid"),
        ],
        "stream_logits": [
            lambda: research.stream_logits(*model, STREAM),
            lambda: research.stream_logits(*model, STREAM[0, 0].tolist()),
            lambda: jax.jit(research.stream_logits, static_argnums=0)(*model, jnp.asarray(STREAM, jnp.float16)),
        ],
        "head_scores": [lambda: research.head_scores(*model, TOKENS, MASK, edits=EDITS)],
        "mean_attention": [lambda: research.mean_attention(*model, TOKENS, MASK, to={"any": np.tri(6, dtype=bool)})],
        "padded": [lambda: research.padded(config, [[1], [2, 3]])],
        "repeated_tokens": [lambda: research.repeated_tokens(config, KEY, 3, 4, first=2)],
        "activation_patching": [
            lambda: patching(METRIC, mask_BT=MASK),
            lambda: patching(METRIC, "attn/pattern", each=("head", "position"), at=[3, -2]),
            lambda: patching(lambda logits: logits.mean(), "attn/z", each=(), at=None),
            lambda: research.activation_patching(*model, TOKENS, means, METRIC, "mlp/out", heads=None),
        ],
        "attribution_patching": [lambda: research.attribution_patching(*model, TOKENS, SOURCE, METRIC, mask_BT=MASK)],
        "causal_tracing": [lambda: research.causal_tracing(*model, TOKENS[:1], [1, 2], KEY, n_samples=2)],
        "attention_knockout": [lambda: research.attention_knockout(*model, TOKENS, METRIC, slice(0, -1), mask_BT=MASK)],
        "logit_attribution": [lambda: research.logit_attribution(*model, TOKENS, MASK, answers=3).flat()[1]],
        "residual_parts": [lambda: research.residual_parts(*model, TOKENS, MASK)],
        "qk_circuit": [lambda: research.qk_circuit(*model, 0, 1).norm()],
        "ov_circuit": [circuit.dense, circuit.svd, circuit.norm],
        "composition_scores": [lambda: research.composition_scores(*model, "k")],
        "copying_scores": [lambda: research.copying_scores(*model, ln_f=True)],
        "top_tokens": [lambda: research.top_tokens(*model, STREAM[0, 0])],
        "fold_layer_norm": [lambda: research.fold_layer_norm(*model)],
        "center_unembed": [lambda: research.center_unembed(params)],
        "center_reading_weights": [lambda: research.center_reading_weights(config, research.fold_layer_norm(*model))],
        "center_writing_weights": [lambda: research.center_writing_weights(*model)],
        "centered_stream": [
            lambda: research.centered_stream(STREAM),
            lambda: jax.jit(research.centered_stream)(STREAM),
        ],
        "fold_value_biases": [lambda: research.fold_value_biases(*model)],
        "process_weights": [lambda: research.process_weights(*model)[1]],
        "resize_vocabulary": [lambda: surgery.resize_vocabulary(*model, load_tokenizer("shakespeare"), ["#%"])[1]],
        "untie_head": [lambda: research.untie_head(*model)[1]],
        "unembedding": [lambda: research.unembedding(*model)],
        "leace": [lambda: research.leace(STREAM, BYTES)(STREAM)],
        "linear_probe": [lambda: research.linear_probe(STREAM.reshape(6, -1), BYTES.ravel(), folds=2)],
        "identity_translators": [lambda: research.identity_translators(config)],
        "train_tuned_lens": [lambda: research.train_tuned_lens(*model, TOKENS, steps=2, batch_size=2)],
        "harvest": [lambda: harvested(*model)],
        "ablate_heads": [lambda: surgery.ablate_heads(*model, [(0, 1)], mean=np.ones((1, 4), np.float32))],
        "ablate_neurons": [lambda: surgery.ablate_neurons(*model, [(0, 1)])],
        "prune_heads": [lambda: surgery.prune_heads(*model, [(0, 1), (1, 2)])],
        "prune_neurons": [lambda: surgery.prune_neurons(*model, [(0, 1), (1, 2)])],
        "split_heads": [lambda: surgery.split_heads(*model, 0)],
        "join_heads": [lambda: surgery.join_heads(*model, 0, surgery.split_heads(*model, 0))],
        "arrange_layers": [lambda: surgery.arrange_layers(*model, [1, 0])[1]],
        "drop_layers": [lambda: surgery.drop_layers(*model, [1])[1]],
        "repeat_layers": [lambda: surgery.repeat_layers(*model, [1])[1]],
        "swap_layers": [lambda: surgery.swap_layers(*model, 0, 1)[1]],
        "low_rank": [lambda: surgery.low_rank(params, "h0/mlp/c_fc/w", 3), lambda: jitted(surgery.low_rank, params, 3)],
        "kept_energy": [lambda: surgery.kept_energy(params, "wpe"), lambda: jitted(surgery.kept_energy, params)],
        "map_params": [lambda: surgery.map_params(lambda name, leaf: leaf * 2, params)],
        "select": [lambda: surgery.select(params, "wpe")],
        "diff": [lambda: [row.max_abs for row in surgery.diff(params, other)]],
        "interpolate": [lambda: surgery.interpolate(params, other, 0.3)],
        "average": [lambda: surgery.average([params, other], [1, 2])],
        "task_vector": [lambda: surgery.task_vector(params, other)],
        "apply_task_vector": [lambda: surgery.apply_task_vector(params, surgery.task_vector(params, other), 0.5)],
    }


def harvested(config, params):
    with tempfile.TemporaryDirectory() as folder:
        stored = research.harvest(config, params, list(TOKENS), folder, "resid_pre$", shown=False)
        return {name: np.array(stored[name][:]) for name in stored.names}


def jitted(function, params, *rank):
    return jax.jit(lambda params: function(params, "h0/mlp/c_fc/w", *rank))(params)


def results(config, params):
    return {name: [tree.map(np.asarray, call()) for call in found] for name, found in calls(config, params).items()}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    config = CONFIG.replace(param_dtype=request.param, compute_dtype=request.param)
    params = tree.map(lambda leaf: leaf.astype(request.param), tiny_models.random_params(CONFIG, 0, 0.3))
    return config, params, results(config, params)


def test_every_public_function_is_here():
    names = {*research.__all__, *surgery.__all__} - MADE
    assert set(calls(CONFIG, tiny_models.random_params(CONFIG, 0))) == names


@pytest.mark.parametrize("switch", SWITCHES)
def test_results_do_not_depend_on_the_switch(model, switch):
    """To the bit: the same programs run."""
    config, params, expected = model
    with SWITCHES[switch]():
        found = results(config, params)
    tree.map(np.testing.assert_array_equal, found, expected)
