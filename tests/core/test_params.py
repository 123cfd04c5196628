"""params.py: the tree by name."""

import jax
import numpy as np

import gpt2_jax
from gpt2_jax import GPT2Config
from gpt2_jax.params import differences, flatten, unflatten

CONFIG = GPT2Config(n_vocab=13, n_ctx=5, n_embd=6, n_head=3, n_layer=11)


def test_names_are_the_checkpoint_s_in_the_order_of_the_layers():
    flat = flatten(gpt2_jax.abstract_params(CONFIG))
    names = list(flat)
    assert len(names) == 4 + 12 * CONFIG.n_layer
    layers = [name.split("/")[0] for name in names if name.startswith("h")]
    assert list(dict.fromkeys(layers)) == [f"h{i}" for i in range(11)]
    assert {name.partition("/")[2]: leaf.shape for name, leaf in flat.items() if name.startswith("h10/")} == {
        "attn/c_attn/b": (18,),
        "attn/c_attn/w": (6, 18),
        "attn/c_proj/b": (6,),
        "attn/c_proj/w": (6, 6),
        "ln_1/b": (6,),
        "ln_1/g": (6,),
        "ln_2/b": (6,),
        "ln_2/g": (6,),
        "mlp/c_fc/b": (24,),
        "mlp/c_fc/w": (6, 24),
        "mlp/c_proj/b": (6,),
        "mlp/c_proj/w": (24, 6),
    }
    assert {name: flat[name].shape for name in ("wte", "wpe", "ln_f/g", "ln_f/b")} == {
        "wte": (13, 6),
        "wpe": (5, 6),
        "ln_f/g": (6,),
        "ln_f/b": (6,),
    }


def test_unflatten_is_the_inverse():
    params = gpt2_jax.init_params(CONFIG, jax.random.key(0))
    back = unflatten(flatten(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_differences_go_both_ways_and_name_each():
    expected = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float32), "c": np.zeros(1, np.float32)}
    found = {"a": np.zeros((3, 2), np.float32), "c": np.zeros(1, np.float16), "d": np.zeros(7, np.int8)}
    assert differences(found, expected) == [
        "missing: b float32[5]",
        "extra: d int8[7]",
        "misshaped: a is float32[3, 2], expected float32[2, 3]",
        "misshaped: c is float16[1], expected float32[1]",
    ]
    assert differences(expected, expected) == []
