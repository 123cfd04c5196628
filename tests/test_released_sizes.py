"""What depends on size, at the sizes of the released models: 50,257 ids and 1,024 positions. Only the width is tiny.

XLA compiles other code for large arrays than for small ones; openxla/xla#21461 showed only from 4,096 elements on.
"""

import commands
import jax
import jax.numpy as jnp
import naive_generation as naive
import numpy as np
import numpy_reference
import pytest
from strength import campaign

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.generation import Settings, complete
from gpt2_jax.training import loss

CONFIG = gpt2_jax.GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=8, n_head=2, n_layer=1)
RNG = np.random.default_rng(11)
LONG, SHORT = RNG.integers(0, 50257, 300).tolist(), [50256]


@pytest.fixture(scope="module")
def params():
    """Large embeddings: the model is sure of some tokens, so that filters keep a few to a few thousand."""
    params = numpy_reference.random_params(CONFIG, np.random.default_rng(5))
    return jax.tree.map(jnp.asarray, params | {"wte": params["wte"] * 8})


@pytest.fixture(scope="module")
def logits(params):
    """Of LONG, [T, V] in float64, by NumPy."""
    return numpy_reference.row(numpy_reference.as_float64(params), np.array(LONG), CONFIG.n_head)


def log_softmax(logits_TV):
    shifted_TV = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "knobs",
    [{"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3}, {"top_p": 0.8, "top_p_rule": "common"},
     *campaign([], [{}, {"top_k": 1000}, {"min_p": 0.01}, {"top_p": 0.99}, {"temperature": 3.0, "top_k": 50256}])],
    ids=str,
)  # fmt: skip
def test_sampled_rows_are_those_of_the_slow_loop(params, knobs):
    """Padded rows of 300 tokens and of one, drawn from 50,257 tokens."""
    rows = gpt2_jax.generate(CONFIG, params, [LONG, SHORT], 20, seed=9, **knobs)
    for index, (prompt, row) in enumerate(zip([LONG, SHORT], rows, strict=True)):
        assert row == naive.sampled(CONFIG, params, prompt, row, index, 9, **knobs)
    assert len(set(rows[1])) > 3


def test_greedy_rows_are_those_of_the_slow_loop_with_logprobs(params):
    rows, logprobs = gpt2_jax.generate(
        CONFIG, params, [LONG, SHORT], 20, temperature=0, repetition_penalty=1.1, logprobs=5
    )
    for prompt, row, scored in zip([LONG, SHORT], rows, logprobs, strict=True):
        assert row == naive.greedy(CONFIG, params, prompt, row, 1.1)
        expected_nV = log_softmax(naive.logits_before(CONFIG, params, prompt, row))
        assert scored.top_ids.tolist() == np.argsort(-expected_nV, axis=-1, kind="stable")[:, :5].tolist()
        # measured 2.4e-6, of logprobs down to -6
        np.testing.assert_allclose(scored.chosen, expected_nV[range(20), row], rtol=0, atol=1e-5)
        np.testing.assert_allclose(scored.top, np.take_along_axis(expected_nV, scored.top_ids, -1), rtol=0, atol=1e-5)


def test_the_window_slides_at_1024(params):
    """The last position that exists, then a window of the last 512 tokens."""
    prompt = RNG.integers(0, 50257, 1022).tolist()
    (row,) = gpt2_jax.generate(CONFIG, params, [prompt], 5, temperature=0, overflow="slide")
    assert row == naive.greedy(CONFIG, params, prompt, row)
    (fitting,) = gpt2_jax.generate(CONFIG, params, [prompt], 2, temperature=0)
    assert fitting == row[:2]
    with pytest.raises(ValueError, match="n_ctx is 1024"):
        gpt2_jax.generate(CONFIG, params, [prompt], 3)


def test_padding_changes_no_logit(params, logits):
    tokens_BT, mask_BT = np.full((2, 400), -1), np.zeros((2, 400), bool)
    tokens_BT[0, 100:], mask_BT[0, 100:] = LONG, True
    tokens_BT[1, :300], mask_BT[1, :300] = LONG, True
    found = np.asarray(jax.jit(gpt2_jax.GPT2(CONFIG).apply)({"params": params}, tokens_BT, mask_BT).logits)
    for row_TV in (found[0, 100:], found[1, :300]):
        np.testing.assert_allclose(row_TV, logits, rtol=0, atol=2e-5)  # measured 5.3e-6, of logits up to 21


def test_score_and_the_lens(params, logits):
    expected_TV = log_softmax(logits)
    expected = expected_TV[np.arange(299), LONG[1:]]
    (scored,) = gpt2_jax.score(CONFIG, params, [LONG])
    np.testing.assert_allclose(scored.logprobs, expected, rtol=0, atol=2e-5)  # measured 4.8e-6, of logprobs down to -29
    best_T = expected_TV.argmax(-1)
    assert scored.greedy.tolist() == (best_T[:-1] == LONG[1:]).tolist()
    lens = research.logit_lens(CONFIG, params, [LONG], names="h0/resid_post", k=3)
    assert lens.ids[0, 0, :, 0].tolist() == best_T.tolist()
    np.testing.assert_allclose(lens.next_logprobs[0, 0, :-1], expected, rtol=0, atol=2e-5)  # measured 5.8e-6
    ranks = (expected_TV[:-1] > expected[:, None]).sum(-1)
    assert np.abs(lens.next_ranks[0, 0, :-1] - ranks).max() <= 1  # two logits may be equal in float32


def test_the_lens_has_no_rank_without_a_number(params):
    """NaN is larger than no logit, which would be rank 0: the prediction."""
    broken = params | {"wte": params["wte"].at[777].set(jnp.nan)}
    lens = research.logit_lens(CONFIG, broken, [LONG[:9]], names="resid_post")
    assert np.isnan(lens.next_logprobs).all()
    assert (np.asarray(lens.next_ranks) == -1).all()


@pytest.mark.parametrize("chunk", [loss.CHUNK, 2**22])
def test_the_chunked_loss_and_its_gradients(params, logits, chunk):
    """In one chunk and in several, of 300 positions."""
    target_T = np.array([*LONG[1:], 50256])
    weight_T = RNG.random(300).astype(np.float32)
    h_TD, _ = gpt2_jax.GPT2(CONFIG).apply({"params": params}, np.array([LONG]), method="hidden")
    value, gradients = jax.jit(jax.value_and_grad(loss.token_loss, (0, 1)), static_argnums=4)(
        h_TD, params["wte"], target_T[None], weight_T[None], chunk
    )
    expected_TV = log_softmax(logits)
    expected = -(weight_T * expected_TV[np.arange(300), target_T]).sum()
    assert float(value) == pytest.approx(expected, rel=1e-6)  # measured 2e-7
    slopes_TV = np.exp(expected_TV)
    slopes_TV[np.arange(300), target_T] -= 1
    slopes_TV *= weight_T[:, None]
    wte = np.asarray(params["wte"], np.float64)
    # measured 3.2e-6 and 2.8e-7 of the largest value
    for found, expected in zip(gradients, (slopes_TV @ wte, slopes_TV.T @ np.asarray(h_TD[0])), strict=True):
        assert np.abs(found - expected).max() < 1.5e-5 * np.abs(expected).max()


DIVIDED = """
    import json
    import jax, numpy as np
    jax.config.update("jax_enable_x64", True)
    from gpt2_jax.sharding import make_mesh
    from gpt2_jax.training.loss import token_loss

    rng = np.random.default_rng(0)
    h, head = rng.normal(size=(2, 1024, 8)), rng.normal(size=(50257, 8))
    target, weight = rng.integers(0, 50257, (2, 1024)), rng.random((2, 1024))
    target[0, :2] = 0, 50256
    both = jax.jit(jax.value_and_grad(token_loss, (0, 1)), static_argnums=(4, 5))
    one, many = (both(h, head, target, weight, 2**25, mesh) for mesh in (None, make_mesh(2, 4)))
    broken = both(h, head, np.where(target == 50256, 50257, target), weight, 2**25, make_mesh(2, 4))[0]
    far = [abs(many[0] / one[0] - 1), *(np.abs(b - a).max() / np.abs(a).max() for a, b in zip(one[1], many[1]))]
    print(json.dumps([*map(float, far), bool(np.isnan(broken))]))
"""


def test_the_loss_with_a_divided_vocabulary():
    """On two by four devices, which cannot share 50,257 ids equally. An id outside of them gives NaN.

    Measured in float64: 1.7e-15 of the largest value.
    """
    *far, is_nan = commands.on_eight_devices(DIVIDED)
    assert max(far) <= 1e-13
    assert is_nan


def test_nan_in_the_loss_reaches_it(params):
    h_TD = jnp.ones((1, 300, 8))
    for broken in (params["wte"].at[40000, 3].set(-jnp.nan), params["wte"].at[0, 0].set(jnp.inf)):
        value = jax.jit(loss.token_loss)(h_TD, broken, np.zeros((1, 300), int), np.ones((1, 300), np.float32))
        assert not np.isfinite(value)


def test_every_id_has_its_text(real):
    """And `complete` returns the text of its ids."""
    tokens = [real.ours.token_bytes(i) for i in range(50257)]
    assert tokens == real.token_bytes
    assert real.ours.decode(list(range(50257))) == b"".join(tokens).decode(errors="replace")


def test_complete_says_what_stopped_it(params, real):
    """Which id, or which string."""
    (row,) = gpt2_jax.generate(CONFIG, params, [SHORT], 20, temperature=0)
    text = real.ours.decode(row)
    settings = {"max_new_tokens": 20, "temperature": 0}
    (whole,) = complete(CONFIG, params, [SHORT], real.ours, Settings(**settings))
    assert (whole.text, whole.stopped, whole.stop) == (text, False, None)
    (by_id,) = complete(CONFIG, params, [SHORT], real.ours, Settings(**settings, stop_ids=[3, row[4]]))
    assert (by_id.stop, by_id.stopped, by_id.ids) == (row[4], True, row[: row.index(row[4])])


def test_a_tensorflow_checkpoint_holds_every_bit(params, tmp_path):
    gpt2_jax.save(tmp_path / "model", CONFIG, params, "tensorflow")
    config, loaded = gpt2_jax.load(tmp_path / "model")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
