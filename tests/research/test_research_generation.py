"""Edits while text is generated, streamed and scored: they apply in every forward pass, as NumPy computes it."""

import dataclasses

import jax
import naive_generation
import numpy as np
import numpy_activations as naive
import pytest
from fake_models import TEXT_CONFIG
from measures import COMPILATIONS
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax import generation, research
from gpt2_jax.changes import Changes
from gpt2_jax.generation.engine import decode_rows

PROMPTS = [[5], list(range(19)), [7] * 13, [3, 1, 4, 1, 5, 9, 2, 6]]
GREEDY = {"temperature": 0}
KNOBS = {"temperature": 1.3, "top_k": 17, "top_p": 0.95, "repetition_penalty": 1.2}
BOUND = 1e-4  # nats; measured: 2e-5, of logprobs down to -31


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def steering(seed=0, places=(2, 9), head=1, start=4):
    """Return edits of several kinds, at prompt, new and all tokens, and their descriptions for `naive`."""
    rng = np.random.default_rng(seed)
    value_D, value_H, value_N11 = rng.normal(0, 1, 12), rng.normal(0, 1, 4), rng.uniform(0, 2, (3, 1, 1))
    every = range(start, CONFIG.n_ctx)
    edits = [
        ("add", "h0/resid_post", value_D, slice(start, None), None, every),
        ("replace", "h0/attn/v", value_H, list(places), head, places),
        ("scale", "h1/attn/scores", 0.5, slice(start, None), head, every),
        ("scale", "h0/attn/pattern", value_N11, None, None, None),
        ("scale", "h1/attn/z", -1.5, places[0], [head, 0], [places[0]]),
        ("add", "h0/resid_post", value_D[::-1], list(places), None, places),
        ("replace", "h1/mlp/post", rng.normal(0, 1, 48), slice(places[1], places[1] + 1), None, [places[1]]),
    ]
    made = [getattr(research, kind)(name, value, said, heads) for kind, name, value, said, heads, _ in edits]
    heads_of = {1: [head], 2: [head], 4: [head, 0]}
    described = [naive.edit(*edit[:3], edit[5], heads_of.get(i)) for i, edit in enumerate(edits)]
    return made, described


@pytest.fixture
def by_hand(monkeypatch):
    """Make naive_generation apply edits in every forward pass, over the whole row or its window."""

    def use(described):
        def logits_before(config, params, prompt, row):
            windows = naive_generation.windows([*prompt, *row[:-1]], config.n_ctx)[len(prompt) - 1 :]
            logits = [naive.forward(config, params, np.array([ids]), None, described)[0][0, -1] for ids in windows]
            return np.stack(logits)

        monkeypatch.setattr(naive_generation, "logits_before", logits_before)

    return use


def greedy(params, rows, prompts=PROMPTS):
    return [naive_generation.greedy(CONFIG, params, *pair) for pair in zip(prompts, rows, strict=True)]


# --- generate --------------------------------------------------------------------------------------------------------


def test_ragged_batches_equal_rows_run_anew(params, by_hand):
    """Greedy: each token follows from a NumPy pass over the whole row so far, with the same edits."""
    edits, described = steering()
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 22, edits=edits, **GREEDY)
    by_hand(described)
    assert rows == greedy(params, rows)
    assert rows != gpt2_jax.generate(CONFIG, params, PROMPTS, 22, **GREEDY)


def test_sampled_rows_equal_rows_run_anew(params, by_hand):
    edits, described = steering(seed=1, places=(0, 7))
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 22, edits=edits, seed=5, **KNOBS)
    by_hand(described)
    assert rows == [
        naive_generation.sampled(CONFIG, params, prompt, row, i, 5, **KNOBS)
        for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True))
    ]


def test_rows_that_slide_equal_windows_run_anew(params, by_hand):
    """Beyond n_ctx, positions are those of the window, which is read again from position 0."""
    edits, described = steering(seed=2, places=(1, 23), start=17)
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 53, overflow="slide", edits=edits, **GREEDY)
    by_hand(described)
    assert rows == greedy(params, rows)


def test_edits_that_change_nothing_change_no_token(params):
    plain = gpt2_jax.generate(CONFIG, params, PROMPTS, 22, **GREEDY)
    edits = [
        research.add("h0/attn/scores", 0.0),
        research.scale("h1/attn/pattern", 1.0, positions=slice(3, 7)),
        research.replace("h1/attn/k", 9.0, positions=[], heads=1),
        research.scale("ln_f/scale", 1.0),
    ]
    assert gpt2_jax.generate(CONFIG, params, PROMPTS, 22, edits=edits, **GREEDY) == plain


def test_other_values_places_and_heads_compile_nothing(params):
    """In generate, stream and score. Earlier edits leave no effect."""
    tokenizer, text_params = (
        gpt2_jax.load_tokenizer(gpt2_jax.embedded_model()),
        random_params(TEXT_CONFIG, 1, scale=0.2),
    )

    def steer(seed):
        rng = np.random.default_rng(seed)
        edits, _ = steering(seed, tuple(rng.choice(11, 2, replace=False).tolist()), int(rng.integers(3)), seed)
        vector_D = research.add("h0/resid_mid", rng.normal(0, 9, 64), slice(seed, None))
        return (
            gpt2_jax.generate(CONFIG, params, PROMPTS, 22, edits=edits, **GREEDY),
            [score.sum for score in gpt2_jax.score(CONFIG, params, PROMPTS[1:], edits=edits)],
            "".join(gpt2_jax.stream(TEXT_CONFIG, text_params, [5, 6], tokenizer, 21, edits=vector_D, **GREEDY)),
        )

    first = steer(1)
    compiled = len(COMPILATIONS)
    others = [steer(seed) for seed in (2, 3, 4)]
    assert steer(1) == first
    assert len(COMPILATIONS) == compiled
    assert all(other[i] != first[i] for other in others for i in range(3))


# --- stream and complete ---------------------------------------------------------------------------------------------


def test_a_stream_is_the_text_of_generate(tokenizer):
    """With the same edits, greedy and sampled. `complete` gives the same ids too."""
    params = random_params(TEXT_CONFIG, 1, scale=0.2)
    vector_D = np.random.default_rng(0).normal(0, 9, 64)
    edits = research.add("h0/resid_mid", vector_D, positions=slice(3, 40))  # a single edit needs no list
    plain = gpt2_jax.generate(TEXT_CONFIG, params, [[5, 6, 7]], 21, **GREEDY)
    for knobs in (GREEDY, {"seed": 3}):
        [ids] = gpt2_jax.generate(TEXT_CONFIG, params, [[5, 6, 7]], 21, edits=edits, **knobs)
        assert ids != plain[0]
        pieces = gpt2_jax.stream(TEXT_CONFIG, params, [5, 6, 7], tokenizer, 21, edits=edits, **knobs)
        assert "".join(pieces) == tokenizer.decode(ids)
        settings = generation.Settings(max_new_tokens=21, **knobs)
        [completion] = generation.complete(TEXT_CONFIG, params, [[5, 6, 7]], tokenizer, settings, edits=edits)
        assert completion.ids == ids


# --- score -----------------------------------------------------------------------------------------------------------


def test_scores_are_numpys(params):
    """Rows have different lengths. Each token's score depends on the tokens before it, with edits."""
    edits, described = steering(seed=6)
    prompts = [*PROMPTS[1:], np.random.default_rng(1).integers(0, 37, 41).tolist()]
    for prompt, score in zip(prompts, gpt2_jax.score(CONFIG, params, prompts, edits=edits), strict=True):
        logits_TV = naive.forward(CONFIG, params, np.array([prompt]), None, described)[0][0]
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        expected = logprobs_TV[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(score.logprobs, expected, atol=BOUND)
        assert np.array_equal(score.greedy, logprobs_TV[:-1].argmax(-1) == prompt[1:])


def test_scores_of_long_texts_have_places_in_their_windows(params):
    """An edit of pos_embed at position 3 is the same as another row 3 of wpe, in every window."""
    value_D = np.random.default_rng(4).normal(0, 1, 12).astype(np.float32)
    prompts = [np.random.default_rng(2).integers(0, 37, 103).tolist(), PROMPTS[1]]
    edits = research.replace("pos_embed", value_D, positions=3)
    ours = gpt2_jax.score(CONFIG, params, prompts, stride=17, edits=edits)
    theirs = gpt2_jax.score(CONFIG, {**params, "wpe": params["wpe"].at[3].set(value_D)}, prompts, stride=17)
    plain = gpt2_jax.score(CONFIG, params, prompts, stride=17)
    for a, b, c in zip(ours, theirs, plain, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=BOUND)
        assert np.abs(a.logprobs - c.logprobs).max() > 0.1


# --- refusals --------------------------------------------------------------------------------------------------------


def calls(params, tokenizer):
    """Return each way to run a text, as a function of its edits."""
    settings = generation.Settings(max_new_tokens=3)
    return {
        "generate": lambda edits: gpt2_jax.generate(CONFIG, params, PROMPTS, 3, edits=edits),
        "stream": lambda edits: gpt2_jax.stream(CONFIG, params, [1], tokenizer, 3, edits=edits),
        "complete": lambda edits: generation.complete(CONFIG, params, PROMPTS, tokenizer, settings, edits=edits),
        "score": lambda edits: gpt2_jax.score(CONFIG, params, PROMPTS[1:], edits=edits),
    }


@pytest.mark.parametrize("call", ["generate", "stream", "complete", "score"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h0/resid_post", (4, 1, 12)),
        ("h0/resid_post", (19, 12)),
        ("h1/attn/z", (4, 1, 3, 4)),
        ("h1/attn/scores", (3, 1, 32)),
        ("h1/attn/pattern", (7, 1)),
        ("ln_f/scale", (4, 1, 1)),
        ("h0/resid_post", (13,)),
    ],
)
def test_values_of_rows_and_tokens_are_refused(params, tokenizer, call, name, shape):
    """A value must be the same for all tokens, because a batch's rows and tokens vary."""
    with pytest.raises(ValueError, match=rf"{name}.*the same for all rows and tokens"):
        calls(params, tokenizer)[call]([research.add(name, np.zeros(shape))])


@pytest.mark.parametrize("call", ["generate", "stream", "complete", "score"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: research.add("h2/resid_pre", 0.0), "h2/resid_pre"),
        (lambda: research.scale("h0/attn/z", 0.0, heads=3), "heads"),
        (lambda: "embed", "edits must be made with"),
    ],
)
def test_edits_that_do_not_fit_the_model_are_refused(params, tokenizer, call, make, match):
    with pytest.raises(ValueError, match=match):
        calls(params, tokenizer)[call]([make()])


@pytest.mark.parametrize("call", ["generate", "stream", "complete", "score"])
def test_traced_values_are_refused(params, tokenizer, call):
    """The loop around the compiled programs is Python, and cannot run inside the caller's compiled program."""
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda value: calls(params, tokenizer)[call](research.add("embed", value)))(1.0)


# --- the compiled programs -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A model as `decode_rows` needs it: hashable, with a GPT2's config and apply."""

    config: gpt2_jax.GPT2Config

    def apply(self, *args, **kwargs):
        """Apply the model."""
        return gpt2_jax.GPT2(self.config).apply(*args, **kwargs)


def test_any_model_with_a_config_and_apply_decodes_with_edits(params):
    edits = tuple(steering()[0])
    settings = generation.Settings(max_new_tokens=9, **GREEDY).check(CONFIG)
    prompts, finished_B = [np.array(prompt) for prompt in PROMPTS], np.zeros(len(PROMPTS), bool)
    pieces = decode_rows(Wrapped(CONFIG), params, prompts, settings, finished_B, changes=Changes(edits))
    ids_BR = np.concatenate([picked.id_BR for picked in pieces], axis=1)
    assert ids_BR.tolist() == gpt2_jax.generate(CONFIG, params, PROMPTS, 9, edits=edits, **GREEDY)
    assert ids_BR.tolist() != gpt2_jax.generate(CONFIG, params, PROMPTS, 9, **GREEDY)
