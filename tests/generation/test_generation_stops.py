"""Stops: each row ends exactly at the requested ids and strings, independently, and nothing else stops it."""

import numpy as np
import pytest
from fake_models import N_SAID, TEXT_CONFIG, decode_steps, speaker  # noqa: F401 (decode_steps is a fixture)
from naive_generation import cut_at_ids, cut_at_strings
from strength import campaign
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax.generation import Settings, complete

PROMPTS = [[5], [3, 1, 4, 1, 5], [36, 0], [7] * 19, [2, 7, 1], [0], list(range(23))]
counted = pytest.mark.usefixtures("decode_steps")  # the step counter's model is compiled once for all tests
UNTOUCHED = {"wte": object()}  # JAX cannot trace this: any attempt raises TypeError


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@pytest.fixture(scope="module")
def text_params():
    """Random weights over the embedded vocabulary: their samples have many incomplete characters."""
    return random_params(TEXT_CONFIG, 1, scale=0.2)


def say(text, tokenizer, **settings):
    """Return generate's ids and text for a model that writes this text and then only `<|endoftext|>`."""
    ids = tokenizer.encode(text)
    settings = {"temperature": 0, "tokenizer": tokenizer, "stop_ids": [tokenizer.eot]} | settings
    [row] = gpt2_jax.generate(TEXT_CONFIG, speaker(ids), [[0]], N_SAID, **settings)
    assert row == ids[: len(row)]
    return row, tokenizer.decode(row)


# ---- stop ids


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"temperature": 1.5, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_rows_with_stop_ids_are_the_rows_without_cut_before_them(params, knobs):
    """Random sets of ids: each row is cut before the first stop id that it picks. The others do not change."""
    rng = np.random.default_rng(1)
    whole = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, seed=4, **knobs)
    for _ in range(campaign(7, 60)):
        stop_ids = rng.choice(CONFIG.n_vocab, rng.integers(1, 5), replace=False).tolist()
        rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, seed=4, stop_ids=stop_ids, **knobs)
        assert rows == [cut_at_ids(row, stop_ids) for row in whole], stop_ids


def test_a_row_is_shorter_exactly_when_it_stopped(params):
    """`len(row) < max_new_tokens` means that the row stopped, also if the stop is the last allowed token."""
    [row] = gpt2_jax.generate(CONFIG, params, [PROMPTS[6]], 17, seed=4, temperature=1.7)
    for stop in dict.fromkeys(row):
        at = row.index(stop)
        for n in range(10, 18):
            [cut] = gpt2_jax.generate(CONFIG, params, [PROMPTS[6]], n, seed=4, temperature=1.7, stop_ids=[stop])
            assert cut == row[: min(at, n)]
            assert (len(cut) < n) == (stop in row[:n])


def test_a_row_that_stops_at_once_is_empty(params):
    """A stop id as the first token gives an empty row. The other rows do not change."""
    whole = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0)
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0, stop_ids=[whole[2][0]])
    assert rows[2] == []
    assert rows == [cut_at_ids(row, whole[2][:1]) for row in whole]


@counted
def test_a_stop_id_in_the_prompt_stops_nothing():
    """Only new tokens stop a row. The prompt's last token is not new."""
    settings = {"temperature": 0, "stop_ids": [3]}
    assert gpt2_jax.generate(TEXT_CONFIG, speaker([0, 5, 6, 7, 3]), [[3, 3]], N_SAID, **settings) == [[5, 6, 7]]
    assert gpt2_jax.generate(TEXT_CONFIG, speaker([0, 3]), [[3, 3]], N_SAID, **settings) == [[]]


def test_any_collection_of_ids_is_taken(params):
    """Lists, tuples, sets, ranges, arrays and repeated ids all give the same set of stops."""
    expected = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0, stop_ids=[3, 4, 5])
    for stop_ids in ((5, 4, 3), {3, 4, 5}, range(3, 6), np.array([3, 4, 5]), [3, 3, 4, 5, 5, 5]):
        assert gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0, stop_ids=stop_ids) == expected


@counted
def test_nothing_stops_by_default(tokenizer):
    """`<|endoftext|>` is an ordinary token unless it is in stop_ids, also with a tokenizer."""
    ids = [5, tokenizer.eot, 7, 0]
    for settings in ({}, {"tokenizer": tokenizer}, {"tokenizer": tokenizer, "stop_strings": ["never"]}):
        rows = gpt2_jax.generate(TEXT_CONFIG, speaker(ids), [[0]], N_SAID, temperature=0, **settings)
        assert rows == [ids + [tokenizer.eot] * (N_SAID - 4)]


@counted
@pytest.mark.parametrize("n", [1, 97, 113, 126])
def test_the_number_of_tokens_is_never_capped(tokenizer, n):
    """For any output of the model, a row has the requested number of tokens, up to the last position."""
    ids = np.random.default_rng(n).integers(0, TEXT_CONFIG.n_vocab, n).tolist()
    params = speaker(ids)
    assert gpt2_jax.generate(TEXT_CONFIG, params, [[0]], n, temperature=0) == [ids]
    never = {"stop_strings": ["\x00 never \x01"], "tokenizer": tokenizer}
    assert gpt2_jax.generate(TEXT_CONFIG, params, [[0]], n, temperature=0, **never) == [ids]


# ---- stop strings

SPOKEN = "First: don't stop. Then Łódź 漢字 and 👨‍👩‍👧 go, go, go!\n\nEND"


@counted
@pytest.mark.parametrize(
    ("stop_strings", "expected"),
    [
        (["\n\n"], "First: don't stop. Then Łódź 漢字 and 👨‍👩‍👧 go, go, go!"),
        (["stop. Then"], "First: don't "),  # over several tokens
        (["irs"], "F"),
        (["First"], ""),
        (["END"], "First: don't stop. Then Łódź 漢字 and 👨‍👩‍👧 go, go, go!\n\n"),  # completed by the last token
        (["ENDS"], SPOKEN),
        (["go, go, go!", ", go"], "First: don't stop. Then Łódź 漢字 and 👨‍👩‍👧 go"),  # the first completed
        (["go,", "go, go"], "First: don't stop. Then Łódź 漢字 and 👨‍👩‍👧 "),  # one begins another
        (["never", "Łódź", "漢字"], "First: don't stop. Then "),
        (["字"], "First: don't stop. Then Łódź 漢"),  # a character of several tokens
        (["👩‍👧"], "First: don't stop. Then Łódź 漢字 and 👨‍"),  # within one displayed character
        (["漢字 and 👨‍👩‍👧"], "First: don't stop. Then Łódź "),
        (["first", "FIRST"], SPOKEN),
        (["t s"], "First: don'"),
        ([" "], "First:"),
    ],
)  # fmt: skip
def test_text_ends_where_a_stop_string_begins(tokenizer, stop_strings, expected):
    """Stop strings that span tokens, overlap each other or are not ASCII: the ids entirely before them remain."""
    ids, text = say(SPOKEN, tokenizer, stop_strings=stop_strings)
    assert (ids, expected) == cut_at_strings(tokenizer, tokenizer.encode(SPOKEN), stop_strings)
    assert expected.startswith(text.rstrip("\ufffd"))


@counted
def test_a_stop_string_may_begin_inside_a_token(tokenizer):
    """A token that contains the beginning of a stop string is not in the result, even if the token begins before it."""
    ids = tokenizer.encode(" the king and the queen")
    inside = next(tokenizer.decode([i]) for i in ids if len(tokenizer.decode([i])) >= 4)
    stop = tokenizer.decode(ids).split(inside[:2], 1)[1][:6]
    row, text = say(" the king and the queen", tokenizer, stop_strings=[stop])
    assert text + inside[:2] == " the king and the queen".split(stop)[0]
    assert row == ids[: len(row)]


@counted
def test_of_two_strings_one_token_completes_the_earlier_counts(tokenizer):
    """The text is cut where the first of them begins, in any order of the arguments."""
    ids = tokenizer.encode(SPOKEN)
    token = next(tokenizer.decode([i]) for i in ids if len(tokenizer.decode([i]).strip()) >= 3)
    at = SPOKEN.index(token)
    strings = [SPOKEN[at + 1 : at + 3], SPOKEN[at - 2 : at + 2]] if at else [token[1:3], token[0:2]]
    for stop_strings in (strings, strings[::-1]):
        row, _ = say(SPOKEN, tokenizer, stop_strings=stop_strings)
        assert row == cut_at_strings(tokenizer, ids, stop_strings)[0]
        assert len(tokenizer.decode(row)) <= max(at - 2, 0)


@counted
def test_a_stop_string_in_the_prompt_stops_nothing(tokenizer):
    """A stop string in the prompt does not stop, and one that begins in the prompt and ends in new text does not."""
    ids = tokenizer.encode("and so on")
    prompt = tokenizer.encode("STOP")
    params = speaker([*[0] * (len(prompt) - 1), *ids])  # positions count the prompt
    for stop_strings in (["STOP"], ["STOPand"], ["TOPa", "P"]):
        settings = {"temperature": 0, "tokenizer": tokenizer, "stop_strings": stop_strings, "stop_ids": [tokenizer.eot]}
        assert gpt2_jax.generate(TEXT_CONFIG, params, [prompt], N_SAID, **settings) == [ids]


@counted
@pytest.mark.parametrize("seed", range(campaign(2, 5)))
def test_rows_with_stop_strings_are_the_rows_without_cut_at_them(text_params, tokenizer, seed):
    """Random texts with incomplete characters. Random pieces of them are stop strings, with and without stop ids."""
    rng = np.random.default_rng(seed)
    prompts = [[1], [2] * 19]
    knobs = {"temperature": 1.3, "seed": seed, "max_new_tokens": N_SAID}
    whole = gpt2_jax.generate(TEXT_CONFIG, text_params, prompts, **knobs)
    texts = [tokenizer.decode(row) for row in whole]
    for _ in range(campaign(3, 9)):
        stop_strings = []
        for text in rng.choice(texts, rng.integers(1, 4)):
            start = rng.integers(len(text))
            piece = text[start : start + rng.integers(1, 6)].replace("\ufffd", "")
            stop_strings += [piece] if piece else []
        stop_ids = rng.choice(np.ravel(whole), rng.integers(0, 2)).tolist()
        if not stop_strings:
            continue
        settings = knobs | {"stop_strings": stop_strings, "stop_ids": stop_ids, "tokenizer": tokenizer}
        rows = gpt2_jax.generate(TEXT_CONFIG, text_params, prompts, **settings)
        expected = [cut_at_strings(tokenizer, cut_at_ids(row, stop_ids), stop_strings)[0] for row in whole]
        assert rows == expected, (stop_strings, stop_ids)


@counted
def test_real_text_stops_at_strings(shakespeare, tokenizer):
    """The embedded model's own lines, cut at the end of a line, of a speech, and in the middle of a word."""
    config, params = shakespeare
    prompts = [tokenizer.encode("ROMEO:\nBut soft")]
    [whole] = gpt2_jax.generate(config, params, prompts, 60, seed=1)
    for stop_strings in (["\n"], ["\n\n", "the"], ["e "], ["."]):
        settings = {"seed": 1, "stop_strings": stop_strings, "tokenizer": tokenizer}
        [row] = gpt2_jax.generate(config, params, prompts, 60, **settings)
        assert row == cut_at_strings(tokenizer, whole, stop_strings)[0]
        assert len(row) < 60


# ---- steps


def test_no_step_is_run_beyond_the_last_tokens(decode_steps, tokenizer):  # noqa: F811
    """Prefill gives the first token and each decode step one more. No extra step runs."""
    ids = np.arange(1, 131).tolist()
    params = speaker(ids)
    for n in (97, 98, 105, 112, 113):
        rows = gpt2_jax.generate(TEXT_CONFIG, params, [[0], [0] * 9], n, temperature=0)
        assert rows == [ids[:n], ids[8 : n + 8]]
        assert decode_steps() == n - 1
    assert gpt2_jax.generate(TEXT_CONFIG, params, [[0]], 0) == [[]]
    assert decode_steps() == 0


def test_no_step_is_run_beyond_stop_ids(decode_steps):  # noqa: F811
    """Decoding ends at the step where the last row picks its stop id."""
    ids = np.arange(1, 131).tolist()
    params = speaker(ids)
    for at in (8, 9, 1, 15, 16, 17, 31, 32, 33, 70):
        prompts = [[0] * 9, [0]]  # the longer is eight tokens ahead, or starts after the stop id
        rows = gpt2_jax.generate(TEXT_CONFIG, params, prompts, N_SAID, temperature=0, stop_ids=[ids[at]])
        assert rows == [ids[8:at] if at >= 8 else ids[8 : 8 + N_SAID], ids[:at]]
        assert decode_steps() == (at if at >= 8 else N_SAID - 1)


def test_at_most_sixteen_steps_are_run_beyond_stop_strings(decode_steps, tokenizer):  # noqa: F811
    """Decoding ends within 16 steps after the last row completes its stop string."""
    for n_before in (0, 1, 14, 15, 16, 17, 31, 32, 33, 70):
        ids = tokenizer.encode("x") * n_before + tokenizer.encode("STOP")
        settings = {"temperature": 0, "stop_strings": ["STOP"], "tokenizer": tokenizer}
        rows = gpt2_jax.generate(TEXT_CONFIG, speaker(ids), [[0], [0]], N_SAID, **settings)
        assert rows == [ids[:n_before]] * 2
        needed = n_before + len(tokenizer.encode("STOP")) - 1
        assert needed <= decode_steps() <= needed + 16


def test_stop_ids_end_the_steps_with_stop_strings_too(decode_steps, tokenizer):  # noqa: F811
    """One row stops at an id, the other later at a string: at most 16 steps run after that."""
    x, y = tokenizer.encode("x") + tokenizer.encode("y")
    end = tokenizer.encode("END")
    params = speaker([*[x] * 20, tokenizer.eot, *[y] * 20, *end, *[x] * 100])
    settings = {"temperature": 0, "stop_ids": [tokenizer.eot], "stop_strings": ["END"], "tokenizer": tokenizer}
    rows = gpt2_jax.generate(TEXT_CONFIG, params, [[0], [0] * 22], N_SAID, **settings)
    assert rows == [[x] * 20, [y] * 20]
    needed = 20 + len(end) - 1
    assert needed <= decode_steps() <= needed + 16


# ---- rejected arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_ids": [1281]}, "stop_ids.*1281"),
        ({"stop_ids": [0, -1]}, "stop_ids.*-1"),
        ({"stop_ids": [2.5]}, r"stop_ids.*2\.5"),
        ({"stop_ids": ["x"]}, "stop_ids.*x"),
        ({"stop_ids": "x"}, "stop_ids.*x"),
        ({"stop_ids": 5}, "stop_ids.*5"),
        ({"stop_ids": None}, "stop_ids.*None"),
        ({"stop_ids": [None]}, "stop_ids.*None"),
        ({"stop_ids": [True]}, "stop_ids.*True"),
        ({"stop_strings": ["x"], "tokenizer": None}, "tokenizer"),
        ({"stop_strings": "x"}, "stop_strings.*list"),
        ({"stop_strings": [""]}, "stop_strings.*''"),
        ({"stop_strings": ["x", ""]}, "stop_strings.*''"),
        ({"stop_strings": [5]}, "stop_strings.*5"),
        ({"stop_strings": [b"x"]}, "stop_strings.*b'x'"),
        ({"stop_strings": 5}, "stop_strings.*5"),
        ({"stop_strings": None}, "stop_strings.*None"),
        ({"stop_strings": ["x"], "tokenizer": "gpt2"}, "tokenizer.*gpt2"),
        ({"tokenizer": 5}, "tokenizer.*5"),
    ],
    ids=str,
)
def test_wrong_stops_are_refused(tokenizer, settings, message):
    """One sentence with the argument and the value, before anything is traced, also for zero new tokens."""
    for n in (3, 0):
        with pytest.raises(ValueError, match=message) as caught:
            gpt2_jax.generate(TEXT_CONFIG, UNTOUCHED, [[1, 2]], n, **{"tokenizer": tokenizer} | settings)
        assert "\n" not in str(caught.value)


def test_a_completion_says_which_stop_ended_it(tokenizer):
    """An id, a string, or None. A string that ends with the last token counts before an id after it."""
    ids = tokenizer.encode("One two three")
    params, eot = speaker(ids), tokenizer.eot
    for stop_ids, stop_strings, n_new, expected in [
        ([eot], [], N_SAID, eot),
        ([eot, ids[2]], [], N_SAID, ids[2]),
        ([eot], ["zzz", "two", "wo"], N_SAID, "two"),
        ([eot], ["three"], N_SAID, "three"),
        ([eot], ["zzz"], len(ids), None),
        ([], [], 3, None),
        ([eot], [], 0, None),
    ]:
        settings = Settings(n_new, 0, stop_ids=stop_ids, stop_strings=stop_strings)
        (row,) = complete(TEXT_CONFIG, params, [[0]], tokenizer, settings)
        assert row.stop == expected
        assert row.stopped == (expected is not None)


def test_rows_may_have_any_numbers(tokenizer, text_params):
    """A row draws with its number, wherever it stands in a batch."""
    settings = Settings(9, seed=3)
    rows = complete(TEXT_CONFIG, text_params, [[7]] * 4, tokenizer, settings)
    mixed = complete(TEXT_CONFIG, text_params, [[7]] * 3, tokenizer, settings, [3, 0, 2])
    assert [row.ids for row in mixed] == [rows[i].ids for i in (3, 0, 2)]
    assert len({tuple(row.ids) for row in rows}) == 4
    for wrong in ([1], [0, 1, -1], [0, 1, 2**32], [0, 1, 2.5], "abc"):
        with pytest.raises(ValueError, match="first_row"):
            complete(TEXT_CONFIG, text_params, [[7]] * 3, tokenizer, settings, wrong)
