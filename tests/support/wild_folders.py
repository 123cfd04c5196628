"""Whole folders: weights and a vocabulary together, whose numbers of rows and ids differ or not."""

import json
from pathlib import Path

import checkpoint_forms as forms
import safetensors.numpy
import vocabularies
import wild_jax
import wild_model
import wild_tensorflow
import wild_weights
from wild_model import CONFIG, Source, flat_model, hf_tensors, source
from wild_table import both
from wild_torch import NANOGPT, linear
from wild_vocabularies import EOT, byte_level, embedded_files, gpt2_tokenizer

import gpt2_jax

NEEDS = ("torch", "transformers")
REAL = 50257


def write(folder: Path, n_rows: int, **fields) -> Source:
    """Write weights with as many rows, and return what was written."""
    flat = flat_model(n_rows)
    wild_weights.write(folder, flat, hf_tensors(flat), **fields)
    return Source(flat)


def real_files(folder: Path) -> None:
    """Copy GPT-2's own vocabulary under Hugging Face's names."""
    forms.copy_vocabulary(vocabularies.real_vocabulary_dir(), folder, ("vocab.json", "merges.txt"))


@both("OpenAI", "OpenAI's release as it was downloaded", transformers=False, needs=("tensorflow",))
def openai(folder):
    wild_tensorflow.write(folder, flat_model(REAL), "model.ckpt")
    forms.copy_vocabulary(vocabularies.real_vocabulary_dir(), folder)
    theirs = folder.with_name(f"{folder.name}-vocabulary")
    theirs.mkdir()
    real_files(theirs)
    (theirs / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return Source(flat_model(REAL), vocabulary=theirs)


@both("hub-folder", "the hub's `openai-community/gpt2`, with its files for other programs", transformers=True)
def hub_folder(folder):
    real_files(folder)
    forms.write_tokenizer_json(folder / "tokenizer.json", vocabularies.real_vocabulary_dir())
    flat = flat_model(REAL)
    wild_weights.write(folder, flat, hf_tensors(flat, "") | wild_weights.masks(""))
    for name in ("pytorch_model.bin", "tf_model.h5", "rust_model.ot", "64.tflite", "README.md"):
        (folder / name).write_bytes(b"the same model for another program")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "decoder_model.onnx").write_bytes(b"")
    (folder / "generation_config.json").write_text('{"bos_token_id": 50256, "eos_token_id": 50256}')
    wild_jax.write_msgpack(folder, flat, {"transformer": wild_jax.flax_tree(flat)})
    return Source(flat)


@both(
    "Trainer", "transformers 5, a checkpoint of a Trainer: `optimizer.pt` is beside it", transformers=True, needs=NEEDS
)
def trainer(folder):
    gpt2_tokenizer().save_pretrained(folder)
    wild_model.torch_model(source()).save_pretrained(folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"PK\x03\x04")  # pickles that are no model
    (folder / "trainer_state.json").write_text("{}")
    return source()


@both("DialoGPT", "DialoGPT's layout: vocab.json, merges.txt, masks and the head stored", transformers=True)
def dialogpt(folder):
    embedded_files(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    tensors = hf_tensors(source().flat) | wild_weights.masks("transformer.") | wild_weights.HEAD
    wild_weights.write(folder, source().flat, tensors)
    return source()


@both("50304-rows", "nanoGPT, build-nanogpt and Megatron: 50,304 rows and 50,257 ids", transformers=True)
def padded_rows(folder):
    real_files(folder)
    return write(folder, 50304)


@both("pad_to_multiple_of", "`resize_token_embeddings(pad_to_multiple_of=64)`", transformers=True, needs=NEEDS)
def pad_to_multiple_of(folder):
    gpt2_tokenizer().save_pretrained(folder)
    return write(folder, 1344)


@both(
    "PAD-not-resized",
    "`[PAD]` added, rows not resized (huggingface/transformers#29899)",
    transformers=True,
    needs=NEEDS,
)
def pad_not_resized(folder):
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return write(folder, 1281)


@both("PAD-resized", "`[PAD]` added, rows resized", transformers=True, needs=NEEDS)
def pad_resized(folder):
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return write(folder, 1282)


@both("CodeParrot-folder", "CodeParrot: `<|endoftext|>` first, both attention fields", transformers=True)
def codeparrot(folder):
    tokenizer = byte_level([EOT])
    tokenizer.save_model(str(folder))
    fields = {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    flat = flat_model(tokenizer.get_vocab_size())
    wild_weights.write(folder, flat, hf_tensors(flat), **fields, **ids)
    return Source(flat, by_layer=True)


@both("no-endoftext-folder", "a model whose vocabulary has no `<|endoftext|>`", transformers=True)
def no_endoftext(folder):
    tokenizer = byte_level([])
    tokenizer.save(str(folder / "tokenizer.json"))
    return write(folder, tokenizer.get_vocab_size(), bos_token_id=None, eos_token_id=None)


@both("nanogpt-folder", "nanoGPT's weights with GPT-2's vocabulary beside them", transformers=False)
def nanogpt_folder(folder):
    flat = flat_model()
    safetensors.numpy.save_file(linear(hf_tensors(flat)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(NANOGPT | {"vocab_size": CONFIG.n_vocab, "bias": True}))
    forms.copy_vocabulary(gpt2_jax.embedded_model(), folder)
    theirs = folder.with_name(f"{folder.name}-vocabulary")
    theirs.mkdir()
    embedded_files(theirs)
    (theirs / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return Source(flat, activation="gelu", vocabulary=theirs)
