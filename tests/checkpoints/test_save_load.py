"""Conversion between formats keeps every bit of arrays, every hyperparameter and every byte of vocabularies."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import checkpoint_forms as forms
import jax
import numpy as np
import pytest
import vocabularies
from checkpoint_forms import CONFIG, FORMATS, assert_loads_as
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strength import campaign

import gpt2_jax
from gpt2_jax import GPT2Config

DTYPES = ("float32", "bfloat16", "float16")
ROUTE = ("huggingface", "tensorflow", "orbax", "huggingface", "orbax", "tensorflow")

pytestmark = pytest.mark.usefixtures("own_cache")


@st.composite
def configs(draw):
    heads, width = draw(st.sampled_from([(1, 1), (1, 7), (3, 5), (5, 1), (2, 3), (7, 3)]))
    sizes = st.sampled_from([1, 2, 3, 5, 11, 23])
    return GPT2Config(
        n_vocab=draw(st.sampled_from([1, 2, 37, 53, 101])),
        n_ctx=draw(sizes),
        n_embd=heads * width,
        n_head=heads,
        n_layer=draw(st.sampled_from([1, 2, 3, 11])),
        param_dtype=draw(st.sampled_from(DTYPES)),
    )


@settings(max_examples=campaign(5, 23))
@given(configs(), st.integers(0, 2**32 - 1))
@example(CONFIG.replace(param_dtype="bfloat16"), 1)
@example(CONFIG.replace(param_dtype="float16"), 2)
@example(CONFIG.replace(n_layer=11), 3)  # h10 comes after h9, not after h1
def test_every_array_survives_every_form(config, seed):
    """TensorFlow -> ours -> Hugging Face -> ours -> TensorFlow -> ours -> Orbax -> ours, and other orders."""
    flat = forms.random_bits(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        source = forms.write_tensorflow(Path(folder) / "source", config, flat)
        loaded = assert_loads_as(source, config, flat)
        for i, form in enumerate(ROUTE):
            directory = Path(folder) / f"{i}-{form}"
            gpt2_jax.save(directory, *loaded, format=form)
            loaded = assert_loads_as(directory, config, flat, keep_copy=False)
            assert gpt2_jax.load_config(directory).to_hparams() == config.to_hparams()


@pytest.mark.parametrize(
    ("vocabulary", "first", "second"),
    campaign(
        [
            ("embedded", "tensorflow", "huggingface"),
            ("real", "huggingface", "orbax"),
            ("embedded", "orbax", "tensorflow"),
        ],
        [(name, *pair) for name in ("embedded", "real") for pair in itertools.permutations(FORMATS, 2)],
    ),
)
def test_the_vocabulary_survives_to_the_byte(tmp_path, model_dir, vocabulary, first, second):
    source = model_dir if vocabulary == "embedded" else vocabularies.real_vocabulary_dir()
    tokenizer = gpt2_jax.Tokenizer.from_files(source / "encoder.json", source / "vocab.bpe")
    config = GPT2Config(n_vocab=tokenizer.n_vocab, n_ctx=3, n_embd=2, n_head=1, n_layer=1)
    params = forms.nested(forms.random_model(config))
    for name, form in ((first, first), (second, second), ("last", "tensorflow")):
        gpt2_jax.save(tmp_path / name, config, params, format=form, tokenizer=tokenizer)
        tokenizer = gpt2_jax.load_tokenizer(tmp_path / name)
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "last" / name).read_bytes() == (source / name).read_bytes(), name
    text = "Don't  you\n\n think 1981 was\tthe year?  \u6f22\u5b57 <|endoftext|> "
    theirs = gpt2_jax.Tokenizer.from_files(source / "encoder.json", source / "vocab.bpe")
    for special in (False, True):
        assert tokenizer.encode(text, allow_special=special) == theirs.encode(text, allow_special=special)


@pytest.mark.parametrize("form", FORMATS)
def test_a_tokenizer_is_optional_and_should_fit(tmp_path, model_dir, form):
    flat = forms.random_model()
    params = forms.nested(flat)
    gpt2_jax.save(tmp_path / "bare", CONFIG, params, format=form)
    assert_loads_as(tmp_path / "bare", CONFIG, flat)
    assert not {"encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "tokenizer.json"} & {
        path.name for path in (tmp_path / "bare").rglob("*")
    }
    with pytest.raises(FileNotFoundError, match=r"bare"):
        gpt2_jax.load_tokenizer(tmp_path / "bare")
    with pytest.warns(UserWarning, match=r"the tokenizer has 1,281 ids, but .* another model") as caught:
        gpt2_jax.save(tmp_path / "other", CONFIG, params, format=form, tokenizer=gpt2_jax.load_tokenizer(model_dir))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("form", ["huggingface", "orbax"])
def test_dropout_rates_survive_where_the_form_has_them(tmp_path, form):
    config = CONFIG.replace(embd_pdrop=0.0, attn_pdrop=0.25, resid_pdrop=0.3)
    gpt2_jax.save(tmp_path / "model", config, forms.nested(forms.random_model()), format=form)
    assert gpt2_jax.load(tmp_path / "model")[0] == gpt2_jax.load_config(tmp_path / "model") == config


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorflow_reads_our_export_under_the_original_names(tmp_path, dtype):
    tf = forms.import_tensorflow()
    config = CONFIG.replace(param_dtype=dtype)
    flat = forms.random_bits(config, 7)
    gpt2_jax.save(tmp_path / "model", config, forms.nested(flat), format="tensorflow")
    reader = tf.train.load_checkpoint(str(tmp_path / "model"))
    expected = forms.variables_of(flat)
    assert reader.get_variable_to_shape_map() == {name: list(array.shape) for name, array in expected.items()}
    for name, array in expected.items():
        stored = reader.get_tensor(name)
        assert (stored.dtype, stored.tobytes()) == (array.dtype, array.tobytes()), name
    assert json.loads((tmp_path / "model" / "hparams.json").read_text()) == config.to_hparams()


def test_a_checkpoint_of_the_old_saver_is_read(tmp_path):
    """Saved with the calls that OpenAI and gpt-2-simple use: a graph, a session, a Saver, a step number."""
    tf = forms.import_tensorflow()
    flat = forms.random_model()
    with warnings.catch_warnings(), tf.Graph().as_default(), tf.compat.v1.Session() as session:
        warnings.simplefilter("ignore")
        for name, array in forms.variables_of(flat).items():
            tf.compat.v1.get_variable(name, initializer=array, use_resource=False)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver()
        saver.save(session, str(tmp_path / "model"), global_step=999)
        saver.save(session, str(tmp_path / "model"), global_step=1000)
    (tmp_path / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    assert (tmp_path / "model-1000.meta").is_file()
    assert_loads_as(tmp_path, CONFIG, flat)


POINTERS = ["/home/someone/run1/model-1000", "C:\\\\Users\\\\me\\\\run1\\\\model-1000", "checkpoint/run1/model-1000"]


@pytest.mark.parametrize("pointer", POINTERS)
def test_the_folder_in_the_pointer_is_ignored(tmp_path, pointer):
    """The `checkpoint` file names the newest one, which may not have the largest number."""
    flat = forms.random_model(seed=1)
    forms.write_tensorflow(tmp_path, CONFIG, forms.random_model(seed=2), prefix="model-2000")
    forms.write_tensorflow(tmp_path, CONFIG, flat, prefix="model-1000", pointer=pointer)
    assert_loads_as(tmp_path, CONFIG, flat)


@pytest.mark.parametrize("form", FORMATS)
def test_saving_takes_what_load_and_init_params_give(tmp_path, form):
    """Device arrays, numpy arrays, a relative path, one with ~, and a path that does not exist yet."""
    params = gpt2_jax.init_params(CONFIG, jax.random.key(3))
    gpt2_jax.save(str(tmp_path / "deep" / "er" / "model"), CONFIG, params, format=form)
    assert_loads_as(tmp_path / "deep" / "er" / "model", CONFIG, forms.leaves(params))
    here = os.path.relpath(tmp_path / "relative")
    gpt2_jax.save(here, CONFIG, jax.tree.map(np.asarray, params), format=form)
    assert_loads_as(here, CONFIG, forms.leaves(params))


def test_the_default_is_no_tokenizer_and_tensorflow(tmp_path):
    gpt2_jax.save(tmp_path / "model", CONFIG, forms.nested(forms.random_model()))
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"hparams.json", "checkpoint"}


@pytest.mark.parametrize("form", FORMATS)
def test_saving_replaces_a_model_of_any_form(tmp_path, form):
    for seed, before in enumerate(FORMATS):
        gpt2_jax.save(tmp_path / "model", CONFIG, forms.nested(forms.random_model(seed=seed)), format=before)
        flat = forms.random_model(seed=97)
        gpt2_jax.save(tmp_path / "model", CONFIG, forms.nested(flat), format=form)
        assert_loads_as(tmp_path / "model", CONFIG, flat)
        assert [path.name for path in tmp_path.iterdir()] == ["model"], "litter"


@pytest.mark.skipif(
    not os.environ.get("GPT2_JAX_SLOW"), reason="set GPT2_JAX_SLOW=1: 20 s, 4 GB of memory, 2 GB of disk"
)
def test_every_array_survives_every_form_at_the_real_shape(tmp_path):
    config = gpt2_jax.SIZES["124M"]
    flat = forms.random_bits(config, 1)
    loaded = assert_loads_as(forms.write_tensorflow(tmp_path / "source", config, flat), config, flat, keep_copy=False)
    for form in ROUTE[:3]:
        gpt2_jax.save(tmp_path / form, *loaded, format=form)
        loaded = assert_loads_as(tmp_path / form, config, flat, keep_copy=False)


LIBRARIES = """
import sys
import gpt2_jax
from gpt2_jax import files

def at_first(directory, check):
    raise FileExistsError(directory)  # before anything is written

files.replacing = at_first
config = gpt2_jax.GPT2Config(n_vocab=3, n_ctx=2, n_embd=2, n_head=1, n_layer=1)
params = gpt2_jax.init_params(config, __import__("jax").random.key(0))
for format, library in (("orbax", "orbax.checkpoint"), ("tensorflow", "tensorflow")):
    try:
        gpt2_jax.save("new", config, params, format)
    except FileExistsError:
        print(format, library in sys.modules)
"""


def test_the_writers_library_is_imported_before_a_folder_is_made(tmp_path):
    """A Ctrl-C during an import that takes long ends the process at once, and would leave the temporary folder."""
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["orbax", "True", "tensorflow", "True"]
