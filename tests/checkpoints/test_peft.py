"""LoRA adapters in PEFT's folders: read, merged into their base model, and written."""

import json
import re
import warnings

import checkpoint_forms as forms
import commands
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
import tiny_runs
from train_states import assert_same

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.checkpoints import Adapter, load_adapter, save_adapter
from gpt2_jax.commands import convert, generate, inspect
from gpt2_jax.params import flatten

CONFIG = tiny_models.CONFIG
D, V = CONFIG.n_embd, CONFIG.n_vocab
# {name in PEFT's file: shape}, as peft 0.21.2 writes them for GPT2LMHeadModel with an output head of its own.
SHAPES = {
    "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (3, D),
    "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": (3 * D, 3),
    "base_model.model.transformer.h.1.mlp.c_proj.lora_A.weight": (2, 4 * D),
    "base_model.model.transformer.h.1.mlp.c_proj.lora_B.weight": (D, 2),
    "base_model.model.transformer.wte.lora_embedding_A": (3, V),
    "base_model.model.transformer.wte.lora_embedding_B": (D, 3),
    "base_model.model.transformer.wte.base_layer.weight": (V, D),
    "base_model.model.lm_head.base_layer.weight": (V, D),
    "base_model.model.lm_head.lora_A.weight": (3, D),
    "base_model.model.lm_head.lora_B.weight": (V, 3),
    "base_model.model.transformer.ln_f.weight": (D,),
    "base_model.model.transformer.ln_f.bias": (D,),
}
FIELDS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.25,
    "rank_pattern": {"c_proj": 2},
    "alpha_pattern": {"h.1.mlp.c_proj": 5},
    "target_modules": ["c_attn", "c_proj", "wte", "lm_head"],
    "modules_to_save": ["ln_f"],
    "fan_in_fan_out": True,
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
}
SCALES = {"h0/attn/c_attn/w": 7 / 3, "h1/mlp/c_proj/w": 5 / 2, "wte": 7 / 3, "lm_head": 7 / 3}


def tensors(shapes=SHAPES):
    rng = np.random.default_rng(4)
    return {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}


def write(folder, arrays, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS | fields))
    return folder


@pytest.fixture
def base(tmp_path):
    """A base model: its folder and its flat params in NumPy."""
    params = tiny_models.random_params(CONFIG, 5)
    gpt2_jax.save(tmp_path / "base", CONFIG, params, "huggingface")
    return tmp_path / "base", {name: np.asarray(leaf, np.float64) for name, leaf in flatten(params).items()}


def expected_of(flat, arrays, scales=SCALES):
    """The merged model by PEFT's definition: W + scale * B @ A, in PyTorch's orientation (out, in)."""
    at = "base_model.model."
    change = {
        f"{at}transformer.h.0.attn.c_attn": ("h0/attn/c_attn/w", True),
        f"{at}transformer.h.1.mlp.c_proj": ("h1/mlp/c_proj/w", True),
        f"{at}lm_head": ("lm_head", False),
    }
    found = dict(flat) | {"lm_head": flat["wte"]}
    for module, (name, transposed) in change.items():
        product = scales[name] * np.float64(arrays[f"{module}.lora_B.weight"]) @ arrays[f"{module}.lora_A.weight"]
        found[name] = found[name] + (product.T if transposed else product)
    a, b = (arrays[f"{at}transformer.wte.lora_embedding_{side}"] for side in "AB")
    found["wte"] = found["wte"] + scales["wte"] * (np.float64(b) @ a).T
    found |= {"ln_f/g": arrays[f"{at}transformer.ln_f.weight"], "ln_f/b": arrays[f"{at}transformer.ln_f.bias"]}
    return found


def assert_close(params, expected):
    found = flatten(params)
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=3e-6, err_msg=name)  # 9e-7: float32 near 16


def test_a_folder_is_merged_into_the_base_that_it_names(tmp_path, base):
    """The embedding and the head change apart, so that the head gets weights of its own, as in PEFT."""
    source, flat = base
    arrays = tensors()
    folder = write(tmp_path / "adapter", arrays, base_model_name_or_path=str(source))
    config, params = gpt2_jax.load(folder)
    assert config == CONFIG.replace(tie_word_embeddings=False) == gpt2_jax.load_config(folder)
    assert_close(params, expected_of(flat, arrays))
    adapter = load_adapter(folder)
    assert (adapter.base, adapter.dropout) == (str(source), 0.25)
    config, merged = adapter.merge(*gpt2_jax.load(source))
    assert not config.tie_word_embeddings
    assert_same(merged, params)


def test_rslora_divides_by_the_root_of_the_rank(tmp_path, base):
    source, flat = base
    arrays = tensors()
    folder = write(tmp_path / "adapter", arrays, base_model_name_or_path=str(source), use_rslora=True)
    scales = {name: scale * (2 if "mlp" in name else 3) ** 0.5 for name, scale in SCALES.items()}
    assert_close(gpt2_jax.load(folder)[1], expected_of(flat, arrays, scales))


def test_what_is_written_is_what_was_read(tmp_path, base):
    source, _ = base
    arrays = tensors()
    folder = write(tmp_path / "adapter", arrays, base_model_name_or_path=str(source))
    save_adapter(tmp_path / "again", gpt2_jax.load_config(folder), load_adapter(folder))
    again = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")
    kept = {name: array for name, array in arrays.items() if ".base_layer." not in name}
    assert again.keys() == kept.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(again[name], array, strict=True)
    fields = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    known = {"target_modules", "rank_pattern", "alpha_pattern", "modules_to_save"}
    assert {name: fields[name] for name in FIELDS.keys() - known} == {n: v for n, v in FIELDS.items() if n not in known}
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in kept if ".lora_" in name}
    assert set(fields["target_modules"]) == modules
    assert fields["rank_pattern"] == {"transformer.h.1.mlp.c_proj": 2}
    assert fields["alpha_pattern"] == {"transformer.h.1.mlp.c_proj": 5.0}
    assert fields["modules_to_save"] == ["transformer.ln_f"]
    assert_same(gpt2_jax.load(tmp_path / "again")[1], gpt2_jax.load(folder)[1])


def test_a_head_for_labels(tmp_path, base):
    """As peft writes for GPT2ForSequenceClassification: score.weight is (labels, n_embd)."""
    source, flat = base
    shapes = {name: shape for name, shape in SHAPES.items() if "attn" in name}
    arrays = tensors(shapes | {"base_model.model.score.weight": (3, D)})
    changed = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"], "rank_pattern": {}}
    folder = write(tmp_path / "adapter", arrays, base_model_name_or_path=str(source), **changed)
    config, params = gpt2_jax.load(folder)
    assert config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    np.testing.assert_array_equal(params["score"]["w"], arrays["base_model.model.score.weight"].T)
    np.testing.assert_array_equal(params["wte"], flat["wte"].astype("f4"))
    save_adapter(tmp_path / "again", config, load_adapter(folder))
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert_same(gpt2_jax.load(tmp_path / "again")[1], params)


REFUSED = {
    "another method": ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora = True"),
    "biases": ({"bias": "lora_only"}, "bias = 'lora_only'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
    "tied pairs": ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    "no base": ({"base_model_name_or_path": None}, "does not name the base model: set base_model_name_or_path"),
    "a base that is gone": (
        {"base_model_name_or_path": "no-such-model"},
        r"'no-such-model' \(base_model_name_or_path\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused(tmp_path, base, case):
    changed, said = REFUSED[case]
    folder = write(tmp_path / "adapter", tensors(), **({"base_model_name_or_path": str(base[0])} | changed))
    assert re.search(said, forms.refusal(folder))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("transformer.h.0.attn.c_attn.lora_magnitude_vector", (36,), "which is not of a LoRA adapter for GPT-2"),
        ("model.layers.0.q_proj.lora_A.weight", (3, 12), "which is not of a LoRA adapter for GPT-2"),
        ("transformer.h.0.mlp.c_fc.lora_A.weight", (3, 12), "no complete pair for h0/mlp/c_fc/w"),
        ("transformer.ln_f.weight", (11,), r"ln_f/g \(11,\), which is \(12,\) in the base model"),
        ("transformer.h.7.ln_1.bias", (12,), "h7/ln_1/b, which the base model does not have"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path, base, name, shape, said):
    arrays = tensors() | tensors({f"base_model.model.{name}": shape})
    folder = write(tmp_path / "adapter", arrays, base_model_name_or_path=str(base[0]))
    assert re.search(said, forms.refusal(folder, ValueError))


def test_what_peft_cannot_hold_is_refused(tmp_path):
    pair = {"a": np.ones((V, 2), "f4"), "b": np.ones((2, D), "f4")}
    for adapter, said in (
        (Adapter({"wte": pair}, {"wte": 2.0}, {}), "wte and the output head apart"),
        (Adapter({}, {}, {"ln_f/g": np.ones(D, "f4")}), r"only a part of transformer\.ln_f was trained"),
    ):
        with pytest.raises(ValueError, match=said):
            save_adapter(tmp_path / "out", CONFIG, adapter)
        assert not (tmp_path / "out").exists()
    classifier = CONFIG.replace(labels=("no", "yes"), pooling="mean")
    with pytest.raises(ValueError, match="the peft format cannot hold a classifier with pooling 'mean'"):
        save_adapter(tmp_path / "out", classifier, Adapter({}, {}, {"score/w": np.ones((D, 2), "f4")}))


def test_a_model_is_no_adapter(base):
    with pytest.raises(ValueError, match="holds no adapter: name a run with LoRA"):
        load_adapter(base[0])


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run with LoRA, and its base model beside it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(tiny_runs.TEXT)
    gpt2_jax.save(folder / "model", tiny_runs.CONFIG, tiny_runs.params(), "huggingface", tokenizer)
    lora = {"rank": 2, "alpha": 3.0, "targets": "c_attn/w$|c_fc/w$", "full": "ln_f/"}
    data = {"n_tokens": 11, "path": str(folder / "text.txt"), "val_fraction": 0.0}
    recipe = tiny_runs.small(lora=lora, model={"source": str(folder / "model"), "dropout": 0.0}, data=data)
    plan, params, tokenizer = training.start_model(recipe)
    text = training.start_data(recipe, tokenizer, folder / "run" / "data")
    with tiny_runs.compiled_once(folder / "cache"):
        training.fit(plan, params, text, folder / "run", tokenizer)
    return folder / "run"


def test_convert_writes_the_adapter_of_a_run(run, tmp_path, capfd):
    """The folder names the base model and has the vocabulary. Loaded or continued, it is the model of the run."""
    done = commands.caller(convert.main, capfd)(run, tmp_path / "out", "--format", "peft")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    assert "an adapter of 120 parameters, of the base model" in done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert_same(gpt2_jax.load(tmp_path / "out")[1], gpt2_jax.load(run)[1])
    done = commands.caller(convert.main, capfd)(run, tmp_path / "out", "--format", "peft", "--overwrite")
    assert done.code == 0, done.err
    with commands.config_of_jax_kept():
        args = ("--prompt", "O", "--max-new-tokens", 5, "--temperature", 0)
        texts = [commands.caller(generate.main, capfd)("--model", at, *args).out for at in (run, tmp_path / "out")]
    assert texts[0] == texts[1] != ""
    assert "adapter_model.safetensors" in commands.caller(inspect.main, capfd)(tmp_path / "out").out


def test_an_adapter_without_a_vocabulary_has_that_of_its_base(run, tmp_path):
    save_adapter(tmp_path / "out", gpt2_jax.load_config(run), load_adapter(run))
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert gpt2_jax.load_tokenizer(tmp_path / "out").n_vocab == tiny_runs.CONFIG.n_vocab


def test_convert_refuses_an_adapter_of_a_model(run, tmp_path, capfd):
    done = commands.caller(convert.main, capfd)(run.parent / "model", tmp_path / "out", "--format", "peft")
    assert done.code == 2
    assert "holds no adapter" in done.err
    assert not (tmp_path / "out").exists()


# ---- peft itself


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_peft_opens_what_is_written_and_its_folders_open_here(tmp_path, tied):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": V, "n_positions": 41, "n_embd": D, "n_head": 3, "n_layer": 2, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **special, attn_pdrop=0.0))
    model.save_pretrained(tmp_path / "base")

    def opened():
        return transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")

    how = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    targets = {"target_modules": ["c_attn", "mlp.c_proj", *(() if tied else ("wte", "lm_head"))]}
    patterns = {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"h.1.attn.c_attn": 5}, "modules_to_save": ["ln_f"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm_head is a linear layer, with another orientation
        theirs = peft.get_peft_model(opened(), peft.LoraConfig(**how, **targets, **patterns))
    for name, tensor in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            tensor.data += 0.1 * torch.randn_like(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it saves the embedding too
        theirs.eval().save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(1).integers(0, V, (2, 17))
    expected = theirs(torch.tensor(tokens)).logits.detach().numpy()
    config, params = gpt2_jax.load(tmp_path / "adapter")
    logits = np.asarray(gpt2_jax.GPT2(config).apply({"params": params}, tokens).logits)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=4e-6 * np.abs(expected).max())  # 4e-7
    save_adapter(tmp_path / "ours", config, load_adapter(tmp_path / "adapter"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(opened(), tmp_path / "ours").eval()
    np.testing.assert_array_equal(again(torch.tensor(tokens)).logits.detach().numpy(), expected)
