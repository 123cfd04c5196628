"""score: every token except the first, once, as in whole forward passes and Hugging Face, in windows beyond n_ctx."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import on_eight_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import COMPILATIONS, equations
from strength import campaign
from tiny_models import CONFIG, chosen_logits, random_params

import gpt2_jax
from gpt2_jax.changes import NO_CHANGES
from gpt2_jax.generation import scoring
from gpt2_jax.generation.scoring import Score, score

BOUND = 4e-5  # nats; measured up to 1.1e-5, of logprobs down to -27
BOUND_FLOAT64 = 1e-13  # measured up to 1.8e-15


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@functools.partial(jax.jit, static_argnums=0)
def log_softmax(config, params, tokens_1T):
    logits = gpt2_jax.GPT2(config).apply({"params": params}, tokens_1T).logits
    return jax.nn.log_softmax(logits[0])


def some_prompts(lengths, n_vocab=CONFIG.n_vocab, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_vocab, n).tolist() for n in lengths]


def by_hand(config, params, prompt, stride):
    """The sliding window as in Hugging Face's documentation, one plain forward pass per window.

    It leaves out the first token of a window that does not overlap the one before: NaN.
    """
    prompt = np.asarray(prompt)
    result, previous_end = np.full(len(prompt), np.nan), 0
    for begin in range(0, len(prompt), stride):
        end = min(begin + config.n_ctx, len(prompt))
        tokens = np.zeros(config.n_ctx, np.int32)  # after the window: no earlier token attends to it
        tokens[: end - begin] = prompt[begin:end]
        logprobs_TV = np.asarray(log_softmax(config, params, tokens[None]))
        for t in range(max(previous_end, begin + 1), end):
            result[t] = logprobs_TV[t - begin - 1, prompt[t]]
        previous_end = end
        if end == len(prompt):
            break
    return result[1:]


def assert_scores(scores, expected, bound=BOUND):
    assert isinstance(scores, list)
    assert len(scores) == len(expected)
    for got, logprobs in zip(scores, expected, strict=True):
        assert isinstance(got, Score)
        np.testing.assert_allclose(got.logprobs, logprobs, rtol=0, atol=bound)
        assert type(got.sum) is type(got.perplexity) is float
        assert got.sum == pytest.approx(got.logprobs.sum(dtype=np.float64), rel=1e-12)
        assert got.perplexity == pytest.approx(np.exp(-got.logprobs.mean(dtype=np.float64)), rel=1e-12)


# ---- one window


def test_every_length_up_to_n_ctx(params):
    """One batch of all lengths, shuffled: each equals its own plain forward pass, in the given order."""
    lengths = np.random.default_rng(1).permutation(np.arange(2, CONFIG.n_ctx + 1))
    prompts = some_prompts(lengths)
    scores = score(CONFIG, params, prompts)
    assert all(got.logprobs.dtype == np.float32 for got in scores)
    assert_scores(scores, [by_hand(CONFIG, params, prompt, CONFIG.n_ctx) for prompt in prompts])


def test_the_embedded_model_equals_the_original(shakespeare, reference):
    """Against the logits of OpenAI's own graph; measured up to 1.1e-5."""
    logits_BTV = reference["logits"].astype(np.float64)
    logprobs_BTV = logits_BTV - np.log(np.exp(logits_BTV - 50).sum(-1, keepdims=True)) - 50
    expected = np.take_along_axis(logprobs_BTV[:, :-1], reference["tokens"][:, 1:, None], -1)[..., 0]
    assert_scores(score(*shakespeare, reference["tokens"]), expected)


def test_known_probabilities():
    config, params = chosen_logits(np.log([0.5, 0.25, 0.125, 0.125]))
    (got,) = score(config, params, [[3, 0, 1, 2, 0]])
    np.testing.assert_allclose(got.logprobs, np.log([0.5, 0.25, 0.125, 0.5]), rtol=2e-6)
    assert got.sum == pytest.approx(-7 * np.log(2), rel=1e-6)
    assert got.perplexity == pytest.approx(2 ** (7 / 4), rel=1e-6)


def test_sums_beyond_float64_are_infinite():
    config, params = chosen_logits([0.0, -800.0])
    (got,) = score(config, params, [[0, 1, 1]])
    assert got.sum == -1600
    assert got.perplexity == np.inf


def test_rows_equal_rows_alone(params):
    """Other rows, padding and windows of other prompts change only the rounding of products."""
    prompts = some_prompts([2, 97, 41, 7, 42, 19, 2, 130, 40])
    together = score(CONFIG, params, prompts, stride=13)
    alone = [score(CONFIG, params, [prompt], stride=13)[0] for prompt in prompts]
    assert_scores(together, [got.logprobs for got in alone])
    backwards = score(CONFIG, params, prompts[::-1], stride=13)[::-1]
    assert_scores(backwards, [got.logprobs for got in alone])


def test_more_prompts_than_go_into_a_call(params, monkeypatch):
    """Several calls, the last with fewer rows. Several chunks of positions in each, the last not full."""
    monkeypatch.setattr(scoring, "TOKENS_PER_CALL", {})
    monkeypatch.setattr(scoring, "TOKENS_PER_CALL_ELSEWHERE", 150)
    monkeypatch.setattr(scoring, "CHUNK", 11)
    prompts = some_prompts([5, 23, 29, 31, 2, 41, 13, 37, 17, 3, 19, 40, 7])
    assert_scores(score(CONFIG, params, prompts), [by_hand(CONFIG, params, prompt, CONFIG.n_ctx) for prompt in prompts])


# ---- windows

N = CONFIG.n_ctx


@pytest.mark.parametrize("stride", campaign([1, 7, N - 1], [1, 2, 7, N // 2, N - 1]))
@pytest.mark.parametrize("length", campaign([N, N + 1, 3 * N + 5], [N, N + 1, N + 2, 2 * N - 1, 2 * N, 3 * N + 5]))
def test_windows_equal_windows_by_hand(params, length, stride):
    (prompt,) = some_prompts([length])
    expected = by_hand(CONFIG, params, prompt, stride)
    assert np.isfinite(expected).all()
    assert_scores(score(CONFIG, params, [prompt], stride), [expected])


def test_stride_defaults_to_half_a_window(params):
    (prompt,) = some_prompts([2 * N + 9])
    np.testing.assert_array_equal(
        score(CONFIG, params, [prompt])[0].logprobs, score(CONFIG, params, [prompt], N // 2)[0].logprobs
    )
    assert (score(CONFIG, params, [prompt])[0].logprobs != score(CONFIG, params, [prompt], 7)[0].logprobs).any()


@pytest.mark.parametrize("length", [N, N + 1, 2 * N, 2 * N + 1, 3 * N + 5])
def test_windows_without_overlap(params, length):
    """The whole window before it scores the first token of a window. The others are as in the documentation."""
    (prompt,) = some_prompts([length])
    expected = by_hand(CONFIG, params, prompt, N)
    for t in range(N, length, N):
        assert np.isnan(expected[t - 1])
        expected[t - 1] = log_softmax(CONFIG, params, np.int32([prompt[t - N : t]]))[-1, prompt[t]]
    assert_scores(score(CONFIG, params, [prompt], N), [expected])


def test_a_context_of_one_token():
    config = CONFIG.replace(n_ctx=1)
    weights = random_params(config, 4)
    table = np.array([log_softmax(config, weights, np.int32([[i]]))[0] for i in range(config.n_vocab)])
    (prompt,) = some_prompts([17])
    for stride in (None, 1):
        assert_scores(score(config, weights, [prompt], stride), [table[prompt[:-1], prompt[1:]]])


@given(st.integers(1, 60), st.integers(1, 23), st.data())
def test_windows_score_every_token_once(length, n_ctx, data):
    """The first window gives all tokens before, later ones n_ctx - stride or more, and never more than n_ctx."""
    stride = data.draw(st.integers(1, n_ctx))
    row = np.arange(length)
    scored = []
    for window in scoring._windows(0, row, n_ctx, stride):
        n_context = len(window.tokens) - len(window.targets) + 1
        assert len(window.tokens) <= n_ctx
        assert n_context >= (1 if window.first == 1 else max(1, n_ctx - stride))
        assert window.tokens[-1] + 1 == window.targets[-1]  # consecutive ids: each target follows its position
        assert window.first == window.targets[0]
        scored += window.targets.tolist()
    assert scored == list(range(1, length))


@settings(max_examples=campaign(5, 20))
@given(st.lists(st.integers(2, 3 * N), min_size=1, max_size=5), st.integers(1, N - 1), st.integers(0, 99))
def test_any_prompts_equal_windows_by_hand(params, lengths, stride, seed):
    prompts = some_prompts(lengths, seed=seed)
    expected = [by_hand(CONFIG, params, prompt, stride) for prompt in prompts]
    assert_scores(score(CONFIG, params, prompts, stride), expected)


# ---- precision


def test_float64_equals_a_plain_forward_pass():
    """Without float32 rounding, any difference would be a bug."""
    config = CONFIG.replace(param_dtype="float64", compute_dtype="float64")
    with jax.enable_x64(True):
        weights = random_params(config, 0)
        prompts = some_prompts([2, 23, N, N + 1, 2 * N + 7])
        expected = [by_hand(config, weights, prompt, 11) for prompt in prompts]
        scores = score(config, weights, prompts, 11)
        assert all(got.logprobs.dtype == np.float64 for got in scores)
        assert_scores(scores, expected, BOUND_FLOAT64)


def test_float32_is_near_float64(params):
    """Measured up to 3.8e-6."""
    prompts = some_prompts([2, 23, N, N + 1, 2 * N + 7])
    scores = score(CONFIG, params, prompts, 11)
    config = CONFIG.replace(param_dtype="float64", compute_dtype="float64")
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        expected = [by_hand(config, weights, prompt, 11) for prompt in prompts]
    assert_scores(scores, expected)


def test_bfloat16_scores_in_float32(shakespeare, reference):
    """Measured 0.007 in the mean. The result has the digits of float32."""
    config, weights = shakespeare
    expected = np.concatenate([got.logprobs for got in score(config, weights, reference["tokens"])])
    scores = score(config.replace(compute_dtype="bfloat16"), weights, reference["tokens"])
    logprobs = np.concatenate([got.logprobs for got in scores])
    assert logprobs.dtype == np.float32
    assert (logprobs.astype(jnp.bfloat16).astype(np.float32) != logprobs).mean() > 0.9
    assert np.abs(logprobs - expected).mean() < 0.02


@pytest.mark.parity
def test_sliding_perplexity_is_hugging_face_s(tmp_path, shakespeare, tokenizer):
    """The loop of its documentation with its own model gives the same loss for each token; measured up to 5.8e-6."""
    reason = "needs the `parity` extra: pip install -e '.[parity]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    config, weights = shakespeare
    gpt2_jax.save(tmp_path / "model", config, weights, format="huggingface")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    text = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 20
    ids = tokenizer.encode(text)
    stride = 101
    assert len(ids) > config.n_ctx + 2 * stride
    input_ids, losses, previous_end = torch.tensor([ids]), [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + config.n_ctx, len(ids))
        window = input_ids[:, begin:end]
        target = window.clone()
        target[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            logits = model(window).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, target[0, 1:], reduction="none")
        losses.append(loss[target[0, 1:] != -100].numpy())
        previous_end = end
        if end == len(ids):
            break
    expected = -np.concatenate(losses)
    assert len(expected) == len(ids) - 1
    assert_scores(score(config, weights, [ids], stride), [expected])


# ---- programs and memory


def test_one_program_a_bucket(params):
    """Other prompts, lengths, strides, weights and orders of the same buckets do not compile."""
    score(CONFIG, params, some_prompts([5, 9, 33]))  # rows of up to 32 ids, four
    score(CONFIG, params, some_prompts([40, 9, 8]))  # two of these, and one of up to 41
    other = random_params(CONFIG, 1)  # making params compiles too
    before = len(COMPILATIONS)
    score(CONFIG, params, some_prompts([3, 33, 2]))
    score(CONFIG, other, some_prompts([41, 31, 30], seed=2), stride=3)
    score(CONFIG, params, some_prompts([31, 41]), stride=40)
    compiled = len(COMPILATIONS) - before
    assert compiled <= 1, compiled  # the last call has one row in its first bucket
    before = len(COMPILATIONS)
    score(CONFIG.replace(n_ctx=39), random_params(CONFIG.replace(n_ctx=39), 1), some_prompts([5, 9]))
    assert len(COMPILATIONS) > before  # the counter counts


def test_many_calls_of_all_lengths_compile_a_few_programs():
    config = CONFIG.replace(n_ctx=101, n_vocab=31)
    weights = random_params(config, 0)
    before = len(COMPILATIONS)
    for length in range(2, 320, campaign(29, 7)):
        score(config, weights, some_prompts([length], n_vocab=31), stride=60)
    assert 0 < len(COMPILATIONS) - before <= 12  # lengths 32, 48, 64, 96 and 101; rows 1, 2, 4, 8


def sizes(jaxpr):
    values = (value for equation in equations(jaxpr) for value in (*equation.invars, *equation.outvars))
    return (getattr(value.aval, "shape", ()) for value in values)


def test_no_more_than_a_chunk_of_logits_exists():
    """No array of the program has the size of all logits. Only a chunk of rows and the params have a V axis."""
    config = CONFIG.replace(n_vocab=5003)
    batch = list(scoring._windows(0, np.arange(1000), 41, 20))[:16]
    arrays = scoring._arrays(batch, 41)
    program = jax.make_jaxpr(functools.partial(scoring._logprobs, gpt2_jax.GPT2(config)))(
        gpt2_jax.abstract_params(config), NO_CHANGES, *arrays
    )
    rows = {np.prod(shape) // 5003 for shape in sizes(program.jaxpr) if 5003 in shape}
    assert rows == {config.n_embd, scoring.CHUNK}
    assert arrays[0].size > 2 * scoring.CHUNK


EIGHT_DEVICES = """
    import json, sys
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import gpt2_jax
    from gpt2_jax.generation.scoring import score

    config, params = gpt2_jax.load(gpt2_jax.embedded_model())
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def spread(leaf):
        axes = [i for i, n in enumerate(leaf.shape) if n % 8 == 0]
        return jax.device_put(leaf, NamedSharding(mesh, P(*[None] * axes[-1], "x") if axes else P()))

    prompts = [list(range(300, 311)), list(range(7, 400)), [5, 6]]
    sharded = jax.tree.map(spread, params)
    assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded)) > 20
    pairs = zip(score(config, params, prompts, 200), score(config, sharded, prompts, 200))
    print(json.dumps([float(np.abs(one.logprobs - other.logprobs).max()) for one, other in pairs]))
"""


def test_params_on_a_mesh_score_the_same():
    """Spread over eight devices; measured up to 5.8e-6."""
    assert max(on_eight_devices(EIGHT_DEVICES)) < BOUND


# ---- arguments


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], [3]], r"prompts\[1\] has 1 token"),
        ([[1, 2], []], r"prompts\[1\] is empty"),
        ([], "prompts is empty"),
        ("To be", "prompts must be a list"),
        ([[1, 2], [3, CONFIG.n_vocab]], rf"prompts\[1\] holds the id {CONFIG.n_vocab}"),
        ([[-1, 2]], r"prompts\[0\] holds the id -1"),
        ([[1.0, 2.0]], r"prompts\[0\] must be a list of token ids"),
    ],
)
def test_wrong_prompts_are_named(params, prompts, message):
    with pytest.raises(ValueError, match=message):
        score(CONFIG, params, prompts)


@pytest.mark.parametrize("stride", [0, -1, N + 1, 1.5, "3", True, [2]])
def test_wrong_strides_are_refused(params, stride):
    with pytest.raises(ValueError, match=f"stride must be a whole number, from 1 to {N}, not"):
        score(CONFIG, params, [[1, 2]], stride)


def test_a_wrong_config_or_params_are_refused(params):
    with pytest.raises(ValueError, match="config must be a GPT2Config"):
        score(None, params, [[1, 2]])
    with pytest.raises(ValueError, match="wpe"):
        score(CONFIG.replace(n_ctx=N + 1), params, [[1, 2]])


def test_nan_names_the_prompt(params):
    broken = {**params, "wpe": params["wpe"].at[5].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"prompts\[1\]: the logits are NaN or infinite at token \d+: .* params.wpe."):
        score(CONFIG, broken, some_prompts([6, 9]))
    assert len(score(CONFIG, broken, some_prompts([6, 5]))) == 2  # position 5 is not read


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_arrays_are_prompts(params, dtype):
    prompts = some_prompts([7, 7, 7])
    expected = [got.logprobs.tolist() for got in score(CONFIG, params, prompts)]
    for given_prompts in (np.array(prompts, dtype), [np.array(prompt, dtype) for prompt in prompts], tuple(prompts)):
        assert [got.logprobs.tolist() for got in score(CONFIG, params, given_prompts, np.int64(3))] == expected
