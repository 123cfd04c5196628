"""Forms of weights with Hugging Face's names: what transformers writes, and what people store beside a whole model."""

import dataclasses
import json
from pathlib import Path

import checkpoint_forms as forms
import numpy as np
import wild_model
from wild_model import CONFIG, Source, flat_model, hf_tensors, source
from wild_table import weights

PARITY = ("torch", "transformers")


def write(folder: Path, flat, tensors, **changes) -> None:
    """Write config.json and model.safetensors."""
    forms.write_huggingface(folder, wild_model.config_of(flat), tensors, **changes)


def masks(prefix: str) -> dict[str, np.ndarray]:
    """The causal masks that files of transformers before 4.31 hold."""
    buffers = {}
    for i in range(CONFIG.n_layer):
        buffers[f"{prefix}h.{i}.attn.bias"] = np.tri(CONFIG.n_ctx, dtype=np.uint8)[None, None]
        buffers[f"{prefix}h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return buffers


# ---- as the library writes it


def saved(name: str, kind: str, writer: str, **changes) -> None:
    """Add a row for `save_pretrained` of one of transformers' classes."""

    @weights(name, writer, transformers=True, needs=PARITY)
    def make(folder):
        wild_model.torch_model(source(), kind, **changes).save_pretrained(folder)
        return source()


saved("GPT2LMHeadModel", "GPT2LMHeadModel", "transformers 5, `GPT2LMHeadModel.save_pretrained`")
saved("GPT2Model", "GPT2Model", "transformers 5, `GPT2Model.save_pretrained`")
saved("GPT2DoubleHeadsModel", "GPT2DoubleHeadsModel", "transformers 5: `multiple_choice_head.*` is beside the model")


@weights(
    "GPT2ForSequenceClassification",
    "transformers 5: `score.weight`, which is loaded with its labels",
    transformers=True,
    needs=PARITY,
)
def classifier(folder):
    model = wild_model.torch_model(source(), "GPT2ForSequenceClassification")
    model.save_pretrained(folder)
    score = {"score/w": np.ascontiguousarray(model.score.weight.detach().numpy().T)}
    return dataclasses.replace(source(), flat=source().flat | score)


saved("GPT2ForTokenClassification", "GPT2ForTokenClassification", "transformers 5: `classifier.*` is beside it")
saved("GPT2ForQuestionAnswering", "GPT2ForQuestionAnswering", "transformers 5: `qa_outputs.*` is beside it")


@weights("sharded", "transformers 5, `save_pretrained(max_shard_size=...)`", transformers=True, needs=PARITY)
def sharded(folder):
    wild_model.torch_model(source()).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    return source()


@weights("index-lists-lm_head", "an index that lists `lm_head.weight`, which no file holds", transformers=True)
def index_lists_lm_head(folder):
    write(folder, source().flat, hf_tensors(source().flat), shards=2)
    change_index(folder, lambda where: where | {"lm_head.weight": min(where.values())})
    return source()


@weights("index-lacks-a-tensor", "an index that leaves out a tensor of its files", transformers=True)
def index_lacks_a_tensor(folder):
    write(folder, source().flat, hf_tensors(source().flat), shards=2)
    change_index(folder, lambda where: {name: file for name, file in where.items() if "h.1.ln_2" not in name})
    return source()


def change_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    forms.write_shard_index(folder, change(json.loads(path.read_text(encoding="utf-8"))["weight_map"]))


# ---- dtypes


def in_dtype(dtype: str) -> None:
    @weights(f"stored-{dtype}", f"transformers 5, a model in {dtype}", transformers=True, needs=PARITY)
    def make(folder):
        import torch

        wild_model.torch_model(source()).to(getattr(torch, dtype)).save_pretrained(folder)
        return Source(flat_model(dtype=dtype))


in_dtype("float16")
in_dtype("bfloat16")


@weights("stored-float64", "a model in float64", transformers=True, needs=PARITY, dtype="float32")
def stored_float64(folder):
    wild_model.torch_model(source()).double().save_pretrained(folder)
    return source()


def with_norms_in_float32(dtype: str) -> None:
    @weights(
        f"{dtype}-with-float32-LayerNorm",
        f"mixed precision: {dtype}, with LayerNorm in float32",
        transformers=True,
        dtype="float32",
    )
    def make(folder):
        half, full = flat_model(dtype=dtype), flat_model()
        flat = {name: full[name] if "ln_" in name else half[name] for name in full}
        write(folder, flat, hf_tensors(flat))
        return Source({name: array.astype(np.float32) for name, array in flat.items()})


with_norms_in_float32("float16")
with_norms_in_float32("bfloat16")


# ---- old files, and tensors beside a whole model


def beside(name: str, writer: str, extra, prefix: str = "transformer.", transformers: bool = True) -> None:
    """Add a row for a whole model with extra tensors."""

    @weights(name, writer, transformers=transformers)
    def make(folder):
        write(folder, source().flat, hf_tensors(source().flat, prefix) | extra)
        return source()


HEAD = {"lm_head.weight": flat_model()["wte"]}
VALUES = {"v_head.summary.weight": np.ones((1, CONFIG.n_embd), np.float32), "v_head.summary.bias": np.ones(1, "f4")}
beside("hub-gpt2", "the hub's `openai-community/gpt2`: names without `transformer.`, masks stored", masks(""), "")
beside("masks", "transformers before 4.31 (huggingface/transformers#24581)", masks("transformer.") | HEAD)
beside("tied-head-stored", "a state dict that holds `lm_head.weight` too", HEAD)
beside("value-head", "trl, `AutoModelForCausalLMWithValueHead` (huggingface/trl#86)", VALUES)
beside(
    "position_ids",
    "wrappers that store `position_ids`",
    {"transformer.position_ids": np.arange(CONFIG.n_ctx)[None]},
)
beside(
    "zero-size-tensors",
    "Megatron and Transformer Engine: `_extra_state` of no elements",
    {f"transformer.h.{i}.attn._extra_state": np.zeros(0, np.uint8) for i in range(CONFIG.n_layer)},
)


@weights("head-without-wte", "`safetensors.torch.save_model`: one name for the tied array", transformers=True)
def head_without_wte(folder):
    tensors = hf_tensors(source().flat)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    write(folder, source().flat, tensors)
    return source()


# ---- prefixes of wrappers


def prefixed(name: str, writer: str, prefix: str, transformers: bool = False, head: bool = True) -> None:
    @weights(name, writer, transformers=transformers)
    def make(folder):
        tensors = hf_tensors(source().flat) | (HEAD if head else {})
        write(folder, source().flat, {prefix + key: array for key, array in tensors.items()})
        return source()


prefixed("DDP", "PyTorch's DistributedDataParallel: `module.`", "module.")
prefixed("torch-compile", "`torch.compile`: `_orig_mod.` (huggingface/transformers#28041)", "_orig_mod.")
prefixed("DDP-torch-compile", "both: `module._orig_mod.`", "module._orig_mod.")
prefixed("torch-compile-DDP", "both, the other way round: `_orig_mod.module.`", "_orig_mod.module.")
prefixed("peft-merged", "the state dict of a merged peft model: `base_model.model.`", "base_model.model.")
prefixed("model-in-a-module", "Lightning and other wrappers: `model.` (huggingface/transformers#4356)", "model.")
prefixed("transformer-twice", "`transformer.transformer.` (vllm-project/vllm#271)", "transformer.", True, head=False)
prefixed("trl-wrapper", "trl's value-head wrapper: `pretrained_model.` (huggingface/trl#3071)", "pretrained_model.")
prefixed("opacus", "Opacus: `_module.module.` (microsoft/dp-transformers#33)", "_module.module.")
