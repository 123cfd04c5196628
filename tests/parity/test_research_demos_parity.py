"""TransformerLens's demos, ported: each test does in both libraries what a demo does, and compares the numbers.

No port has more lines than the demo's code with hooks, but for options of `detect_head` that are written out here. All
runs are on the same unprocessed weights.
"""

import functools

import bridge as bridges
import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
import tiny_models
from toy_induction import INDUCTION, induction_toy

import gpt2_jax
from gpt2_jax import research

pytestmark = pytest.mark.parity

BOUND = 1e-5  # relative to the largest value; measured: 1.2e-6, with --full 2e-6
CONFIG = tiny_models.CONFIG  # 2 layers of 3 heads
TOKENS, CLEAN = np.random.default_rng(5).integers(1, CONFIG.n_vocab, (2, 4, 11))
TOKENS[:, 0] = CLEAN[:, 0] = 0  # id 0 stands for BOS
ANSWER, WRONG = np.array([5, 11, 7, 30]), np.array([2, 23, 9, 1])  # of each row
LAYERS = range(CONFIG.n_layer)


@pytest.fixture(scope="module")
def params():
    return tiny_models.random_params(CONFIG, 3, scale=0.4)


@pytest.fixture(scope="module")
def model(params):
    return bridges.bridge_of(CONFIG, params).requires_grad_(True)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tokens(torch):
    return torch.tensor(TOKENS)


@pytest.fixture(scope="module")
def clean_cache(model, torch):
    return model.run_with_cache(torch.tensor(CLEAN))[1]


METRIC = research.logit_difference(ANSWER, WRONG)


def logit_diff(logits):
    """The IOI demo's metric in torch: the difference of two logits at the last token, mean over the prompts."""
    rows = range(len(logits))
    return (logits[rows, -1, ANSWER] - logits[rows, -1, WRONG]).mean()


def assert_close(ours, theirs, bound=BOUND, least=1e-3):
    """Compare relative to the largest value. The numbers must differ from one another: `least` is their range."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    assert np.ptp(theirs) > least
    assert naive.error(ours, theirs) < bound


# ---- Main_Demo


def test_ablation_of_a_head(params, model, tokens):
    """Main demo: set the values of head 1 in layer 0 to zero, and compare the losses per token."""

    def head_ablation_hook(v, hook):
        v[:, :, 1, :] = 0.0
        return v

    hooks = [("blocks.0.attn.hook_v", head_ablation_hook)]
    theirs = model.run_with_hooks(tokens, return_type="loss", loss_per_token=True, fwd_hooks=hooks)

    scores = gpt2_jax.score(CONFIG, params, TOKENS, edits=research.scale("h0/attn/v", 0.0, heads=1))
    assert_close(-np.stack([row.logprobs for row in scores]), theirs)


def test_patching_of_the_residual_stream(params, model, tokens, clean_cache, torch):
    """Main demo: patch the clean stream at each layer and position into the corrupted run; the change of the metric."""

    def residual_stream_patching_hook(resid_pre, hook, position):
        resid_pre[:, position, :] = clean_cache[hook.name][:, position, :]
        return resid_pre

    theirs = torch.zeros(CONFIG.n_layer, 11)
    for layer in LAYERS:
        for position in range(11):
            hook = functools.partial(residual_stream_patching_hook, position=position)
            patched = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", hook)])
            theirs[layer, position] = logit_diff(patched)

    assert_close(research.activation_patching(CONFIG, params, TOKENS, CLEAN, METRIC), theirs)

    _, clean = research.forward(CONFIG, params, CLEAN, capture="resid_pre$")  # the same from parts

    def patched(layer, position):
        edit = research.patch("resid_pre", clean, positions=position, layers=layer)
        return METRIC(research.forward(CONFIG, params, TOKENS, edits=edit)[0].logits[:, -1])

    grid = jax.vmap(jax.vmap(patched, (None, 0)), (0, None))(jnp.arange(CONFIG.n_layer), jnp.arange(11))
    assert_close(grid, theirs)


def test_induction_heads_on_repeated_random_tokens(torch):
    """Main demo: the mean attention to the token after the earlier equal one, by a hook on each pattern."""
    config, params = induction_toy()
    model = bridges.bridge_of(config, params)
    rows = research.repeated_tokens(config, jax.random.key(0), n_rows=5, n_tokens=8, first=0)

    theirs = torch.zeros(config.n_layer, config.n_head)

    def induction_score_hook(pattern, hook):
        stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - 8)
        theirs[hook.layer(), :] = stripe[..., 2:].mean((0, -1))  # from the second copy on

    hooks = [(lambda name: name.endswith("attn.hook_pattern"), induction_score_hook)]
    model.run_with_hooks(torch.tensor(np.array(rows)).long(), return_type=None, fwd_hooks=hooks)

    ours = research.head_scores(config, params, rows).induction
    assert_close(ours, theirs)
    assert np.unravel_index(np.argmax(ours), ours.shape) == INDUCTION

    _, seen = research.forward(config, params, rows, capture="attn/pattern$", logits=False)  # the same from parts
    stripes = [jnp.diagonal(pattern, 1 - 8, -2, -1)[..., 2:].mean((0, -1)) for pattern in seen.values()]
    assert_close(jnp.stack(stripes), theirs)


# ---- Exploratory_Analysis_Demo (IOI)


def test_logit_difference_of_each_prompt(params, model, tokens):
    """IOI demo: the logit difference of each prompt and their mean."""
    logits = model(tokens)
    theirs = logits[range(4), -1, ANSWER] - logits[range(4), -1, WRONG]

    logits_BTV = research.forward(CONFIG, params, TOKENS)[0].logits
    assert_close(logits_BTV[np.arange(4), -1, ANSWER] - logits_BTV[np.arange(4), -1, WRONG], theirs)
    assert_close(METRIC(logits_BTV[:, -1]), logit_diff(logits), least=-1)


def directions(model):
    """The logit difference directions [B, D]: rows of W_U, times ln_final's gain, which the demo folds into W_U."""
    return (model.W_U[:, ANSWER] - model.W_U[:, WRONG]).T * model.ln_final.weight


def on_last_scale(cache, stack):
    """The demo's apply_ln_to_stack, which needs weights that write no mean."""
    return (stack - stack.mean(-1, keepdim=True)) / cache["ln_final.hook_scale"][:, -1]


@pytest.mark.parametrize("by", ["component", "head"])
def test_direct_logit_attribution(params, model, tokens, by):
    """IOI demo: what each layer's or head's output adds to the logit difference, at the last token, per prompt."""
    _, cache = model.run_with_cache(tokens)
    if by == "component":
        stack = cache.decompose_resid(layer=-1, pos_slice=-1)
    else:
        stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    theirs = (on_last_scale(cache, stack) * directions(model)).sum(-1)

    found = research.logit_attribution(CONFIG, params, TOKENS, answers=ANSWER[:, None], against=WRONG[:, None], by=by)
    ours = found.flat()[1][..., 0] if by == "component" else found.parts["attn/z"].reshape(6, 4)
    assert_close(ours[: len(theirs)], theirs)


def test_accumulated_logit_difference(params, model, tokens):
    """IOI demo: the logit difference of the stream up to each half layer, with the last LayerNorm's scale."""
    _, cache = model.run_with_cache(tokens)
    stack = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1)
    theirs = (on_last_scale(cache, stack) * directions(model)).sum(-1)

    found = research.logit_attribution(CONFIG, params, TOKENS, answers=ANSWER[:, None], against=WRONG[:, None])
    ours = jnp.cumsum(found.flat()[1], 0)[1:-1, :, 0]  # without pos_embed, and without ln_f's bias
    assert_close(ours, theirs)


@pytest.mark.parametrize("part", ["z", "q", "k", "v", "pattern"])
def test_patching_of_each_head(params, model, tokens, clean_cache, torch, part):
    """IOI demo: patch each head's output, queries, keys, values or pattern from the clean run, at all positions."""

    def patch_head_hook(value, hook, head):
        index = (slice(None), head) if part == "pattern" else (slice(None), slice(None), head)
        value[index] = clean_cache[hook.name][index]
        return value

    theirs = torch.zeros(CONFIG.n_layer, CONFIG.n_head)
    for layer in LAYERS:
        for head in range(CONFIG.n_head):
            hook = functools.partial(patch_head_hook, head=head)
            patched = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_{part}", hook)])
            theirs[layer, head] = logit_diff(patched)

    assert_close(
        research.activation_patching(CONFIG, params, TOKENS, CLEAN, METRIC, f"attn/{part}", each="head"), theirs
    )


def test_copying_through_a_head(params, model, tokens, torch):
    """IOI demo: which tokens a head predicts from the stream after layer 0, if it attends only to that token."""
    _, cache = model.run_with_cache(tokens)
    read = model.blocks[1].ln1(cache["resid_post", 0])
    written = read @ model.blocks[1].attn.W_V[2] @ model.blocks[1].attn.W_O[2]
    theirs = model.unembed(model.ln_final(written))

    _, seen = research.forward(CONFIG, params, TOKENS, capture="h1/ln_1/out$", logits=False)
    written_BTD = seen["h1/ln_1/out"] @ research.ov_circuit(CONFIG, params, 1, 2).dense()
    assert_close(research.stream_logits(CONFIG, params, written_BTD), theirs)


# ---- Attribution_Patching_Demo


PATCHED = ["resid_pre", "attn/out", "mlp/out", "attn/q", "attn/k", "attn/v", "attn/pattern", "attn/z"]


def values_and_gradients(model, tokens, names):
    """The demo's get_cache_fwd_and_bwd, for the metric."""
    return bridges.values_and_gradients(model, tokens, names, logit_diff)


def test_attribution_patching(params, model, tokens, torch):
    """Attribution patching demo: (clean - corrupted) * gradient, of each kind of patch, per position and head."""
    names = [f"h{layer}/{part}" for layer in LAYERS for part in PATCHED]
    clean, _ = values_and_gradients(model, torch.tensor(CLEAN), names)
    corrupted, grads = values_and_gradients(model, tokens, names)
    theirs = {}
    for name in names:
        product = (clean[name] - corrupted[name]) * grads[name]
        if product.ndim == 4 and not name.endswith("pattern"):
            theirs[name] = product.sum((0, 3)).T  # head, position
        else:
            theirs[name] = product.sum((0, -1))  # position; of a pattern: head, position

    ours = research.attribution_patching(CONFIG, params, TOKENS, CLEAN, METRIC, [f"{part}$" for part in PATCHED])
    assert set(ours) == set(theirs)
    for name in names:  # Products of D numbers cancel: measured 9.3e-6, of which torch's rounding is 8.8e-6.
        assert_close(ours[name], theirs[name], bound=3e-5)


def test_attention_attribution(params, model, tokens):
    """Attribution patching demo: each entry of each pattern times its gradient, [layer, row, head, query, key]."""
    values, grads = values_and_gradients(model, tokens, [f"h{layer}/attn/pattern" for layer in LAYERS])
    theirs = np.stack([values[name] * grads[name] for name in values])

    def metric(*pushes):
        edits = [research.add(f"h{layer}/attn/pattern", push) for layer, push in enumerate(pushes)]
        out, seen = research.forward(CONFIG, params, TOKENS, capture="attn/pattern$", edits=edits)
        return METRIC(out.logits[:, -1]), list(seen.values())

    zeros = [jnp.zeros((4, 3, 11, 11))] * CONFIG.n_layer
    grads, patterns = jax.grad(metric, argnums=(0, 1), has_aux=True)(*zeros)
    assert_close(jnp.stack(patterns) * jnp.stack(grads), theirs)


def test_path_attribution_between_heads(params, model, tokens, torch):
    """Attribution patching demo: what heads of layer 0 do by way of queries, keys and values of layer 1."""
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    inputs = [f"h1/attn/{part}_in" for part in "qkv"]
    clean, _ = values_and_gradients(model, torch.tensor(CLEAN), ["h0/attn/result"])
    corrupted, _ = values_and_gradients(model, tokens, ["h0/attn/result"])
    _, grads = values_and_gradients(model, tokens, inputs)
    model.set_use_attn_result(False)
    model.set_use_split_qkv_input(False)
    change = clean["h0/attn/result"] - corrupted["h0/attn/result"]
    theirs = torch.stack([torch.einsum("btnd,btmd->nm", change, grads[name]) for name in inputs])

    def metric(push_3BTND):
        edits = [research.add(name, push) for name, push in zip(inputs, push_3BTND, strict=True)]
        return METRIC(research.forward(CONFIG, params, TOKENS, edits=edits)[0].logits[:, -1])

    clean, corrupted = (research.forward(CONFIG, params, rows, capture="h0/attn/result")[1] for rows in (CLEAN, TOKENS))
    change_BTND = clean["h0/attn/result"] - corrupted["h0/attn/result"]
    grads_3BTND = jax.grad(metric)(jnp.zeros((3, *change_BTND.shape)))
    assert_close(jnp.einsum("btnd,ibtmd->inm", change_BTND, grads_3BTND), theirs)


# ---- Head_Detector_Demo


TEXT = "7 3 9 7 3 5 9 7"  # the bridge's tokenizer reads numbers as ids


@pytest.mark.parametrize("kind", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_head_detector(params, model, kind):
    """Head detector demo: the share of each head's attention that goes where such a head looks.

    `detect_head` divides by the number of all tokens, `head_scores` by that of tokens with a match.
    """
    from transformer_lens import head_detector

    theirs = head_detector.detect_head(model, TEXT, kind)

    tokens = np.array([[0, *map(int, TEXT.split())]])
    ours = getattr(research.head_scores(CONFIG, params, tokens), kind.split("_")[0])
    pattern = getattr(head_detector, f"get_{kind}_detection_pattern")(model.to_tokens(TEXT))
    share = (pattern.sum(-1) > 0).float().mean().item()
    assert_close(ours * share, theirs)


def test_head_detector_with_options(params, model, torch):
    """Head detector demo: an own pattern, by the absolute difference, without BOS and the current token; and "mul"."""
    from transformer_lens import head_detector

    own = torch.tril(torch.rand(9, 9, generator=torch.Generator().manual_seed(3)))
    own = own / own.sum(-1, keepdim=True)
    options = {"exclude_bos": True, "exclude_current_token": True}
    by_difference = head_detector.detect_head(model, TEXT, own, error_measure="abs", **options)
    by_product = head_detector.detect_head(model, TEXT, (own > 0.2).float(), **options)

    tokens = [[0, *map(int, TEXT.split())]]
    _, seen = research.forward(CONFIG, params, tokens, capture="attn/pattern$", logits=False)
    counted = np.tri(9, k=-1) * (np.arange(9) > 0)  # neither BOS nor the current token
    pattern_LNTS, own = jnp.concatenate([*seen.values()]) * counted, own.numpy() * counted
    assert np.abs(1 - jnp.abs(pattern_LNTS - own).sum((-2, -1)) / 9 - by_difference.numpy()).max() < 5.1e-4  # rounded
    assert_close((pattern_LNTS * (own > 0.2)).sum((-2, -1)) / pattern_LNTS.sum((-2, -1)), by_product)
