"""`download_and_load_gpt2`, the function of the build-an-LLM books, and the books' nesting of the arrays."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints.integrity import count_non_finite
from gpt2_jax.checkpoints.loading import read, warn_of_non_finite
from gpt2_jax.checkpoints.released import use_release
from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.files import expanded
from gpt2_jax.params import Params, unflatten
from gpt2_jax.release import download


def download_and_load_gpt2(
    model_size: str = "124M", models_dir: str | os.PathLike = "gpt2"
) -> tuple[dict[str, int], dict[str, Any]]:
    """Load a released model as the books do. It is fetched into models_dir/model_size if it is not there yet.

    Returns:
      settings, params. settings is the contents of hparams.json. params holds NumPy float32 arrays in the books'
      nesting (`to_blocks`): `params["blocks"][0]["attn"]["c_attn"]["w"]` is (n_embd, 3 * n_embd), and the final norm
      is at `params["g"]` and `params["b"]`.

    Raises:
      ValueError: the size is unknown, or the files are damaged.
      OSError: the files cannot be fetched.
    """
    size = download.size_of(model_size)
    if size is None:
        raise ValueError(f"model_size must be one of {', '.join(SIZES)}, not {model_size!r}")

    def use(directory: Path) -> tuple[GPT2Config, dict[str, Any]]:
        config, leaves = read(directory)
        return config, dict(leaves)

    config, flat = use_release(size, expanded(models_dir) / size, use)
    non_finite = {name: n for name, array in flat.items() if (n := count_non_finite(array))}
    warn_of_non_finite(non_finite, "these weights hold NaN or infinite values")
    return config.to_hparams(), to_blocks(unflatten(flat))


def to_blocks(params: Params, nested_ln_f: bool = False) -> dict[str, Any]:
    """Return the same arrays in the books' nesting: `{"wte", "wpe", "blocks": [h0, h1, ...]}` and the final norm.

    Args:
      params: params as `load` returns them.
      nested_ln_f: True puts the final norm at `["ln_f"]["g"]` and `["ln_f"]["b"]`, as in the notebook. False puts it at
        `["g"]` and `["b"]`, as in the book.

    Raises:
      ValueError: a name is missing or unknown, or the params have an untied output head, or a classifier's.
    """
    if isinstance(params, dict) and "lm_head" in params:
        raise ValueError("the books' nesting has no place for an untied output head, lm_head: the books' code uses wte")
    if isinstance(params, dict) and "score" in params:
        raise ValueError("the books' nesting has no place for a classifier's head, score: take it out of the params")
    names = _layer_names(params)
    _check_names(params, {"wte", "wpe", "ln_f", *names}, "params")
    last = {"ln_f": params["ln_f"]} if nested_ln_f else dict(params["ln_f"])
    return {"wte": params["wte"], "wpe": params["wpe"], "blocks": [params[name] for name in names], **last}


def from_blocks(blocks: dict[str, Any]) -> Params:
    """Return the same arrays as a params tree, from either nesting of the books. This is the inverse of `to_blocks`.

    Raises:
      ValueError: a name is missing or unknown.
    """
    last = {"ln_f"} if isinstance(blocks, dict) and "ln_f" in blocks else {"g", "b"}
    _check_names(blocks, {"wte", "wpe", "blocks"} | last, "the books' params")
    ln_f = blocks["ln_f"] if "ln_f" in last else {"g": blocks["g"], "b": blocks["b"]}
    if not isinstance(blocks["blocks"], list | tuple):
        raise ValueError(f"the books' params must hold blocks as a list, not as a {type(blocks['blocks']).__name__}")
    layers = {f"h{i}": block for i, block in enumerate(blocks["blocks"])}
    for name, block in layers.items():
        _check_block(block, f"blocks[{name[1:]}]")
    _check_names(ln_f, {"g", "b"}, "ln_f")
    return {"wte": blocks["wte"], "wpe": blocks["wpe"], **layers, "ln_f": ln_f}


_BLOCK = {"ln_1": {"g", "b"}, "attn": {"c_attn", "c_proj"}, "ln_2": {"g", "b"}, "mlp": {"c_fc", "c_proj"}}


def _check_block(block: Any, where: str) -> None:
    _check_names(block, set(_BLOCK), where)
    for name, parts in _BLOCK.items():
        _check_names(block[name], parts, f"{where}[{name!r}]")
        for part in parts - {"g", "b"}:
            _check_names(block[name][part], {"w", "b"}, f"{where}[{name!r}][{part!r}]")


def _layer_names(params: Any) -> list[str]:
    n_layer = sum(1 for name in params if re.fullmatch(r"h\d+", str(name))) if isinstance(params, dict) else 0
    return [f"h{i}" for i in range(n_layer)]


def _check_names(tree: Any, names: set[str], where: str) -> None:
    if not isinstance(tree, dict):
        raise ValueError(f"{where} must be a dict with {', '.join(sorted(names))}, not a {type(tree).__name__}")
    if missing := sorted(names - tree.keys()):
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if unknown := sorted(str(name) for name in tree.keys() - names):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}")
