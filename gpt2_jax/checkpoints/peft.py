"""Folders of PEFT with a LoRA adapter: adapter_config.json and adapter_model.safetensors.

PEFT names modules as Hugging Face does, behind "base_model.model.". A pair of a linear layer is lora_A (rank, in) and
lora_B (out, rank), and that of an embedding lora_embedding_A (rank, rows) and lora_embedding_B (n_embd, rank). Whole
modules that were trained themselves ("modules_to_save") have their usual names.

Here, a is (in, rank) and b is (rank, out). lm_head is (n_vocab, n_embd): its b is lora_A, and its a is lora_B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import safetensors
from gpt2_jax.checkpoints.adapter import SCORE, TABLE, Adapter
from gpt2_jax.checkpoints.integrity import Leaves
from gpt2_jax.checkpoints.vocabulary_files import write_json
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import read_json
from gpt2_jax.lora import OUTPUT_HEAD

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUGGING_FACE_SIZES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
PREFIX = "base_model.model."
EMBEDDINGS = (TABLE, "wpe")
PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
REFUSED = {  # fields of adapter_config.json, and the values that mean what this module computes
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "ensure_weight_tying": (False, None),
    **dict.fromkeys(("layer_replication", "target_parameters", "trainable_token_indices"), (None, [], {})),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"), (None,)),
    # The other methods change the weights of the base model before training.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter in files that are read."""
    return (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()


def read_fields(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
      ValueError: it is malformed, or asks for something else than plain LoRA. The message names the field.
    """
    path = directory / CONFIG
    fields = read_json(path)
    if not isinstance(fields, dict) or "peft_type" not in fields:
        raise ValueError(f"{path} is malformed: it names no peft_type")
    for name, allowed in REFUSED.items():
        if name in fields and not any(fields[name] == value for value in allowed):
            raise ValueError(
                f"{path} has {name} = {fields[name]!r}, and only plain LoRA can be read: merge the adapter with peft's "
                "model.merge_and_unload(), and save the result with save_pretrained"
            )
    return fields


def base_name(directory: Path) -> str:
    """Return the name of the base model.

    Raises:
      ValueError: the adapter does not name it.
    """
    fields = read_fields(directory)
    if not fields.get("base_model_name_or_path"):
        raise ValueError(f"{directory / CONFIG} does not name the base model: set base_model_name_or_path in it")
    revision = fields.get("revision")
    return fields["base_model_name_or_path"] + (f"@{revision}" if revision else "")


def read(
    directory: Path, dtype: np.dtype | None, open_model: Callable[[str, np.dtype | None], tuple[GPT2Config, Leaves]]
) -> tuple[GPT2Config, Leaves]:
    """Read the base model of an adapter onto the host, with the adapter merged.

    Args:
      directory: the folder.
      dtype: the dtype into which the caller casts the params; None keeps that of the base model.
      open_model: opens the base model by its name.

    Raises:
      FileNotFoundError, ValueError, OSError: as `read_adapter`; or the base model cannot be opened.
    """
    adapter, name = read_adapter(directory), base_name(directory)
    try:
        config, leaves = open_model(name, dtype)
    except FileNotFoundError as error:
        where = f"{directory / CONFIG} names the base model {name!r} (base_model_name_or_path)"
        raise FileNotFoundError(f"{where}: {error}") from error
    return adapter.merged(config, leaves)


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter. Its arrays are on the host, in their stored dtype.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is malformed, or the adapter is not plain LoRA for GPT-2.
    """
    fields = read_fields(directory)
    stored, _ = safetensors.read_header(directory / WEIGHTS)
    if wrong := [name for name, tensor in stored.items() if not isinstance(tensor.dtype, np.dtype)]:
        raise ValueError(f"{directory / WEIGHTS} holds {stored[wrong[0]].dtype.name}: tensors must be floats")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    own = {}
    for key, array in safetensors.read(stored, None):
        name, side = _meaning(key, directory / WEIGHTS)
        if side:
            pairs.setdefault(name, {})[side] = array if name == OUTPUT_HEAD else array.T
        elif name:
            own[name] = array.T if name == SCORE else array
    for name, pair in pairs.items():
        if set(pair) != {"a", "b"} or pair["a"].shape[1] != pair["b"].shape[0]:
            raise ValueError(f"{directory / WEIGHTS} holds no complete pair for {name}")
    return Adapter(
        pairs={name: pairs[name] for name in sorted(pairs)},
        alpha={name: _alpha(name, pair["a"].shape[1], fields) for name, pair in pairs.items()},
        own=own,
        base=fields.get("base_model_name_or_path") or "",
        dropout=float(fields.get("lora_dropout") or 0),
    )


def _meaning(key: str, path: Path) -> tuple[str, str]:
    """Return our name of a tensor, and its side "a" or "b" in a pair. Two empty strings mean a copy of the base."""
    name = re.sub(r"\.(modules_to_save)(\.default)?(?=\.)", "", key.removeprefix(PREFIX))
    if ".base_layer." in name or ".original_module." in name:
        return "", ""
    pair = PAIR.fullmatch(name)
    module, _, leaf = name.rpartition(".") if pair is None else (pair["module"], "", "weight")
    ours = _param(module, leaf)
    if ours is None or (pair is not None and bool(pair["embedding"]) != (ours in EMBEDDINGS)):
        raise ValueError(f"{path} holds {key}, which is not of a LoRA adapter for GPT-2")
    if pair is None:
        return ours, ""
    return ours, {"A": "a", "B": "b"}[pair["side"]] if ours != OUTPUT_HEAD else {"A": "b", "B": "a"}[pair["side"]]


def _param(module: str, leaf: str) -> str | None:
    """Return our name of "weight" or "bias" of a module of Hugging Face; None if GPT-2 has none of that name."""
    module = module.removeprefix("transformer.")
    if module in (*EMBEDDINGS, OUTPUT_HEAD):
        return module if leaf == "weight" else None
    if not re.fullmatch(r"score|ln_f|h\.\d+\.(ln_[12]|attn\.c_(attn|proj)|mlp\.c_(fc|proj))", module):
        return None
    last = {"weight": "g" if re.search(r"ln_\w$", module) else "w", "bias": "b"}.get(leaf)
    return None if last is None else f"{re.sub(r'^h.', 'h', module).replace('.', '/')}/{last}"


def module_of(name: str) -> str:
    """Return Hugging Face's name of the module of a parameter: "transformer.h.0.attn.c_attn" of "h0/attn/c_attn/w"."""
    if name in (*EMBEDDINGS, OUTPUT_HEAD):
        return name if name == OUTPUT_HEAD else f"transformer.{name}"
    module = re.sub(r"^h(\d+)/", r"h/\1/", name.rpartition("/")[0]).replace("/", ".")
    return module if name == SCORE else f"transformer.{module}"


def _alpha(name: str, rank: int, fields: Mapping[str, Any]) -> float:
    """Return the alpha for which alpha / rank is the scale of a pair in PEFT."""
    patterns, module = fields.get("alpha_pattern") or {}, module_of(name)
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = float(next(found, fields.get("lora_alpha", 8)))
    return alpha * math.sqrt(rank) if fields.get("use_rslora") else alpha


def write(directory: Path, config: GPT2Config, adapter: Adapter) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an empty directory.

    Raises:
      ValueError: PEFT's files cannot hold the adapter.
    """
    whole = _check_writable(config, adapter)
    ranks = {module_of(name): pair["a"].shape[1] for name, pair in adapter.pairs.items()}
    alphas = {module_of(name): adapter.alpha[name] for name in adapter.pairs}
    rank, alpha = (max(set(of.values()), key=[*of.values()].count) for of in (ranks, alphas))
    tensors: dict[str, np.ndarray] = {}
    for name, pair in adapter.pairs.items():
        a, b = (np.asarray(pair[side]) for side in ("ba" if name == OUTPUT_HEAD else "ab"))
        kind, end = ("embedding_", "") if name in EMBEDDINGS else ("", ".weight")
        for side, array in (("A", a), ("B", b)):
            tensors[f"{PREFIX}{module_of(name)}.lora_{kind}{side}{end}"] = array if name == OUTPUT_HEAD else array.T
    for name, leaf in adapter.own.items():
        last = "bias" if name.endswith("/b") else "weight"
        tensors[f"{PREFIX}{module_of(name)}.{last}"] = np.asarray(leaf).T if name == SCORE else np.asarray(leaf)
    with safetensors.writing(directory / WEIGHTS, tensors, lambda _: {"format": "pt"}) as add:
        for key, array in tensors.items():
            add(key, array)
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.labels else "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": [*ranks],
        "rank_pattern": {module: one for module, one in ranks.items() if one != rank},
        "alpha_pattern": {module: one for module, one in alphas.items() if one != alpha},
        "modules_to_save": whole or None,
        "fan_in_fan_out": True,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    write_json(directory / CONFIG, fields)


def _check_writable(config: GPT2Config, adapter: Adapter) -> list[str]:
    """Return the modules that are stored as a whole."""
    if config.tie_word_embeddings and TABLE in {*adapter.pairs, *adapter.own}:
        raise ValueError("PEFT changes wte and the output head apart, but they are tied here: convert the merged model")
    modules: dict[str, set[str]] = {}
    for name in adapter.own:
        modules.setdefault(module_of(name), set()).add(name.rpartition("/")[2])
    paired = {module_of(name) for name in adapter.pairs}
    for module, leaves in modules.items():
        last = module.rpartition(".")[2]
        needed = {"g", "b"} if last.startswith("ln_") else {"w", "b"} if last.startswith("c_") else leaves
        if module in paired or leaves != needed:
            raise ValueError(f"PEFT trains whole modules or their pairs, but here only a part of {module} was trained")
    return list(modules)
