"""Each row of docs/coming_from/transformer_lens.md on weights, analyses and patching, against NumPy.

test_coming_from_parity_lens.py compares with the library itself.
"""

import itertools
import re

import coming_from
import naive_generation as slow
import numpy as np
import numpy_activations as naive
import pytest
import tiny_runs
from tiny_models import CONFIG

import gpt2_jax
from gpt2_jax import research

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
BOUND = 1e-5  # of the largest value; measured: 7e-7
TOKENS = [[36, 3, 11, 5, 3, 11], [36, 7, 1, 30, 7, 2]]
CLEAN = [[36, 3, 12, 5, 3, 11], [36, 7, 1, 30, 8, 2]]
ANSWER, WRONG = 9, 21
LAYER, HEAD = 1, 2


@pytest.fixture(scope="module")
def clean(params):
    """All activations of the other run, by NumPy."""
    return naive.forward(CONFIG, params, CLEAN)[1]


@pytest.fixture
def run(params):
    """Run a row's code on the tiny model."""
    names = {"config": CONFIG, "params": params, "tokens": TOKENS, "clean_tokens": CLEAN, "layer": LAYER, "head": HEAD}
    names |= {"answer": ANSWER, "wrong": WRONG, "metric": research.logit_difference(ANSWER, WRONG)}
    return lambda row, **more: row.run(**(names | more))


def close(found, expected):
    return naive.error(found, expected) < BOUND


def edited(params, *edits):
    return naive.forward(CONFIG, params, TOKENS, edits=[naive.edit(*edit) for edit in edits])[0]


def difference(logits_BTV):
    """The metric: the logit difference at the last token, mean over the rows."""
    return (logits_BTV[:, -1, ANSWER] - logits_BTV[:, -1, WRONG]).mean()


# ---- weights


def heads(params):
    """W_Q, W_K, W_V [N, D, H] and W_O [N, H, D] of LAYER, in float64, as TransformerLens has them."""
    attn = params[f"h{LAYER}"]["attn"]
    qkv = np.split(np.asarray(attn["c_attn"]["w"], np.float64), 3, axis=1)
    split = [np.stack(np.split(part, CONFIG.n_head, axis=1)) for part in qkv]
    return [*split, np.asarray(attn["c_proj"]["w"], np.float64).reshape(CONFIG.n_head, -1, CONFIG.n_embd)]


@CHECKS("model.W_E, model.W_pos")
def embeddings(row, run, params):
    wte, wpe = run(row)
    assert (wte.shape, wpe.shape) == ((CONFIG.n_vocab, CONFIG.n_embd), (CONFIG.n_ctx, CONFIG.n_embd))
    assert wte is params["wte"]


@CHECKS("model.W_U")
def unembedding(row, run, params, expected):
    assert close(expected[1]["ln_f/out"] @ np.asarray(run(row), np.float64), expected[0])


@CHECKS("model.W_Q[layer, head]")
def query_weights(row, run, params, expected):
    assert close(run(row), heads(params)[0][HEAD])
    bias = research.surgery.split_heads(CONFIG, params, LAYER)["q"]["b"][HEAD]
    read = expected[1][f"h{LAYER}/ln_1/out"]
    assert close(
        read @ np.asarray(run(row), np.float64) + np.asarray(bias), expected[1][f"h{LAYER}/attn/q"][:, :, HEAD]
    )


@CHECKS("model.W_O[layer, head]")
def output_weights(row, run, params):
    assert close(run(row), heads(params)[3][HEAD])


@CHECKS("model.W_in[layer]")
def mlp_in(row, run, params, expected):
    pre = expected[1][f"h{LAYER}/ln_2/out"] @ np.asarray(run(row), np.float64)
    assert close(pre + np.asarray(params[f"h{LAYER}"]["mlp"]["c_fc"]["b"]), expected[1][f"h{LAYER}/mlp/pre"])


@CHECKS("model.W_out[layer]")
def mlp_out(row, run, params, expected):
    out = expected[1][f"h{LAYER}/mlp/post"] @ np.asarray(run(row), np.float64)
    assert close(out + np.asarray(params[f"h{LAYER}"]["mlp"]["c_proj"]["b"]), expected[1][f"h{LAYER}/mlp/out"])


@CHECKS("model.QK[layer, head]")
def qk(row, run, params):
    q, k, _, _ = heads(params)
    assert close(run(row), q[HEAD] @ k[HEAD].T)
    u, s, v = research.qk_circuit(CONFIG, params, LAYER, HEAD).svd()
    assert close(u * s @ v, q[HEAD] @ k[HEAD].T)
    assert s.shape == (CONFIG.head_dim,)


@CHECKS("model.OV[layer, head]")
def ov(row, run, params):
    _, _, v, out = heads(params)
    assert close(run(row), v[HEAD] @ out[HEAD])


@CHECKS('model.all_composition_scores("Q")')
def composition(row, run, params):
    """From dense matrices: |OV @ QK| / (|OV| |QK|), for a writer in layer 0 and a reader in layer 1."""
    found = run(row)
    assert found.shape == (2, CONFIG.n_head, 2, CONFIG.n_head)
    first = {"h1": params["h0"]}  # `heads` reads LAYER, which is 1
    _, _, v, out = heads(first)
    q, k, _, _ = heads(params)
    for writer, reader in itertools.product(range(CONFIG.n_head), repeat=2):
        a, b = v[writer] @ out[writer], q[reader] @ k[reader].T
        score = np.linalg.norm(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert found[0, writer, 1, reader] == pytest.approx(score, rel=1e-4)
    assert not np.asarray(found)[1].any()


@CHECKS("enable_compatibility_mode(fold_ln=True)")
def fold(row, run, params, expected):
    folded = run(row)
    assert close(naive.forward(CONFIG, folded, TOKENS)[0], expected[0])
    assert (folded["h1"]["ln_1"]["g"] == 1).all()
    assert (folded["ln_f"]["g"] == params["ln_f"]["g"]).all()


@CHECKS("enable_compatibility_mode(center_unembed=True)")
def center(row, run, expected):
    logits_BTV, seen = naive.forward(CONFIG, run(row), TOKENS)
    assert close(logits_BTV, expected[0] - expected[0].mean(-1, keepdims=True))
    assert close(seen["h1/resid_post"], expected[1]["h1/resid_post"])


# ---- analyses


def read(params, stream):
    """Logits of a stream, by NumPy."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params["ln_f"].items()}
    stream = np.asarray(stream, np.float64)
    stream = stream - stream.mean(-1, keepdims=True)
    stream = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + 1e-5) * p["g"] + p["b"]
    return stream @ np.asarray(params["wte"], np.float64).T


@CHECKS("cache.logit_lens()")
def logit_lens(row, run, params, expected):
    lens = run(row)
    assert lens.names == ("h0/resid_pre", "h0/resid_post", "h1/resid_post")
    for i, name in enumerate(lens.names):
        logits_BTV = read(params, expected[1][name])
        np.testing.assert_array_equal(lens.ids[i], np.argsort(-logits_BTV, -1)[..., :3])
        log_p = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
        assert close(lens.logprobs[i], -np.sort(-log_p, -1)[..., :3])


@CHECKS("model.unembed(model.ln_final(resid))")
def stream_logits(row, run, params, expected):
    _, seen = research.forward(CONFIG, params, TOKENS, capture="resid_post$")
    assert close(run(row, seen=seen), read(params, expected[1]["h0/resid_post"]))


@CHECKS("cache.decompose_resid(return_labels=True)")
def decompose(row, run, expected):
    parts = run(row)
    assert list(parts) == ["embed", "pos_embed", "h0/attn/out", "h0/mlp/out", "h1/attn/out", "h1/mlp/out"]
    assert close(sum(np.asarray(part, np.float64) for part in parts.values()), expected[1]["h1/resid_post"])


def attributed(params, expected, part):
    """What a part of the stream [B, D] at the last token gives to the logit difference, [B]."""
    wte = np.asarray(params["wte"], np.float64)
    read_D = (wte[ANSWER] - wte[WRONG]) * np.asarray(params["ln_f"]["g"], np.float64)
    return ((part - part.mean(-1, keepdims=True)) / expected[1]["ln_f/scale"][:, -1]) @ read_D


@CHECKS("cache.logit_attrs(cache.decompose_resid(), answer, wrong)")
def logit_attrs(row, run, params, expected):
    labels, values = run(row).flat()
    assert labels == [*(name for name in naive.names(2) if re.search(r"^(pos_)?embed$|/out$", name)
                        and "ln_" not in name), "ln_f/b"]  # fmt: skip
    for label, value in zip(labels[:-1], values, strict=False):
        assert close(value[:, 0], attributed(params, expected, expected[1][label][:, -1])), label
    assert close(values.sum(0)[:, 0], expected[0][:, -1, ANSWER] - expected[0][:, -1, WRONG])


@CHECKS("cache.stack_head_results() then logit_attrs")
def head_attrs(row, run, params, expected):
    found = run(row)
    out = heads(params)[3]
    for head in range(CONFIG.n_head):
        result = expected[1]["h1/attn/z"][:, -1, head] @ out[head]
        assert close(found.parts["attn/z"][1, head, :, 0], attributed(params, expected, result))
    assert close(found.flat()[1].sum(0)[:, 0], expected[0][:, -1, ANSWER] - expected[0][:, -1, WRONG])


MATCHES = {
    "previous_token_head": lambda row, t, s: s == t - 1,
    "duplicate_token_head": lambda row, t, s: s < t and row[s] == row[t],
    "induction_head": lambda row, t, s: 0 < s < t and row[s - 1] == row[t],
}


def mean_attention(expected, match):
    """[L, N]: attention to the tokens that match, summed, over the tokens that have a match."""
    where = np.array([[[match(row, t, s) for s in range(6)] for t in range(6)] for row in TOKENS], float)
    n = (where.sum(-1) > 0).sum()
    patterns = [expected[1][f"h{layer}/attn/pattern"] for layer in range(CONFIG.n_layer)]
    return np.stack([np.einsum("bnts,bts->n", pattern, where) / n for pattern in patterns])


@CHECKS(*(f'detect_head(model, text, "{name}")' for name in MATCHES))
def detect_head(row, run, expected):
    name = re.search(r'"(\w+)"', row.theirs)[1]
    assert close(run(row), mean_attention(expected, MATCHES[name]))


@CHECKS("detect_head(model, text, pattern)")
def own_pattern(row, run, expected):
    pattern = np.random.default_rng(2).random((6, 6)) < 0.4
    pattern &= np.tri(6, dtype=bool)
    assert close(run(row, pattern=pattern), mean_attention(expected, lambda row, t, s: pattern[t, s]))


@CHECKS("model.generate(text, max_new_tokens=8, do_sample=False)")
def greedy(row, run, params):
    for prompt, new in zip(TOKENS, run(row), strict=True):
        assert new == slow.greedy(CONFIG, params, prompt, new)
        assert len(new) == 8


@CHECKS("model.generate_stream(text, max_new_tokens=8)")
def generate_stream(row, tokenizer):
    config, params, text = tiny_runs.CONFIG, tiny_runs.params(), "First"
    ids = gpt2_jax.generate(config, params, [tokenizer.encode(text)], 8)[0]
    pieces = list(row.run(config=config, params=params, text=text, tokenizer=tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids)


# ---- activation patching

GRIDS = {
    "get_act_patch_resid_pre": ("resid_pre", "p"),
    "get_act_patch_resid_mid": ("resid_mid", "p"),
    "get_act_patch_attn_out": ("attn/out", "p"),
    "get_act_patch_mlp_out": ("mlp/out", "p"),
    "get_act_patch_attn_head_out_all_pos": ("attn/z", "h"),
    "get_act_patch_attn_head_q_all_pos": ("attn/q", "h"),
    "get_act_patch_attn_head_k_all_pos": ("attn/k", "h"),
    "get_act_patch_attn_head_v_all_pos": ("attn/v", "h"),
    "get_act_patch_attn_head_pattern_all_pos": ("attn/pattern", "h"),
    "get_act_patch_attn_head_out_by_pos": ("attn/z", "hp"),
    "get_act_patch_attn_head_pattern_by_pos": ("attn/pattern", "hp"),
}


@CHECKS(*GRIDS)
def patching(row, run, params, clean):
    """Some entries of the grid, each by a whole pass in NumPy with that one patch."""
    grid, (activation, axes) = np.asarray(run(row)), GRIDS[row.theirs]
    sizes = {"h": CONFIG.n_head, "p": len(TOKENS[0])}
    assert grid.shape == (CONFIG.n_layer, *(sizes[axis] for axis in axes))
    assert np.ptp(grid) > 1e-3
    places = list(np.ndindex(*grid.shape))
    for place in [places[i] for i in np.random.default_rng(len(row.theirs)).permutation(len(places))[:5]]:
        where = dict(zip(axes, place[1:], strict=True))
        name = f"h{place[0]}/{activation}"
        positions, only = ([where[axis]] if axis in where else None for axis in "ph")
        expected = difference(edited(params, ("replace", name, clean[name], positions, only)))
        assert grid[place] == pytest.approx(expected, rel=1e-4, abs=1e-5), place
