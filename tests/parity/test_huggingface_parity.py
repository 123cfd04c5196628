"""Hugging Face's library opens our exports without a warning, and we load its files bit for bit."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import checkpoint_forms as forms
import forward
import jax
import ml_dtypes
import numpy as np
import pytest
import vocabularies
from hypothesis import given
from hypothesis import strategies as st

import gpt2_jax

pytestmark = pytest.mark.parity

BOUND = 4e-6  # test_parity.py measured 8.2e-7
DTYPES = ("float32", "bfloat16", "float16")
ODD = forward.CONFIG


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """Return the library, or skip: it comes with the `parity` extra."""
    reason = "needs the `parity` extra: pip install -e '.[parity]'"
    pytest.importorskip("torch", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, shakespeare, tokenizer):
    """Return a folder of exports: the embedded model with its tokenizer, and odd models without one, in each dtype."""
    folder = tmp_path_factory.mktemp("exports")
    gpt2_jax.save(folder / "shakespeare", *shakespeare, format="huggingface", tokenizer=tokenizer)
    for dtype in DTYPES:
        config = ODD.replace(param_dtype=dtype)
        params = forms.nested(forms.random_model(config))
        gpt2_jax.save(folder / dtype, config, params, format="huggingface")
    source = vocabularies.real_vocabulary_dir()
    real = gpt2_jax.Tokenizer.from_files(source / "encoder.json", source / "vocab.bpe")
    config = gpt2_jax.GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=6, n_head=3, n_layer=1)
    params = forms.nested(forms.random_model(config))
    gpt2_jax.save(folder / "real", config, params, format="huggingface", tokenizer=real)
    return folder


OPEN = """
    import json, logging, os, sys, warnings
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an import says is not about our files
        import torch, transformers
    transformers.utils.logging.disable_progress_bar()

    said = []
    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
    logging.getLogger().addHandler(Listener(level=logging.WARNING))
    for name in list(logging.root.manager.loggerDict):
        if not logging.getLogger(name).propagate:
            logging.getLogger(name).addHandler(Listener(level=logging.WARNING))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for directory in sys.argv[1:]:
            for auto in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):
                model, info = auto.from_pretrained(directory, output_loading_info=True)
                said += [f"{k}: {sorted(map(str, v))}" for k, v in info.items() if v]
                assert type(model) is transformers.GPT2LMHeadModel
                assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
            if os.path.basename(directory) in ("shakespeare", "real"):
                tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
                ids = tokenizer("First Citizen:", return_tensors="pt")
                model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(json.dumps([*said, *(str(w.message) for w in caught)]))
"""


def test_it_opens_our_export_without_a_word(transformers, exports):
    """There is no warning, no log record, no output on standard error, and no missing, unexpected or misshaped key."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OPEN), *map(str, sorted(exports.iterdir()))],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["shakespeare", "float32"])
def test_its_logits_from_our_export_are_ours(transformers, exports, name, reference):
    import torch

    config, params = gpt2_jax.load(exports / name)
    model = transformers.GPT2LMHeadModel.from_pretrained(exports / name, attn_implementation="eager").eval()
    tokens_BT = reference["tokens"] if name == "shakespeare" else forward.some_tokens(config, 3, 23)
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(tokens_BT, np.int64))).logits.numpy()
    assert forward.relative_error(forward.logits_of(config, params, tokens_BT), theirs) <= BOUND


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_reads_every_tensor_to_the_bit(transformers, exports, dtype):
    model = transformers.GPT2LMHeadModel.from_pretrained(exports / dtype, dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    expected = forms.hf_tensors(forms.random_model(ODD.replace(param_dtype=dtype)))
    theirs = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert theirs.keys() == expected.keys()
    for name, array in expected.items():
        assert _as_numpy(theirs[name]).tobytes() == array.tobytes(), name


def _as_numpy(tensor):
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def test_it_understands_our_config(transformers, exports, shakespeare):
    config = transformers.AutoConfig.from_pretrained(exports / "shakespeare")
    assert (config.vocab_size, config.n_positions, config.n_embd, config.n_head, config.n_layer) == tuple(
        shakespeare[0].to_hparams().values()
    )
    assert config.activation_function == "gelu_new"
    assert config.layer_norm_epsilon == 1e-5
    assert config.tie_word_embeddings
    assert config.eos_token_id == config.bos_token_id == 1280


# ---- tokenizers


@pytest.fixture(scope="module", params=["shakespeare", "real"])
def both_tokenizers(request, transformers, exports):
    theirs = transformers.AutoTokenizer.from_pretrained(exports / request.param)
    return gpt2_jax.load_tokenizer(exports / request.param), theirs


@given(st.lists(st.sampled_from(vocabularies.SNIPPETS) | st.text(max_size=7), max_size=23).map("".join))
def test_its_tokenizer_gives_our_ids(both_tokenizers, text):
    """There, `<|endoftext|>` in a text is the special id, as with our allow_special."""
    ours, theirs = both_tokenizers
    text = text.encode("utf-8", "replace").decode()
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text, allow_special=True)
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)


def test_its_tokenizer_knows_the_end_of_text(both_tokenizers):
    ours, theirs = both_tokenizers
    assert theirs.eos_token == theirs.bos_token == theirs.unk_token == "<|endoftext|>"
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot
    assert len(theirs) == theirs.vocab_size == ours.n_vocab
    assert theirs("a<|endoftext|>")["input_ids"][-1] == ours.eot


# ---- what it writes


@pytest.fixture(params=["one file", "sharded"])
def max_shard_size(request):
    return {"one file": "50GB", "sharded": "20KB"}[request.param]


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_saves_loads_with_us(transformers, tmp_path, kind, dtype, max_shard_size):
    import torch

    config = ODD.replace(param_dtype=dtype, attn_pdrop=0.25)
    theirs = transformers.GPT2Config(
        vocab_size=ODD.n_vocab, n_positions=ODD.n_ctx, n_embd=ODD.n_embd, n_head=ODD.n_head, n_layer=ODD.n_layer,
        attn_pdrop=0.25, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = getattr(transformers, kind)(theirs).to(getattr(torch, dtype))
    prefix = "transformer." if kind == "GPT2LMHeadModel" else ""
    with torch.no_grad():  # biases are not all zero, gains not all one
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "50GB")
    tensors = {name: _as_numpy(parameter.detach()) for name, parameter in model.named_parameters()}
    flat = {name: tensors[prefix + forms.hf_name(name)] for name in forms.shapes(config)}
    loaded, _ = forms.assert_loads_as(tmp_path, config, flat)
    assert loaded.attn_pdrop == 0.25


@pytest.mark.parametrize("name", ["shakespeare", "real"])
def test_the_tokenizer_it_saves_loads_with_us(transformers, exports, tmp_path, name):
    """The vocabulary is the same byte for byte, whichever vocabulary files the library writes."""
    transformers.AutoTokenizer.from_pretrained(exports / name).save_pretrained(tmp_path)
    transformers.AutoConfig.from_pretrained(exports / name).save_pretrained(tmp_path)
    ours, again = gpt2_jax.load_tokenizer(exports / name), gpt2_jax.load_tokenizer(tmp_path)
    text = "".join(vocabularies.SNIPPETS) + "Thou art as wise as thou art beautiful."
    assert (again.n_vocab, again.eot) == (ours.n_vocab, ours.eot)
    for special in (False, True):
        assert again.encode(text, allow_special=special) == ours.encode(text, allow_special=special)
    config, params = gpt2_jax.load(exports / name)
    for side, one in (("a", ours), ("b", again)):
        gpt2_jax.save(tmp_path / side, config, params, format="tensorflow", tokenizer=one)
    for file in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_logits_of_what_it_saves_are_ours(transformers, tmp_path):
    import torch

    config = transformers.GPT2Config(
        vocab_size=53, n_positions=23, n_embd=21, n_head=3, n_layer=3, bos_token_id=1, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    tokens_BT = forward.some_tokens(ODD, 3, 23)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens_BT.astype(np.int64))).logits.numpy()
    with jax.default_matmul_precision("highest"):
        ours = forward.logits_of(*gpt2_jax.load(tmp_path), tokens_BT)
    assert forward.relative_error(ours, theirs) <= BOUND


@pytest.mark.parametrize("folder", ["plain", 'it\'s a "folder" $HOME'])
def test_the_line_that_converts_pickles_does(transformers, tmp_path, folder):
    """The command in the error message is run as a user pastes it. Then the directory loads bit for bit."""
    import torch

    directory = tmp_path / folder
    directory.mkdir()
    flat = forms.random_model(ODD)
    state = {name: torch.tensor(array) for name, array in forms.hf_tensors(flat).items()}
    torch.save(state, directory / "pytorch_model.bin")
    (directory / "config.json").write_text(json.dumps(forms.hf_config(ODD)))
    with pytest.raises(ValueError, match="pickle") as refused:
        gpt2_jax.load(directory)
    line = re.search(r"python3? -c .*", str(refused.value), re.DOTALL)[0]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (line, done.stderr[-2000:])
    forms.assert_loads_as(directory, ODD, flat)
