"""Rows of docs/coming_from/transformer_lens.md against TransformerLens 4 itself.

The row's "ours" is run, and its "theirs" in torch on the same weights.
"""

import re

import bridge
import coming_from
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from tiny_models import CONFIG

import gpt2_jax
from gpt2_jax import research

pytestmark = pytest.mark.parity

BOUND = 1e-5  # of the largest value; measured: 7e-7
TOKENS = [[0, 3, 11, 5, 3, 11], [0, 7, 1, 30, 7, 2]]  # 0 is what the bridge's tokenizer prepends
CLEAN = [[0, 3, 12, 5, 3, 11], [0, 7, 1, 30, 8, 2]]
ANSWER, WRONG, LAYER, HEAD = 9, 21, 1, 2
TEXT = "First Senator:\nO"
LENS = {row.theirs: row for row in coming_from.rows("transformer_lens")}


@pytest.fixture(scope="module")
def model(params, torch):
    """The tiny model as their bridge; nothing is processed."""
    return bridge.bridge_of(CONFIG, params)


@pytest.fixture(scope="module")
def tokens(torch):
    return torch.tensor(TOKENS)


@pytest.fixture(scope="module")
def cache(model, tokens):
    return model.run_with_cache(tokens)[1]


@pytest.fixture
def run(params):
    """Run the code of a row of the page on TransformerLens, on the tiny model."""
    names = {"config": CONFIG, "params": params, "tokens": TOKENS, "clean_tokens": CLEAN, "layer": LAYER, "head": HEAD}
    names |= {"answer": ANSWER, "wrong": WRONG, "metric": research.logit_difference(ANSWER, WRONG)}
    return lambda theirs, **more: LENS[theirs].run(**(names | more))


def close(ours, theirs):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    return naive.error(ours, theirs) < BOUND


# ---- TransformerLens: tokens


@pytest.fixture(scope="module")
def embedded(torch, tmp_path_factory, shakespeare, tokenizer):
    """The embedded model as their bridge, with its tokenizer as Hugging Face's reads it."""
    import transformers

    folder = tmp_path_factory.mktemp("embedded") / "model"
    gpt2_jax.save(folder, *shakespeare, format="huggingface", tokenizer=tokenizer)
    return bridge.bridge_of(*shakespeare, transformers.AutoTokenizer.from_pretrained(folder))


def test_tokens(embedded, tokenizer):
    ids = tokenizer.encode(TEXT)
    calls = {
        "model.to_tokens(text)": embedded.to_tokens(TEXT).tolist(),
        "model.to_tokens(text, prepend_bos=False)": embedded.to_tokens(TEXT, prepend_bos=False).tolist(),
        "model.to_string(tokens[0])": embedded.to_string([1280, *ids]),
        "model.to_str_tokens(text, prepend_bos=False)": embedded.to_str_tokens(TEXT, prepend_bos=False),
        'model.to_single_token(" S")': embedded.to_single_token(" S"),
    }
    for theirs, expected in calls.items():
        assert LENS[theirs].run(tokenizer=tokenizer, text=TEXT, tokens=[[1280, *ids]]) == expected, theirs


def test_config(model, run):
    theirs = "cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.n_ctx, cfg.d_vocab"
    assert run(theirs) == tuple(getattr(model.cfg, name.removeprefix("cfg.")) for name in theirs.split(", "))
    assert model.cfg.d_mlp == 4 * CONFIG.n_embd


# ---- TransformerLens: activations and hooks


def test_forward_and_losses(model, run, tokens):
    assert close(run("model(tokens)"), model(tokens))
    for theirs in ('model(tokens, return_type="loss")', 'model(tokens, return_type="loss", loss_per_token=True)'):
        assert np.allclose(run(theirs), eval(theirs, {"model": model, "tokens": tokens}).detach(), rtol=1e-5), theirs


def test_activations(cache, run):
    """Every row of the names, in each layer; a masked score is another large negative number there."""
    seen = run("model.run_with_cache(tokens)")["seen"]
    hooks = [row for row in LENS.values() if re.fullmatch(r"[\w.]*hook_\w+", row.theirs)]
    assert len(hooks) == len(research.AXES)
    for row in hooks:
        for layer in range(CONFIG.n_layer):
            tensor = cache[row.theirs.replace(".L.", f".{layer}.")].numpy()
            ours = np.asarray(seen[row.code[0].replace("hL/", f"h{layer}/")])
            if row.theirs.endswith("scores"):
                hidden = np.broadcast_to(~np.tri(tensor.shape[-1], dtype=bool), tensor.shape)
                assert (tensor[hidden] < -1e30).all()
                assert (ours[hidden] == -1e10).all()
                tensor = np.where(hidden, ours, tensor)
            assert close(ours, tensor), row.theirs
    assert close(seen["h1/attn/pattern"], cache["pattern", 1])


def test_hooks(model, run, tokens, cache, torch):
    rng = np.random.default_rng(5)
    direction, value = rng.normal(size=CONFIG.n_embd), rng.normal(size=4 * CONFIG.n_embd)
    _, clean_cache = model.run_with_cache(torch.tensor(CLEAN))
    clean = {"h0/resid_mid": jnp.asarray(clean_cache["resid_mid", 0].numpy())}

    def zero_head(z, hook):
        z[:, :, 1] = 0
        return z

    def add(x, hook):
        x[:, 2:] += torch.tensor(direction, dtype=x.dtype)
        return x

    def put(post, hook):
        post[:, 3] = torch.tensor(value, dtype=post.dtype)
        return post

    def patch(x, hook):
        x[:, 4] = clean_cache[hook.name][:, 4]
        return x

    hooks = {
        "a hook that sets head 1 of hook_z to 0": ("blocks.0.attn.hook_z", zero_head),
        "a hook that adds a vector to hook_resid_pre": ("blocks.1.hook_resid_pre", add),
        "a hook that returns another value for mlp.hook_post": ("blocks.1.mlp.hook_post", put),
        "a hook that returns clean_cache[hook.name]": ("blocks.0.hook_resid_mid", patch),
        "run_with_hooks(tokens, fwd_hooks=[(name, fn)])": ("blocks.1.mlp.hook_post", lambda x, hook: x**2),
    }
    plain = model(tokens)
    for theirs, hook in hooks.items():
        expected = model.run_with_hooks(tokens, fwd_hooks=[hook])
        out = run(theirs, direction=direction, value=value, clean=clean)
        assert close((out[0] if isinstance(out, tuple) else out).logits, expected), theirs
        assert naive.error(plain.numpy(), expected.numpy()) > 1e-3, theirs


def test_gradients(params, run, torch):
    """The gradient that reaches blocks.1.hook_resid_pre, by a hook of torch's own."""
    model = bridge.bridge_of(CONFIG, params).requires_grad_(True)
    kept = []

    def keep(x, hook):
        x.retain_grad()
        kept.append(x)

    logits = model.run_with_hooks(torch.tensor(TOKENS), fwd_hooks=[("blocks.1.hook_resid_pre", keep)])
    (logits[:, -1, ANSWER] - logits[:, -1, WRONG]).mean().backward()
    assert close(run("run_with_cache(tokens, incl_bwd=True)"), kept[0].grad)


def test_generation(model, run):
    greedy = {"do_sample": False, "stop_at_eos": False, "use_past_kv_cache": False, "verbose": False}
    out = model.generate(model.to_tokens("3 11 5"), max_new_tokens=8, **greedy)
    ours = run("model.generate(text, max_new_tokens=8, do_sample=False)", tokens=[[0, 3, 11, 5]])
    assert [[0, 3, 11, 5, *ours[0]]] == out.tolist()


# ---- TransformerLens: weights and analyses


def test_weights(model, run):
    assert all(map(close, run("model.W_E, model.W_pos"), (model.W_E, model.W_pos)))
    names = {"model": model, "layer": LAYER, "head": HEAD}
    for theirs in ("model.W_U", "model.W_Q[layer, head]", "model.W_O[layer, head]"):
        assert close(run(theirs), eval(theirs, names)), theirs
    for theirs in ("model.W_in[layer]", "model.W_out[layer]"):
        assert close(run(theirs), eval(theirs, names)), theirs
    for theirs in ("model.QK[layer, head]", "model.OV[layer, head]"):
        assert close(run(theirs), eval(theirs, names).AB), theirs
    theirs = 'model.all_composition_scores("Q")'
    assert close(run(theirs), eval(theirs, names).scores)


def test_processing(params, run, tokens):
    """Each weight processing alone: their logits are those of our function."""
    off = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    for flag in ("fold_ln", "center_unembed"):
        model = bridge.bridge_of(CONFIG, params)
        model.enable_compatibility_mode(**(off | {flag: True}))
        processed = run(f"enable_compatibility_mode({flag}=True)")
        ours = research.forward(CONFIG, processed, TOKENS)[0].logits
        assert close(ours, model(tokens)), flag


def test_lens_and_parts(model, params, run, cache):
    lens = run("cache.logit_lens()")
    for i, name in enumerate(("resid_pre", "resid_post", "resid_post")):
        logits = model.unembed(model.ln_final(cache[name, max(i - 1, 0)]))
        best = logits.log_softmax(-1).topk(3)
        assert (np.asarray(lens.ids[i]) == best.indices.numpy()).all()
        assert close(lens.logprobs[i], best.values)
    _, seen = research.forward(CONFIG, params, TOKENS, capture="resid_post$")
    theirs = "model.unembed(model.ln_final(resid))"
    assert close(run(theirs, seen=seen), model.unembed(model.ln_final(cache["resid_post", 0])))
    parts, labels = cache.decompose_resid(return_labels=True)
    ours = run("cache.decompose_resid(return_labels=True)")
    spelled = [re.sub(r"^h(\d+)/(attn|mlp)/out$", r"\1_\2_out", name) for name in ours]
    assert spelled == labels
    assert all(map(close, ours.values(), parts))


def test_direct_logit_attribution(params, run, tokens, torch):
    """Theirs on folded and centered weights, ours on the weights as they are: one number per part."""
    model = bridge.bridge_of(CONFIG, params)
    model.enable_compatibility_mode(fold_value_biases=False)  # which would take a part of each head to the layer's bias
    _, cache = model.run_with_cache(tokens)
    answer, wrong = (torch.tensor([token] * 2) for token in (ANSWER, WRONG))
    attrs = cache.logit_attrs(cache.decompose_resid(), answer, wrong)[:, :, -1]
    ours = run("cache.logit_attrs(cache.decompose_resid(), answer, wrong)").flat()[1][:-1, :, 0]
    assert close(ours, attrs)
    heads = cache.logit_attrs(cache.stack_head_results(), answer, wrong)[:, :, -1]
    by_head = run("cache.stack_head_results() then logit_attrs").parts["attn/z"][..., 0]
    assert close(np.asarray(by_head).reshape(heads.shape), heads)


@pytest.mark.parametrize("name", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_head_detector(model, run, name):
    """Theirs divides by the number of tokens, ours by that of tokens with a match: the page says so."""
    from transformer_lens.head_detector import detect_head

    ids = [0, 3, 11, 5, 3, 11, 7]
    theirs = detect_head(model, " ".join(map(str, ids[1:])), name).numpy()
    ours = np.asarray(run(f'detect_head(model, text, "{name}")', tokens=[ids]))
    n_matched = {"previous_token_head": 6, "duplicate_token_head": 2, "induction_head": 2}[name]
    assert np.abs(ours * n_matched / len(ids) - theirs).max() < 1e-6
    assert theirs.max() > 1e-3


@pytest.mark.parametrize("theirs", [name for name in LENS if name.startswith("get_act_patch")])
def test_patching(model, run, tokens, theirs, torch):
    from transformer_lens import patching

    _, clean_cache = model.run_with_cache(torch.tensor(CLEAN))

    def metric(logits):
        return (logits[:, -1, ANSWER] - logits[:, -1, WRONG]).mean()

    grid = getattr(patching, theirs)(model, tokens, clean_cache, metric).numpy()
    grid = grid.transpose(0, 2, 1) if theirs.endswith("out_by_pos") else grid  # as the note says
    assert np.ptp(grid) > 1e-3
    assert np.abs(np.asarray(run(theirs)) - grid).max() < BOUND * np.abs(grid).max()
