"""Each row of docs/coming_from/books.md on loading, config and names. peer_models.py has the book's model in NumPy."""

from pathlib import Path
from unittest import mock

import checkpoint_forms as forms
import coming_from
import forward
import jax
import numpy as np
import numpy_activations as naive
import peer_models
import pytest
from tiny_models import CONFIG

import gpt2_jax
from gpt2_jax.checkpoints import book

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
TOKENS = np.random.default_rng(3).integers(0, CONFIG.n_vocab, (1, 7), dtype=np.int32)
LAYER = 1
WORDS = {
    "vocab_size": 53, "context_length": 23, "emb_dim": 21, "n_heads": 3, "n_layers": 2, "drop_rate": 0.25,
    "qkv_bias": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    """The book's GPTModel with random weights: {its names: arrays}."""
    return peer_models.book_state(CONFIG, np.random.default_rng(7))


@pytest.fixture(scope="module")
def book_params(state):
    """What the book's download_and_load_gpt2 returns for these weights."""
    return peer_models.book_params(state, CONFIG.n_layer)


@CHECKS('settings, params = download_and_load_gpt2(model_size="124M", models_dir="gpt2")')
def download(row, book_params):
    """The call of the book, word for word. Files are not fetched here: tests/checkpoints/test_book.py does that."""
    assert row.code[0] == row.theirs.replace("download", "gpt2_jax.download", 1)
    flat = forms.leaves(gpt2_jax.from_blocks(book_params))
    with mock.patch.object(book, "use_release", return_value=(CONFIG, flat)) as use_release:
        known = row.run()
    assert use_release.call_args.args[:2] == ("124M", Path("gpt2/124M"))
    assert known["settings"] == {"n_vocab": 37, "n_ctx": 41, "n_embd": 12, "n_head": 3, "n_layer": 2}
    assert jax.tree.structure(known["params"]) == jax.tree.structure(book_params)
    jax.tree.map(np.testing.assert_array_equal, known["params"], book_params)


@CHECKS("load_weights_into_gpt(gpt, params)")
def load_weights(row, state, book_params):
    params = row.run(book_params=book_params)["params"]
    assert params["h1"]["mlp"]["c_fc"]["w"] is book_params["blocks"][1]["mlp"]["c_fc"]["w"]
    assert (
        naive.error(
            forward.logits_of(CONFIG, params, TOKENS)[0], peer_models.book_logits(state, TOKENS[0], CONFIG.n_head)
        )
        < 5e-6
    )


@CHECKS('params["blocks"][1]["attn"]["c_attn"]["w"]', 'params["g"], params["b"]')
def nesting(row, book_params):
    theirs = eval(row.theirs, {"params": book_params})
    ours = row.run(params=gpt2_jax.from_blocks(book_params))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    nested = {name: value for name, value in book_params.items() if name not in "gb"}
    nested["ln_f"] = {"g": book_params["g"], "b": book_params["b"]}
    jax.tree.map(np.testing.assert_array_equal, row.run(params=gpt2_jax.from_blocks(nested)), theirs)


@CHECKS("settings")
def settings(row):
    config = row.run(settings={"n_vocab": 53, "n_ctx": 23, "n_embd": 21, "n_head": 3, "n_layer": 2})["config"]
    assert (config.n_vocab, config.n_ctx, config.n_embd, config.n_head, config.n_layer) == (53, 23, 21, 3, 2)


@CHECKS("GPT_CONFIG_124M")
def from_book(row):
    words = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
    words |= {"drop_rate": 0.1, "qkv_bias": False}
    config = row.run(GPT_CONFIG_124M=words)["config"]
    assert config == gpt2_jax.SIZES["124M"].replace(qkv_bias=False)
    for word in words:
        with pytest.raises(ValueError, match=word):
            row.run(GPT_CONFIG_124M={name: value for name, value in words.items() if name != word})


@CHECKS(*WORDS)
def word(row, book_params):
    found = row.run(config=gpt2_jax.GPT2Config.from_book(WORDS))
    assert set(found if isinstance(found, tuple) else (found,)) == {WORDS[row.theirs]}
    if row.theirs == "qkv_bias":
        wrong = CONFIG.replace(qkv_bias=False)
        with pytest.raises(ValueError, match="qkv_bias"):
            gpt2_jax.generate(wrong, gpt2_jax.from_blocks(book_params), [[1, 2]], 1)


@CHECKS("drop_rate_emb, drop_rate_attn, drop_rate_shortcut")
def rates(row):
    rates = {"drop_rate_emb": 0.1, "drop_rate_attn": 0.2, "drop_rate_shortcut": 0.3}
    words = {word: value for word, value in WORDS.items() if word != "drop_rate"}
    found = row.run(config=gpt2_jax.GPT2Config.from_book(words | rates))
    assert found == tuple(rates.values())


@CHECKS(*(row.theirs for row in coming_from.rows("books", "Parameter names")))
def parameter(row, state, book_params):
    ours = row.run(params=gpt2_jax.from_blocks(book_params), layer=LAYER, D=CONFIG.n_embd)
    np.testing.assert_array_equal(ours, state[row.theirs.replace("[layer]", f"[{LAYER}]")])
    assert (".T" in row.code[0]) == (row.theirs.endswith("weight") and "trf_blocks" in row.theirs)
