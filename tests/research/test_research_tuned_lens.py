"""The tuned lens: its losses and gradients, what training reaches, and how `logit_lens` reads with translators."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forward import CONFIG, padding_masks, silence, some_tokens

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.research import lens, tuned_lens
from gpt2_jax.research.tuned_lens import identity_translators, train_tuned_lens


def divergences(config, params, tokens_BT, translators):
    """Return KL(model, lens) in nats [L, B, T], written out in NumPy float64 from all logits."""
    out, seen = research.forward(config, params, tokens_BT, capture="^h0/resid_pre$|resid_post$")
    found = []
    for i, name in enumerate(translators.names):
        w_DD, b_D = (np.asarray(part[i], np.float64) for part in (translators.w_LDD, translators.b_LD))
        stream_BTD = np.asarray(seen[name], np.float64)
        logits = research.stream_logits(config, params, np.float32(stream_BTD @ (np.eye(len(b_D)) + w_DD) + b_D))
        logp, logq = (jax.nn.log_softmax(np.asarray(x, np.float64)) for x in (out.logits, logits))
        found.append(np.sum(np.exp(logp) * (np.asarray(logp) - logq), -1))
    return np.stack(found)


def random_translators(config, seed=0, scale=0.1):
    rng, same = np.random.default_rng(seed), identity_translators(config)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), same)


def test_on_the_embedded_model_every_layer_comes_closer_to_the_output(shakespeare, tokenizer):
    """Trained on texts that the model has written, and measured on others of them."""
    config, params = shakespeare
    texts = gpt2_jax.generate(config, params, [[tokenizer.eot]] * 24, 31, temperature=1.0, seed=0)
    tokens_BT = np.array([[tokenizer.eot, *text] for text in texts])
    translators, losses = train_tuned_lens(config, params, tokens_BT[:16], steps=24)
    assert losses.shape == (24, config.n_layer)
    held_out = tokens_BT[16:]
    before_L = divergences(config, params, held_out, identity_translators(config)).mean((1, 2))
    after_L = divergences(config, params, held_out, translators).mean((1, 2))
    assert (after_L < 0.8 * before_L).all()  # measured: 0.39, 0.63, 0.51, 0.56
    found = research.logit_lens(config, params, held_out, translators=translators)
    plain = research.logit_lens(config, params, held_out)
    out, _ = research.forward(config, params, held_out)
    best_BT = np.asarray(out.logits).argmax(-1)
    agree = [(np.asarray(one.ids[:-1, ..., 0]) == best_BT).mean((1, 2)) for one in (found, plain)]
    assert (agree[0] > agree[1]).all()
    np.testing.assert_array_equal(found.ids[-1], plain.ids[-1])  # the last stream has no translator


def test_the_identity_reads_to_the_bit_as_the_logit_lens_does(params):
    tokens_BT = some_tokens(CONFIG, 3, 17)
    plain = research.logit_lens(CONFIG, params, tokens_BT, k=7)
    same = research.logit_lens(CONFIG, params, tokens_BT, k=7, translators=identity_translators(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    other = research.logit_lens(CONFIG, params, tokens_BT, k=7, translators=random_translators(CONFIG))
    for i in range(3):
        assert (other.logprobs[i] != plain.logprobs[i]).any()
    np.testing.assert_array_equal(other.logprobs[3], plain.logprobs[3])


def test_the_lens_reads_the_translated_stream(params):
    tokens_BT, translators = some_tokens(CONFIG, 2, 11), random_translators(CONFIG)
    found = research.logit_lens(CONFIG, params, tokens_BT, k=CONFIG.n_vocab, translators=translators)
    _, seen = research.forward(CONFIG, params, tokens_BT, capture="resid")
    for i, name in enumerate(found.names[:-1]):
        moved = seen[name] @ (np.eye(CONFIG.n_embd, dtype=np.float32) + translators.w_LDD[i]) + translators.b_LD[i]
        np.testing.assert_allclose(translators(name, seen[name]), moved, rtol=0, atol=1e-5)
        logprobs = -np.sort(-jax.nn.log_softmax(research.stream_logits(CONFIG, params, moved)))
        np.testing.assert_allclose(found.logprobs[i], logprobs, rtol=0, atol=1e-6)  # measured: 9e-8
    name = "h2/resid_post"
    assert translators(name, seen[name]) is seen[name]


@pytest.mark.parametrize("chunk", [256, 7])
def test_losses_and_gradients_are_those_of_the_whole_batch(params, monkeypatch, chunk):
    """One step of gradient descent, against the gradient of the mean over all real tokens. 51 positions, 8 chunks."""
    monkeypatch.setattr(tuned_lens, "CHUNK", chunk)
    mask_BT, tokens_BT, start = padding_masks(17)["holes"], some_tokens(CONFIG, 3, 17), random_translators(CONFIG)
    out, seen = research.forward(CONFIG, params, tokens_BT, mask_BT, capture="resid")

    def loss_L(translators):
        logp = jax.nn.log_softmax(out.logits)
        logq = [
            jax.nn.log_softmax(research.stream_logits(CONFIG, params, translators(n, seen[n]))) for n in start.names
        ]
        kl_LBT = jnp.stack([(jnp.exp(logp) * (logp - q)).sum(-1) for q in logq])
        return jnp.where(mask_BT, kl_LBT, 0).sum((1, 2)) / mask_BT.sum()

    found, losses = train_tuned_lens(
        CONFIG, params, tokens_BT, mask_BT, steps=1, batch_size=3, optimizer=optax.sgd(1.0), translators=start
    )
    np.testing.assert_allclose(losses[0], loss_L(start), rtol=2e-5)  # measured: 3e-7
    slope = jax.grad(lambda translators: loss_L(translators).sum())(start)
    for new, old, expected in zip(*map(jax.tree.leaves, (found, start, slope)), strict=True):
        np.testing.assert_allclose(old - new, expected, rtol=0, atol=3e-7)  # measured: 3e-8
        assert np.abs(expected).max() > 1e-3


def test_constant_layers_are_learned(params):
    """Each layer adds its biases only. That constant, as a translator, has the loss 0."""
    constant, tokens_BT = silence(params), some_tokens(CONFIG, 12, 19)
    added_LD = np.zeros((4, CONFIG.n_embd), np.float32)
    for i in range(CONFIG.n_layer):
        for room in ("attn", "mlp"):
            constant[f"h{i}"][room]["c_proj"]["w"][:] = 0
            added_LD[i] += constant[f"h{i}"][room]["c_proj"]["b"]
    exact = identity_translators(CONFIG).replace(b_LD=jnp.asarray(added_LD[::-1].cumsum(0)[::-1][:3]))
    _, losses = train_tuned_lens(CONFIG, constant, tokens_BT, steps=1, translators=exact)
    assert np.abs(losses).max() < 1e-6  # measured: 9e-9
    optimizer = optax.adam(optax.linear_schedule(5e-3, 0, 300))
    _, losses = train_tuned_lens(CONFIG, constant, tokens_BT, steps=300, batch_size=6, optimizer=optimizer)
    assert (losses[-1] < 0.03 * losses[0]).all()  # measured: at most 0.008


def test_every_row_is_drawn_once_before_any_is_drawn_again():
    rows = tuned_lens._batches(5, 6, 2, np.random.default_rng(0)).reshape(-1)
    assert sorted(rows[:5]) == sorted(rows[5:10]) == [0, 1, 2, 3, 4]
    assert list(rows[:5]) != list(rows[5:10])


def test_a_seed_gives_the_same_translators_and_bfloat16_works(params):
    tokens_BT, config = some_tokens(CONFIG, 4, 11), CONFIG.replace(compute_dtype="bfloat16")
    first, second, other = (
        train_tuned_lens(config, params, tokens_BT, steps=3, batch_size=2, seed=seed)[0] for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert (np.asarray(first.w_LDD) != other.w_LDD).any()
    assert first.w_LDD.dtype == jnp.float32
    assert np.isfinite(research.logit_lens(config, params, tokens_BT, translators=first).logprobs).all()


def test_chunks_bound_the_logits_in_memory():
    config = gpt2_jax.GPT2Config(n_vocab=4999, n_ctx=256, n_embd=8, n_head=1, n_layer=7)
    tokens, params = jax.ShapeDtypeStruct((4, 256), jnp.int32), gpt2_jax.abstract_params(config)
    translators, mask = jax.eval_shape(lambda: identity_translators(config)), jax.ShapeDtypeStruct((4, 256), bool)
    step, optimizer = tuned_lens._step_of(config, optax.sgd(1.0)), optax.sgd(1.0)
    program = step.lower(params, translators, optimizer.init(translators), tokens, mask).compile()
    one_chunk = 4 * lens.CHUNK * config.n_vocab
    assert program.memory_analysis().temp_size_in_bytes < 6 * one_chunk  # measured: 5.1, of 28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number, 1 or more, not 0"),
        ({"batch_size": 3}, "batch_size must be a whole number, from 1 to 2, not 3"),
        ({"tokens_BT": [[1, 99]]}, "id 99"),
        (
            {"translators": identity_translators(CONFIG.replace(n_layer=2))},
            "the translators are not of this model",
        ),
        ({"mask_BT": np.ones((2, 4), bool)}, r"mask must be bool\(2, 5\)"),
    ],
)
def test_bad_arguments_are_refused(params, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_tuned_lens(CONFIG, params, **({"tokens_BT": [[1, 2, 3, 4, 5]] * 2, "batch_size": 1} | arguments))


def test_translators_of_another_width_are_refused(params):
    other = identity_translators(CONFIG.replace(n_embd=24))
    with pytest.raises(ValueError, match=r"the translators are 24 wide, not 21 \(n_embd\)"):
        research.logit_lens(CONFIG, params, [[1, 2]], translators=other)
