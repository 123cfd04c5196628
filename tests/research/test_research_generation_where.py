"""Generation and scoring with edits of each row and from each prompt's end, and activations of new tokens."""

import jax
import numpy as np
import numpy_activations as naive
import pytest
from measures import COMPILATIONS
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax import research

PROMPTS = [[5], list(range(19)), [7] * 13, [3, 1, 4, 1, 5, 9, 2, 6]]
GREEDY = {"temperature": 0}
BOUND = 5e-6  # of float32, relative to the largest value; measured: 9e-7
N_NEW = 7
RNG = np.random.default_rng(0)
VALUES = RNG.normal(0, 2, (len(PROMPTS), CONFIG.n_embd)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def greedy_by_hand(params, prompt, edits_of, n_new=N_NEW):
    """Decode one row without a cache. `edits_of(n)` returns the edits with positions counted from 0, for n tokens."""
    row = list(prompt)
    for _ in range(n_new):
        out, _ = research.forward(CONFIG, params, [row], edits=edits_of(len(row)))
        row.append(int(out.logits[0, -1].argmax()))
    return row[len(prompt) :]


WHERE = {  # positions as said, and as they are in a row of n tokens whose prompt has p
    "the prompt's last token": (-1, lambda p, n: [p - 1]),
    "from there on": (slice(-1, None), lambda p, n: range(p - 1, n)),
    "all but the prompt's last token": (slice(None, -1), lambda p, n: range(p - 1)),
    "new tokens, by number": (slice(19, None), lambda p, n: range(19, n)),
    "of each row": ([[0], [-2, 4], [12], [-8, -1]], None),
    "a slice of each row": (slice([0, 3, -4, 5], [1, 9, 13, 200]), None),
}
OF_ROWS = {
    "of each row": [[0], [17, 4], [12], [0, 7]],
    "a slice of each row": [range(1), range(3, 9), range(9, 13), range(5, 99)],
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("each_row", [False, True])
def test_positions_in_prompts_of_any_length(params, where, each_row):
    """Ragged rows together give what each gives alone, run as a whole for every token."""
    said, at = WHERE[where]
    value = VALUES if each_row else VALUES[1]
    edits = [research.add("h1/resid_pre", value, said, each_row=each_row)]
    how = {**GREEDY, "edits": edits, "capture": "h1/resid_post"}
    rows, activations = gpt2_jax.generate(CONFIG, params, PROMPTS, N_NEW, **how)

    def edits_of(b, n):
        places = at(len(PROMPTS[b]), n) if at else OF_ROWS[where][b]
        places = [place for place in places if place < n]
        return research.add("h1/resid_pre", VALUES[b if each_row else 1], places)

    for b, prompt in enumerate(PROMPTS):
        assert rows[b] == greedy_by_hand(params, prompt, lambda n, b=b: edits_of(b, n)), b
        whole = [*prompt, *rows[b]]
        _, seen = research.forward(CONFIG, params, [whole], edits=edits_of(b, len(whole)), capture="h1/resid_post")
        expected_RD = seen["h1/resid_post"][0, len(prompt) - 1 : -1]
        assert naive.error(activations[b]["h1/resid_post"], expected_RD) < BOUND
    assert rows != gpt2_jax.generate(CONFIG, params, PROMPTS, N_NEW, **GREEDY)


def test_rows_that_are_divided_keep_their_own_edits(params, monkeypatch):
    """With little memory, a list is decoded in parts."""
    edits = [research.add("h1/resid_pre", VALUES, [[0], [-2], [12], [3]], each_row=True)]
    how = {**GREEDY, "edits": edits, "capture": "h1/resid_post"}
    whole, activations = gpt2_jax.generate(CONFIG, params, PROMPTS, N_NEW, **how)
    monkeypatch.setattr("gpt2_jax.generation.decoding.rows_together", lambda *_: 3)
    parts, again = gpt2_jax.generate(CONFIG, params, PROMPTS, N_NEW, **how)
    assert parts == whole
    for one, other in zip(activations, again, strict=True):
        assert naive.error(other["h1/resid_post"], one["h1/resid_post"]) < BOUND


def test_a_value_of_each_position_of_a_prompt(params):
    """As activation addition does: vectors of another prompt at the first positions, for rows of any length."""
    values = RNG.normal(0, 3, (4, 3, CONFIG.n_embd)).astype(np.float32)
    prompts = PROMPTS[1:]
    edit = research.add("h0/resid_post", values[1:], slice(0, 3), each_row=True, each_position=True)
    rows = gpt2_jax.generate(CONFIG, params, prompts, N_NEW, **GREEDY, edits=edit)
    for b, prompt in enumerate(prompts):
        alone = [research.add("h0/resid_post", values[b + 1, t], t) for t in range(3)]
        assert rows[b] == greedy_by_hand(params, prompt, lambda n, alone=alone: alone)
    assert rows != gpt2_jax.generate(CONFIG, params, prompts, N_NEW, **GREEDY)


def test_a_prompt_that_leaves_the_window_keeps_no_edit(params):
    """After the window has moved, positions from the prompt's end are no longer in it; those behind it are all new."""
    prompt = PROMPTS[1]
    how = {"overflow": "slide", **GREEDY}
    how |= {"edits": research.add("h0/resid_post", VALUES[0], -1), "capture": "h1/resid_post"}
    (ended,), (activations,) = gpt2_jax.generate(CONFIG, params, [prompt], 50, **how)
    row = list(prompt)
    for new, found_D in zip(ended, activations["h1/resid_post"], strict=True):
        n = len(row)
        start = n - gpt2_jax.generation.engine.window(CONFIG.n_ctx, n)
        places = [len(prompt) - 1 - start] if len(prompt) - 1 >= start else []
        edit = research.add("h0/resid_post", VALUES[0], places)
        out, seen = research.forward(CONFIG, params, [row[start:]], edits=edit, capture="h1/resid_post")
        assert int(out.logits[0, -1].argmax()) == new
        assert naive.error(found_D, seen["h1/resid_post"][0, -1]) < BOUND
        row.append(new)
    assert len(row) > CONFIG.n_ctx + CONFIG.n_ctx // 2


def test_scores_have_positions_from_each_prompts_end(params):
    prompts = PROMPTS[1:]
    edits = [
        research.add("h0/mlp/out", VALUES[1:], slice(-5, -1), each_row=True),
        research.scale("attn/z", 0.3, [[1], [-2], [2]], heads=1),
    ]
    for b, found in enumerate(gpt2_jax.score(CONFIG, params, prompts, edits=edits)):
        alone = [
            research.add("h0/mlp/out", VALUES[b + 1], slice(-5, -1)),
            research.scale("attn/z", 0.3, [1, -2, 2][b], heads=1),
        ]
        out, _ = research.forward(CONFIG, params, np.array([prompts[b]]), edits=alone)
        logprobs = jax.nn.log_softmax(out.logits[0, :-1])[np.arange(len(prompts[b]) - 1), prompts[b][1:]]
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)  # nats; measured: 5e-6


def test_a_long_prompt_is_scored_with_positions_in_its_windows(params):
    """Those from its end are in the last window that has them."""
    long = RNG.integers(0, CONFIG.n_vocab, CONFIG.n_ctx + 9).tolist()
    edit = research.add("h0/mlp/out", VALUES[0], -3)
    found, plain = (gpt2_jax.score(CONFIG, params, [long], stride=CONFIG.n_ctx // 2, edits=e)[0] for e in (edit, ()))
    changed = np.flatnonzero(found.logprobs != plain.logprobs)
    assert changed.tolist() == [len(long) - 3, len(long) - 2]


# --- activations of new tokens ---------------------------------------------------------------------------------------

CAPTURE = ["resid_post$", "attn/q$", "mlp/post", "ln_f/scale", "attn/result", "mlp/in", "^embed"]


@pytest.mark.parametrize("changed", [False, True])
def test_activations_are_those_of_the_whole_row(params, changed):
    how = {"edits": research.add("mlp/out", VALUES[0], slice(-1, None)), "taps": {"attn/v": lambda v, _: v * 1.5}}
    ids, activations = gpt2_jax.generate(
        CONFIG, params, PROMPTS, N_NEW, **GREEDY, capture=CAPTURE, **(how if changed else {})
    )
    assert ids == gpt2_jax.generate(CONFIG, params, PROMPTS, N_NEW, **GREEDY, **(how if changed else {}))
    for prompt, new, found in zip(PROMPTS, ids, activations, strict=True):
        whole = {**how, "edits": research.add("mlp/out", VALUES[0], slice(len(prompt) - 1, None))} if changed else {}
        _, seen = research.forward(CONFIG, params, np.array([prompt + new]), capture=CAPTURE, **whole)
        assert list(found) == list(seen)
        for name, expected in seen.items():
            assert naive.error(found[name], expected[0, len(prompt) - 1 : -1]) < BOUND, name


def test_rows_end_at_their_stop_and_in_windows(params):
    """As many as new ids, also in several calls of a long text that slides, and with log-probabilities."""
    prompts, how = PROMPTS, {"overflow": "slide", "temperature": 1.0, "seed": 3}
    plain = gpt2_jax.generate(CONFIG, params, prompts, 60, **how)
    stop = plain[0][9]
    ids, logprobs, activations = gpt2_jax.generate(
        CONFIG, params, prompts, 60, **how, stop_ids=[stop], logprobs=2, capture="^h1/resid_post$"
    )
    lengths = [row.index(stop) if stop in row else 60 for row in plain]
    assert len(set(lengths)) > 1
    for row, new, n, chosen, found in zip(prompts, ids, lengths, logprobs, activations, strict=True):
        assert len(new) == len(chosen.chosen) == len(found["h1/resid_post"]) == n
        for i in (0, n // 2, n - 1) if n else ():
            text = [*row, *new[:i]]
            text = text[-gpt2_jax.generation.engine.window(CONFIG.n_ctx, len(text)) :]
            _, seen = research.forward(CONFIG, params, [text], capture="^h1/resid_post$")
            assert naive.error(found["h1/resid_post"][i], seen["h1/resid_post"][0, -1]) < BOUND


def test_no_new_tokens_have_no_activations(params):
    ids, activations = gpt2_jax.generate(CONFIG, params, PROMPTS, 0, capture="attn/q$")
    assert ids == [[]] * 4
    assert [found["h0/attn/q"].shape for found in activations] == [(0, 3, 4)] * 4


@pytest.mark.parametrize("name", ["h0/attn/scores", "attn/pattern"])
def test_what_grows_with_the_text_is_refused(params, name):
    with pytest.raises(ValueError, match=r"attn/(scores|pattern).*research\.forward"):
        gpt2_jax.generate(CONFIG, params, PROMPTS, 3, capture=name)


def test_bfloat16_stays_bfloat16(params):
    config = CONFIG.replace(compute_dtype="bfloat16")
    _, activations = gpt2_jax.generate(config, params, PROMPTS, 3, **GREEDY, capture=["mlp/out", "ln_f/scale"])
    assert {name: value.dtype.name for name, value in activations[2].items()} == {
        "h0/mlp/out": "bfloat16", "h1/mlp/out": "bfloat16", "ln_f/scale": "float32",
    }  # fmt: skip


# --- arguments and cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [26, -20, [[0], [19], [-14], [2]], slice(40, None)])
def test_positions_that_no_row_can_have_are_refused(params, positions):
    """19 tokens and 7 new ones: positions to 25, and back to -19."""
    with pytest.raises(ValueError, match="row"):
        gpt2_jax.generate(CONFIG, params, PROMPTS, N_NEW, edits=research.add("embed", 1.0, positions))


def test_an_edit_that_can_change_no_score_is_refused(params):
    with pytest.raises(ValueError, match="-2"):
        gpt2_jax.score(CONFIG, params, PROMPTS[1:], edits=research.add("embed", 1.0, -1))


def test_other_rows_positions_and_layers_compile_nothing(params):
    def run(seed):
        rng = np.random.default_rng(seed)
        value = rng.normal(0, 3, (4, CONFIG.n_embd)).astype(np.float32)
        positions = [[int(rng.integers(len(prompt)))] for prompt in PROMPTS]
        edit = research.add("resid_post", value, positions, each_row=True, layers=seed % 2)
        return gpt2_jax.generate(CONFIG, params, PROMPTS, N_NEW, **GREEDY, edits=edit)

    first, compiled = run(0), len(COMPILATIONS)
    assert run(1) != first
    assert len(COMPILATIONS) == compiled
