"""Files of a vocabulary that disagree, were cut or are malformed are named in one sentence."""

import json
import re
import warnings

import pytest
import vocabulary_forms as forms
import vocabulary_makers as makers

import gpt2_jax

EOT = makers.EOT


# ---- files that disagree


def cut(folder, n_lines):
    path = folder / "merges.txt"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:n_lines]), encoding="utf-8")


@pytest.mark.parametrize("special", [[EOT], makers.SPECIALS, [], ["<pad>", EOT]], ids=["end", "five", "none", "two"])
@pytest.mark.parametrize("n_lines", [-1, 200, 2, 1])
def test_merges_that_were_cut_are_refused(tmp_path, special, n_lines):
    """Wherever `<|endoftext|>` is; with id 0 (CodeParrot, ProtGPT2) all later tokens would have become added ones."""
    makers.model_saved(tmp_path, special)
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
    makers.model_saved(tmp_path, special)
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
    tokens, merges = makers.embedded()
    names = sorted(tokens.keys() - {EOT}, key=tokens.__getitem__)
    names.insert(256 + n_kept, EOT)
    makers.two_files(tmp_path, {token: i for i, token in enumerate(names)}, merges)
    gpt2_jax.load_tokenizer(tmp_path)
    cut(tmp_path, 1 + n_kept)
    with pytest.raises(ValueError, match=r"which no line of .*merges\.txt makes"):
        gpt2_jax.load_tokenizer(tmp_path)


def test_merges_of_a_sorted_vocabulary_that_were_cut(tmp_path):
    """Single characters have high ids there."""
    tokens, merges = makers.embedded()
    makers.two_files(tmp_path, {token: i for i, token in enumerate(sorted(tokens))}, merges)
    gpt2_jax.load_tokenizer(tmp_path)
    cut(tmp_path, 100)
    with pytest.raises(ValueError, match=r"which no line of .*merges\.txt makes"):
        gpt2_jax.load_tokenizer(tmp_path)


def test_a_line_that_is_missing_among_the_merges(tmp_path):
    makers.model_saved(tmp_path, [EOT])
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    merged = [line.strip().replace(" ", "") for line in lines]
    last = next(i for i in range(1, len(lines)) if not any(merged[i] in line.split() for line in lines))
    (tmp_path / "merges.txt").write_text("".join([*lines[:last], *lines[last + 1 :]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"which no line of .*merges\.txt makes"):
        gpt2_jax.load_tokenizer(tmp_path)


def test_tokens_without_a_merge_that_are_declared(tmp_path):
    """A word that was added to vocab.json by hand, and is declared. Without that it looks like a lost merge."""
    tokens, merges = makers.embedded()
    tokens = tokens | {"forsooth": 1281}
    makers.two_files(tmp_path, tokens | {EOT: 1282, "gramercy": 1280}, merges)
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
    makers.write(tmp_path, tokenizer=makers.described(model={"dropout": 0.5}), tokenizer_config=makers.FAST)
    with pytest.warns(UserWarning, match=r"model\.dropout = 0\.5, which makes ids random: it is left out") as caught:
        ours = gpt2_jax.load_tokenizer(tmp_path)
    assert len(caught) == 1
    makers.two_files(tmp_path / "plain")
    assert ours.encode(forms.TEXT) == gpt2_jax.load_tokenizer(tmp_path / "plain").encode(forms.TEXT)


def test_tokenizer_json_wins_over_the_two_files(tmp_path):
    """As in transformers. Equal vocabularies are no reason to warn."""
    makers.two_files(tmp_path, tokenizer=makers.described(post_processor=forms.FIRST))
    assert gpt2_jax.load_tokenizer(tmp_path).prefix == (1280,)
    cut(tmp_path, 300)
    with pytest.warns(
        UserWarning, match=r"tokenizer\.json does not hold the vocabulary of vocab\.json and merges\.txt"
    ):
        ours = gpt2_jax.load_tokenizer(tmp_path)
    assert len(ours.merges) == len(makers.embedded()[1])


@pytest.mark.parametrize("name", ["RobertaTokenizer", "BertTokenizerFast", "T5Tokenizer"])
def test_another_class(tmp_path, name):
    makers.two_files(tmp_path, tokenizer_config={"tokenizer_class": name})
    with pytest.raises(
        ValueError, match=rf"tokenizer_config\.json has tokenizer_class = '{name}', which is not GPT-2's"
    ):
        gpt2_jax.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(makers.described(**forms.DIGITS)))
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
    makers.two_files(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        gpt2_jax.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [{"content": "x"}, {"content": "x", "id": "1281"}, {"content": 3, "id": 1281}, 3])
def test_malformed_added_tokens_in_tokenizer_json(tmp_path, token):
    makers.write(tmp_path, tokenizer=makers.described(added_tokens=[token]))
    with pytest.raises(ValueError, match=r"tokenizer\.json: added_tokens must be a list of tokens with id and content"):
        gpt2_jax.load_tokenizer(tmp_path)
