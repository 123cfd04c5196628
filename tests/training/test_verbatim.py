"""How much of a sample occurs in the training text: equal to a naive search, for any text, in bounded memory."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gpt2_jax.training import verbatim
from gpt2_jax.training.verbatim import verbatim_share, verbatim_shares


@dataclasses.dataclass
class Text:
    """A text in memory that counts how much of it is read at a time."""

    ids: np.ndarray
    most: int = 0
    n_read: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        assert 0 <= start <= start + count <= self.n_tokens
        self.most, self.n_read = max(self.most, count), self.n_read + count
        ids = np.asarray(self.ids[start : start + count], np.int32)
        return ids, np.ones(len(ids), bool)


def naive(sample: list[int], text: list[int], n: int) -> tuple[float, int, int]:
    """The share, the longest run and its first place, from the definition."""
    covered, longest, position = set(), 0, -1
    for start in range(len(sample)):
        for end in range(start + n, len(sample) + 1):
            length = end - start
            places = [p for p in range(len(text) - length + 1) if text[p : p + length] == sample[start:end]]
            if not places:
                break  # a longer run does not occur either
            covered |= set(range(start, end))
            if length > longest:
                longest, position = length, places[0]
            elif length == longest:
                position = min(position, places[0])
    return len(covered) / len(sample) if sample else 0.0, longest, position


@st.composite
def texts_and_samples(draw):
    """A text with few different tokens, and samples of parts of it and noise."""
    token = st.integers(0, draw(st.sampled_from([0, 1, 3, 50256])))
    text = draw(st.lists(token, max_size=60))
    part = st.lists(token, max_size=6)
    if text:
        cut = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 20)).map(lambda c: text[c[0] : c[0] + c[1]])
        part = st.one_of(part, cut)
    samples = draw(
        st.lists(st.lists(part, max_size=4).map(lambda parts: [*itertools.chain(*parts)]), min_size=1, max_size=3)
    )
    return text, samples


@hypothesis.given(case=texts_and_samples(), n=st.integers(1, 9), chunk=st.integers(1, 70), block=st.integers(1, 70))
@hypothesis.settings(max_examples=300)
def test_equals_a_naive_search(case, n, chunk, block):
    """For any text, samples and n, and any sizes of chunks and blocks."""
    text, samples = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbatim, "CHUNK", chunk)
        patch.setattr(verbatim, "BLOCK", block)
        found = verbatim_shares(samples, Text(np.array(text, np.int32)), n)
    for sample, overlap in zip(samples, found, strict=True):
        share, longest, position = naive(sample, text, n)
        assert overlap.share == pytest.approx(share)
        assert (overlap.longest, overlap.text_position) == (longest, position)
        assert (overlap.n_sample, overlap.n_searched, overlap.n_text) == (len(sample), len(text), len(text))


@hypothesis.given(case=texts_and_samples(), n=st.integers(1, 5))
@hypothesis.settings(max_examples=100)
def test_a_collision_of_hashes_changes_nothing(case, n):
    """If all hashes are equal, the comparison of tokens still decides."""
    text, samples = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbatim, "_hashes", lambda ids, n: np.full(max(len(ids) - n + 1, 0), 7, np.uint32))
        found = verbatim_shares(samples, Text(np.array(text, np.int32)), n)
    for sample, overlap in zip(samples, found, strict=True):
        assert (overlap.share, overlap.longest, overlap.text_position) == pytest.approx(naive(sample, text, n))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11, 16])
def test_the_hash_is_the_polynomial(n):
    """For any n, equal runs have equal hashes, and the hash depends on each token and its position."""
    ids = np.random.default_rng(n).integers(0, 50257, 23).astype(np.uint32)
    base = int(verbatim.BASE)
    expected = [sum(int(ids[i + j]) * base ** (n - 1 - j) for j in range(n)) % 2**32 for i in range(23 - n + 1)]
    assert verbatim._hashes(ids, n).tolist() == expected


def test_a_run_across_chunks_is_found_whole():
    """A sample that occurs verbatim across the end of a chunk is one run, at the right position."""
    rng = np.random.default_rng(5)
    text = rng.integers(0, 50257, 100_003)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbatim, "CHUNK", 10_007)
        tokens = Text(text)
        overlap = verbatim_share(text[20_000:20_301].tolist(), tokens)
    assert overlap == verbatim.Overlap(1.0, 301, 20_000, 8, 301, 100_003, 100_003)
    assert tokens.most == 10_007
    assert tokens.n_read == 100_003  # once, however many chunks


def test_text_that_repeats_itself_ends_soon():
    """A text of one token, and a sample of it: the longest run is the sample, first found at the beginning."""
    overlap = verbatim_share([13] * 499, Text(np.full(300_007, 13)))
    assert (overlap.share, overlap.longest, overlap.text_position) == (1.0, 499, 0)


def test_a_cap_is_said_when_it_bites():
    """Tokens after `at_most` are not read, and the sentence says so. A cap beyond the end is not mentioned."""
    text = np.arange(1009)
    sample = text[901:921].tolist()
    capped = verbatim_share(sample, tokens := Text(text), at_most=907)
    assert (capped.share, capped.longest, capped.n_searched, capped.n_text) == (0.0, 0, 907, 1009)
    assert tokens.n_read == 907
    assert str(capped) == (
        "0% of the sample's 20 tokens occur verbatim in the first 907 of the 1,009 tokens of the training text: "
        "no run of 8 or more"
    )
    whole = verbatim_share([7, *sample, 7, 7, 7], Text(text), at_most=2000)
    assert str(whole) == (
        "83% of the sample's 24 tokens occur verbatim in the training text, in runs of 8 or more; "
        "the longest is 20, at token 901"
    )


def test_too_short_a_sample_reads_nothing():
    tokens = Text(np.arange(100))
    assert verbatim_shares([[1, 2, 3], []], tokens, n=4)[0].share == 0
    assert tokens.n_read == 0


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        ([1, 2], {"n": 0}, "n must be a whole number, 1 or more, not 0"),
        ([1, 2], {"n": 2.0}, "n must be"),
        ([1, 2], {"at_most": 0}, "at_most must be"),
        ([1.5, 2], {}, "a list of token ids, not float64"),
        ([-1], {}, "a list of token ids"),
        ([[1]], {}, "a list of token ids"),
    ],
)
def test_refused(sample, options, message):
    with pytest.raises(ValueError, match=message):
        verbatim_share(sample, Text(np.arange(10)), **options)
