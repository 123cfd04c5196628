"""Batches: a function of (seed, step), each token once an epoch; validation windows, exact."""

import hashlib
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import token_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data.batching import batches, windows


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Give text(n_tokens), whose ids are their own positions: 0, 1, 2, ..."""
    folder = tmp_path_factory.mktemp("tokens")
    return lambda n_tokens, mask=None: token_folders.counting(folder / f"{n_tokens}.bin", n_tokens, mask)


def take(count, *args, **kwargs):
    iterator = batches(*args, **kwargs)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("tokens", "targets", "weights"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def starts(some_batches) -> np.ndarray:
    return np.concatenate([batch.tokens[:, 0] for batch in some_batches])


def test_a_batch(text):
    (batch,) = take(1, text(1009), 13, 5, seed=3)
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (5, 13)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.weights.dtype) == (np.int32, np.int32, np.float32)
    np.testing.assert_array_equal(batch.tokens, batch.tokens[:, :1] + np.arange(13))
    np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
    assert (batch.weights == 1).all()
    assert batch.targets.max() < 1009


@settings(max_examples=25)
@given(
    n_tokens=st.integers(12, 400), length=st.integers(1, 11), rows=st.integers(1, 7), step=st.integers(0, 90),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_begun_late_equals_uninterrupted(text, n_tokens, length, rows, step, seed):
    tokens = text(n_tokens)
    whole = take(step + 3, tokens, length, rows, seed)
    assert_same(take(3, tokens, length, rows, seed, first_step=step), whole[step:])


def test_begun_at_a_step_that_none_reaches(text):
    """Earlier steps are neither read nor counted."""
    first, second = take(2, text(1009), 13, 5, 3, first_step=10**12)
    assert_same([second], take(1, text(1009), 13, 5, 3, first_step=10**12 + 1))
    assert (first.tokens != second.tokens).any()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("first_step", [0, 17])
def test_processes_share_the_same_batches(text, count, first_step):
    whole = take(9, text(307), 7, 12, 5, first_step)
    parts = [take(9, text(307), 7, 12, 5, first_step, index, count) for index in range(count)]
    for step, batch in enumerate(whole):
        for name in ("tokens", "targets", "weights"):
            shards = [getattr(part[step], name) for part in parts]
            assert {len(shard) for shard in shards} == {12 // count}
            np.testing.assert_array_equal(np.concatenate(shards), getattr(batch, name))


@settings(max_examples=40)
@given(n_tokens=st.integers(9, 700), length=st.integers(1, 8), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_an_epoch_reads_each_token_once(text, n_tokens, length, seed, epoch):
    """Except for less than a window at both ends. Overlaps are as small as even distances between windows allow."""
    n_windows = -(-(n_tokens - 1) // length)
    drawn = starts(take(n_windows, text(n_tokens), length, 1, seed, first_step=epoch * n_windows))
    seen = np.zeros(n_tokens, int)
    for start in drawn:
        seen[start + 1 : start + 1 + length] += 1
    assert seen[length : n_tokens - length].min(initial=1) >= 1
    apart = max((n_tokens - length) // n_windows, 1)  # tokens from one window to the next, at least
    assert seen.max() <= min(n_windows, -(-length // apart))
    assert (seen == 2).sum() <= 2 * length + n_windows


def test_epochs_differ_in_order_and_in_where_windows_begin(text):
    epochs = [starts(take(31, text(401), 13, 1, 3, first_step=31 * epoch)) for epoch in range(4)]
    for one, other in itertools.combinations(epochs, 2):
        assert set(one) != set(other)
        assert (np.argsort(one) != np.argsort(other)).any()
    assert all((np.diff(epoch) < 0).any() for epoch in epochs)


def test_windows_begin_at_every_token_equally_often(text):
    """1,200 epochs of 4 windows over the 22 possible starts: a chi-square with 21 degrees of freedom."""
    drawn = starts(take(1200, text(29), 7, 4, 11))
    observed = np.bincount(drawn, minlength=22)
    assert len(observed) == 22
    expected = len(drawn) / 22
    assert ((observed - expected) ** 2 / expected).sum() < 46.8  # p = 0.001


def test_seeds_differ_and_neighbours_share_no_epoch(text):
    """Seed 1 must not give the next epoch of seed 0, as it would if seed and epoch were added."""
    orders = {}
    for seed, epoch in itertools.product(range(3), range(3)):
        drawn = starts(take(31, text(401), 13, 1, seed, first_step=31 * epoch))
        orders[seed, epoch] = tuple(np.argsort(drawn))
    assert len(set(orders.values())) == 9


def test_the_order_is_what_it_always_was(text):
    """A run that is resumed with a later version continues in the same order."""
    drawn = starts(take(40, text(1009), 13, 3, 20261122)).astype("<i4")
    assert drawn[:6].tolist() == GOLDEN_STARTS
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == GOLDEN_SHA256


GOLDEN_STARTS = [191, 817, 715, 25, 383, 331]
GOLDEN_SHA256 = "8c62cdb528b8370e5211bc93a39b83a1ac125514e9af864d124007ba0b4ff0ad"


def test_masked_targets_have_weight_0(text):
    mask = np.random.default_rng(3).random(211) < 0.3
    for batch in [*take(5, text(211, mask), 7, 4, 1), *windows(text(211, mask), 7, 4)]:
        real = batch.targets > 0  # the first token is not a target, and padding is 0
        np.testing.assert_array_equal(batch.weights[real], mask[batch.targets[real]])
        assert not batch.weights[~real].any()


def test_a_text_shorter_than_a_window_is_padded_with_one_warning(text):
    with pytest.warns(UserWarning, match=r"5\.bin has 5 tokens, fewer than the 12 ") as caught:
        (batch,) = take(1, text(5), 11, 3, 0)
    assert len(caught) == 1
    np.testing.assert_array_equal(batch.tokens, [[0, 1, 2, 3, 4] + [0] * 6] * 3)
    np.testing.assert_array_equal(batch.targets, [[1, 2, 3, 4] + [0] * 7] * 3)
    np.testing.assert_array_equal(batch.weights, [[1] * 4 + [0] * 7] * 3)
    assert starts(take(2, text(12), 11, 3, 0)).tolist() == [0] * 6  # one whole window: no warning


@pytest.mark.parametrize("read", [lambda tokens: batches(tokens, 7, 2, 0), lambda tokens: windows(tokens, 7, 2)])
@pytest.mark.parametrize("n_tokens", [0, 1])
def test_nothing_to_predict(text, read, n_tokens):
    with pytest.raises(ValueError, match=f"{n_tokens}.bin has {n_tokens} tokens: there is nothing to predict"):
        read(text(n_tokens))


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        ((0, 2, 0), "n_tokens"), ((7, 0, 0), "batch_size"), ((7, 2, -1), "seed"), ((7, 2, 2**32), "seed"),
        ((7, 2, 0, -1), "first_step"), ((7, 3, 0, 0, 0, 2), "batch of 3 rows.*2 processes"),
        ((7, 4, 0, 0, 2, 2), "number 2"), ((7, 4, 0, 0, -1, 2), "number -1"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit(text, args, culprit):
    with pytest.raises(ValueError, match=culprit) as error:
        batches(text(101), *args)
    assert "\n" not in str(error.value)


def test_a_failure_to_read_is_told(tmp_path):
    tokens = token_folders.counting(tmp_path / "text.bin", 307)
    os.truncate(tokens.path, 100)
    with pytest.raises(OSError, match=r"text\.bin has become shorter"):
        take(20, tokens, 7, 4, 0)


def test_closed_it_leaves_no_thread(text):
    before = set(threading.enumerate())
    iterator = batches(text(307), 7, 4, 0)
    next(iterator)
    own = set(threading.enumerate()) - before
    assert own
    iterator.close()
    for thread in own:
        thread.join(20)
        assert not thread.is_alive()
    assert next(iterator, None) is None


def test_a_program_that_ends_without_closing_ends_quietly(tmp_path):
    token_folders.counting(tmp_path / "text.bin", 307)
    code = """if True:
        import sys; from pathlib import Path
        from gpt2_jax.data.batching import batches; from gpt2_jax.data.token_files import Tokens
        iterator = batches(Tokens(Path(sys.argv[1]), 307, 65535), 7, 4, 0)
        print(next(iterator).tokens.shape)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, str(tmp_path / "text.bin")],
        capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "(4, 7)\n", "")


# ---- validation


def test_validation_of_the_embedded_model_has_its_readme_windows(text):
    """The last tenth of 433,552 tokens in windows of 256: 43,264 predictions of the next token, none twice."""
    got = list(windows(text(433_552 - 390_196), 256, 16))
    targets = np.concatenate([batch.targets[batch.weights == 1] for batch in got])
    np.testing.assert_array_equal(targets, np.arange(1, 43_264 + 1))
    assert {batch.tokens.shape for batch in got} == {(16, 256)}
    assert got[-1].weights.sum(1).tolist() == [256] * 9 + [0] * 7


@settings(max_examples=40)
@given(n_tokens=st.integers(2, 300), length=st.integers(1, 40), rows=st.integers(1, 7), at_most=st.integers(0, 9))
def test_windows_are_consecutive_and_full(text, n_tokens, length, rows, at_most):
    got = list(windows(text(n_tokens), length, rows, at_most))
    assert {batch.tokens.shape for batch in got} == {(rows, length)}
    n_windows = (n_tokens - 1) // length
    n_windows = min(n_windows, at_most or n_windows)
    count = n_windows * length if n_windows else n_tokens - 1
    real = [
        np.concatenate([getattr(batch, name)[batch.weights == 1] for batch in got]) for name in ("tokens", "targets")
    ]
    np.testing.assert_array_equal(real[0], np.arange(count))
    np.testing.assert_array_equal(real[1], np.arange(1, count + 1))
    assert len(got) == max(-(-n_windows // rows), 1)
    assert all(not batch.targets[batch.weights == 0].any() for batch in got)


def test_at_most_may_not_be_negative(text):
    with pytest.raises(ValueError, match="at_most"):
        windows(text(101), 7, 2, -1)


def test_reading_keeps_no_file_open(text):
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("no list of open files here")
    tokens = text(307)
    before = len(list(fds.iterdir()))
    for _ in range(3):
        tokens.read(5, 20)
    assert len(list(fds.iterdir())) == before
