"""Directories of unknown format, shards that do not match, pickles, and the two formats of a tokenizer."""

import json
import pickle
import re
import shutil
from pathlib import Path

import checkpoint_forms as forms
import pytest
import vocabularies
from checkpoint_forms import CONFIG, SAFETENSORS, assert_loads_as, hf_tensors, write_huggingface

import gpt2_jax

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---- shards


def edit_index(directory, change):
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    change(weight_map)
    forms.write_shard_index(directory, weight_map)


SECOND = "model-00002-of-00003.safetensors"
WPE, WTE = "transformer.wpe.weight", "transformer.wte.weight"
BAD_SHARDS = {
    "a shard is missing": (lambda d: (d / SECOND).unlink(), SECOND),
    "a shard is cut off": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-3]), SECOND),
    "a tensor is in another shard": (
        lambda d: edit_index(d, lambda m: m.update({WPE: "model-00001-of-00003.safetensors"})),
        r"wpe",
    ),
    "a name is in no shard": (
        lambda d: edit_index(d, lambda m: m.update({"transformer.h.7.ln_1.bias": SECOND})),
        r"h\.?7[./]ln_1",
    ),
    "a shard that is not there": (lambda d: edit_index(d, lambda m: m.update({WPE: "x.safetensors"})), "wpe|x.safe"),
    "a shard outside": (lambda d: edit_index(d, lambda m: m.update({WPE: "../y.safetensors"})), r"y\.safetensors"),
    "an absolute shard": (lambda d: edit_index(d, lambda m: m.update({WPE: "/y.safetensors"})), r"y\.safetensors"),
    "a shard is a number": (lambda d: edit_index(d, lambda m: m.update({WPE: 3})), r"index\.json"),
    "no map": (lambda d: (d / INDEX).write_text("{}"), r"index\.json"),
    "not JSON": (lambda d: (d / INDEX).write_text("{"), r"index\.json"),
    "a list": (lambda d: (d / INDEX).write_text("[]"), r"index\.json"),
}


@pytest.mark.parametrize(("damage", "culprit"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_shards_that_do_not_fit_together(tmp_path, damage, culprit):
    directory = tmp_path / "model"
    write_huggingface(directory, CONFIG, hf_tensors(forms.random_model()), shards=3)
    shutil.copyfile(directory / SECOND, tmp_path / "y.safetensors")
    damage(directory)
    assert re.search(culprit, forms.refusal(directory))


def test_an_index_that_lists_the_head_and_leaves_a_tensor_out(tmp_path):
    """Programs that tie the head list it, although it is stored once. transformers reads each file as a whole."""
    flat = forms.random_model()
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat), shards=3)
    edit_index(tmp_path, lambda m: (m.pop(WPE), m.update({"lm_head.weight": SECOND})))
    assert_loads_as(tmp_path, CONFIG, flat)


@pytest.mark.parametrize("extra", ["transformer.h.0.attn.bias", "v_head.summary.weight", "module.lm_head.weight"])
def test_an_index_that_lists_what_is_not_needed(tmp_path, extra):
    """Some programs leave buffers and heads out of the files, but not out of the index."""
    flat = forms.random_model()
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat), shards=3)
    edit_index(tmp_path, lambda m: m.update({extra: SECOND}))
    assert_loads_as(tmp_path, CONFIG, flat)


def test_an_index_that_calls_the_tied_head_by_its_other_name(tmp_path):
    """The file holds the one array as lm_head.weight, and the index as wte.weight."""
    flat = forms.random_model()
    tensors = hf_tensors(flat)
    tensors["lm_head.weight"] = tensors.pop(WTE)
    write_huggingface(tmp_path, CONFIG, tensors, shards=3)
    edit_index(tmp_path, lambda m: m.update({WTE: m.pop("lm_head.weight")}))
    assert_loads_as(tmp_path, CONFIG, flat)


# ---- pickles


PICKLES = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "model.ckpt"]


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("with_config", [True, False])
def test_pickles_are_refused_with_the_line_that_converts_them(tmp_path, name, with_config):
    """A pickle is a program: nothing in it may run."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(forms.hf_config(CONFIG)))
    said = forms.refusal(tmp_path, ValueError)
    assert name in said
    assert re.search("(?i)pickle", said)
    assert re.search(r"save_pretrained|save_file|safetensors", said), said
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path):
    flat = forms.random_model()
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat))
    (tmp_path / "pytorch_model.bin").write_bytes(b"?")
    assert_loads_as(tmp_path, CONFIG, flat)


# ---- directories of unknown format


def test_an_unknown_directory_lists_what_was_found_and_what_is_understood(tmp_path):
    for name in ("notes.txt", "weights.npy", "notes.pages"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sub").mkdir()
    for call in (gpt2_jax.load, gpt2_jax.load_config):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            call(tmp_path)
        said = str(caught.value)
        for word in ("notes.txt", "weights.npy", "notes.pages", "hparams.json", "config.json", "model.safetensors",
                     "gpt2_jax.json"):  # fmt: skip
            assert word in said, word


def test_an_empty_directory_and_one_of_thousands_of_files(tmp_path):
    (tmp_path / "empty").mkdir()
    assert re.search("empty", forms.refusal(tmp_path / "empty"))
    (tmp_path / "many").mkdir()
    for i in range(1009):
        (tmp_path / "many" / f"photo{i}.jpg").touch()
    said = forms.refusal(tmp_path / "many")
    assert len(said) < 3000
    assert re.search("photo", said)


@pytest.mark.parametrize(
    "source", ["/no/such/place", "./no/such/place", "../nowhere-at-all", "nowhere-at-all", "~/nowhere-at-all"]
)
def test_no_such_path_is_told(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for call in (gpt2_jax.load, gpt2_jax.load_config, gpt2_jax.load_tokenizer):
        for form in (str, Path):
            with pytest.raises(FileNotFoundError, match=source.rpartition("/")[2]):
                call(form(source))


def test_a_file_is_not_a_directory(tmp_path):
    path = write_huggingface(tmp_path, CONFIG, hf_tensors(forms.random_model())) / SAFETENSORS
    for call in (gpt2_jax.load, gpt2_jax.load_config, gpt2_jax.load_tokenizer):
        with pytest.raises((ValueError, FileNotFoundError), match=r"model\.safetensors.*(file|directory)"):
            call(path)


@pytest.mark.parametrize("typo", ["125M", "1.5B", "gpt2-xxl", "124m ", "gpt2_medium", ""])
def test_a_mistyped_size_lists_the_sizes(tmp_path, monkeypatch, typo):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        gpt2_jax.load(typo)
    if typo:
        assert all(size in str(caught.value) for size in ("124M", "355M", "774M", "1558M")), str(caught.value)


@pytest.mark.parametrize("name", ["124M", "gpt2", "GPT2-XL", "owner/name"])
def test_a_folder_of_that_name_wins(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    flat = forms.random_model()
    write_huggingface(tmp_path / name, CONFIG, hf_tensors(flat))
    assert_loads_as(name, CONFIG, flat)
    assert gpt2_jax.load_config(name).to_hparams() == CONFIG.to_hparams()


def test_an_orbax_directory_that_is_not_ours(tmp_path):
    """Plain Orbax has no number of heads and no hashes. It is refused, and the message says what is missing."""
    import orbax.checkpoint as ocp

    params = forms.nested(forms.random_model())
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", params)
    assert re.search(r"gpt2_jax\.json", forms.refusal(tmp_path / "plain"))
    gpt2_jax.save(tmp_path / "ours", CONFIG, params, format="orbax")
    (tmp_path / "ours" / "gpt2_jax.json").unlink()
    assert re.search(r"gpt2_jax\.json", forms.refusal(tmp_path / "ours"))


def test_an_orbax_directory_without_its_arrays(tmp_path):
    gpt2_jax.save(tmp_path / "ours", CONFIG, forms.nested(forms.random_model()), format="orbax")
    shutil.rmtree(tmp_path / "ours" / "params")
    assert re.search("params", forms.refusal(tmp_path / "ours"))


@pytest.mark.parametrize("wrong", [None, 3, b"124M", ["124M"]])
def test_a_source_must_be_a_name_or_a_path(wrong):
    for call in (gpt2_jax.load, gpt2_jax.load_config, gpt2_jax.load_tokenizer):
        with pytest.raises(ValueError, match=r"path|name"):
            call(wrong)


# ---- tokenizers in Hugging Face's files


@pytest.fixture(params=["shakespeare", "real"])
def source(request, model_dir):
    return model_dir if request.param == "shakespeare" else vocabularies.real_vocabulary_dir()


def assert_same_tokenizer(directory, source):
    ours = gpt2_jax.load_tokenizer(directory)
    right = gpt2_jax.Tokenizer.from_files(source / "encoder.json", source / "vocab.bpe")
    text = "".join(vocabularies.SNIPPETS) + "O Romeo, Romeo! wherefore art thou Romeo?"
    assert (ours.n_vocab, ours.eot) == (right.n_vocab, right.eot)
    assert ours.encode(text, allow_special=True) == right.encode(text, allow_special=True)


def test_vocab_json_and_merges_txt(tmp_path, source):
    forms.copy_vocabulary(source, tmp_path, ("vocab.json", "merges.txt"))
    assert_same_tokenizer(tmp_path, source)


@pytest.mark.parametrize("pairs", [False, True])
def test_tokenizer_json_alone(tmp_path, source, pairs):
    forms.write_tokenizer_json(tmp_path / "tokenizer.json", source, pairs=pairs)
    assert_same_tokenizer(tmp_path, source)


OTHER_TOKENIZERS = {
    "model": [{"model": 3}, {"model": None}, {"model": {}}],
    "model.type = 'WordPiece'": [{"model": {"type": "WordPiece", "vocab": {"a": 0}}}],
    "model.type = 'Unigram'": [{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}],
    "model.vocab": [{"model": {"type": "BPE", "merges": [], "vocab": vocab}} for vocab in ([], {"a": "b"}, {}, None)],
    "model.merges": [
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": merges}} for merges in (None, 3, "a a", [3], {"a": "a"})
    ],
    "added_tokens": [{"added_tokens": 3}, {"added_tokens": ["[PAD]"]}, {"added_tokens": [{"id": 0}]}],
    "pre_tokenizer|PreTokenizer": [{"pre_tokenizer": 3}, {"pre_tokenizer": {"type": "none such"}}],
}


@pytest.mark.parametrize(
    ("culprit", "changes"), [(name, changes) for name, some in OTHER_TOKENIZERS.items() for changes in some], ids=str
)
def test_another_tokenizer_is_refused(tmp_path, model_dir, culprit, changes):
    """The message names the field."""
    forms.write_tokenizer_json(tmp_path / "tokenizer.json", model_dir, **changes)
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*({culprit})") as caught:
        gpt2_jax.load_tokenizer(tmp_path)
    assert forms.is_clear(caught.value), caught.value


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 99_999, b"\xff"], ids=lambda t: repr(t)[:9])
def test_a_tokenizer_json_that_is_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        gpt2_jax.load_tokenizer(tmp_path)
    assert forms.is_clear(caught.value), caught.value


def test_a_vocabulary_of_another_model_is_told(tmp_path, model_dir):
    write_huggingface(tmp_path, CONFIG, hf_tensors(forms.random_model()))
    forms.copy_vocabulary(model_dir, tmp_path, ("vocab.json", "merges.txt"))
    with pytest.warns(UserWarning, match=r"1,281 ids, but the embedding has n_vocab = 37 rows"):
        gpt2_jax.load_tokenizer(tmp_path)
