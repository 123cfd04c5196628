"""The books' function, their nesting of the arrays, their config names, and qkv_bias=False."""

import copy

import checkpoint_forms as forms
import fake_release
import forward
import jax
import jax.numpy as jnp
import misbehaving_server
import numpy as np
import pytest
from checkpoint_forms import CONFIG

import gpt2_jax
from gpt2_jax import GPT2Config
from gpt2_jax.release import download

GPT_CONFIG_124M = {
    "vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "drop_rate": 0.1,
    "qkv_bias": False,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def release(tmp_path_factory, monkeypatch):
    """(server, flat): a server on this machine gives a small model with odd sizes as the 124M."""
    folder, flat = tmp_path_factory.mktemp("release"), forms.random_model()
    forms.write_tensorflow(folder, CONFIG, flat)
    files = fake_release.made_up() | {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(download, "expectations", lambda size: fake_release.expectations(files))
    with misbehaving_server.Server(fake_release.served(files)) as server:
        monkeypatch.setenv("GPT2_JAX_BASE_URL", server.url)
        yield server, flat


def as_the_book_does(flat):
    """The book's load_gpt2_params_from_tf_ckpt, on the variables of a checkpoint."""
    params = {"blocks": [{} for _ in range(CONFIG.n_layer)]}
    for name, array in forms.variables_of(flat).items():
        parts = name.split("/")[1:]
        target = params
        if parts[0].startswith("h"):
            target = params["blocks"][int(parts[0][1:])]
            parts = parts[1:]
        for key in parts[:-1]:
            if key == "ln_f":  # the book drops this prefix
                continue
            target = target.setdefault(key, {})
        target[parts[-1]] = np.squeeze(array)
    return params


def assert_same_nesting(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, y.tobytes())


def test_the_books_call(tmp_path, release, monkeypatch):
    _, flat = release
    monkeypatch.chdir(tmp_path)
    settings, params = gpt2_jax.download_and_load_gpt2(model_size="124M", models_dir="gpt2")
    assert settings == {"n_vocab": 37, "n_ctx": 11, "n_embd": 15, "n_head": 3, "n_layer": 2}
    assert type(settings) is dict
    assert sorted(params) == ["b", "blocks", "g", "wpe", "wte"]
    assert_same_nesting(params, as_the_book_does(flat))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert (tmp_path / "gpt2" / "124M" / "model.ckpt.data-00000-of-00001").is_file()
    assert (tmp_path / "gpt2" / "124M" / "encoder.json").is_file()


def test_files_in_place_are_not_fetched_again(tmp_path, release):
    server, _ = release
    first = gpt2_jax.download_and_load_gpt2(models_dir=tmp_path)
    asked = len(server.requests)
    _, params = gpt2_jax.download_and_load_gpt2("124M", str(tmp_path))
    assert len(server.requests) == asked
    assert_same_nesting(params, first[1])
    (tmp_path / "124M" / "hparams.json").write_text("{}")  # present but wrong
    gpt2_jax.download_and_load_gpt2("124M", tmp_path)
    assert len(server.requests) == asked + 1


def test_what_readers_do_with_the_arrays(tmp_path, release):
    """Readers edit the arrays in place. This changes neither the next call nor the files."""
    _, flat = release
    _, params = gpt2_jax.download_and_load_gpt2(models_dir=tmp_path)
    q, k, v = np.split(params["blocks"][1]["attn"]["c_attn"]["w"], 3, axis=-1)
    assert q.shape == k.shape == v.shape == (15, 15)
    for leaf in jax.tree.leaves(params):
        leaf[...] = 0
    for _ in range(2):  # the second call reads the kept copy
        _, again = gpt2_jax.download_and_load_gpt2(models_dir=tmp_path)
        assert_same_nesting(again, as_the_book_does(flat))
        again["wte"][0, 0] = 1.0


@pytest.mark.parametrize("size", ["125M", "", None, 124])
def test_an_unknown_size_lists_those_there_are(tmp_path, size):
    with pytest.raises(ValueError, match=r"124M.*355M.*774M.*1558M"):
        gpt2_jax.download_and_load_gpt2(size, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- nestings


@pytest.mark.parametrize("nested_ln_f", [False, True])
def test_to_blocks_and_back(nested_ln_f):
    config = CONFIG.replace(n_layer=11)  # h10 comes after h9
    flat = forms.random_model(config)
    params = jax.tree.map(jnp.asarray, forms.nested(flat))
    blocks = gpt2_jax.to_blocks(params, nested_ln_f=nested_ln_f)
    assert set(blocks) == {"wte", "wpe", "blocks"} | ({"ln_f"} if nested_ln_f else {"g", "b"})
    assert [set(block) for block in blocks["blocks"]] == [{"ln_1", "attn", "ln_2", "mlp"}] * 11
    for i, block in enumerate(blocks["blocks"]):
        assert block["mlp"]["c_proj"]["w"] is params[f"h{i}"]["mlp"]["c_proj"]["w"]
    back = gpt2_jax.from_blocks(blocks)
    assert forms.difference(back, flat) == ""


BAD_BLOCKS = {
    "no wpe": (lambda b: b.pop("wpe"), "wpe"),
    "no blocks": (lambda b: b.pop("blocks"), "blocks"),
    "no g": (lambda b: b.pop("g"), r"\bg\b|ln_f"),
    "unknown": (lambda b: b.update(lm_head=b["wte"]), "lm_head"),
    "no c_attn": (lambda b: b["blocks"][1]["attn"].pop("c_attn"), r"1.*c_attn"),
    "no bias": (lambda b: b["blocks"][0]["mlp"]["c_fc"].pop("b"), r"0.*c_fc.*\bb\b"),
    "unknown in a block": (lambda b: b["blocks"][1].update(ln_3={}), r"1.*ln_3"),
    "unknown in a norm": (lambda b: b["blocks"][1]["ln_1"].update(w=0), r"1.*ln_1.*\bw\b"),
    "both final norms": (lambda b: b.update(ln_f={"g": b["g"], "b": b["b"]}), r"\bg\b|ln_f"),
    "a block is a list": (lambda b: b["blocks"].__setitem__(1, []), "1"),
    "blocks are a number": (lambda b: b.update(blocks=3), "blocks"),
}


@pytest.mark.parametrize(("spoil", "culprit"), BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_wrong_blocks_are_refused_by_name(spoil, culprit):
    blocks = copy.deepcopy(gpt2_jax.to_blocks(forms.nested(forms.random_model())))
    spoil(blocks)
    with pytest.raises(ValueError, match=culprit):
        gpt2_jax.from_blocks(blocks)


@pytest.mark.parametrize("gone", ["wte", "ln_f", "h0", "h1"])
def test_wrong_params_are_refused_by_name(gone):
    params = forms.nested(forms.random_model(CONFIG.replace(n_layer=3)))
    with pytest.raises(ValueError, match=gone):
        gpt2_jax.to_blocks({name: branch for name, branch in params.items() if name != gone})


@pytest.mark.parametrize("name", ["lm_head", "head"])
def test_unknown_params_are_refused_by_name(name):
    params = forms.nested(forms.random_model())
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        gpt2_jax.to_blocks(params | {name: params["wte"]})


# ---- config names


def test_the_books_words():
    config = GPT2Config.from_book(GPT_CONFIG_124M)
    assert config == gpt2_jax.SIZES["124M"].replace(qkv_bias=False)
    assert GPT2Config.from_book(GPT_CONFIG_124M | {"qkv_bias": True}) == gpt2_jax.SIZES["124M"]
    assert config.embd_pdrop == config.attn_pdrop == config.resid_pdrop == 0.1
    assert GPT2Config.from_book(GPT_CONFIG_124M | {"drop_rate": 0.0}).resid_pdrop == 0
    assert hash(config) != hash(gpt2_jax.SIZES["124M"])


@pytest.mark.parametrize("word", GPT_CONFIG_124M)
def test_a_missing_word_is_named(word):
    with pytest.raises(ValueError, match=word):
        GPT2Config.from_book({name: value for name, value in GPT_CONFIG_124M.items() if name != word})


WRONG_WORDS = [
    ({"n_kv_groups": 4}, "n_kv_groups"), ({"n_embd": 768}, "n_embd"), ({"drop_rate": 1.5}, "drop|1.5"),
    ({"qkv_bias": "no"}, "qkv_bias"), ({"qkv_bias": None}, "qkv_bias"), ({"n_heads": 7}, "n_head"),
    ({"vocab_size": "50257"}, "vocab"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "culprit"), WRONG_WORDS, ids=str)
def test_a_wrong_word_is_named(changes, culprit):
    with pytest.raises(ValueError, match=culprit):
        GPT2Config.from_book(GPT_CONFIG_124M | changes)
    with pytest.raises(ValueError, match=r"dict|map"):
        GPT2Config.from_book(["vocab_size"])


# ---- qkv_bias=False

NO_BIAS = CONFIG.replace(qkv_bias=False)


def biases(params):
    return [np.asarray(params[f"h{i}"]["attn"]["c_attn"]["b"]) for i in range(CONFIG.n_layer)]


def test_those_biases_stay_zero_and_untrained():
    """The gradient is exactly zero only for these biases, and AdamW steps do not change them."""
    import optax

    params = gpt2_jax.init_params(NO_BIAS, jax.random.key(1))
    assert all((bias == 0).all() for bias in biases(params))
    tokens_BT = jnp.asarray(forward.some_tokens(CONFIG, 5, 11))

    def loss(params):
        logits_BTV = gpt2_jax.GPT2(NO_BIAS).apply({"params": params}, tokens_BT).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).mean()

    optimizer = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, gradient

    state, losses = optimizer.init(params), []
    for _ in range(7):
        params, state, value, gradient = step(params, state)
        losses.append(float(value))
        still = [name for name, leaf in forms.leaves(gradient).items() if not leaf.any()]
        assert still == [f"h{i}/attn/c_attn/b" for i in range(CONFIG.n_layer)]
    assert all((bias == 0).all() for bias in biases(params))
    assert losses[-1] < losses[0]


def test_the_forward_pass_is_that_of_a_zero_bias():
    params = gpt2_jax.init_params(NO_BIAS, jax.random.key(2))
    tokens_BT = forward.some_tokens(CONFIG, 3, 11)
    np.testing.assert_array_equal(
        forward.logits_of(NO_BIAS, params, tokens_BT), forward.logits_of(CONFIG, params, tokens_BT)
    )


def test_released_weights_are_refused(tmp_path):
    flat = forms.random_model()
    params = forms.nested(flat)
    with pytest.raises(ValueError, match=r"qkv_bias.*c_attn/b"):
        gpt2_jax.generate(NO_BIAS, params, [[1, 2, 3]], max_new_tokens=2)
    for form in forms.FORMATS:
        with pytest.raises(ValueError, match=r"qkv_bias.*c_attn/b"):
            gpt2_jax.save(tmp_path / form, NO_BIAS, params, format=form)
    assert not list(tmp_path.iterdir())
    forms.write_tensorflow(tmp_path / "released", CONFIG, flat)
    assert gpt2_jax.load(tmp_path / "released")[0].qkv_bias


@pytest.mark.parametrize("form", forms.FORMATS)
def test_a_model_without_them_goes_in_and_out(tmp_path, form):
    """OpenAI's format cannot store it. After loading, the biases are zeros and the config has its default."""
    params = gpt2_jax.init_params(NO_BIAS, jax.random.key(3))
    gpt2_jax.save(tmp_path / "model", NO_BIAS, params, format=form)
    config, loaded = gpt2_jax.load(tmp_path / "model")
    assert forms.difference(loaded, forms.leaves(params)) == ""
    assert config == (CONFIG if form == "tensorflow" else NO_BIAS)
