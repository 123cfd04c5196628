"""Vocabularies that people have open with the ids of the library that trained them, and go out unchanged."""

import json
import pickle
import re
import warnings

import numpy as np
import pytest
import vocabulary_forms as forms
from hypothesis import given, settings
from hypothesis import strategies as st
from strength import campaign

import gpt2_jax
from gpt2_jax.checkpoints import runs
from gpt2_jax.data import open_prepared, prepare
from gpt2_jax.generation.text import RowText
from gpt2_jax.inspection import describe_vocabulary
from gpt2_jax.recipe import Recipe
from gpt2_jax.research.pictures import token_labels
from gpt2_jax.tokenizer import fingerprint

EOT = forms.EOT
FORMATS = ("tensorflow", "huggingface", "orbax")
N_TEXTS = campaign(100, 2_000)
BOTH = ["special first, named", "digits"]  # one form for each backend
TEXT = "O Romeo,  Romeo! 1597 <|endoftext|>\n\n\u6f22\u5b57 \U0001f98a abc"


def load(folder, name):
    """The tokenizer of a form. Its warnings are tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gpt2_jax.load_tokenizer(forms.FORMS[name](folder / "form"))


def small_model(n_vocab):
    config = gpt2_jax.GPT2Config(n_vocab=n_vocab, n_ctx=8, n_embd=4, n_head=2, n_layer=1)
    import jax

    return config, gpt2_jax.init_params(config, jax.random.key(0))


# ---- what is trained and written by Hugging Face's library


@pytest.mark.parametrize(
    "special",
    [forms.SPECIALS, ["<pad>", EOT], [EOT], [], ["<s>", "<pad>", "</s>", "<unk>"]],
    ids=["five", "pad and end", "end", "none", "four"],
)
@pytest.mark.parametrize("how", ["save_model", "save"])
def test_a_byte_level_vocabulary_with_special_tokens_first(tmp_path, special, how):
    """Dbmdz's german-gpt2 #3 and #13, and huggingface/tokenizers#361, have these ids."""
    theirs = forms.trained(special)
    getattr(theirs, how)(str(tmp_path if how == "save_model" else tmp_path / "tokenizer.json"))
    ours = gpt2_jax.load_tokenizer(tmp_path)
    assert ours.is_openai_form
    assert ours.eot == (special.index(EOT) if EOT in special else None)
    parsed = {} if how == "save_model" else {token: i for i, token in enumerate(special)}
    assert ours.added.keys() >= parsed.keys()
    for text in forms.hostile_texts(N_TEXTS, 3):
        if how == "save":  # save_model does not write which tokens are special
            assert ours.encode(text, allow_special=True) == theirs.encode(text).ids, text
        plain = text if not special else re.sub("|".join(map(re.escape, special)), "", text)
        assert ours.encode(plain) == theirs.encode(plain).ids, plain
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("unk", [None, "<unk>"])
def test_bytes_that_the_corpus_did_not_have(tmp_path, unk):
    """The tokenizer of Hugging Face's course is trained without an initial alphabet: they are dropped, or unknown."""
    theirs = forms.course(**({} if unk is None else {"unk_token": unk}))
    forms.saved(tmp_path, theirs, tokenizer_config=forms.FAST)
    ours = gpt2_jax.load_tokenizer(tmp_path)
    assert ours.encode("\x07") == ([] if unk is None else [ours.tokens["<unk>"]])
    for text in forms.hostile_texts(N_TEXTS, 4):
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids, text


def test_what_transformers_writes_for_plain_gpt2(tmp_path, tokenizer):
    """It puts a template that adds nothing into tokenizer.json."""
    forms.write(tmp_path, tokenizer=forms.described(post_processor=forms.IDENTITY))
    ours = gpt2_jax.load_tokenizer(tmp_path)
    assert (ours.tokens, ours.merges, ours.eot) == (tokenizer.tokens, tokenizer.merges, tokenizer.eot)
    assert ours.fits_openai_files
    assert ours.encode(TEXT, allow_special=True) == tokenizer.encode(TEXT, allow_special=True)


def test_merges_that_are_not_canonical(tmp_path):
    """In "abc" the merge "b c" comes first, and "a bc" is no merge. tiktoken would find the whole token."""
    tokens, merges = forms.not_canonical()
    once = [merge for merge in merges if merge != ("d", "dd")]  # it makes "ddd" a second time
    for ours in (load(tmp_path, "not canonical"), gpt2_jax.Tokenizer(tokens, once)):
        assert ours.encode("abc") == [ours.tokens["a"], ours.tokens["bc"]]
        assert not ours.is_openai_form
        assert ours.decode(ours.encode("abcd ddd")) == "abcd ddd"


def test_64000_ids(tmp_path):
    ours = load(tmp_path, "64,000 ids")
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
    config = {"model_type": "gpt2", "vocab_size": 700, **forms.CONFIG, **config}
    forms.model_saved(tmp_path, forms.SPECIALS, tokenizer_config=settings, config=config)
    assert gpt2_jax.load_tokenizer(tmp_path).eot == expected


def test_what_needs_an_end_of_text_says_so(tmp_path):
    ours = load(tmp_path, "no end of text")
    (tmp_path / "a.txt").write_text("some text")
    for call in (lambda: ours.prompt(""), lambda: prepare([tmp_path / "a.txt"], tmp_path / "out", ours)):
        with pytest.raises(ValueError, match="needs an end-of-text token, and the vocabulary has none") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert ours.prompt("a") == ours.encode("a")
    assert describe_vocabulary(tmp_path / "form")["end_of_text"] is None


# ---- files that disagree


def cut(folder, n_lines):
    path = folder / "merges.txt"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:n_lines]), encoding="utf-8")


@pytest.mark.parametrize("special", [[EOT], forms.SPECIALS, [], ["<pad>", EOT]], ids=["end", "five", "none", "two"])
@pytest.mark.parametrize("n_lines", [-1, 200, 2, 1])
def test_merges_that_were_cut_are_refused(tmp_path, special, n_lines):
    """Wherever `<|endoftext|>` is; with id 0 (CodeParrot, ProtGPT2) all later tokens would have become added ones."""
    forms.model_saved(tmp_path, special)
    gpt2_jax.load_tokenizer(tmp_path)
    cut(tmp_path, n_lines)
    with pytest.raises(
        ValueError, match=r"vocab\.json holds '.*', id \d+, which no line of .*merges\.txt makes"
    ) as caught:
        gpt2_jax.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("special", [[EOT], []], ids=["end", "none"])
@pytest.mark.parametrize("character", ["\u2192", "\u010a"])
def test_an_added_character_does_not_hide_that_merges_were_cut(tmp_path, special, character):
    """Its id is above those of the merges, as that of `<|endoftext|>` may be."""
    forms.model_saved(tmp_path, special)
    n_ids = len(json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")))
    added = {character: n_ids} if character == "\u2192" else {"\n": n_ids}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    gpt2_jax.load_tokenizer(tmp_path)
    cut(tmp_path, 100)
    with pytest.raises(ValueError, match=r"which no line of .*merges\.txt makes"):
        gpt2_jax.load_tokenizer(tmp_path)


@pytest.mark.parametrize("n_kept", [0, 100])
def test_merges_that_were_cut_where_the_end_of_text_stands(tmp_path, n_kept):
    """What follows `<|endoftext|>` looks like tokens that were appended, but tokens before it could merge into each."""
    tokens, merges = forms.embedded()
    names = sorted(tokens.keys() - {EOT}, key=tokens.__getitem__)
    names.insert(256 + n_kept, EOT)
    forms.two_files(tmp_path, {token: i for i, token in enumerate(names)}, merges)
    gpt2_jax.load_tokenizer(tmp_path)
    cut(tmp_path, 1 + n_kept)
    with pytest.raises(ValueError, match=r"which no line of .*merges\.txt makes"):
        gpt2_jax.load_tokenizer(tmp_path)


def test_merges_of_a_sorted_vocabulary_that_were_cut(tmp_path):
    """Single characters have high ids there."""
    tokens, merges = forms.embedded()
    forms.two_files(tmp_path, {token: i for i, token in enumerate(sorted(tokens))}, merges)
    gpt2_jax.load_tokenizer(tmp_path)
    cut(tmp_path, 100)
    with pytest.raises(ValueError, match=r"which no line of .*merges\.txt makes"):
        gpt2_jax.load_tokenizer(tmp_path)


def test_a_line_that_is_missing_among_the_merges(tmp_path):
    forms.model_saved(tmp_path, [EOT])
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    merged = [line.strip().replace(" ", "") for line in lines]
    last = next(i for i in range(1, len(lines)) if not any(merged[i] in line.split() for line in lines))
    (tmp_path / "merges.txt").write_text("".join([*lines[:last], *lines[last + 1 :]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"which no line of .*merges\.txt makes"):
        gpt2_jax.load_tokenizer(tmp_path)


def test_tokens_without_a_merge_that_are_declared(tmp_path):
    """A word that was added to vocab.json by hand, and is declared. Without that it looks like a lost merge."""
    tokens, merges = forms.embedded()
    tokens = tokens | {"forsooth": 1281}
    forms.two_files(tmp_path, tokens | {EOT: 1282, "gramercy": 1280}, merges)
    with pytest.raises(ValueError, match=r"holds 'gramercy', id 1280, which no line .* must be declared"):
        gpt2_jax.load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"gramercy": 1280, "forsooth": 1281}')
    ours = gpt2_jax.load_tokenizer(tmp_path)
    assert ours.encode("gramercy") == [1280]
    assert ours.special == {EOT}


WARNED = {
    "normalizer, GPT2Tokenizer": r"asks for normalizer, which the class GPT2Tokenizer of transformers leaves out",
    "digits, GPT2Tokenizer": r"asks for pre_tokenizer, which",
    "prefix space, not in tokenizer_config.json": r"asks for pre_tokenizer, which",
    "bytes missing, GPT2Tokenizer": r"asks for model\.unk_token, which",
    "added tokens with other ids": r"gives '\[PAD\]' the id 1290, but its id is 1282 in transformers",
}


@pytest.mark.parametrize(("name", "message"), WARNED.items())
def test_files_that_disagree_are_named(tmp_path, name, message):
    """They are read as transformers 5 reads them."""
    folder = forms.FORMS[name](tmp_path / "form")
    with pytest.warns(UserWarning, match=message) as caught:
        gpt2_jax.load_tokenizer(folder)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("name", [name for name in forms.FORMS if name not in WARNED])
def test_other_forms_open_without_a_warning(tmp_path, name):
    folder = forms.FORMS[name](tmp_path / "form")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt2_jax.load_tokenizer(folder)


def test_dropout_of_merges_is_left_out(tmp_path):
    """It is for training: the ids of a text would be random, and so would scores, and samples of one seed."""
    forms.write(tmp_path, tokenizer=forms.described(model={"dropout": 0.5}), tokenizer_config=forms.FAST)
    with pytest.warns(UserWarning, match=r"model\.dropout = 0\.5, which makes ids random: it is left out") as caught:
        ours = gpt2_jax.load_tokenizer(tmp_path)
    assert len(caught) == 1
    forms.two_files(tmp_path / "plain")
    assert ours.encode(TEXT) == gpt2_jax.load_tokenizer(tmp_path / "plain").encode(TEXT)


def test_tokenizer_json_wins_over_the_two_files(tmp_path):
    """As in transformers. Equal vocabularies are no reason to warn."""
    forms.two_files(tmp_path, tokenizer=forms.described(post_processor=forms.FIRST))
    assert gpt2_jax.load_tokenizer(tmp_path).prefix == (1280,)
    cut(tmp_path, 300)
    with pytest.warns(
        UserWarning, match=r"tokenizer\.json does not hold the vocabulary of vocab\.json and merges\.txt"
    ):
        ours = gpt2_jax.load_tokenizer(tmp_path)
    assert len(ours.merges) == len(forms.embedded()[1])


@pytest.mark.parametrize("name", ["RobertaTokenizer", "BertTokenizerFast", "T5Tokenizer"])
def test_another_class(tmp_path, name):
    forms.two_files(tmp_path, tokenizer_config={"tokenizer_class": name})
    with pytest.raises(
        ValueError, match=rf"tokenizer_config\.json has tokenizer_class = '{name}', which is not GPT-2's"
    ):
        gpt2_jax.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(forms.described(**forms.DIGITS)))
    with pytest.warns(UserWarning, match=rf"tokenizer_class = '{name}', .*: tokenizer\.json is read as it is"):
        ours = gpt2_jax.load_tokenizer(tmp_path)
    assert ours.encode("12") == [*ours.encode("1"), *ours.encode("2")]


# ---- malformed files


MALFORMED = {
    "added_tokens.json": ['["[PAD]"]', '{"[PAD]": "1281"}', "3", "{", '{"[PAD]": null}'],
    "tokenizer_config.json": [
        "[]", '{"added_tokens_decoder": []}', '{"added_tokens_decoder": {"x": {"content": "a"}}}',
        '{"added_tokens_decoder": {"1281": 3}}', '{"eos_token": 3}', '{"eos_token": {"a": 1}}', '{"pad_token": ["a"]}',
        '{"extra_special_tokens": [3]}',
    ],
    "special_tokens_map.json": ["[]", '{"pad_token": 3}', '{"additional_special_tokens": [3]}', "\x00"],
    "merges.txt": ["a b c\n", "ab\n", "zz zz\n", "\n\n", "\x00"],
    "vocab.json": ["[]", "{}", '{"a": 1.5}', '{"a": "0"}', "3"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in MALFORMED.items() for text in texts])
def test_a_malformed_file_is_named_in_one_sentence(tmp_path, name, text):
    forms.two_files(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        gpt2_jax.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [{"content": "x"}, {"content": "x", "id": "1281"}, {"content": 3, "id": 1281}, 3])
def test_malformed_added_tokens_in_tokenizer_json(tmp_path, token):
    forms.write(tmp_path, tokenizer=forms.described(added_tokens=[token]))
    with pytest.raises(ValueError, match=r"tokenizer\.json: added_tokens must be a list of tokens with id and content"):
        gpt2_jax.load_tokenizer(tmp_path)


# ---- added tokens


def test_added_tokens_can_be_written_in_a_text(tmp_path):
    """huggingface/transformers#1043, #21053. Words that were added are always found, special tokens if allowed."""
    forms.two_files(
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
    ours = load(tmp_path, name)
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
    ours = load(tmp_path, name)
    config, params = small_model(ours.n_vocab + 3)
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
            load(tmp_path / name, name).to_files(tmp_path / "a.json", tmp_path / "a.bpe")
    assert not (tmp_path / "a.json").exists()


def test_an_export_keeps_the_ids_of_special_tokens_in_config_json(tmp_path):
    ours = load(tmp_path, "special first, named")
    gpt2_jax.save(tmp_path / "out", *small_model(700), format="huggingface", tokenizer=ours)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["pad_token_id"], config["eos_token_id"]) == (0, 1, 2)


@pytest.mark.parametrize("n_vocab", [1280 + 64, 1281, 1280])
def test_rows_and_ids_may_differ(tmp_path, tokenizer, n_vocab):
    """Padded embeddings (karpathy/build-nanogpt#95), and an added token without a row (transformers#29899)."""
    for format in FORMATS:
        gpt2_jax.save(tmp_path / format, *small_model(n_vocab), format=format, tokenizer=tokenizer)
        assert gpt2_jax.load_tokenizer(tmp_path / format).tokens == tokenizer.tokens


# ---- everything else that uses a tokenizer


@pytest.mark.parametrize("name", BOTH)
def test_a_tokenizer_travels_to_other_processes(tmp_path, name):
    ours = load(tmp_path, name)
    again = pickle.loads(pickle.dumps(ours))
    assert (again.eot, again.tokens, again.added, again.settings) == (ours.eot, ours.tokens, ours.added, ours.settings)
    assert again.encode(TEXT, allow_special=True) == ours.encode(TEXT, allow_special=True)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT + str(i)}) + "\n" for i in range(50)))
    one = prepare([tmp_path / "a.jsonl"], tmp_path / "one", ours, n_processes=1)
    two = prepare([tmp_path / "a.jsonl"], tmp_path / "two", ours, n_processes=2)
    assert one.digests() == two.digests()
    ids = np.concatenate([split.read(0, split.n_tokens)[0] for split in (one.train, one.val)])
    documents = np.split(ids, np.flatnonzero(ids == ours.eot) + 1)
    assert {ours.decode(document[:-1]) for document in documents if len(document)} == {TEXT + str(i) for i in range(50)}
    assert open_prepared(tmp_path / "one", again).train.n_tokens == one.train.n_tokens


@pytest.mark.parametrize("name", BOTH)
def test_a_run_keeps_the_tokenizer(tmp_path, name):
    ours = load(tmp_path, name)
    config = small_model(ours.n_vocab)[0]
    runs.write_run(tmp_path / "run", config, Recipe(), {}, ours)
    again = gpt2_jax.load_tokenizer(tmp_path / "run")
    assert (again.eot, again.added, fingerprint(again)) == (ours.eot, ours.added, fingerprint(ours))
    assert runs.write_run(tmp_path / "run", config, Recipe(), {}, again)  # resumed: it is the same tokenizer


def test_fingerprints_tell_tokenizers_apart(tmp_path, tokenizer):
    """The same tokens and merges, and other ids for the same text."""
    names = ("digits", "normalizer", "prefix space", "added_tokens_decoder", "added tokens that strip")
    found = [fingerprint(load(tmp_path / name, name)) for name in names] + [fingerprint(tokenizer)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", [*BOTH, "course", "byte fallback", "words", "added tokens that strip"])
def test_streamed_text_is_the_decoded_text(tmp_path, name):
    """Whatever the pieces. A stop string is found across tokens."""
    ours = load(tmp_path, name)
    draw = np.random.default_rng(5)
    for _ in range(50):
        ids = [int(i) for i in draw.integers(0, ours.n_vocab, 30)]
        row = RowText(ours)
        assert "".join(row.add([i]) for i in ids) + row.end() == ours.decode(ids)
        assert b"".join(map(ours.token_bytes, ids)).decode(errors="replace") == ours.decode(ids)
        assert len(token_labels(ours, ids)) == 30
    ids = ours.encode("the man that stops here")
    row = RowText(ours, ["that"])
    text = row.add(ids) + row.end()
    assert row.stopped
    assert text.strip() == "the man"


def test_byte_level_decoding_is_that_of_the_library(tmp_path):
    ours = load(tmp_path, "course")
    theirs = forms.course()
    draw = np.random.default_rng(6)
    for _ in range(campaign(200, 5_000)):
        ids = [int(i) for i in draw.integers(0, ours.n_vocab, 12)]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load(tmp_path_factory.mktemp("digits"), "digits")


@settings(deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(forms.hostile_texts(200, 9))).map("".join))
def test_the_other_backend_decodes_what_it_encodes(digits, text):
    assert digits.decode(digits.encode(text)) == digits.decode(digits.encode(text, allow_special=True)) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00"], ids=["high", "low", "pair"])
def test_lone_surrogates(digits, tokenizer, text):
    """Both backends read them as U+FFFD; a pair is a character."""
    assert digits.decode(digits.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("name", ["digits", "prefix space", "added_tokens_decoder", "special first, named"])
@pytest.mark.parametrize("text", ["spaces", "newlines x", "words"])
def test_large_texts(tmp_path, name, text):
    """A megabyte takes a second, and the ids do not depend on where a long text is cut."""
    ours = load(tmp_path, name)
    n = campaign(400_000, 3_000_000)
    words = "".join(forms.hostile_texts(n // 40, 8)) + "x <user> 12  \n y" * (n // 16)
    text = {"spaces": " " * n, "newlines x": "\n" * n + "x", "words": words}[text]
    whole = ours.encode(text)
    if not ours.is_openai_form:
        assert whole == ours._backend._plain.encode(text, add_special_tokens=False).ids
    if name != "prefix space":
        assert ours.decode(whole) == text
