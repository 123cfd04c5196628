"""Processed weights give the activations, logits, attributions and scores of TransformerLens's processed model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from bridge import HOOKS, as_torch, bridge_of, hook_of
from forward import CONFIG, some_tokens

from gpt2_jax import research
from gpt2_jax.research import folding

pytestmark = pytest.mark.parity

BOUND = 1e-13  # relative to the largest value, in float64; measured: at most 1.8e-15
NORMS = [f"{norm}/{name}" for norm in ("ln_1", "ln_2") for name in ("scale", "normalized")]  # ours have no g and b left
SAME = [name for name in HOOKS if "ln_" not in name and name not in research.BRANCHES] + NORMS


@pytest.fixture(scope="module")
def models():
    """Return our model with random biases and gains, its processed form, their processed bridge, and tokens."""
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        config = CONFIG.replace(param_dtype="float64", compute_dtype="float64")
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), naive.weights(CONFIG))
        bridge = bridge_of(config, params)
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # theirs processes all weights in float32
        bridge.enable_compatibility_mode(disable_warnings=True)
        patch.undo()
        tokens_BT = some_tokens(config, 3, 23)
        yield (config, params), folding.process_weights(config, params), bridge, tokens_BT


def error(ours, theirs):
    """The largest difference relative to the largest value."""
    return naive.error(np.asarray(ours), theirs.detach().numpy())


def test_every_activation_and_the_logits(models):
    plain, (config, params), bridge, tokens_BT = models
    logits_BTV, theirs = bridge.run_with_cache(as_torch(tokens_BT).long())
    out, ours = research.forward(config, params, tokens_BT, capture=".")
    assert error(out.logits, logits_BTV) < BOUND
    names = ["embed", "pos_embed", "ln_f/scale", "ln_f/normalized"]
    names += [f"h{i}/{name}" for i in range(config.n_layer) for name in SAME]
    for name in names:
        tensor = theirs[hook_of(name)]
        if name.endswith("attn/scores"):
            ours[name], tensor = (np.tril(array) for array in (ours[name], tensor.numpy()))
            assert naive.error(ours[name], tensor) < BOUND, name
            continue
        assert error(ours[name], tensor) < BOUND, name
    _, unprocessed = research.forward(*plain, tokens_BT, capture="h1/(resid_pre|attn/z)$")
    assert error(unprocessed["h1/resid_pre"], theirs[hook_of("h1/resid_pre")]) > 0.01
    assert error(unprocessed["h1/attn/z"], theirs[hook_of("h1/attn/z")]) > 0.01


def test_the_centered_stream_of_the_unprocessed_model(models):
    """What a dictionary trained on their model reads. It is also that of a tied model with centered writing weights."""
    (config, params), _, bridge, tokens_BT = models
    _, theirs = bridge.run_with_cache(as_torch(tokens_BT).long())
    names = "embed|resid|(attn|mlp)/out"
    _, ours = research.forward(config, params, tokens_BT, capture=names)
    centered = folding.center_writing_weights(config, params)
    _, tied = research.forward(config, centered, tokens_BT, capture=names)
    for name, stream_BTD in ours.items():
        assert error(research.centered_stream(stream_BTD), theirs[hook_of(name)]) < BOUND, name
        assert error(stream_BTD, theirs[hook_of(name)]) > 1e-3, name
        if name == "pos_embed" or name.endswith("/out"):
            assert error(tied[name], theirs[hook_of(name)]) < BOUND, name
    offset_BT1 = params["wte"][tokens_BT].mean(-1, keepdims=True)
    assert error(tied["h2/resid_post"] - offset_BT1, theirs[hook_of("h2/resid_post")]) < BOUND


def test_the_unembedding(models):
    plain, processed, bridge, tokens_BT = models
    for w_DV, b_V in (folding.unembedding(*processed), folding.unembedding(plain[0], folding.center_unembed(plain[1]))):
        assert error(w_DV, bridge.W_U) < BOUND
        assert error(b_V, bridge.b_U) < BOUND
    out, ours = research.forward(*plain, tokens_BT, capture="ln_f/normalized")
    w_DV, b_V = folding.unembedding(*plain)
    assert naive.error(ours["ln_f/normalized"] @ w_DV + b_V, out.logits) < BOUND


@pytest.mark.parametrize("by", ["component", "head", "neuron"])
def test_logit_attribution(models, by):
    _, (config, params), bridge, tokens_BT = models
    answers, against = some_tokens(config, 2, 3, seed=7)
    _, cache = bridge.run_with_cache(as_torch(tokens_BT).long())
    if by == "component":
        stack, labels = cache.decompose_resid(return_labels=True)
    else:
        by_head = by == "head"
        results = cache.stack_head_results if by_head else cache.stack_neuron_results
        stack, labels = results(config.n_layer, return_labels=True)
    at_last = stack[:, :, -1:]
    theirs = cache.logit_attrs(
        at_last, as_torch(answers[:, None]).long(), pos_slice=[22], incorrect_tokens=as_torch(against[:, None]).long()
    )
    found = research.logit_attribution(
        config, params, tokens_BT, answers=answers[:, None], against=against[:, None], by=by
    )
    parts = {"component": ("attn/out", "mlp/out"), "head": ("attn/z",), "neuron": ("mlp/post",)}[by]
    ours = np.stack([found.parts[name] for name in parts], 1).reshape(-1, 3, 1)  # layer by layer
    if by == "component":
        ours = np.concatenate([[found.parts["embed"], found.parts["pos_embed"]], ours])
    assert len(labels) == len(ours)
    assert error(ours, theirs) < BOUND


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_composition_scores(models, kind):
    plain, processed, bridge, _ = models
    theirs = bridge.all_composition_scores(kind.upper()).scores
    assert error(research.composition_scores(*processed, kind), theirs) < BOUND
    assert error(research.composition_scores(*plain, kind), theirs) > 1e-3
