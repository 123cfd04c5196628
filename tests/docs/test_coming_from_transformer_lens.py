"""Each row of docs/coming_from/transformer_lens.md on activations and hooks, against NumPy.

test_coming_from_parity_lens.py compares with the library itself.
"""

import re

import coming_from
import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from tiny_models import CONFIG

import gpt2_jax
from gpt2_jax import research

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
BOUND = 1e-5  # of the largest value; measured: 6e-7
TOKENS = [[36, 3, 11, 5, 3, 11], [36, 7, 1, 30, 7, 2]]
CLEAN = [[36, 3, 12, 5, 3, 11], [36, 7, 1, 30, 8, 2]]
ANSWER, WRONG = 9, 21


@pytest.fixture(scope="module")
def clean(params):
    """All activations of the other run, by NumPy."""
    return {name: jnp.asarray(value, jnp.float32) for name, value in naive.forward(CONFIG, params, CLEAN)[1].items()}


@pytest.fixture
def run(params):
    """Run a row's code on the tiny model."""
    names = {"config": CONFIG, "params": params, "tokens": TOKENS, "metric": research.logit_difference(ANSWER, WRONG)}
    return lambda row, **more: row.run(**(names | more))


def close(found, expected):
    return naive.error(found, expected) < BOUND


# ---- load, tokenize, run


@CHECKS('TransformerBridge.boot_transformers("gpt2")')
def released(row):
    coming_from.assert_is_the_release(row)


@CHECKS("cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.n_ctx, cfg.d_vocab")
def cfg(row):
    """The released 124M: FACTS of the paper's table."""
    assert row.run(config=gpt2_jax.SIZES["124M"]) == (12, 12, 768, 64, 1024, 50257)
    assert "4 * config.n_embd" in row.note


TEXT = "First Senator:\nO"


@CHECKS("model.to_tokens(text)")
def to_tokens(row, tokenizer):
    found = row.run(tokenizer=tokenizer, text=TEXT)
    assert found[0][0] == 1280
    assert tokenizer.decode(found[0]) == f"<|endoftext|>{TEXT}"


@CHECKS("model.to_tokens(text, prepend_bos=False)")
def to_tokens_without_bos(row, tokenizer):
    (ids,) = row.run(tokenizer=tokenizer, text=TEXT)
    assert b"".join(map(tokenizer.token_bytes, ids)) == TEXT.encode()


@CHECKS("model.to_string(tokens[0])")
def to_string(row, tokenizer):
    assert row.run(tokenizer=tokenizer, tokens=[[1280, *tokenizer.encode(TEXT)]]) == f"<|endoftext|>{TEXT}"


@CHECKS("model.to_str_tokens(text, prepend_bos=False)")
def to_str_tokens(row, tokenizer):
    found = row.run(tokenizer=tokenizer, text=TEXT)
    assert "".join(found) == TEXT
    assert len(found) == len(tokenizer.encode(TEXT))


@CHECKS('model.to_single_token(" S")')
def to_single_token(row, tokenizer):
    assert tokenizer.token_bytes(row.run(tokenizer=tokenizer)) == b" S"


@CHECKS("model(tokens)")
def logits(row, run, expected):
    assert close(run(row), expected[0])


def losses(logits_BTV):
    """Nats of each token but the first, [B, T - 1]."""
    shifted = logits_BTV[:, :-1] - logits_BTV[:, :-1].max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, np.array(TOKENS)[:, 1:, None], -1)[..., 0]


@CHECKS('model(tokens, return_type="loss")')
def loss(row, run, expected):
    assert run(row) == pytest.approx(losses(expected[0]).mean(), rel=1e-5)


@CHECKS('model(tokens, return_type="loss", loss_per_token=True)')
def loss_per_token(row, run, expected):
    assert close(run(row), losses(expected[0]))


@CHECKS("model.run_with_cache(tokens)")
def run_with_cache(row, run, expected):
    known = run(row)
    assert list(known["seen"]) == naive.names(CONFIG.n_layer)
    assert type(known["seen"]) is dict
    assert close(known["out"].logits, expected[0])


@CHECKS("run_with_cache(tokens, names_filter=names)")
def names_filter(row, run):
    assert list(run(row)) == ["h0/attn/pattern", "h1/attn/pattern", "h1/mlp/post"]


@CHECKS('cache["pattern", 1]')
def cached(row, expected, params):
    _, seen = research.forward(CONFIG, params, TOKENS, capture="attn/pattern$")
    assert close(row.run(seen=seen), expected[1]["h1/attn/pattern"])


@CHECKS("model(tokens, stop_at_layer=1)")
def stopped(row, run, expected):
    assert close(run(row), expected[1]["h1/resid_pre"])


# ---- activation names

HOOKS = [row.theirs for row in CHECKS.rows if re.fullmatch(r"[\w.]*hook_\w+", row.theirs)]


@CHECKS(*HOOKS)
def activation(row, params, expected):
    """It is what NumPy computes under that name, in each layer, and the note says its axes."""
    axes = row.note.split(";")[0]
    for layer in range(CONFIG.n_layer if "L" in row.theirs else 1):
        name = row.code[0].replace("hL/", f"h{layer}/")
        assert research.AXES[re.sub(r"^h\d+/", "", name)] == axes
        _, seen = all_activations(params)
        assert close(seen[name], expected[1][name]), name


def all_activations(params):
    return research.forward(CONFIG, params, TOKENS, capture=".")  # compiled once


def test_every_activation_has_a_row():
    rows = [row for row in CHECKS.rows if row.theirs in HOOKS]
    assert [row.code[0].removeprefix("hL/") for row in rows] == list(research.AXES)


# ---- hooks become edits


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(5)
    return {"direction": rng.normal(size=CONFIG.n_embd), "value": rng.normal(size=4 * CONFIG.n_embd)}


def edited(params, *edits):
    return naive.forward(CONFIG, params, TOKENS, edits=[naive.edit(*edit) for edit in edits])[0]


@CHECKS("a hook that sets head 1 of hook_z to 0")
def ablate(row, run, params):
    assert close(run(row)[0].logits, edited(params, ("scale", "h0/attn/z", 0.0, None, [1])))


@CHECKS("a hook that adds a vector to hook_resid_pre")
def steer(row, run, params, vectors):
    found = run(row, **vectors)[0].logits
    assert close(found, edited(params, ("add", "h1/resid_pre", vectors["direction"], range(2, 6))))


@CHECKS("a hook that returns another value for mlp.hook_post")
def replace(row, run, params, vectors):
    found = run(row, **vectors)[0].logits
    assert close(found, edited(params, ("replace", "h1/mlp/post", vectors["value"], [3])))


@CHECKS("a hook that returns clean_cache[hook.name]")
def patch(row, run, params, clean):
    found = run(row, clean=clean)[0].logits
    assert close(found, edited(params, ("replace", "h0/resid_mid", clean["h0/resid_mid"], [4])))


@CHECKS("run_with_hooks(tokens, fwd_hooks=[(name, fn)])")
def taps(row, run, params, expected):
    squared = expected[1]["h1/mlp/post"] ** 2
    found = jax.jit(lambda: run(row)[0].logits)()
    assert close(found, edited(params, ("replace", "h1/mlp/post", squared)))


@CHECKS("a hook that sets hook_attn_scores[:, :, -1, 2] to -inf")
def knockout(row, run, params, expected):
    masked = np.array(expected[1]["h1/attn/scores"])
    masked[:, :, -1, 2] = -1e9
    assert close(run(row)[0].logits, edited(params, ("replace", "h1/attn/scores", masked)))


def difference(logits_BTV):
    """The metric: the logit difference at the last token, mean over the rows."""
    return (logits_BTV[:, -1, ANSWER] - logits_BTV[:, -1, WRONG]).mean()


@CHECKS("run_with_cache(tokens, incl_bwd=True)")
def gradient(row, run, params):
    """Its product with a direction is the slope along it, by central differences in float64."""
    grad, step = np.asarray(run(row), np.float64), 1e-4
    for seed in range(3):
        push = np.random.default_rng(seed).normal(size=grad.shape)
        ends = [difference(edited(params, ("add", "h1/resid_pre", sign * step * push))) for sign in (1, -1)]
        assert (grad * push).sum() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-4)


@CHECKS("model.generate(...) with hooks added")
def steered_generation(row, run, params, vectors):
    """Each new token is the most likely one of a whole pass with the edit."""
    edit = naive.edit("add", "h1/resid_pre", vectors["direction"])
    for prompt, new in zip(TOKENS, run(row, **vectors), strict=True):
        logits_BTV, _ = naive.forward(CONFIG, params, [[*prompt, *new]], edits=[edit])
        assert new == logits_BTV[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert len(new) == 8
    assert run(row, **vectors) != gpt2_jax.generate(CONFIG, params, TOKENS, 8, temperature=0)
