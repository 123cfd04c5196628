"""GPT-2's activations by name, and edits of them, in plain NumPy float64: the expected results of research.forward.

B batch, T query, S key, D n_embd, N heads, H head width, F mlp width, V vocab."""

import numpy as np
import numpy_reference

import gpt2_jax

CONFIG = gpt2_jax.GPT2Config(n_vocab=53, n_ctx=211, n_embd=15, n_head=3, n_layer=2)
LN = ["scale", "normalized", "out"]
OF_BLOCK = [
    "resid_pre", *(f"ln_1/{name}" for name in LN), *(f"attn/{name}" for name in ["q", "k", "v"]),
    "attn/scores", "attn/pattern", "attn/z", "attn/out", "resid_mid", *(f"ln_2/{name}" for name in LN),
    "mlp/pre", "mlp/post", "mlp/out", "resid_post",
]  # fmt: skip
MASKED = {"scores": numpy_reference.MASKED, "pattern": 0}
PER_HEAD = {"q": "BTN", "k": "BTN", "v": "BTN", "z": "BTN", "scores": "BNT", "pattern": "BNT"}


def names(n_layer):
    """All names in the order of computation."""
    blocks = [f"h{i}/{name}" for i in range(n_layer) for name in OF_BLOCK]
    return ["embed", "pos_embed", *blocks, *(f"ln_f/{name}" for name in LN)]


def edit(how, name, value, positions=None, heads=None):
    """The edit that `change` takes. `how` is "replace", "add" or "scale". A dict has the positions of each row."""
    return how, name, np.asarray(value, np.float64), positions, heads


def change(edits, name, x, value_of, b):
    """Row b's activation after its edits in order, one place and one head at a time."""
    letters = PER_HEAD.get(name.split("/")[-1], "BT")[1:]
    for how, of, value, positions, heads in edits:
        if of != name:
            continue
        x, old, value = x.copy(), x, value_of(value)
        positions = positions[b] if isinstance(positions, dict) else positions
        for index in np.ndindex(*x.shape[: len(letters)]):
            t, n = (index[letters.index(axis)] if axis in letters else None for axis in "TN")
            if (positions is None or t in positions) and (heads is None or n in heads):
                x[index] = {"replace": value, "add": old + value, "scale": old * value}[how][index]
    return x


def forward(config, params, tokens_BT, mask_BT=None, edits=()):
    """Logits [B, T, V] and {name: activation}. Only the real tokens of a padded row are run. Padding holds 0."""
    params, seen, tokens_BT = numpy_reference.as_float64(params), {}, np.asarray(tokens_BT)
    mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else np.asarray(mask_BT)
    logits_BTV = np.zeros((*tokens_BT.shape, config.n_vocab))
    for b, mask_T in enumerate(mask_BT):

        def see(name, x, b=b, mask_T=mask_T):
            shape, real = shape_of(name, *tokens_BT.shape, config), (mask_T,)
            if PER_HEAD.get(name.split("/")[-1]) == "BNT":
                real = np.ix_(range(config.n_head), mask_T, mask_T)
            x = change(edits, name, x, lambda value: np.broadcast_to(value, shape)[b][real], b)
            if PER_HEAD.get(name.split("/")[-1]) == "BNT":  # no change opens what is masked
                x = np.where(np.tri(x.shape[-1], dtype=bool), x, MASKED[name.split("/")[-1]])
            seen.setdefault(name, np.zeros(shape))[b][real] = x
            return x

        logits_BTV[b, mask_T] = numpy_reference.row(params, tokens_BT[b, mask_T], config.n_head, see)
    return logits_BTV, seen


def weights(config=CONFIG, seed=3):
    """Weights in which every parameter affects the result."""
    return numpy_reference.random_params(config, np.random.default_rng(seed))


def real(name, x, mask_BT):
    """The activation at real tokens (for scores and patterns: queries and keys), and 0 elsewhere."""
    letters = PER_HEAD.get(name.split("/")[-1], "BT")
    if letters != "BNT":
        return np.where(mask_BT.reshape(*mask_BT.shape, *[1] * (x.ndim - 2)), x, 0)
    return np.where(mask_BT[:, None, :, None] & mask_BT[:, None, None, :], x, 0)


def has_heads(name):
    return name.split("/")[-1] in PER_HEAD


def shape_of(name, n_rows, n_tokens, config=CONFIG):
    last, width = name.split("/")[-1], config.n_embd
    if has_heads(name):
        place = (n_rows, n_tokens, config.n_head)
        return (*place, width // config.n_head) if last in "qkvz" else (n_rows, config.n_head, n_tokens, n_tokens)
    is_neuron = name.endswith(("mlp/pre", "mlp/post"))
    return n_rows, n_tokens, 1 if last == "scale" else 4 * width if is_neuron else width


def error(ours, theirs):
    """The largest difference relative to the largest value. Masked scores are compared relative to themselves."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    hidden = np.abs(theirs) > 1e8
    assert not hidden.any() or np.abs(ours[hidden] / theirs[hidden] - 1).max() < 1e-6
    return np.abs(ours - theirs)[~hidden].max() / np.abs(theirs[~hidden]).max()


def assert_agrees(ours, params, tokens_BT, mask_BT=None, edits=(), *, config=CONFIG, bound):
    """Check `ours`, the logits and captured activations that research.forward returned for these edits."""
    out, seen = ours
    logits_BTV, expected = forward(config, params, tokens_BT, mask_BT, edits)
    real_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
    for name, value in seen.items():
        assert error(*(real(name, np.asarray(x), real_BT) for x in (value, expected[name]))) < bound, name
    assert error(np.asarray(out.logits)[real_BT], logits_BTV[real_BT]) < bound
