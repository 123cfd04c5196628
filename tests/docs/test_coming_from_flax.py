"""Each row of docs/coming_from/flax.md. transformers 4 is not installed: its model is in peer_models.py, in NumPy."""

import json

import checkpoint_forms as forms
import coming_from
import forward
import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import numpy_reference
import peer_models
import pytest
import safetensors.numpy
import tiny_runs
import tokenizers
from flax import serialization
from tiny_models import CONFIG

import gpt2_jax

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
BOUND = 5e-6  # of the largest value; measured: 1.1e-6
TOKENS = np.random.default_rng(3).integers(0, CONFIG.n_vocab, (2, 7), dtype=np.int32)


@pytest.fixture
def run(params):
    """Run a row's code on the tiny model, in one program."""
    names = {"config": CONFIG, "params": params, "tokens": TOKENS}
    return lambda row, result="", **more: row.compiled(result, **(names | more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(folder, flat): a model in Hugging Face's form, written without the package."""
    folder, flat = tmp_path_factory.mktemp("model"), forms.random_model(CONFIG)
    return forms.write_huggingface(folder, CONFIG, forms.hf_tensors(flat), embd_pdrop=0.25), flat


# ---- parameter names


@pytest.fixture(scope="module")
def theirs():
    return peer_models.flax_tree(CONFIG, np.random.default_rng(7))


@pytest.fixture(scope="module")
def converted(theirs):
    return coming_from.functions("flax")["from_flax"](theirs)


@CHECKS("flax_model.msgpack")
def msgpack(row, theirs):
    tree = serialization.msgpack_restore(serialization.to_bytes(theirs))
    known = row.run(tree=tree, from_flax=coming_from.functions("flax")["from_flax"])
    expected = peer_models.flax_logits(theirs, TOKENS[0], CONFIG.n_head)
    assert naive.error(forward.logits_of(CONFIG, known["params"], TOKENS[:1])[0], expected) < BOUND


@CHECKS(*(row.theirs for row in CHECKS.rows if row.theirs.startswith("transformer/")))
def parameter(row, theirs, converted):
    """The converted array is theirs, transposed where it is a kernel, and so says the note; checked by value."""
    array = theirs
    for name in row.theirs.split("/"):
        array = array[name]
    kernel = row.theirs.endswith("kernel")
    assert kernel == ("transposed" in row.note)
    np.testing.assert_array_equal(row.run(params=converted), array.T if kernel else array)


# ---- load and save


@CHECKS('FlaxGPT2LMHeadModel.from_pretrained("gpt2")')
def released(row):
    coming_from.assert_is_the_release(row)


@CHECKS("from_pretrained(folder)")
def from_pretrained(row, folder):
    known = row.run(folder=folder[0])
    assert known["config"] == CONFIG.replace(embd_pdrop=0.25)
    assert forms.difference(known["params"], folder[1]) == ""


@CHECKS("from_pretrained(folder, from_pt=True)")
def from_pt(row, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "config.json").write_text(json.dumps(forms.hf_config(CONFIG)))
    with pytest.raises(ValueError, match=r"python -c .*torch\.load.*save_file.*model\.safetensors"):
        row.run(pickled=tmp_path)


@CHECKS("FlaxGPT2LMHeadModel(config, seed=0)")
def init_params(row):
    config = gpt2_jax.GPT2Config(n_vocab=1009, n_ctx=997, n_embd=64, n_head=2, n_layer=1)
    params = row.compiled("params", config=config)
    found = {name: float(np.std(leaf)) for name, leaf in forms.leaves(params).items()}
    for name, deviation in {"wte": 0.02, "wpe": 0.01, "h0/attn/c_attn/w": 0.02, "h0/mlp/c_proj/w": 0.02}.items():
        assert abs(found[name] / deviation - 1) < 0.03, name
    assert "N(0, 0.01)" in row.note
    assert found["ln_f/b"] == found["h0/attn/c_attn/b"] == 0


@CHECKS("AutoTokenizer.from_pretrained(folder)")
def tokenizer_of_a_folder(row, tmp_path, model_dir):
    """Against Hugging Face's tokenizers on the same files."""
    forms.copy_vocabulary(model_dir, tmp_path, ("vocab.json", "merges.txt"))
    theirs = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    text = "First Citizen:\n  Thou'rt 3 times\twelcome — é."
    ids = row.run(folder=tmp_path)["tokenizer"].encode(text)
    assert isinstance(ids, list)
    assert ids == theirs.encode(text).ids


@CHECKS("tokenizer(text)")
def special_tokens(row, tokenizer):
    text, eot = "a<|endoftext|>b", 1280
    assert row.run(tokenizer=tokenizer, text=text) == [*tokenizer.encode("a"), eot, *tokenizer.encode("b")]
    assert eot not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@CHECKS("model.save_pretrained(folder)")
def save_pretrained(row, tmp_path, tokenizer):
    """Names and bits of the file, read by safetensors; and config.json."""
    weights = tiny_runs.params()
    row.run(folder=tmp_path / "model", config=tiny_runs.CONFIG, params=weights, tokenizer=tokenizer)
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    expected = forms.hf_tensors(forms.leaves(weights))
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].tobytes() == array.tobytes() for name, array in expected.items())
    told = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (told["model_type"], told["vocab_size"], told["layer_norm_epsilon"]) == ("gpt2", 1281, 1e-5)
    assert (tmp_path / "model" / "tokenizer.json").is_file()


@CHECKS("config.vocab_size, config.n_positions")
def config_names(row, folder):
    told = json.loads((folder[0] / "config.json").read_text())
    config = gpt2_jax.load_config(folder[0])
    assert row.run(config=config) == (told["vocab_size"], told["n_positions"])
    same = ("n_embd", "n_head", "n_layer", "embd_pdrop", "attn_pdrop", "resid_pdrop")
    assert [getattr(config, name) for name in same] == [told[name] for name in same]


# ---- forward pass


@CHECKS("model(input_ids).logits")
def logits(row, run, expected):
    found = run(row)
    assert naive.error(found, expected[0]) < BOUND
    assert run(row, config=CONFIG.replace(compute_dtype="bfloat16")).dtype == found.dtype == np.float32


@CHECKS("attention_mask=mask")
def attention_mask(row, run, params):
    """A padded row has the logits of the row alone, whatever id the padding has."""
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
    found = run(row, mask=mask)
    alone = numpy_reference.forward(params, TOKENS[:1, 2:], CONFIG.n_head)
    assert naive.error(found[:1, 2:], alone) < BOUND
    unmasked = run(row, mask=np.ones_like(mask))
    assert naive.error(unmasked[:1, 2:], alone) > 0.01


@CHECKS("output_hidden_states=True")
def hidden_states(row, run, expected):
    """Embeddings, then the stream behind each block but the last, then what ln_f gives: n_layer + 1 arrays."""
    found = run(row)
    assert list(found) == ["h0/resid_pre", "h1/resid_pre", "ln_f/out"]
    for name, array in found.items():
        assert naive.error(array, expected[1][name]) < BOUND, name


@CHECKS("output_attentions=True")
def attentions(row, run, expected):
    found = run(row)
    assert list(found) == [f"h{i}/attn/pattern" for i in range(CONFIG.n_layer)]
    for name, array in found.items():
        assert array.shape == (2, CONFIG.n_head, 7, 7)
        assert naive.error(array, expected[1][name]) < BOUND, name


@CHECKS("FlaxGPT2Model(...)(input_ids).last_hidden_state")
def last_hidden_state(row, run, expected):
    assert naive.error(run(row), expected[1]["ln_f/out"]) < BOUND


@CHECKS("model(input_ids, train=True, dropout_rng=key)")
def dropout(row, run, expected):
    found = [run(row, key=jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(found[0], found[1])
    assert naive.error(found[0], found[2]) > 0.01
    off = CONFIG.replace(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    assert naive.error(run(row, key=jax.random.key(1), config=off), expected[0]) < BOUND


@CHECKS("cache = model.init_cache(batch_size, max_length)")
def init_cache(row, run):
    cache = run(row, "cache", batch_size=2, length=9)
    assert cache.k_BNHS[0].shape == (2, CONFIG.n_head, CONFIG.head_dim, 9)
    assert len(cache.k_BNHS) == CONFIG.n_layer
    assert not cache.mask_BS.any()


@CHECKS("model(input_ids, past_key_values=cache, position_ids=...)")
def past_key_values(row, run, expected):
    """In two calls, of 4 and 3 tokens: the second one continues the positions."""
    cache, parts = gpt2_jax.init_cache(CONFIG, 2, 7), []
    for part in (TOKENS[:, :4], TOKENS[:, 4:]):
        out = run(row, "out", tokens=part, cache=cache)
        cache = out.cache
        parts.append(out.logits)
    assert naive.error(np.concatenate(parts, axis=1), expected[0]) < BOUND


@CHECKS("enable_gradient_checkpointing()")
def remat(row, params):
    def loss(params, model):
        return jnp.square(model.apply({"params": params}, TOKENS).logits).mean()

    model = row.run(config=CONFIG)["model"]
    grads = [jax.jit(jax.grad(loss), static_argnums=1)(params, one) for one in (model, gpt2_jax.GPT2(CONFIG))]
    for ours, plain in zip(*map(jax.tree.leaves, grads), strict=True):
        assert np.abs(ours - plain).max() <= 1e-5 * np.abs(plain).max() + 1e-9
    assert "remat" in str(jax.make_jaxpr(lambda params: loss(params, model))(params))
