"""Every form of docs/guides/forms.md: the folder is made, opened here and by transformers 5, and compared."""

import checkpoint_forms as forms
import forward
import pytest
import wild_forms
from commands import ROOT
from wild_checks import BOUND, HOSTILE, TOKENS, ids, logits, opened, ours, rows, tokenizer_of
from wild_forms import FORMS

import gpt2_jax

# Measured over the rows, relative to the largest logit, against NumPy in float64: 1.1e-6 here, 7.8e-7 in transformers.


@pytest.mark.parametrize("row", rows("weights", "both"))
def test_weights_are_the_same_bits_and_logits_are_equal(row, made):
    folder, source = made(row)
    config, params = ours(gpt2_jax.load, folder / row.path, dtype=row.dtype)
    found, expected = forms.leaves(params), dict(source.flat)
    if source.head is not None:
        expected["lm_head"] = source.head
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        leaf = found[name][: source.n_ids] if name == "wte" else found[name]
        assert (leaf.dtype, leaf.shape) == (array.dtype, array.shape), name
        assert leaf.tobytes() == array.tobytes(), name
    logits_BTV = forward.logits_of(config, params, TOKENS)[..., : source.n_ids]
    assert forward.relative_error(logits_BTV, source.logits(TOKENS)) <= BOUND


@pytest.mark.parametrize("row", rows("vocabulary", "both", all_parity=True))
def test_ids_and_decoded_texts_are_those_of_transformers(row, made, transformers):
    """As `tokenizer(text)["input_ids"]`: special tokens are parsed and templates apply."""
    folder, source = made(row)
    theirs = tokenizer_of(transformers, (source and source.vocabulary) or folder)
    tokenizer = ours(gpt2_jax.load_tokenizer, folder)
    for text in HOSTILE:
        expected = ids(theirs, text)
        assert tokenizer.encode(text, allow_special=True) == expected, text
        if theirs.backend_tokenizer.decoder is not None:  # without one, transformers puts a space between tokens
            decoded = theirs.decode(expected, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(expected) == decoded


@pytest.mark.parametrize("row", rows("weights", "vocabulary", refused=True))
def test_another_model_is_refused_with_one_sentence(row, made):
    folder, _ = made(row)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){row.refused}") as caught:
        (gpt2_jax.load_tokenizer if row.kind == "vocabulary" else gpt2_jax.load)(folder)
    assert forms.is_clear(caught.value), caught.value


# ---- in transformers 5


@pytest.mark.parametrize("row", rows("weights", "both", refused=None, all_parity=True))
def test_transformers_opens_weights_as_the_table_says(row, made, transformers):
    folder, source = made(row)
    model = opened(transformers, folder)
    assert (model is not None) == row.transformers
    if model is not None and source is not None:
        assert forward.relative_error(logits(model), source.logits(TOKENS)) <= BOUND


@pytest.mark.parametrize("row", rows("vocabulary", refused=None, all_parity=True))
def test_transformers_opens_vocabularies_as_the_table_says(row, made, transformers):
    folder, _ = made(row)
    assert ids(tokenizer_of(transformers, folder), "one 2")
    assert row.transformers


# ---- the table


@pytest.mark.parametrize("kind", wild_forms.TITLES)
def test_the_page_has_the_rows_of_the_registry(kind):
    """The expected text is what `python tests/support/wild_forms.py` prints."""
    page = (ROOT / "docs" / "guides" / "forms.md").read_text(encoding="utf-8")
    section = page.split(f"## {wild_forms.TITLES[kind]}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert "\n".join(lines) == wild_forms.table(kind)


def test_there_are_forms_of_every_kind():
    counts = {kind: len([row for row in FORMS if row.kind == kind]) for kind in wild_forms.TITLES}
    assert sum(counts.values()) >= 40
    assert min(counts.values()) >= 8
