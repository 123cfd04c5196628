"""transformers opens a folder, and so do we, with the same ids for hostile texts; what we export, it opens too."""

import shutil
import warnings

import hostile_vocabularies as hostile
import pytest
import vocabulary_forms as forms
import vocabulary_makers as makers
from strength import campaign

import gpt2_jax
from gpt2_jax.checkpoints import vocabulary_files

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::UserWarning")]

N_TEXTS = campaign(40, 1_000)  # other ones for each form: more than 20,000 for each backend with --full


@pytest.fixture(scope="module")
def transformers():
    reason = "needs the `parity` extra: pip install -e '.[parity]'"
    library = pytest.importorskip("transformers", reason=reason)
    library.utils.logging.set_verbosity_error()
    return library


def extended(path, library):
    """A fine-tune with a word, speakers and padding."""
    tokenizer = library.AutoTokenizer.from_pretrained(makers.two_files(path / "before"))
    tokenizer.add_tokens(["forsooth", " gramercy"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<speaker1>", "<speaker2>"]})
    return tokenizer


def retrained(path, library):
    """The Hugging Face course's way to a vocabulary for code, as CodeParrot went: `<|endoftext|>` has id 0."""
    old = library.AutoTokenizer.from_pretrained(makers.two_files(path / "before"))
    return old.train_new_from_iterator(makers.corpus(), 600, show_progress=False)


WRITTEN = {
    "plain": lambda path, library: library.GPT2Tokenizer(*makers.embedded()),
    "bos": lambda path, library: library.GPT2Tokenizer(*makers.embedded(), add_bos_token=True),
    "extended": extended,
    "retrained": retrained,
    "wrapped": lambda path, library: library.PreTrainedTokenizerFast(
        tokenizer_object=makers.course(), eos_token=makers.EOT, pad_token=makers.EOT
    ),
    "opened again": lambda path, library: library.AutoTokenizer.from_pretrained(
        forms.FORMS["added tokens that strip"](path / "before")
    ),
}


def folder_of(name, path, library):
    """The folder of a form, or one that transformers writes."""
    if name in forms.FORMS:
        return forms.FORMS[name](path)
    tokenizer = WRITTEN[name](path, library)
    makers.write(path, len(tokenizer))
    tokenizer.save_pretrained(path)
    return path


def texts_for(tokenizer, seed):
    return hostile.hostile_texts(N_TEXTS, seed, list(tokenizer.added))


@pytest.mark.parametrize("name", [*forms.FORMS, *WRITTEN])
def test_ids_equal_those_of_transformers(transformers, tmp_path, name):
    """With allow_special=True, template and special tokens. Without, as with its split_special_tokens=True."""
    folder = folder_of(name, tmp_path / "model", transformers)
    ours, theirs = gpt2_jax.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.tokens == theirs.get_vocab()
    for text in texts_for(ours, [*forms.FORMS, *WRITTEN].index(name)):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, allow_special=True) == ids, text
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == plain, text
        if ours.is_openai_form:
            assert ours.decode(plain) == text
        if '"ByteLevel"' in str(theirs.backend_tokenizer.decoder):
            assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", [*forms.FORMS, *WRITTEN])
def test_an_export_opens_with_the_same_ids_and_names(transformers, tmp_path, name):
    """In transformers and here again: special tokens stay special, other added tokens stay as they were."""
    folder = folder_of(name, tmp_path / "model", transformers)
    ours = gpt2_jax.load_tokenizer(folder)
    (tmp_path / "export").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "export")
    vocabulary_files.write(tmp_path / "export", vocabulary_files.huggingface_files(ours, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = gpt2_jax.load_tokenizer(tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for field in ("eot", "n_vocab", "tokens", "merges", "added", "special", "prefix", "suffix"):
        assert getattr(again, field) == getattr(ours, field), field
    for text in texts_for(ours, 2):
        assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True), text
        assert again.encode(text) == ours.encode(text), text
        assert theirs(text)["input_ids"] == ours.encode(text, allow_special=True), text
    before = transformers.AutoTokenizer.from_pretrained(folder)
    names = {name: token for name, token in before.special_tokens_map.items() if name != "eos_token"}
    assert {name: theirs.special_tokens_map.get(name) for name in names} == names
    assert set(before.all_special_tokens) - {before.eos_token} <= set(theirs.all_special_tokens)
    theirs_added = {i: (str(t), t.special) for i, t in theirs.added_tokens_decoder.items()}
    assert theirs_added == {i: (str(t), t.special) for i, t in before.added_tokens_decoder.items()}


@pytest.mark.parametrize("seed", range(campaign(25, 400)))
def test_ids_in_random_folders(transformers, tmp_path, seed):
    """Any tokens are named, added and declared in any files, which may contradict each other."""
    folder = hostile.random_folder(tmp_path / "model", seed)
    ours, theirs = gpt2_jax.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.tokens == theirs.get_vocab()
    for text in hostile.hostile_texts(20, seed, hostile.NAMES):
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"], text
