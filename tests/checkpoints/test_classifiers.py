"""Classifiers in every format: saved to the bit, opened by transformers, read from it, or refused with one sentence."""

import json

import checkpoint_forms as forms
import jax
import numpy as np
import pytest
from checkpoint_forms import CONFIG, hf_tensors, write_huggingface

import gpt2_jax
from gpt2_jax import inspection, research
from gpt2_jax.checkpoints import runs
from gpt2_jax.checkpoints.fingerprints import fingerprint
from gpt2_jax.commands import convert
from gpt2_jax.recipe import Recipe

LABELS = CONFIG.replace(labels=("ham", "spam"))
SQUARE = CONFIG.replace(
    labels=tuple(f"kind {i}" for i in range(CONFIG.n_embd))
)  # its head's orientation cannot be seen
TEXTS = [[4, 9, 2, 7, 7], [3, 1], [8], [8, 8, 30, 0, 5, 6, 2, 9, 9, 1, 3]]


@pytest.mark.parametrize("config", [LABELS, SQUARE, LABELS.replace(tie_word_embeddings=False)])
@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_a_saved_classifier_is_loaded_to_the_bit(tmp_path, config, format):
    flat = forms.random_bits(config, 7)
    gpt2_jax.save(tmp_path, config, forms.nested(flat), format=format)
    loaded, params = forms.assert_loads_as(tmp_path, config, flat)
    assert loaded == config == gpt2_jax.load_config(tmp_path)
    assert fingerprint(loaded, params) == fingerprint(config, forms.nested(flat))


def test_pooling_is_saved_by_orbax_and_refused_by_hugging_face_s_format(tmp_path):
    config = LABELS.replace(pooling="mean")
    params = forms.nested(forms.random_model(config))
    gpt2_jax.save(tmp_path / "orbax", config, params, format="orbax")
    assert gpt2_jax.load_config(tmp_path / "orbax") == config
    with pytest.raises(ValueError, match="pooling 'mean', since transformers reads the last token"):
        gpt2_jax.save(tmp_path / "model", config, params, format="huggingface")
    assert not (tmp_path / "model").exists()


def test_openai_s_files_and_the_book_s_nesting_refuse_a_classifier(tmp_path):
    params = forms.nested(forms.random_model(LABELS))
    with pytest.raises(ValueError, match="classifier's head, score/w: save it in the format huggingface or orbax"):
        gpt2_jax.save(tmp_path / "model", LABELS, params)
    with pytest.raises(ValueError, match="no place for a classifier's head"):
        gpt2_jax.to_blocks(params)
    with pytest.raises(ValueError, match="extra: score/w"):
        gpt2_jax.save(tmp_path / "model", CONFIG, params)
    with pytest.raises(ValueError, match=r"misshaped: score/w is float32\[15, 2\], expected float32\[15, 3\]"):
        gpt2_jax.save(tmp_path / "model", LABELS.replace(labels=("a", "b", "c")), params, format="orbax")


def test_a_run_s_checkpoint_keeps_labels_and_pooling(tmp_path):
    config = LABELS.replace(pooling="first")
    runs.write_run(tmp_path, config, Recipe(objective="classification"), {})
    assert runs.read_run(tmp_path).config == config


# ---- folders of transformers


def write_transformers(directory, config, flat, **fields):
    """What GPT2ForSequenceClassification.save_pretrained writes, without the package's own writers."""
    tensors = hf_tensors({name: array for name, array in flat.items() if name not in ("score/w", "lm_head")})
    tensors["score.weight"] = np.ascontiguousarray(flat["score/w"].T)
    write_huggingface(directory, config, tensors, architectures=["GPT2ForSequenceClassification"], **fields)


def test_labels_are_those_of_id2label(tmp_path):
    """In the order of their numbers, as a JSON file may hold them in any order."""
    flat = forms.random_model(LABELS)
    write_transformers(tmp_path, CONFIG, flat, id2label={"1": "spam", "0": "ham"}, label2id={"ham": 0, "spam": 1})
    assert forms.assert_loads_as(tmp_path, LABELS, flat)[0] == LABELS


def test_without_id2label_labels_are_numbered_as_in_transformers(tmp_path):
    flat = forms.random_model(LABELS)
    write_transformers(tmp_path, CONFIG, flat)
    assert forms.assert_loads_as(tmp_path, LABELS, flat)[0].labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("id2label", [{"0": "ham"}, {"0": "ham", "2": "spam"}, {"0": "ham", "1": "ham"}, ["a", "b"]])
def test_names_that_do_not_fit_the_head_are_refused(tmp_path, id2label):
    write_transformers(tmp_path, CONFIG, forms.random_model(LABELS), id2label=id2label)
    assert "id2label" in forms.refusal(tmp_path)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_head_for_another_problem_is_left_out_with_a_warning(tmp_path, problem):
    flat = forms.random_model(LABELS)
    write_transformers(tmp_path, CONFIG, flat, problem_type=problem)
    del flat["score/w"]
    with pytest.warns(UserWarning, match=r"score.weight: these are for another task, and were left out"):
        assert forms.assert_loads_as(tmp_path, CONFIG, flat)[0] == CONFIG


def test_a_head_for_one_number_is_left_out_with_a_warning(tmp_path):
    flat = forms.random_model(LABELS)
    one = flat | {"score/w": flat.pop("score/w")[:, :1]}
    write_transformers(tmp_path, CONFIG, one, id2label={"0": "LABEL_0"})
    with pytest.warns(UserWarning, match=r"score.weight: these are for another task, and were left out"):
        assert forms.assert_loads_as(tmp_path, CONFIG, flat)[0] == CONFIG


def test_an_untied_classifier_of_transformers_has_no_output_head(tmp_path):
    """GPT2ForSequenceClassification does not create it. Labels do not need it."""
    flat = forms.random_model(LABELS)
    write_transformers(tmp_path, CONFIG, flat, id2label={"0": "ham", "1": "spam"}, tie_word_embeddings=False)
    with pytest.warns(UserWarning, match="no output head.*the next token is predicted with wte"):
        assert forms.assert_loads_as(tmp_path, LABELS, flat)[0] == LABELS


def test_transformers_opens_the_export_with_equal_logits_and_names(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    flat = forms.random_model(LABELS)
    tokenizer = gpt2_jax.load_tokenizer("shakespeare")
    gpt2_jax.save(tmp_path / "ours", LABELS, forms.nested(flat), "huggingface")
    model = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert (model.config.num_labels, model.config.id2label) == (2, {0: "ham", 1: "spam"})
    assert model.config.label2id == {"ham": 0, "spam": 1}
    pad, n_tokens = model.config.pad_token_id, max(map(len, TEXTS))
    assert pad == CONFIG.n_vocab - 1
    rows = np.array([[*text, *[pad] * (n_tokens - len(text))] for text in TEXTS])
    mask = np.array([[True] * len(text) + [False] * (n_tokens - len(text)) for text in TEXTS])
    with torch.no_grad():
        theirs = model(torch.tensor(rows), attention_mask=torch.tensor(mask).long()).logits.numpy()
    params = jax.tree.map(jax.numpy.asarray, forms.nested(flat))
    ours = gpt2_jax.GPT2(LABELS).apply({"params": params}, rows, mask, method="classify")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)  # measured: 2.4e-6; logits are up to 4

    model.save_pretrained(tmp_path / "theirs")
    assert forms.assert_loads_as(tmp_path / "theirs", LABELS, flat)[0] == LABELS
    config = gpt2_jax.load_config("shakespeare").replace(labels=("a", "b"))
    small = config.replace(n_ctx=8, n_embd=6, n_head=1, n_layer=1)
    gpt2_jax.save(tmp_path / "named", small, gpt2_jax.init_params(small, jax.random.key(0)), "huggingface", tokenizer)
    fields = json.loads((tmp_path / "named" / "config.json").read_text())
    assert fields["pad_token_id"] == fields["eos_token_id"] == tokenizer.eot


# ---- everything else that takes params


def test_a_classifier_works_as_a_language_model(tmp_path):
    """The head of labels changes nothing of it."""
    config = LABELS
    flat = forms.random_model(config)
    params = jax.tree.map(jax.numpy.asarray, forms.nested(flat))
    without = {name: leaf for name, leaf in params.items() if name != "score"}
    tokens = np.array([[4, 9, 2]])
    ours = gpt2_jax.GPT2(config).apply({"params": params}, tokens).logits
    np.testing.assert_array_equal(ours, gpt2_jax.GPT2(CONFIG).apply({"params": without}, tokens).logits)
    new, plain = (gpt2_jax.generate(*model, [[4, 9]], 4) for model in ((config, params), (CONFIG, without)))
    np.testing.assert_array_equal(new, plain)
    (one,), (other,) = gpt2_jax.score(config, params, [[4, 9, 2]]), gpt2_jax.score(CONFIG, without, [[4, 9, 2]])
    assert one.sum == other.sum


def test_weights_that_are_processed_for_research_give_the_same_logits_of_labels():
    """ln_f is not folded, since the output head and the classifier's head both read it."""
    config = LABELS.replace(param_dtype="float32")
    params = jax.tree.map(jax.numpy.asarray, forms.nested(forms.random_model(config)))
    tokens = np.array([[4, 9, 2, 7], [1, 1, 2, 30]])
    logits = [
        gpt2_jax.GPT2(a).apply({"params": b}, tokens, method="classify")
        for a, b in ((config, params), research.process_weights(config, params))
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)  # measured: 1.9e-6; logits are up to 6
    lens = research.logit_lens(config, params, tokens)
    assert lens.logprobs.shape[0] == config.n_layer + 1
    assert research.surgery.swap_layers(config, params, 0, 1)[0] == config


def test_gpt2_inspect_counts_the_head(tmp_path):
    gpt2_jax.save(tmp_path, LABELS, forms.nested(forms.random_model(LABELS)), format="orbax")
    report = inspection.inspect(tmp_path)
    assert (report["labels"], report["pooling"]) == (["ham", "spam"], "last")
    counts = report["parameters"]
    assert counts["agree"]
    assert counts["counted"] == LABELS.n_params == CONFIG.n_params + 2 * CONFIG.n_embd
    assert counts["parts"][-1]["part"] == "score"
    assert counts["formula"].endswith("+ D·2")


def test_gpt2_convert_converts_a_classifier(tmp_path, capsys):
    gpt2_jax.save(tmp_path / "one", LABELS, forms.nested(forms.random_model(LABELS)), format="orbax")
    convert.main([str(tmp_path / "one"), str(tmp_path / "two"), "--format", "huggingface"])
    assert gpt2_jax.load_config(tmp_path / "two") == LABELS
