"""stream: the text of generate in whole characters, promptly, and only while the iterator is in use."""

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

pytestmark = pytest.mark.usefixtures("decode_steps")  # the step counter's model is compiled once for all tests
UNTOUCHED = {"wte": object()}  # JAX cannot trace this: any attempt raises TypeError
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
    """Random weights over the embedded vocabulary: their samples have many incomplete characters."""
    return random_params(TEXT_CONFIG, 1, scale=0.2)


def say(text, tokenizer, **settings):
    """Return the pieces of this text."""
    params = speaker(tokenizer.encode(text))
    return list(gpt2_jax.stream(TEXT_CONFIG, params, [0], tokenizer, N_SAID, stop_ids=[tokenizer.eot], **settings))


# ---- the text of a stream


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_comes_out_whole(tokenizer, text):
    """Emoji, flags, CJK and combining marks, each over several tokens: nothing is lost, and no piece is broken."""
    pieces = say(text, tokenizer)
    assert "".join(pieces) == text
    assert all(pieces)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {}, {"temperature": 1.6, "top_k": 500, "min_p": 1e-4}], ids=str)
def test_pieces_joined_are_the_text_of_generate(text_params, tokenizer, knobs):
    """Random weights give invalid bytes and parts of characters. Joined, pieces equal tokenizer.decode of all ids."""
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
    """A text with invalid bytes has only its own U+FFFD: every piece is a slice of the whole text."""
    for seed in range(7):
        knobs = {"seed": seed, "temperature": 1.5, "max_new_tokens": N_SAID}
        pieces = list(gpt2_jax.stream(TEXT_CONFIG, text_params, [9], tokenizer, **knobs))
        [ids] = gpt2_jax.generate(TEXT_CONFIG, text_params, [[9]], **knobs)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert all(isinstance(piece, str) and piece for piece in pieces)


def test_real_text(shakespeare, tokenizer):
    """The embedded model, greedy and sampled, from text and from ids: the text of generate, in several pieces."""
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
    """Streaming works beyond n_ctx too."""
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
        (["minds.?"], TEXTS["ascii"]),  # a possible beginning of the stop string comes at the end
        (["nobody knows", "dog, or"], TEXTS["ascii"]),
        (["the lazy cat", "jumps over it", "over"], "The quick brown fox jumps "),
    ],
)
def test_text_is_cut_exactly_at_a_stop_string(tokenizer, stop_strings, expected):
    """Also inside a token. Text that begins like a stop string but is not one is not lost."""
    assert "".join(say(TEXTS["ascii"], tokenizer, stop_strings=stop_strings)) == expected


def test_stops_equal_those_of_generate(text_params, tokenizer):
    """Random pieces of random text as stop strings, and stop ids: the text ends before the first of them."""
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
    """An incomplete character before a stop id becomes U+FFFD, as in tokenizer.decode, and no text is kept back."""
    ids = [*tokenizer.encode("ab"), *tokenizer.encode("🦊")[:2], tokenizer.eot, *tokenizer.encode("cd")]
    pieces = list(gpt2_jax.stream(TEXT_CONFIG, speaker(ids), [0], tokenizer, N_SAID, stop_ids=[tokenizer.eot]))
    assert "".join(pieces) == tokenizer.decode(ids[:-3]) == "ab\ufffd"


# ---- promptness, counted in steps


@pytest.mark.parametrize("settings", [{}, {"stop_strings": ["dog?", "x" * 50]}], ids=["no stops", "stop strings"])
def test_text_comes_within_sixteen_steps(decode_steps, tokenizer, settings):  # noqa: F811
    """A piece of ASCII comes within 16 decode steps, and no step runs after the last token."""
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
    """At most 16 of 125 steps run before the first piece."""
    pieces = gpt2_jax.stream(TEXT_CONFIG, speaker(tokenizer.encode("x") * 126), [0], tokenizer, 126, temperature=0)
    assert set(next(pieces)) == {"x"}
    assert decode_steps() <= 16
    pieces.close()


@pytest.mark.parametrize("how", ["close", "drop", "break"])
def test_nobody_listening_stops_the_decoding(decode_steps, tokenizer, how):  # noqa: F811
    """After you close or drop the iterator, or leave the loop over it, no further step runs."""
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
    """A stream ends at its stop string, and at most 16 steps run after it."""
    ids = tokenizer.encode("one two END three four")
    settings = {"temperature": 0, "stop_strings": ["END"]}
    assert "".join(gpt2_jax.stream(TEXT_CONFIG, speaker(ids), [0], tokenizer, N_SAID, **settings)) == "one two "
    assert decode_steps() <= len(tokenizer.encode("one two END")) - 1 + 16


def test_two_streams_at_once_are_two_streams(text_params, tokenizer):
    """Read in turn, each stream gives the same text as alone."""
    calls = [{"prompt": [1], "seed": 1}, {"prompt": [2, 3], "seed": 2}]
    settings = {"tokenizer": tokenizer, "max_new_tokens": N_SAID}
    alone = ["".join(gpt2_jax.stream(TEXT_CONFIG, text_params, **call, **settings)) for call in calls]
    streams = [gpt2_jax.stream(TEXT_CONFIG, text_params, **call, **settings) for call in calls]
    turns = itertools.zip_longest(*streams, fillvalue="")
    assert ["".join(pieces) for pieces in zip(*turns, strict=True)] == alone


def test_thousands_of_tokens_in_flat_memory(tokenizer, text_params):
    """A stream of many contexts uses the same device memory at its end as near its beginning."""
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


# ---- rejected arguments


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
    """The call itself raises, not the first piece, which may be read elsewhere."""
    call = {"config": TEXT_CONFIG, "params": UNTOUCHED, "prompt": [1, 2], "tokenizer": tokenizer, "max_new_tokens": 5}
    with pytest.raises(ValueError, match=message) as caught:
        gpt2_jax.stream(**call | changes)
    assert "\n" not in str(caught.value)


def test_params_of_another_config_are_refused_by_the_call(tokenizer, text_params):
    with pytest.raises(ValueError, match="missing: wpe"):
        gpt2_jax.stream(TEXT_CONFIG, {k: v for k, v in text_params.items() if k != "wpe"}, [1], tokenizer)


def test_nan_in_the_params_is_told(tokenizer, text_params):
    """With NaN in the params, a stream yields the text before it and then raises the error."""
    params = text_params | {"wpe": text_params["wpe"].at[20].set(np.nan)}
    pieces = gpt2_jax.stream(TEXT_CONFIG, params, [1], tokenizer, N_SAID)
    with pytest.raises(ValueError, match="NaN"):
        list(pieces)
