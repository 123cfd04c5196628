"""stream: the text of generate as it comes, in whole characters, promptly, and no longer than somebody listens."""

import gc
import itertools

import jax
import numpy as np
import pytest
from fake_models import N_SAID, TEXT_CONFIG, decode_steps, speaker  # noqa: F401 (decode_steps is a fixture)
from naive_generation import cut_at_ids, cut_at_strings
from strength import campaign
from tiny_models import random_params

import gpt2_jax

pytestmark = pytest.mark.usefixtures("decode_steps")  # all with the model that counts: it is compiled once for all
UNTOUCHED = {"wte": object()}  # jax can trace nothing with this in it: any attempt raises TypeError
TEXTS = {
    "ascii": "The quick brown fox jumps over the lazy dog, and nobody minds.",
    "family": "👨‍👩‍👧‍👦 says 👩🏽‍🚀: ❤️‍🔥!",
    "flags": "🇫🇷🇯🇵🏴󠁧󠁢󠁳󠁣󠁴󠁿 flags",
    "cjk": "漢字と仮名、한글과 中文。",
    "combining": "e\u0301 o\u0308\u0323 नि ก็ \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "one emoji": "🦊",
    "whitespace": " \n\n\t  \r\n x ",
    "astral": "\U0001d54f \U0010fffd \ufeff \u2028",
    "replacement": "a \ufffd b",
}


@pytest.fixture(scope="module")
def text_params():
    """Random weights over the embedded vocabulary: what they sample is full of broken characters."""
    return random_params(TEXT_CONFIG, 1, scale=0.2)


def say(text, tokenizer, **settings):
    """The pieces in which this text comes."""
    params = speaker(tokenizer.encode(text))
    return list(gpt2_jax.stream(TEXT_CONFIG, params, [0], tokenizer, N_SAID, stop_ids=[tokenizer.eot], **settings))


# ---- streaming is decoding


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_comes_out_whole(tokenizer, text):
    """Emoji, flags, CJK and combining marks, each over several tokens: nothing is lost, and no piece is broken."""
    pieces = say(text, tokenizer)
    assert "".join(pieces) == text
    assert all(pieces)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {}, {"temperature": 1.6, "top_k": 500, "min_p": 1e-4}], ids=str)
def test_pieces_joined_are_the_text_of_generate(text_params, tokenizer, knobs):
    """Random weights say invalid bytes and halves of characters: joined, the pieces are tokenizer.decode of it all."""
    broken = 0
    for seed, prompt, n in [(1, [5], 96), (2, [5, 6, 7], 97), (3, list(range(19)), 100), (4, [5], 126), (5, [5], 0)]:
        pieces = list(gpt2_jax.stream(TEXT_CONFIG, text_params, prompt, tokenizer, n, seed=seed, **knobs))
        [ids] = gpt2_jax.generate(TEXT_CONFIG, text_params, [prompt], n, seed=seed, **knobs)
        text = tokenizer.decode(ids)
        assert "".join(pieces) == text
        assert all(pieces)
        broken += text.count("\ufffd")
    assert broken or knobs == {"temperature": 0}


def test_no_piece_is_broken_where_the_text_is_not(text_params, tokenizer):
    """A text with broken bytes is streamed with its own U+FFFD and no other: every piece is a slice of the whole."""
    for seed in range(7):
        knobs = {"seed": seed, "temperature": 1.5, "max_new_tokens": N_SAID}
        pieces = list(gpt2_jax.stream(TEXT_CONFIG, text_params, [9], tokenizer, **knobs))
        [ids] = gpt2_jax.generate(TEXT_CONFIG, text_params, [[9]], **knobs)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert all(isinstance(piece, str) and piece for piece in pieces)


def test_real_text(shakespeare, tokenizer):
    """The embedded model, greedy and sampled, from text and from ids: what generate gives, in several pieces."""
    config, params = shakespeare
    prompt = "ROMEO:\nBut soft"
    for settings in ({"temperature": 0}, {"seed": 3, "top_k": 40}, {"seed": 3, "stop_strings": ["\n\n"]}):
        pieces = list(gpt2_jax.stream(config, params, prompt, tokenizer, 60, **settings))
        ids = tokenizer.encode(prompt)
        assert list(gpt2_jax.stream(config, params, ids, tokenizer, 60, **settings)) == pieces
        plain = {name: value for name, value in settings.items() if name != "stop_strings"}
        [row] = gpt2_jax.generate(config, params, [ids], 60, **plain)
        assert "".join(pieces) == cut_at_strings(tokenizer, row, settings.get("stop_strings", []))[1]
        assert len(pieces) > 1


def test_streaming_slides(text_params, tokenizer):
    """Beyond n_ctx as within it."""
    settings = {"max_new_tokens": 400, "seed": 2, "overflow": "slide", "repetition_penalty": 1.1}
    pieces = list(gpt2_jax.stream(TEXT_CONFIG, text_params, [3, 4], tokenizer, **settings))
    assert "".join(pieces) == tokenizer.decode(gpt2_jax.generate(TEXT_CONFIG, text_params, [[3, 4]], **settings)[0])


# ---- stops


@pytest.mark.parametrize(
    ("stop_strings", "expected"),
    [
        (["lazy"], "The quick brown fox jumps over the "),
        (["rown f"], "The quick b"),
        (["x jumps over the lazy d"], "The quick brown fo"),
        (["T"], ""),
        (["minds."], "The quick brown fox jumps over the lazy dog, and nobody "),
        (["minds.?"], TEXTS["ascii"]),  # what might have become the stop string comes at the end
        (["nobody knows", "dog, or"], TEXTS["ascii"]),
        (["the lazy cat", "jumps over it", "over"], "The quick brown fox jumps "),
    ],
)
def test_text_is_cut_exactly_at_a_stop_string(tokenizer, stop_strings, expected):
    """Also inside a token, and what looks like the beginning of a stop string but is none is not lost."""
    assert "".join(say(TEXTS["ascii"], tokenizer, stop_strings=stop_strings)) == expected


def test_stops_equal_those_of_generate(text_params, tokenizer):
    """Random pieces of random text as stop strings, and stop ids: the text up to the first of either."""
    rng = np.random.default_rng(3)
    for seed in range(campaign(5, 17)):
        knobs = {"temperature": 1.3, "seed": seed, "max_new_tokens": N_SAID}
        [row] = gpt2_jax.generate(TEXT_CONFIG, text_params, [[2]], **knobs)
        text = tokenizer.decode(row)
        starts = rng.integers(0, len(text), 2)
        stop_strings = [text[start : start + 3].replace("\ufffd", "") or "zz" for start in starts]
        stop_ids = rng.choice(row, rng.integers(0, 2)).tolist()
        pieces = gpt2_jax.stream(
            TEXT_CONFIG, text_params, [2], tokenizer, stop_ids=stop_ids, stop_strings=stop_strings, **knobs
        )
        assert "".join(pieces) == cut_at_strings(tokenizer, cut_at_ids(row, stop_ids), stop_strings)[1]


def test_a_stop_in_the_middle_of_a_character_leaves_what_was_whole(tokenizer):
    """Half a character before a stop id is U+FFFD, as tokenizer.decode has it, and nothing is held back for ever."""
    ids = [*tokenizer.encode("ab"), *tokenizer.encode("🦊")[:2], tokenizer.eot, *tokenizer.encode("cd")]
    pieces = list(gpt2_jax.stream(TEXT_CONFIG, speaker(ids), [0], tokenizer, N_SAID, stop_ids=[tokenizer.eot]))
    assert "".join(pieces) == tokenizer.decode(ids[:-3]) == "ab\ufffd"


# ---- promptness, counted in steps


@pytest.mark.parametrize("settings", [{}, {"stop_strings": ["dog?", "x" * 50]}], ids=["no stops", "stop strings"])
def test_text_comes_within_sixteen_steps(decode_steps, tokenizer, settings):  # noqa: F811
    """No piece of ASCII is waited for longer than 16 decode steps, and none is run beyond the last token."""
    ids = np.resize(tokenizer.encode("dog "), 126).tolist()
    pieces = gpt2_jax.stream(TEXT_CONFIG, speaker(ids), [0], tokenizer, 126, temperature=0, **settings)
    waits, said = [], ""
    for piece in pieces:
        said += piece
        waits.append(decode_steps())
    assert max(waits) <= 16
    assert said == tokenizer.decode(ids)
    assert sum(waits) + decode_steps() == 125


def test_the_first_piece_does_not_wait_for_the_rest(decode_steps, tokenizer):  # noqa: F811
    """When the first piece is here, at most 16 steps of 125 have been run."""
    pieces = gpt2_jax.stream(TEXT_CONFIG, speaker(tokenizer.encode("x") * 126), [0], tokenizer, 126, temperature=0)
    assert set(next(pieces)) == {"x"}
    assert decode_steps() <= 16
    pieces.close()


@pytest.mark.parametrize("how", ["close", "drop", "break"])
def test_nobody_listening_stops_the_decoding(decode_steps, tokenizer, how):  # noqa: F811
    """Closing the iterator, dropping it, or leaving the loop over it: no further step is run."""
    pieces = gpt2_jax.stream(TEXT_CONFIG, speaker(tokenizer.encode("x") * 126), [0], tokenizer, 126, temperature=0)
    n_read = 0
    for piece in itertools.islice(pieces, 3) if how != "break" else pieces:
        n_read += len(piece)
        if how == "break" and n_read > 20:
            break
    if how == "close":
        pieces.close()
        assert next(pieces, None) is None
    else:
        del pieces
        gc.collect()
    assert decode_steps() <= n_read + 16
    assert decode_steps() == 0


def test_a_stop_string_ends_the_decoding(decode_steps, tokenizer):  # noqa: F811
    """A stream that stopped has run at most 16 steps beyond, and ends by itself."""
    ids = tokenizer.encode("one two END three four")
    settings = {"temperature": 0, "stop_strings": ["END"]}
    assert "".join(gpt2_jax.stream(TEXT_CONFIG, speaker(ids), [0], tokenizer, N_SAID, **settings)) == "one two "
    assert decode_steps() <= len(tokenizer.encode("one two END")) - 1 + 16


def test_two_streams_at_once_are_two_streams(text_params, tokenizer):
    """Read in turn, each gives what it gives alone."""
    calls = [{"prompt": [1], "seed": 1}, {"prompt": [2, 3], "seed": 2}]
    settings = {"tokenizer": tokenizer, "max_new_tokens": N_SAID}
    alone = ["".join(gpt2_jax.stream(TEXT_CONFIG, text_params, **call, **settings)) for call in calls]
    streams = [gpt2_jax.stream(TEXT_CONFIG, text_params, **call, **settings) for call in calls]
    turns = itertools.zip_longest(*streams, fillvalue="")
    assert ["".join(pieces) for pieces in zip(*turns, strict=True)] == alone


def test_thousands_of_tokens_in_flat_memory(tokenizer, text_params):
    """A stream of many contexts holds no more on the device at its end than near its beginning."""
    n_new = campaign(2000, 5000)
    settings = {"max_new_tokens": n_new, "overflow": "slide", "seed": 1}
    held, n_read = [], 0
    for piece in gpt2_jax.stream(TEXT_CONFIG, text_params, [1], tokenizer, **settings):
        n_read += len(piece)
        held.append(sum(array.nbytes for array in jax.live_arrays()))
    early = len(held) // 5
    assert early > 30
    assert n_read > n_new
    assert max(held[early:]) <= max(held[:early])


# ---- what is refused, and when


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": TEXT_CONFIG.to_hparams()}, "config"),
        ({"prompt": []}, "prompt.*empty"),
        ({"prompt": ""}, "prompt.*empty"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": [1281]}, "prompt.*1281"),
        ({"prompt": [1.5]}, r"prompt.*1\.5"),
        ({"prompt": b"x"}, "prompt"),
        ({"prompt": [1] * 128}, "n_ctx.*127"),
        ({"tokenizer": None}, "tokenizer.*None"),
        ({"tokenizer": "gpt2"}, "tokenizer.*gpt2"),
        ({"max_new_tokens": -1}, "max_new_tokens.*-1"),
        ({"max_new_tokens": 126}, "n_ctx.*127"),
        ({"temperature": -1}, "temperature.*-1"),
        ({"top_k": 2.5}, r"top_k.*2\.5"),
        ({"top_p": 0}, "top_p.*0"),
        ({"min_p": 2}, "min_p.*2"),
        ({"repetition_penalty": 0}, "repetition_penalty.*0"),
        ({"top_p_rule": "mine"}, "top_p_rule.*mine"),
        ({"seed": -1}, "seed.*-1"),
        ({"stop_ids": [1281]}, "stop_ids.*1281"),
        ({"stop_strings": "x"}, "stop_strings"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"overflow": "crop"}, "overflow.*crop"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_by_the_call(tokenizer, changes, message):
    """Not at the first piece, where a loop elsewhere would meet the error."""
    call = {"config": TEXT_CONFIG, "params": UNTOUCHED, "prompt": [1, 2], "tokenizer": tokenizer, "max_new_tokens": 5}
    with pytest.raises(ValueError, match=message) as caught:
        gpt2_jax.stream(**call | changes)
    assert "\n" not in str(caught.value)


def test_params_of_another_config_are_refused_by_the_call(tokenizer, text_params):
    with pytest.raises(ValueError, match="missing: wpe"):
        gpt2_jax.stream(TEXT_CONFIG, {k: v for k, v in text_params.items() if k != "wpe"}, [1], tokenizer)


def test_nan_in_the_params_is_told(tokenizer, text_params):
    """A stream over params with a NaN ends with the error that says so, after the text before it."""
    params = text_params | {"wpe": text_params["wpe"].at[20].set(np.nan)}
    pieces = gpt2_jax.stream(TEXT_CONFIG, params, [1], tokenizer, N_SAID)
    with pytest.raises(ValueError, match="NaN"):
        list(pieces)
