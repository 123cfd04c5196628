"""`python -m gpt2_jax.evaluate.lm_eval`: the harness's own command line with our models gives the adapter's numbers."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from gpt2_jax.evaluate.harness import language_model

pytestmark = pytest.mark.parity
SPEECH = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"


@pytest.fixture(scope="module")
def library():
    reason = "needs the `parity` extra: pip install -e '.[parity]'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of imports are not about our files
        pytest.importorskip("lm_eval", reason=reason)
        import lm_eval.api.registry
    return lm_eval


def test_its_own_command_line(library, shakespeare, tokenizer, tmp_path):
    """A task in a file, a model by its name, and the table and the numbers that the harness writes."""
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": SPEECH}) + "\n")
    task = {
        "task": "speech",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "speech.yaml").write_text(json.dumps(task))
    options = ["--model", "gpt2-jax", "--model_args", "model=shakespeare,max_gen_toks=9", "--batch_size", "2"]
    options += ["--tasks", "speech", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "-m", "gpt2_jax.evaluate.lm_eval", *options],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gpt2-jax ({'model': 'shakespeare', 'max_gen_toks': 9})" in done.stdout
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text())["results"]["speech"]["bits_per_byte,none"]
    from lm_eval.api.instance import Instance

    ask = Instance("loglikelihood_rolling", doc={}, arguments=(SPEECH,), idx=0)
    (total,) = language_model(*shakespeare, tokenizer).loglikelihood_rolling([ask], disable_tqdm=True)
    expected = -total / len(SPEECH.encode()) / 0.6931471805599453
    assert found == pytest.approx(expected, rel=1e-6)  # measured: 1e-7; the programs of two processes may round apart


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ("modle=x", {}, "unknown name, 'modle'"),
        ("model=a,pretrained=b", {}, "two names"),
        ("model=shakespeare", {"batch_size": "auto"}, "batch_size .*'auto'"),
        ("model=shakespeare,dtype=int8", {}, "dtype"),
        ("model=shakespeare,seed=-1", {}, "seed"),
    ],
)
def test_wrong_arguments(library, arguments, more, message):
    from gpt2_jax.evaluate import lm_eval as ours

    ours.register()
    ours.register()  # twice is once
    kind = library.api.registry.get_model("gpt2-jax")
    with pytest.raises(ValueError, match=message):
        kind.create_from_arg_string(arguments, more)


def test_arguments_of_the_harness_for_torch_are_ignored(library):
    from gpt2_jax.evaluate import lm_eval as ours

    ours.register()
    kind = library.api.registry.get_model("gpt2-jax")
    model = kind.create_from_arg_obj(
        {"pretrained": "shakespeare", "dtype": "bfloat16"}, {"device": "cpu", "batch_size": "3", "max_batch_size": None}
    )
    assert (model.batch_size, model.config.compute_dtype.name, model.config.param_dtype.name) == (3, *["bfloat16"] * 2)
