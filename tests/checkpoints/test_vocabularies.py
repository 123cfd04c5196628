"""Vocabularies that people have open with the ids of the library that trained them, and go out unchanged."""

import json
import re
import warnings

import hostile_vocabularies as hostile
import pytest
import vocabulary_forms as forms
import vocabulary_makers as makers
from strength import campaign

import gpt2_jax
from gpt2_jax.data import prepare
from gpt2_jax.inspection import describe_vocabulary
from gpt2_jax.tokenizer import fingerprint

EOT = makers.EOT
FORMATS = ("tensorflow", "huggingface", "orbax")
N_TEXTS = campaign(100, 2_000)
TEXT = forms.TEXT


# ---- what is trained and written by Hugging Face's library


@pytest.mark.parametrize(
    "special",
    [makers.SPECIALS, ["<pad>", EOT], [EOT], [], ["<s>", "<pad>", "</s>", "<unk>"]],
    ids=["five", "pad and end", "end", "none", "four"],
)
@pytest.mark.parametrize("how", ["save_model", "save"])
def test_a_byte_level_vocabulary_with_special_tokens_first(tmp_path, special, how):
    """Dbmdz's german-gpt2 #3 and #13, and huggingface/tokenizers#361, have these ids."""
    theirs = makers.trained(special)
    getattr(theirs, how)(str(tmp_path if how == "save_model" else tmp_path / "tokenizer.json"))
    ours = gpt2_jax.load_tokenizer(tmp_path)
    assert ours.is_openai_form
    assert ours.eot == (special.index(EOT) if EOT in special else None)
    parsed = {} if how == "save_model" else {token: i for i, token in enumerate(special)}
    assert ours.added.keys() >= parsed.keys()
    for text in hostile.hostile_texts(N_TEXTS, 3):
        if how == "save":  # save_model does not write which tokens are special
            assert ours.encode(text, allow_special=True) == theirs.encode(text).ids, text
        plain = text if not special else re.sub("|".join(map(re.escape, special)), "", text)
        assert ours.encode(plain) == theirs.encode(plain).ids, plain
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("unk", [None, "<unk>"])
def test_bytes_that_the_corpus_did_not_have(tmp_path, unk):
    """The tokenizer of Hugging Face's course is trained without an initial alphabet: they are dropped, or unknown."""
    theirs = makers.course(**({} if unk is None else {"unk_token": unk}))
    makers.saved(tmp_path, theirs, tokenizer_config=makers.FAST)
    ours = gpt2_jax.load_tokenizer(tmp_path)
    assert ours.encode("\x07") == ([] if unk is None else [ours.tokens["<unk>"]])
    for text in hostile.hostile_texts(N_TEXTS, 4):
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids, text


def test_what_transformers_writes_for_plain_gpt2(tmp_path, tokenizer):
    """It puts a template that adds nothing into tokenizer.json."""
    makers.write(tmp_path, tokenizer=makers.described(post_processor=forms.IDENTITY))
    ours = gpt2_jax.load_tokenizer(tmp_path)
    assert (ours.tokens, ours.merges, ours.eot) == (tokenizer.tokens, tokenizer.merges, tokenizer.eot)
    assert ours.fits_openai_files
    assert ours.encode(TEXT, allow_special=True) == tokenizer.encode(TEXT, allow_special=True)


def test_merges_that_are_not_canonical(tmp_path):
    """In "abc" the merge "b c" comes first, and "a bc" is no merge. tiktoken would find the whole token."""
    tokens, merges = makers.not_canonical()
    once = [merge for merge in merges if merge != ("d", "dd")]  # it makes "ddd" a second time
    for ours in (forms.load(tmp_path, "not canonical"), gpt2_jax.Tokenizer(tokens, once)):
        assert ours.encode("abc") == [ours.tokens["a"], ours.tokens["bc"]]
        assert not ours.is_openai_form
        assert ours.decode(ours.encode("abcd ddd")) == "abcd ddd"


def test_64000_ids(tmp_path):
    ours = forms.load(tmp_path, "64,000 ids")
    assert ours.n_vocab == 64_001  # transformers adds <|endoftext|>
    assert ours.eot is None
    assert ours.decode(ours.encode(TEXT)) == TEXT


# ---- the end of text


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({}, {}, None),
        ({"eos_token": "</s>"}, {}, 2),
        ({}, {"eos_token_id": 2}, 2),
        ({}, {"eos_token_id": [2, 0]}, 2),
        ({"eos_token": "<pad>"}, {"eos_token_id": 2}, 1),
        ({}, {"eos_token_id": 50256}, None),
        ({"eos_token": "<new>"}, {}, None),
    ],
)
def test_the_end_of_text_of_a_vocabulary_without_it(tmp_path, settings, config, expected):
    """It is the end that the files name, if the model has a row for it. Else there is none."""
    config = {"model_type": "gpt2", "vocab_size": 700, **makers.CONFIG, **config}
    makers.model_saved(tmp_path, makers.SPECIALS, tokenizer_config=settings, config=config)
    assert gpt2_jax.load_tokenizer(tmp_path).eot == expected


def test_what_needs_an_end_of_text_says_so(tmp_path):
    ours = forms.load(tmp_path, "no end of text")
    (tmp_path / "a.txt").write_text("some text")
    for call in (lambda: ours.prompt(""), lambda: prepare([tmp_path / "a.txt"], tmp_path / "out", ours)):
        with pytest.raises(ValueError, match="needs an end-of-text token, and the vocabulary has none") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert ours.prompt("a") == ours.encode("a")
    assert describe_vocabulary(tmp_path / "form")["end_of_text"] is None


# ---- added tokens


def test_added_tokens_can_be_written_in_a_text(tmp_path):
    """huggingface/transformers#1043, #21053. Words that were added are always found, special tokens if allowed."""
    makers.two_files(
        tmp_path, added_tokens={"<speaker1>": 1281, "[PAD]": 1282}, special_tokens_map={"pad_token": "[PAD]"}
    )
    ours = gpt2_jax.load_tokenizer(tmp_path)
    text = f"<speaker1>hi[PAD]{EOT}"
    assert ours.encode(text, allow_special=True) == [1281, *ours.encode("hi"), 1282, 1280]
    assert ours.encode(text) == [1281, *ours.encode(f"hi[PAD]{EOT}")]
    assert not {1280, 1282} & set(ours.encode(text))
    assert ours.decode([1281, 1282]) == "<speaker1>[PAD]"


# ---- templates


@pytest.mark.parametrize("name", ["end of text before", "end of text around, fast", "bos and eos asked"])
def test_a_template_is_applied_where_special_tokens_are_allowed(tmp_path, name):
    """Documents and scored texts get none. A prompt gets what comes before a text, not what ends it."""
    ours = forms.load(tmp_path, name)
    after = [] if name == "end of text before" else [1280]
    plain = ours.encode("thou")
    assert ours.encode("thou", allow_special=True) == [1280, *plain, *after]
    assert ours.encode("thou", allow_special=True, template=False) == plain
    assert ours.encode("thou", template=True) == [1280, *plain, *after]
    assert ours.prompt("thou") == [1280, *plain]
    assert ours.prompt("") == [1280]


# ---- out again


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name", ["special first, named", "digits", "end of text before", "added tokens that strip", "course"]
)
def test_every_format_keeps_every_tokenizer(tmp_path, name, format):
    """OpenAI's two files if they can hold it, else Hugging Face's, also beside a TensorFlow checkpoint."""
    ours = forms.load(tmp_path, name)
    config, params = forms.small_model(ours.n_vocab + -ours.n_vocab % 8)  # padded
    gpt2_jax.save(tmp_path / "out", config, params, format=format, tokenizer=ours)
    again = gpt2_jax.load_tokenizer(tmp_path / "out")
    for field in ("eot", "n_vocab", "tokens", "merges", "added", "special", "prefix", "suffix"):
        assert getattr(again, field) == getattr(ours, field), field
    assert fingerprint(again) == fingerprint(ours)
    for special in (False, True):
        assert again.encode(TEXT, allow_special=special) == ours.encode(TEXT, allow_special=special)
    gpt2_jax.save(tmp_path / "out", config, params, format=format, tokenizer=again)  # it may be replaced


def test_to_files_refuses_what_the_two_files_cannot_hold(tmp_path):
    for name in ("digits", "special first, named", "end of text before"):
        with pytest.raises(ValueError, match=r"a\.json and a\.bpe cannot hold this tokenizer"):
            forms.load(tmp_path / name, name).to_files(tmp_path / "a.json", tmp_path / "a.bpe")
    assert not (tmp_path / "a.json").exists()


def test_an_export_keeps_the_ids_of_special_tokens_in_config_json(tmp_path):
    ours = forms.load(tmp_path, "special first, named")
    gpt2_jax.save(tmp_path / "out", *forms.small_model(700), format="huggingface", tokenizer=ours)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["pad_token_id"], config["eos_token_id"]) == (0, 1, 2)


@pytest.mark.parametrize("n_vocab", [1280 + 64, 1288, 1281, 1280])
def test_rows_and_ids_may_differ(tmp_path, tokenizer, n_vocab):
    """Padded embeddings (karpathy/build-nanogpt#95), and an added token without a row (transformers#29899)."""
    for format in FORMATS:
        gpt2_jax.save(tmp_path / format, *forms.small_model(n_vocab), format=format, tokenizer=tokenizer)
        assert gpt2_jax.load_tokenizer(tmp_path / format).tokens == tokenizer.tokens


@pytest.mark.parametrize(
    ("n_vocab", "said"),
    [
        (1282, r"has 1,282 rows, .*: id 1,281 is never sampled, and .* may be that of another model"),
        (1287, r"has 1,287 rows, .*: ids 1,281 to 1,286 are never sampled"),
        (2300, r"has 2,300 rows, .*: ids 1,281 to 2,299 are never sampled"),
        (2305, r"n_vocab = 2,305 rows: it seems to belong to another model"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_are_no_padding_are_named(tmp_path, tokenizer, n_vocab, said, format):
    """Programs pad to a multiple of 8 or more. Other rows are those of tokens that this vocabulary does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `save` says it too if the difference is large
        gpt2_jax.save(tmp_path / "out", *forms.small_model(n_vocab), format=format, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match=said) as caught:
        assert gpt2_jax.load_tokenizer(tmp_path / "out").tokens == tokenizer.tokens
    assert [warning.filename for warning in caught] == [__file__]  # one, and it names the caller
    assert "\n" not in str(caught[0].message)


def test_the_released_rows_with_a_vocabulary_without_the_end_of_text(tmp_path):
    """50,257 rows are not padding: the last is that of `<|endoftext|>`, which was lost."""
    tokens, merges = makers.released()
    whole = makers.two_files(tmp_path / "whole", tokens, merges)
    assert gpt2_jax.load_tokenizer(whole).eot == 50256
    del tokens[EOT]
    config = {"model_type": "gpt2", "vocab_size": 50257, **makers.CONFIG}
    names = {
        "config": config,
        "tokenizer_config": makers.FAST,
        "tokenizer": makers.described(added_tokens=[], model={"vocab": tokens, "merges": merges}),
    }
    makers.write(tmp_path / "cut", **names)
    with pytest.warns(UserWarning, match=r"50,256 ids and the model has 50,257 rows.*: id 50,256 is never sampled"):
        assert gpt2_jax.load_tokenizer(tmp_path / "cut").eot is None
    makers.write(tmp_path / "cut", **names | {"config": config | {"vocab_size": 50304}})
    assert gpt2_jax.load_tokenizer(tmp_path / "cut").n_vocab == 50256
