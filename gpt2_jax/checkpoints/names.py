"""Tensors under the names of other programs, and which parameter each of them is.

| Names                             | Who writes them                                                     |
|-----------------------------------|---------------------------------------------------------------------|
| `h.0.attn.c_attn.weight`          | Hugging Face (in, out); nanoGPT, whose linear layers are (out, in)  |
| `h.0.attn.c_attn.kernel`          | Flax, also Hugging Face's `FlaxGPT2LMHeadModel`, which is (out, in) |
| `trf_blocks.0.att.W_query.weight` | the build-an-LLM book, with query, key and value apart, (out, in)   |
| `h0.attn.c_attn.w`                | OpenAI and this package                                             |

Wrappers put prefixes before these names, and so do modules that hold the model. The orientation of the weights is
found from the shapes of the weights that are not square, and is the same for all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from gpt2_jax.checkpoints.integrity import FLOATS, DtypeNeededError, Leaves, sha256, stored_dtype, warn
from gpt2_jax.config import GPT2Config
from gpt2_jax.model import abstract_params
from gpt2_jax.params import differences, flatten

ROOT = "transformer."
SCORE = "score.weight"  # the head of transformers' GPT2ForSequenceClassification, (labels, D)
# Names of the modules that wrap a model: DataParallel and DDP, torch.compile, FSDP, activation checkpointing,
# Lightning, Opacus, PEFT, TRL, and `params` in a Flax TrainState.
PREFIX = re.compile(r"((_?module|model|base_model|pretrained_model|transformer|_forward_module|params)\.)+")
WRAPPER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
# What old programs store beside the weights although it is not learned: causal masks, positions, rotary frequencies.
BUFFER = re.compile(r"(.+\.)?(attn\.((masked_)?bias|(causal_)?mask)|att\.mask|position_ids|(rotary(_emb)?\.)?inv_freq)")
# Heads for other tasks. They are not part of the language model, so `load` warns that it leaves them out.
OTHER_HEAD = re.compile(
    r"((v|value|reward|regression|multiple_choice)_head|ilql_heads|score|classifier|qa_outputs)\..+"
)
# What a training state holds under the same names as the params.
MOMENTS = re.compile(r"(^|\.)(opt_state|optimizer|opt|mu|nu|m|v|ema|ema_params)\.")

_DENSE_OF_BOOK = {"attn/c_proj": "att.out_proj", "mlp/c_fc": "ff.layers.0", "mlp/c_proj": "ff.layers.2"}
_NORM_OF_BOOK = {"ln_1": "norm1", "ln_2": "norm2", "ln_f": "final_norm"}
Naming = Callable[[str], tuple[str, ...]]
"""Returns the names of a parameter's tensors: one, or one each for query, key and value."""
Read = Callable[[Mapping[str, Any]], Iterable[tuple[str, np.ndarray]]]
"""Reads some of the tensors: takes {name: tensor}, and yields (name, array) in any order."""


def short(key: str) -> str:
    """Return a name without the prefixes of wrappers, with dots: "module.transformer.wte.weight" is "wte.weight"."""
    key = WRAPPER.sub("", key.replace("/", "."))
    prefix = PREFIX.match(key)
    return key[prefix.end() :] if prefix else key


def openai_keys(name: str) -> tuple[str, ...]:
    """Return OpenAI's name of a parameter, with dots: "h0.attn.c_attn.w"."""
    return (name.replace("/", "."),)


def hugging_face_keys(name: str) -> tuple[str, ...]:
    """Return Hugging Face's short name of a parameter: "h.0.attn.c_attn.weight"."""
    *path, last = re.sub(r"^h(\d+)/", r"h/\1/", name).split("/")
    return (".".join([*path, {"w": "weight", "g": "weight", "b": "bias"}.get(last, f"{last}.weight")]),)


def flax_keys(name: str) -> tuple[str, ...]:
    """Return the short name of a parameter in Flax: "h.0.attn.c_attn.kernel"."""
    *path, last = re.sub(r"^h(\d+)/", r"h/\1/", name).split("/")
    renamed = {"w": "kernel", "g": "scale", "b": "bias", "lm_head": "lm_head.kernel"}
    return (".".join([*path, renamed.get(last, f"{last}.embedding")]),)


def book_keys(name: str) -> tuple[str, ...]:
    """Return the book's names of a parameter. c_attn has three: the parts for query, key and value."""
    if name in (tables := {"wte": "tok_emb.weight", "wpe": "pos_emb.weight", "lm_head": "out_head.weight"}):
        return (tables[name],)
    block, rest = (f"trf_blocks.{name[1:].split('/')[0]}.", name.partition("/")[2]) if name[:2] != "ln" else ("", name)
    module, _, leaf = rest.rpartition("/")
    if module in _NORM_OF_BOOK:
        return (f"{block}{_NORM_OF_BOOK[module]}.{'scale' if leaf == 'g' else 'shift'}",)
    end = "weight" if leaf == "w" else "bias"
    if module == "attn/c_attn":
        return tuple(f"{block}att.W_{kind}.{end}" for kind in ("query", "key", "value"))
    return (f"{block}{_DENSE_OF_BOOK[module]}.{end}",)


NAMINGS = (hugging_face_keys, flax_keys, book_keys, openai_keys)


def naming_of(keys: Iterable[str]) -> Naming | None:
    """Return the naming in which short names contain the token embedding or the output head. None if there is none."""
    there = set(keys)
    return next((naming for naming in NAMINGS if {*naming("wte"), *naming("lm_head")} & there), None)


def root_of(keys: Iterable[str]) -> str:
    """Return what precedes the names of all params: "params." for "params.wte" and "opt_state.0.mu.wte".

    Args:
      keys: the names of all arrays, with dots. If they are those of several models, or of none, the root is "".
    """
    ends = [naming("wte")[0] for naming in NAMINGS]
    roots = {key.removesuffix(end) for key in keys for end in ends if f".{key}".endswith(f".{end}")}
    roots = {root.removesuffix(ROOT) for root in roots if not MOMENTS.search(root)}
    return roots.pop() if len(roots) == 1 else ""


@dataclasses.dataclass(frozen=True)
class Matched:
    """The tensors of a GPT-2, and which parameter each of them is.

    Attributes:
      config: the config, with what only the tensors tell: param_dtype, and the book's qkv_bias.
      tensors: the tensors to read, by short name. A dict of its own: if they are arrays, `drain` may empty it.
      keys: for each parameter the names of its tensors: one; or query, key and value; or none, then it is zero.
      transposed: the names of the tensors that are stored as (out, in).
    """

    config: GPT2Config
    tensors: dict[str, Any]
    keys: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str]

    def leaves(self, arrays: Iterable[tuple[str, np.ndarray]]) -> Leaves:
        """Yield every parameter once. `arrays` yields (short name, array) for each of `tensors`, in any order."""
        name_of = {key: name for name, keys in self.keys.items() for key in keys}
        shapes = flatten(abstract_params(self.config))
        dtypes = {key: tensor.dtype for key, tensor in self.tensors.items()}
        waiting: dict[str, tuple[np.ndarray, set[str]]] = {}  # what has only some of its parts, and those that lack
        for key, stored in arrays:
            array = stored.T if key in self.transposed else stored
            name = name_of[key]
            keys = self.keys[name]
            if len(keys) > 1:
                if name not in waiting:
                    dtype = np.result_type(*(dtypes[part] for part in keys))
                    waiting[name] = np.empty(shapes[name].shape, dtype), {*keys}
                whole, lacking = waiting[name]
                np.split(whole, len(keys), axis=-1)[keys.index(key)][...] = array
                lacking.remove(key)
                if lacking:
                    del array, stored, whole
                    continue
                array, _ = waiting.pop(name)
                del whole
            yield name, array
            del array, stored  # before the next one is read
        yield from ((n, np.zeros(shapes[n].shape, shapes[n].dtype)) for n, keys in self.keys.items() if not keys)


def match(
    found: Mapping[str, Any],
    config: GPT2Config,
    source: object,
    config_file: str,
    read: Read,
    dtype: np.dtype | None,
) -> Matched:
    """Find out which parameter each tensor is.

    Args:
      found: {name: an object with shape and dtype}, with the names of any of the programs above.
      config: the config that a file describes.
      source: the file or folder to name in messages.
      config_file: the name of the config's file, for messages.
      read: reads some of the tensors, with `found`'s objects under their short names.
      dtype: the dtype to load, into which tensors of any float dtypes are cast. None: all must have the same dtype.

    Raises:
      ValueError: the tensors are not those of a GPT-2 with this config. The message lists the differences.
    """
    tensors = _merge_prefixes(found, source, read)
    naming = naming_of(tensors) or hugging_face_keys
    if config.n_layer > len(tensors):  # checked before a tree of that many layers is built
        raise ValueError(f"{config_file} says n_layer = {config.n_layer}, but {source} has {len(tensors)} tensors")
    config = _tie(tensors, naming, config, source, read)
    shapes = flatten(abstract_params(config))
    keys = {name: naming(name) for name in shapes}
    transposed = _transposed(tensors, keys, shapes)
    if config.labels:
        transposed |= {*keys["score/w"]}
    if naming is flax_keys and "lm_head" in shapes:
        transposed |= {*keys["lm_head"]}  # a linear layer of Flax, which is (in, out)
    config, keys = _without_biases(tensors, config, keys, transposed, naming)
    expected: dict[str, Any] = {}
    for name, parts in keys.items():
        *rows, last = shapes[name].shape
        for key in parts:
            shape = (*rows, last // len(parts))
            expected[key] = jax.ShapeDtypeStruct(shape[::-1] if key in transposed else shape, shapes[name].dtype)
    _drop_extras(tensors, expected, source)
    config = config.replace(param_dtype=stored_dtype((tensor.dtype for tensor in tensors.values()), source, dtype))
    expected = {key: jax.ShapeDtypeStruct(leaf.shape, config.param_dtype) for key, leaf in expected.items()}
    check_differences(tensors, expected, source, config_file, dtype)
    tensors = {key: tensors[key] for parts in keys.values() for key in parts}  # so parts of a whole follow each other
    return Matched(config, tensors, keys, frozenset(transposed & expected.keys()))


def check_differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], source: object, config_file: str, dtype: np.dtype | None
) -> None:
    """Check names, shapes and dtypes. With a dtype to load, the stored dtypes may be any floats.

    Raises:
      DtypeNeededError: only the dtypes differ, and all are floats.
      ValueError: something differs. The message lists it.
    """
    if not (wrong := differences(found, expected, dtypes=dtype is None)):
        return
    listed = ":\n  " + "\n  ".join(wrong)
    names = sorted({tensor.dtype.name for tensor in found.values()})
    if not differences(found, expected, dtypes=False) and set(names) <= set(FLOATS):
        raise DtypeNeededError(
            f"{source} holds tensors of several dtypes ({', '.join(names)}): pass the one to load, as in "
            f'dtype="float32"{listed}'
        )
    raise ValueError(f"{source} does not hold the GPT-2 that {config_file} describes{listed}")


def _merge_prefixes(found: Mapping[str, Any], source: object, read: Read) -> dict[str, Any]:
    """Return the tensors by their short names. Two names of one tensor must have equal contents."""
    tensors: dict[str, Any] = {}
    root = root_of(key.replace("/", ".") for key in found)
    for key, tensor in found.items():
        name = short(key.replace("/", ".").removeprefix(root))
        if name in tensors and not BUFFER.fullmatch(name) and not _equal(tensors[name], tensor, read):
            raise ValueError(
                f"{source} holds {name} twice, with and without a prefix such as {ROOT}, and the two are not equal: "
                "remove one"
            )
        tensors[name] = tensor
    return tensors


def _equal(one: Any, other: Any, read: Read) -> bool:
    if tuple(one.shape) != tuple(other.shape) or one.dtype.name != other.dtype.name or one.dtype.name not in FLOATS:
        return False
    found = set()
    for _, array in read({"one": one, "other": other}):
        found.add(sha256(array))
        del array  # before the other one is read
    return len(found) == 1


def _tie(tensors: dict[str, Any], naming: Naming, config: GPT2Config, source: object, read: Read) -> GPT2Config:
    """Remove a stored output head that is `wte` itself, unless the config says that the model has a head of its own.

    The book's configs do not say it, so its tensors decide.
    """
    wte, head = naming("wte")[0], naming("lm_head")[0]
    if head not in tensors and not config.tie_word_embeddings:
        if config.labels:  # transformers saves a classifier without the output head
            warn(
                f"{source} holds no output head, although config.json says tie_word_embeddings = False: labels are "
                "not affected, but the next token is predicted with wte"
            )
            return config.replace(tie_word_embeddings=True)
        raise ValueError(f"config.json says tie_word_embeddings = False, but {source} has no {head}: the output head")
    if wte not in tensors and head in tensors and config.tie_word_embeddings:  # the same array under its other name
        tensors[wte] = tensors[head]
    if head not in tensors or not config.tie_word_embeddings:
        return config
    if tensors[wte] is tensors[head] or _equal(tensors[wte], tensors[head], read):
        del tensors[head]
        return config
    if naming is not book_keys:
        warn(
            f"config.json says that the output head is tied, but {head} in {source} is not equal to {wte}: the head is "
            "loaded as a parameter of its own, lm_head, as in transformers 5"
        )
    return config.replace(tie_word_embeddings=False)


def _transposed(
    tensors: Mapping[str, Any], keys: Mapping[str, tuple[str, ...]], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> set[str]:
    """Return the tensors stored as (out, in): all weights of linear layers, or none."""
    weights = [name for name in keys if name.endswith("/w") and name != "score/w"]
    telling = [name for name in weights if len(keys[name]) == 1 and len(set(shapes[name].shape)) == 2]
    stored = [(tuple(tensors[keys[name][0]].shape), shapes[name].shape) for name in telling if keys[name][0] in tensors]
    if stored and all(shape == expected[::-1] for shape, expected in stored):
        return {key for name in weights for key in keys[name]}
    return set()


def _without_biases(
    tensors: Mapping[str, Any],
    config: GPT2Config,
    keys: Mapping[str, tuple[str, ...]],
    transposed: set[str],
    naming: Naming,
) -> tuple[GPT2Config, dict[str, tuple[str, ...]]]:
    """Leave out the biases that a program did not create. They are zero.

    nanoGPT has a setting for no biases at all, and the book has one for no biases of query, key and value.
    """
    biases = {name for name in keys if name.endswith("/b")}
    qkv = {name for name in biases if name.endswith("c_attn/b")}
    absent: set[str] = set()
    if naming is book_keys and not any(key in tensors for name in qkv for key in keys[name]):
        absent, config = qkv, config.replace(qkv_bias=False)
    elif transposed >= {*keys["h0/mlp/c_fc/w"]} and not any(key in tensors for name in biases for key in keys[name]):
        absent = biases
    return config, {name: () if name in absent else parts for name, parts in keys.items()}


def _drop_extras(tensors: dict[str, Any], expected: Mapping[str, Any], source: object) -> None:
    """Remove what is known not to belong to the language model, and warn about heads for other tasks."""
    heads = []
    for key in sorted(tensors.keys() - expected.keys()):
        if OTHER_HEAD.fullmatch(key):
            heads.append(key)
        elif not BUFFER.fullmatch(key) and 0 not in tensors[key].shape:
            continue
        del tensors[key]
    if heads:
        warn(f"{source} also holds {', '.join(heads)}: these are for another task, and were left out")
