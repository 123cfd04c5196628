"""Forms that TensorFlow 1 code leaves: OpenAI's release, gpt-2-simple, forks, and the optimizer's slots."""

import json
from pathlib import Path

import checkpoint_forms as forms
import numpy as np
import wild_model
from wild_model import CONFIG, Source, flat_model, source
from wild_table import weights

NEEDS = ("tensorflow",)


def slots(flat) -> dict[str, np.ndarray]:
    """What TensorFlow's Adam adds to a checkpoint."""
    variables = forms.variables_of(flat)
    found = {f"{name}/Adam{which}": np.zeros_like(array) for name, array in variables.items() for which in ("", "_1")}
    return found | {"beta1_power": np.float32(0.9), "beta2_power": np.float32(0.999), "global_step": np.int64(1000)}


def write(folder: Path, flat, prefix: str, extra=None, **hparams) -> None:
    """Write a checkpoint, the pointer to it and hparams.json."""
    forms.write_variables(folder / prefix, forms.variables_of(flat) | (extra or {}))
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{prefix}"\n', encoding="utf-8")
    (folder / "hparams.json").write_text(json.dumps(wild_model.config_of(flat).to_hparams() | hparams))


@weights("openai-release", "OpenAI's release, `model.ckpt`", transformers=False, needs=NEEDS)
def openai_release(folder):
    write(folder, source().flat, "model.ckpt")
    return source()


@weights("gpt-2-simple", "gpt-2-simple: `checkpoint/run1`, with its `counter`", transformers=False, needs=NEEDS)
def gpt_2_simple(folder):
    write(folder, source().flat, "model-1000")
    (folder / "counter").write_text("1000\n")
    (folder / "events.out.tfevents.1600000000.host").write_bytes(b"\0")
    return source()


@weights(
    "one-of-several",
    "gpt-2-simple, one of several steps by name (minimaxir/gpt-2-simple#217)",
    transformers=False,
    needs=NEEDS,
    path="model-1000",
)
def one_of_several(folder):
    write(folder, source().flat, "model-1000")
    write(folder, {name: array + 1 for name, array in source().flat.items()}, "model-2000")
    return source()


@weights(
    "Adam-slots",
    "training code that saves all variables: `Adam`, `global_step` (huggingface/transformers#16, #6467)",
    transformers=False,
    needs=NEEDS,
)
def adam_slots(folder):
    write(folder, source().flat, "model-1000", slots(source().flat))
    return source()


@weights("hparams-of-forks", "forks whose hparams.json also has dropout rates", transformers=False, needs=NEEDS)
def hparams_of_forks(folder):
    write(folder, source().flat, "model-7", res_dropout=0.1, attn_dropout=0.1)
    return source()


@weights("tensorflow-V1", "TensorFlow 1's Saver in format V1: one file", transformers=False, needs=NEEDS)
def tensorflow_v1(folder):
    tf = forms.import_tensorflow()
    names, arrays = zip(*forms.variables_of(source().flat).items(), strict=True)
    with tf.device("CPU"):
        tf.raw_ops.Save(filename=str(folder / "model.ckpt"), tensor_names=names, data=arrays)
    (folder / "model.ckpt.meta").write_bytes(b"\n")
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n', encoding="utf-8")
    (folder / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    return source()


@weights("tensorflow-bfloat16", "a TensorFlow checkpoint in bfloat16", transformers=False, needs=NEEDS)
def tensorflow_bfloat16(folder):
    write(folder, flat_model(dtype="bfloat16"), "model.ckpt")
    return Source(flat_model(dtype="bfloat16"))


@weights("several-data-files", "TensorFlow's sharded saver: two data files", transformers=False, needs=NEEDS)
def several_data_files(folder):
    tf = forms.import_tensorflow()
    variables = list(forms.variables_of(source().flat).items())
    write(folder, source().flat, "model.ckpt")
    for path in [*folder.glob("model.ckpt.data*"), folder / "model.ckpt.index"]:
        path.unlink()
    parts = [str(folder / f"part-{i}") for i in range(2)]
    for i, part in enumerate(parts):
        forms.write_variables(Path(part), dict(variables[i::2]))
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(folder / "model.ckpt"))
    assert len(list(folder.glob("model.ckpt.data*"))) == 2
    return source()


@weights(
    "tf_model.h5",
    "transformers 4, `TFGPT2LMHeadModel.save_pretrained`",
    transformers=False,
    refused=r"tf_model\.h5",
    names="`tf_model.h5`",
)
def tf_model_h5(folder):
    (folder / "config.json").write_text(json.dumps(wild_model.hf_fields(source().flat)))
    (folder / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
