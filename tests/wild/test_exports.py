"""What was loaded from any form goes back out unchanged, and transformers 5 opens what goes out."""

import checkpoint_forms as forms
import forward
import numpy as np
import pytest
import wild_model
from strength import campaign
from wild_checks import BOUND, HOSTILE, TOKENS, ids, logits, opened, ours, rows, tokenizer_of

import gpt2_jax

WEIGHTS = rows("weights", "both")
VOCABULARIES = rows("vocabulary", "both", all_parity=True)
NAMED = {  # rows that also run by default: arithmetic fields, dtypes, padded rows
    "activation-gelu", "stanford-crfm", "untied-head", "another-head-stored", "stored-bfloat16", "nanogpt", "llm.c",
    "book-trained", "CodeParrot-folder",
}  # fmt: skip


@pytest.mark.parametrize("row", campaign([row for row in WEIGHTS if row.id in NAMED], WEIGHTS))
def test_weights_go_out_unchanged(row, made, tmp_path):
    folder, _ = made(row)
    config, params = ours(gpt2_jax.load, folder / row.path, dtype=row.dtype)
    gpt2_jax.save(tmp_path / "out", config, params, format="huggingface")
    again, same = gpt2_jax.load(tmp_path / "out")
    assert again == config
    assert forms.difference(same, forms.leaves(params)) == ""


@pytest.mark.parity
@pytest.mark.parametrize("row", campaign([row for row in WEIGHTS if row.id in NAMED], WEIGHTS))
def test_transformers_opens_the_export(row, made, tmp_path, transformers):
    folder, source = made(row)
    config, params = ours(gpt2_jax.load, folder / row.path, dtype=row.dtype)
    gpt2_jax.save(tmp_path / "out", config, params, format="huggingface")
    theirs = logits(opened(transformers, tmp_path / "out"))[..., : source.n_ids]
    assert forward.relative_error(theirs, source.logits(TOKENS)) <= BOUND


@pytest.mark.parametrize("row", VOCABULARIES)
def test_vocabularies_go_out_unchanged(row, made, tmp_path, transformers):
    """The ids, the tokens for begin, end, padding and unknown, and the kind of each added token are those of before."""
    folder, source = made(row)
    before = tokenizer_of(transformers, (source and source.vocabulary) or folder)
    tokenizer = ours(gpt2_jax.load_tokenizer, folder)
    n_rows = tokenizer.n_vocab if source is None else len(source.flat["wte"])
    config = wild_model.CONFIG.replace(n_vocab=n_rows)
    params = {name: np.zeros(shape, np.float32) for name, shape in forms.shapes(config).items()}
    options = {"format": "huggingface", "tokenizer": tokenizer}
    ours(gpt2_jax.save, tmp_path / "out", config, forms.nested(params), **options)
    after, again = tokenizer_of(transformers, tmp_path / "out"), ours(gpt2_jax.load_tokenizer, tmp_path / "out")
    for text in HOSTILE:
        assert ids(after, text) == ids(before, text), text
        assert again.encode(text, allow_special=True) == ids(before, text), text
        assert again.encode(text) == tokenizer.encode(text), text
    assert special_tokens(after) == special_tokens(before)


def special_tokens(theirs) -> dict:
    named = {name: getattr(theirs, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return named | {i: (token.content, token.special) for i, token in sorted(theirs.added_tokens_decoder.items())}
