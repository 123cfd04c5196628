"""Steering vectors and function vectors: a few lines of JAX over `forward` and edits, checked on known models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from edited_weights import CONFIG, weights
from forward import some_tokens
from toy_induction import INDUCTION, SCALE, induction_toy

from gpt2_jax import research
from gpt2_jax.research import surgery


def test_a_contrastive_steering_vector_raises_what_the_positive_texts_have_in_common():
    """Contrastive activation addition: the mean difference at the last token (Rimsky et al. 2024, section 3).

    The texts of a pair differ in their last token, 5 or 11. The vector makes the model predict after any text what it
    predicts after 5, and its negative what it predicts after 11.
    """
    config, params, name = CONFIG, weights(kind=jnp.asarray), "h0/resid_post"
    positive, negative = (some_tokens(config, 40, 7) for _ in range(2))
    positive[:, -1], negative[:, -1] = 5, 11
    tokens = some_tokens(config, 9, 7, seed=1)

    _, with_it = research.forward(config, params, positive, capture=f"^{name}$")
    _, without = research.forward(config, params, negative, capture=f"^{name}$")
    vector_D = (with_it[name][:, -1] - without[name][:, -1]).mean(0)

    differences = np.asarray(with_it[name], np.float64)[:, -1] - np.asarray(without[name], np.float64)[:, -1]
    np.testing.assert_allclose(vector_D, differences.mean(0), rtol=0, atol=1e-6)
    target = [research.forward(config, params, texts)[0].logits[:, -1].mean(0) for texts in (positive, negative)]
    direction_V = target[0] - target[1]
    logits = []
    for factor in (-2, 0, 2):
        out, _ = research.forward(config, params, tokens, edits=research.add(name, factor * vector_D))
        logits.append(out.logits[:, -1] @ direction_V)
    assert (logits[0] < logits[1]).all()
    assert (logits[1] < logits[2]).all()


def test_a_function_vector_is_the_mean_output_of_the_heads_with_the_largest_effect():
    """Function vectors (Todd et al. 2024, sections 2.3 and 2.4), on the induction toy.

    In the demonstrations, 11 follows an earlier equal token. So the induction head's mean output stands for 11. In the
    other texts no token repeats, and the model predicts the last token again.
    """
    config, params = induction_toy()
    others = np.array(
        [np.random.default_rng(seed).permutation([i for i in range(19) if i != 11])[:6] for seed in range(8)]
    )
    demonstrations = np.insert(others[:, :4], 2, 11, axis=1)
    demonstrations = np.concatenate([demonstrations, others[:, 1:2]], 1)  # t0 a 11 t1 t2 a
    last = others.shape[1] - 1

    def effect(name, head):
        edit = research.replace(name, mean_NH[name], positions=last, heads=head)
        out, _ = research.forward(config, params, others, edits=edit)
        return jax.nn.softmax(out.logits[:, -1])[:, 11].mean()

    _, seen = research.forward(config, params, demonstrations, capture="attn/z$")
    mean_NH = {name: z_BTNH[:, -1].mean(0) for name, z_BTNH in seen.items()}
    effects_LN = jnp.stack([jax.vmap(partial(effect, name))(jnp.arange(config.n_head)) for name in seen])
    layer, head = divmod(int(effects_LN.argmax()), config.n_head)
    vector_D = mean_NH[f"h{layer}/attn/z"][head] @ surgery.split_heads(config, params, layer)["out"]["w"][head]

    assert (layer, head) == INDUCTION
    expected_D = -SCALE * np.bincount(others[:, 1], minlength=config.n_embd) / 8  # the last token gives way to 11
    expected_D[11] = SCALE
    np.testing.assert_allclose(vector_D, expected_D, rtol=0, atol=1e-6 * SCALE)  # measured: 6e-8
    with_it, _ = research.forward(config, params, others, edits=research.add("h1/resid_post", 2 * vector_D, last))
    plain, _ = research.forward(config, params, others)
    assert (with_it.logits[:, -1].argmax(-1) == 11).all()
    np.testing.assert_array_equal(plain.logits[:, -1].argmax(-1), others[:, -1])
