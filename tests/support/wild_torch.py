"""Forms of other PyTorch code and of C: nanoGPT, the books, llm.c, and pickles."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import wild_model
from checkpoint_forms import write_shard_index
from wild_model import CONFIG, Source, flat_model, hf_tensors, source
from wild_table import weights

TORCH = ("torch",)
DENSE = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
NANOGPT = {"block_size": CONFIG.n_ctx, "n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head, "n_embd": CONFIG.n_embd}
BOOK = {"context_length": CONFIG.n_ctx, "emb_dim": CONFIG.n_embd, "n_heads": CONFIG.n_head, "n_layers": CONFIG.n_layer}


def linear(tensors) -> dict[str, np.ndarray]:
    """The same tensors with nn.Linear's orientation, (out, in)."""
    return {name: np.ascontiguousarray(a.T) if name.endswith(DENSE) else a for name, a in tensors.items()}


def without_biases(tensors) -> dict[str, np.ndarray]:
    return {name: array for name, array in tensors.items() if not name.endswith(".bias")}


# ---- nanoGPT (karpathy/nanoGPT): nn.Linear, the exact GELU, `bias=False` without any bias


def nanogpt(name: str, writer: str, bias: bool = True, prefix: str = "", n_vocab: int = CONFIG.n_vocab) -> None:
    @weights(name, writer, transformers=False)
    def make(folder):
        flat = flat_model(n_vocab, biases=bias)
        tensors = linear(hf_tensors(flat))
        tensors = (tensors if bias else without_biases(tensors)) | {"lm_head.weight": flat["wte"]}
        safetensors.numpy.save_file({prefix + key: a for key, a in tensors.items()}, folder / "model.safetensors")
        fields = NANOGPT | {"vocab_size": n_vocab, "dropout": 0.0, "bias": bias}
        (folder / "config.json").write_text(json.dumps(fields))
        return Source(flat, activation="gelu")


nanogpt("nanogpt", "nanoGPT's state dict as safetensors, with its `model_args` as config.json")
nanogpt("nanogpt-without-biases", "nanoGPT, `bias=False`", bias=False)
nanogpt("nanogpt-compiled", "nanoGPT, a compiled model: `_orig_mod.`, rows padded to 1,344", True, "_orig_mod.", 1344)


@weights("nanogpt-with-Hugging-Face-config", "nanoGPT's state dict beside a GPT-2 config.json", transformers=False)
def nanogpt_with_config(folder):
    tensors = linear(hf_tensors(source().flat)) | {"lm_head.weight": source().flat["wte"]}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(wild_model.hf_fields(source().flat, activation_function="gelu")))
    return Source(source().flat, activation="gelu")


@weights(
    "build-nanogpt",
    "build-nanogpt: GPT-2's GELU in words of `model_args`, as safetensors",
    transformers=False,
)
def build_nanogpt(folder):
    tensors = linear(hf_tensors(source().flat)) | {"lm_head.weight": source().flat["wte"]}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    fields = NANOGPT | {"vocab_size": CONFIG.n_vocab, "activation_function": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(fields))
    return source()


@weights("minGPT", "minGPT: masks stored, a head of its own, `gelu_new` in words of `model_args`", transformers=False)
def mingpt(folder):
    head = wild_model.another_head()
    tensors = linear(hf_tensors(source().flat)) | {"lm_head.weight": head}
    for i in range(CONFIG.n_layer):
        mask = np.tri(CONFIG.n_ctx, dtype=np.float32)[None, None]
        tensors[f"transformer.h.{i}.attn.bias"] = mask
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    fields = NANOGPT | {"vocab_size": CONFIG.n_vocab, "activation_function": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(fields))
    return source(head=head)


@weights("mlx-lm", "mlx-lm, `mlx_lm.convert`: `model.`, (out, in), an index of one file", transformers=False)
def mlx_lm(folder):
    flat = flat_model(dtype="bfloat16")
    tensors = linear(hf_tensors(flat, "model."))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    write_shard_index(folder, dict.fromkeys(tensors, "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(wild_model.hf_fields(flat)))
    return Source(flat)


# ---- the books (rasbt/LLMs-from-scratch): separate query, key and value, a head of its own


def book_tensors(flat, head, qkv_bias: bool = True) -> dict[str, np.ndarray]:
    """The names of GPTModel in "Build a Large Language Model (From Scratch)"."""
    tensors = {"tok_emb.weight": flat["wte"], "pos_emb.weight": flat["wpe"], "out_head.weight": head}
    tensors |= {"final_norm.scale": flat["ln_f/g"], "final_norm.shift": flat["ln_f/b"]}
    for i in range(CONFIG.n_layer):
        block = f"trf_blocks.{i}"
        for j, part in enumerate(("query", "key", "value")):
            columns = slice(j * CONFIG.n_embd, (j + 1) * CONFIG.n_embd)
            tensors[f"{block}.att.W_{part}.weight"] = flat[f"h{i}/attn/c_attn/w"][:, columns].T
            if qkv_bias:
                tensors[f"{block}.att.W_{part}.bias"] = flat[f"h{i}/attn/c_attn/b"][columns]
        tensors[f"{block}.att.mask"] = np.triu(np.ones((CONFIG.n_ctx, CONFIG.n_ctx), np.float32), 1)
        dense = {"att.out_proj": "attn/c_proj", "ff.layers.0": "mlp/c_fc", "ff.layers.2": "mlp/c_proj"}
        for theirs, ours in dense.items():
            tensors[f"{block}.{theirs}.weight"] = flat[f"h{i}/{ours}/w"].T
            tensors[f"{block}.{theirs}.bias"] = flat[f"h{i}/{ours}/b"]
        for theirs, ours in {"norm1": "ln_1", "norm2": "ln_2"}.items():
            tensors[f"{block}.{theirs}.scale"] = flat[f"h{i}/{ours}/g"]
            tensors[f"{block}.{theirs}.shift"] = flat[f"h{i}/{ours}/b"]
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def book(name: str, writer: str, qkv_bias: bool = True, tied: bool = True) -> None:
    @weights(name, writer, transformers=False)
    def make(folder):
        flat = dict(flat_model())
        for name in flat if not qkv_bias else ():
            if name.endswith("c_attn/b"):
                flat[name] = np.zeros_like(flat[name])
        head = None if tied else wild_model.another_head()
        tensors = book_tensors(flat, flat["wte"] if tied else head, qkv_bias)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        fields = BOOK | {"vocab_size": CONFIG.n_vocab, "drop_rate": 0.1, "qkv_bias": qkv_bias}
        (folder / "config.json").write_text(json.dumps(fields))
        return Source(flat, head=head)


book("book", "the book's GPTModel as safetensors (rasbt/LLMs-from-scratch), with the book's config")
book("book-trained", "the book's GPTModel trained from scratch: a head of its own", tied=False)
book("book-without-qkv-bias", "the book's GPTModel, `qkv_bias=False`", qkv_bias=False, tied=False)


# ---- llm.c (karpathy/llm.c): a header of 256 int32, then the tensors, (out, in), rows padded


def llm_c(name: str, dtype: str, version: int, file: str, path: str) -> None:
    @weights(name, f"llm.c, `{file}` in {dtype}, padded rows", transformers=False, path=path)
    def make(folder):
        flat, n_rows = flat_model(dtype=dtype), 1408  # the next multiple of 128
        header = np.zeros(256, "<i4")
        header[:8] = (
            20240326,
            version,
            CONFIG.n_ctx,
            CONFIG.n_vocab,
            CONFIG.n_layer,
            CONFIG.n_head,
            CONFIG.n_embd,
            n_rows,
        )
        padded = np.pad(flat["wte"], ((0, n_rows - CONFIG.n_vocab), (0, 0)))
        order = ["ln_1/g", "ln_1/b", "attn/c_attn/w", "attn/c_attn/b", "attn/c_proj/w", "attn/c_proj/b"]
        order += ["ln_2/g", "ln_2/b", "mlp/c_fc/w", "mlp/c_fc/b", "mlp/c_proj/w", "mlp/c_proj/b"]
        arrays = [padded, flat["wpe"], *(flat[f"h{i}/{leaf}"].T for leaf in order for i in range(CONFIG.n_layer))]
        arrays += [flat["ln_f/g"], flat["ln_f/b"]]
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        (folder / file).write_bytes(header.tobytes() + data)
        return Source(flat, n_ids=CONFIG.n_vocab)


llm_c("llm.c", "float32", 3, "gpt2_124M.bin", "gpt2_124M.bin")
llm_c("llm.c-bfloat16", "bfloat16", 5, "gpt2_124M_bf16.bin", "gpt2_124M_bf16.bin")
llm_c("llm.c-folder", "float32", 3, "model_00001000.bin", "")


# ---- pickles, and files of other programs: refused, and the message says what to do


def pickled(name: str, writer: str, file: str, content, transformers: bool = False, config: bool = False) -> None:
    @weights(name, writer, transformers=transformers, needs=TORCH, refused="pickle.*python3? -c", names=f"`{file}`")
    def make(folder):
        import torch

        state = {name: torch.tensor(array) for name, array in content().items()}
        torch.save(NESTED.get(name, lambda state: state)(state), folder / file)
        if config:
            (folder / "config.json").write_text(json.dumps(wild_model.hf_fields(source().flat)))


NESTED = {
    "nanogpt-ckpt.pt": lambda state: {"model": state, "optimizer": {}, "model_args": NANOGPT, "iter_num": 7},
    "book-checkpoint.pth": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
    "lightning": lambda state: {"state_dict": state, "epoch": 1, "pytorch-lightning_version": "2.4.0"},
}


def linear_tensors():
    return linear(hf_tensors(flat_model()))


def tensors_of_book():
    return book_tensors(flat_model(), flat_model()["wte"])


def plain_tensors():
    return hf_tensors(flat_model())


pickled("pytorch_model.bin", "transformers before 4.35", "pytorch_model.bin", plain_tensors, True, config=True)
pickled("nanogpt-ckpt.pt", "nanoGPT", "ckpt.pt", linear_tensors)
pickled("book-model.pth", "the book, a state dict", "model.pth", tensors_of_book)
pickled("book-checkpoint.pth", "the book, with the optimizer", "model_and_optimizer.pth", tensors_of_book)
pickled("lightning", "PyTorch Lightning", "epoch=1.ckpt", lambda: {f"model.{k}": a for k, a in plain_tensors().items()})


def another_program(name: str, writer: str, file: str, content: bytes) -> None:
    @weights(name, writer, transformers=False, refused=file.replace(".", r"\."), names=f"`{file}`")
    def make(folder):
        (folder / "config.json").write_text(json.dumps(wild_model.hf_fields(source().flat)))
        (folder / file).write_bytes(content)


another_program("gguf", "llama.cpp", "gpt2-q8_0.gguf", b"GGUF" + bytes(60))
another_program("onnx", "Optimum", "model.onnx", bytes(64))


@weights(
    "shards-without-index",
    "a download that lacks model.safetensors.index.json",
    transformers=False,
    refused=r"model\.safetensors\.index\.json",
    names="`model.safetensors.index.json`",
)
def shards_without_index(folder: Path):
    from wild_weights import write

    write(folder, source().flat, hf_tensors(source().flat), shards=2)
    (folder / "model.safetensors.index.json").unlink()
