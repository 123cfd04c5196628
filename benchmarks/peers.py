"""The libraries that benchmarks/decode.py times, each in its own process.

Every loader returns greedy(prompts_BP, n_new). It returns the new ids when they are on the host, so a measured time
includes the wait for the device. No row stops early. A library is imported only in the process that needs it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from turns import forget_peak, save_weights

Greedy = Callable[[np.ndarray, int], list[list[int]]]


def prepare(source: str, random: bool, folder: Path, with_ctranslate2: bool) -> dict[str, int]:
    """Write the same float32 weights in the format of every library, and return the model's hparams.

    In `folder`, hf is Hugging Face's format, and ct2 is CTranslate2's, if requested. Runs on the CPU.
    """
    config, params = save_weights(source, random, folder)
    if with_ctranslate2:
        save_ctranslate2(folder / "ct2", config, params)
    return config.to_hparams()


def save_ctranslate2(folder: Path, config: object, params: dict) -> None:
    """Write params in CTranslate2's format. It needs a vocabulary: the token with id 7 is called "7"."""
    import ctranslate2

    def norm(spec: object, part: dict) -> None:
        spec.gamma, spec.beta = np.array(part["g"]), np.array(part["b"])

    def linear(spec: object, part: dict) -> None:
        spec.weight, spec.bias = np.array(part["w"]).T.copy(), np.array(part["b"])  # (out, in)

    spec = ctranslate2.specs.TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, pre_norm=True, activation=ctranslate2.specs.Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = np.array(params["wte"])
    decoder.position_encodings.encodings = np.array(params["wpe"])
    norm(decoder.layer_norm, params["ln_f"])
    for i, layer in enumerate(decoder.layer):
        block = params[f"h{i}"]
        norm(layer.self_attention.layer_norm, block["ln_1"])
        linear(layer.self_attention.linear[0], block["attn"]["c_attn"])
        linear(layer.self_attention.linear[1], block["attn"]["c_proj"])
        norm(layer.ffn.layer_norm, block["ln_2"])
        linear(layer.ffn.linear_0, block["mlp"]["c_fc"])
        linear(layer.ffn.linear_1, block["mlp"]["c_proj"])
    spec.register_vocabulary([str(i) for i in range(config.n_vocab)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization=None)
    folder.mkdir()
    spec.save(str(folder))


def load_ours(folder: Path, dtype: str, where: str) -> Greedy:
    """Load this library; JAX finds the device by itself."""
    import gpt2_jax

    config, params = gpt2_jax.load(folder / "hf", dtype=dtype)
    config = config.replace(compute_dtype=dtype)
    return lambda prompts_BP, n_new: gpt2_jax.generate(config, params, prompts_BP, n_new, temperature=0)


def load_torch(folder: Path, dtype: str, where: str, compiled: bool = False) -> Greedy:
    """Load Hugging Face torch; `compiled` uses its static cache, with which `generate` compiles the decode step."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if where == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32, the default in JAX
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf", dtype=getattr(torch, dtype)).eval()
    model.to("cuda" if where == "gpu" else "cpu")
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "pad_token_id": 0}
    if compiled and where != "gpu":  # on a GPU it compiles by default
        options["compile_config"] = transformers.CompileConfig()
        options["compile_config"]._compile_all_devices = True
    caches = []

    def greedy(prompts_BP: np.ndarray, n_new: int) -> list[list[int]]:
        prompts_BP = torch.from_numpy(prompts_BP).to(model.device)
        if compiled and not caches:  # one for all calls, as compiled code reads it; the first call is longest
            caches.append(transformers.StaticCache(config=model.config, max_cache_len=prompts_BP.shape[1] + n_new))
        for cache in caches:
            cache.reset()
            options["past_key_values"] = cache
        ids = model.generate(prompts_BP, attention_mask=torch.ones_like(prompts_BP), max_new_tokens=n_new, **options)
        return ids[:, prompts_BP.shape[1] :].tolist()

    return greedy


def load_torch_compiled(folder: Path, dtype: str, where: str) -> Greedy:
    """Load Hugging Face torch with its static cache and torch.compile."""
    return load_torch(folder, dtype, where, compiled=True)


def load_ctranslate2(folder: Path, dtype: str, where: str) -> Greedy:
    """Load CTranslate2 on all CPU cores, in float32 or with int8 weights."""
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / "ct2"), compute_type=dtype, intra_threads=len(os.sched_getaffinity(0))
    )

    def greedy(prompts_BP: np.ndarray, n_new: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[str(i) for i in row] for row in prompts_BP],
            max_length=n_new,
            end_token=[],
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return greedy


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library to time.

    Attributes:
      load: (folder, dtype, where) -> greedy.
      package: the package that must be installed.
      devices: devices on which it runs by default: "cpu", "gpu".
      dtype: the dtype of its weights; None takes that of the benchmark.
    """

    load: Callable[[Path, str, str], Greedy]
    package: str
    devices: tuple[str, ...]
    dtype: str | None = None


PEERS = {
    "ours": Peer(load_ours, "jax", ("cpu", "gpu")),
    "torch": Peer(load_torch, "transformers", ("cpu", "gpu")),
    "torch-compiled": Peer(load_torch_compiled, "transformers", ("gpu",)),
    "ct2-float32": Peer(load_ctranslate2, "ctranslate2", ("cpu",), "float32"),
    "ct2-int8": Peer(load_ctranslate2, "ctranslate2", ("cpu",), "int8"),
}


def start(name: str, folder: Path, dtype: str, where: str) -> None:
    """Load a library in a worker process, and reset the peak memory after that."""
    global greedy
    greedy = PEERS[name].load(folder, dtype, where)
    forget_peak(where)


def timed(prompts_BP: np.ndarray, n_new: int) -> tuple[float, list[list[int]]]:
    """Return the seconds of one call in a worker process, and the ids."""
    begin = time.perf_counter()
    ids = greedy(prompts_BP, n_new)
    return time.perf_counter() - begin, ids
