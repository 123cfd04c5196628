"""This library's programs, lowered for a device that need not be there: every argument is abstract.

Shape letters: A parts of a step, B rows, T tokens, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax import SIZES, GPT2Config
from gpt2_jax import recipe as recipes
from gpt2_jax.changes import NO_CHANGES
from gpt2_jax.generation import engine, programs
from gpt2_jax.generation.memory import RECENT
from gpt2_jax.generation.settings import Settings
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.params import flatten, unflatten
from gpt2_jax.sharding import DATA, MODEL, array_sharding, make_mesh, param_shardings
from gpt2_jax.tensor_parallel import RULES_BY_HEADS, by_heads
from gpt2_jax.training import make_plan
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.step import lower_train_step

if TYPE_CHECKING:
    from ahead_of_time import Case

TINY = GPT2Config(n_vocab=1000, n_ctx=1024, n_embd=128, n_head=2, n_layer=2)


def config_of(case: Case) -> GPT2Config:
    """Return the config of a case's model, with room for its tokens."""
    config = TINY if case.size == "tiny" else SIZES[case.size]
    n_ctx = max(config.n_ctx, case.n_positions)
    return config.replace(n_ctx=n_ctx, param_dtype=case.dtype, compute_dtype=case.dtype)


def large(case: Case) -> int:
    """Return the elements of one layer's keys. A copy of this many or more is a copy of cache size."""
    return case.rows * case.n_positions * config_of(case).n_embd


def lower(case: Case, devices: list[Any]) -> Any:
    """Lower a program for devices along the mesh axis `model`. Nothing is allocated."""
    mesh = Mesh(np.array(devices).reshape(1, -1), (DATA, MODEL))
    return {"decode": _decode, "prefill": _prefill, "train": _train}[case.program](case, mesh)


def least_bytes(case: Case) -> int:
    """Return the bytes that a program, or a step of decode, must read and write, whatever kernels it has.

    Several devices share them.
    """
    return _least_bytes_of_all(case) // case.devices


def _least_bytes_of_all(case: Case) -> int:
    config = config_of(case)
    wpe, wte = (config.param_dtype.itemsize * n * config.n_embd for n in (config.n_ctx, config.n_vocab))
    if case.program == "decode":  # weights and cache are read; one slot of each row is written
        n_slots = case.slots + RECENT + 1
        return config.param_bytes - wpe + config.cache_bytes(case.rows, n_slots)
    if case.program == "prefill":  # the weights of the blocks are read; the cache is written
        return config.param_bytes - wpe - wte + config.cache_bytes(case.rows, case.tokens)
    state = jax.tree.leaves(_plan(case, make_mesh(1, 1)).state)  # read and written
    return 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in state)


def _decode(case: Case, mesh: Mesh) -> Any:
    """Lower `programs.decode` for greedy decoding."""
    values = _engine_values(case, mesh)
    values["past"], values["h_BD"] = jax.eval_shape(
        functools.partial(programs.empty, values["model"], case.rows, case.slots)
    )
    static, arrays = _arguments(programs.first, values)
    values["state"], _ = jax.eval_shape(functools.partial(programs.first, **static), **arrays)
    values["fixed"] = mesh.devices.flat[0].platform in engine.FIXED_STEPS
    return _lower(programs.decode, values)


def _prefill(case: Case, mesh: Mesh) -> Any:
    """Lower `programs.prefill`."""
    values = _engine_values(case, mesh)
    values["tokens_GP"] = np.zeros((case.rows, case.tokens), np.int32)
    values["length_G"] = np.zeros(case.rows, np.int32)
    return _lower(programs.prefill, values)


def _engine_values(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Return values for the parameters of the engine's programs, by name: one dict for all of them."""
    config, params = config_of(case), abstract_params(config_of(case))
    if several := mesh.size > 1:
        params = jax.eval_shape(lambda params: by_heads(config, params, mesh), params)
    return {
        "model": GPT2(config, mesh=mesh, by_heads=several),  # fused attention depends on the device
        "params": params,
        "changes": NO_CHANGES,
        "seen_BV": np.zeros((case.rows, config.n_vocab), bool),
        "done_B": np.zeros(case.rows, bool),
        "row_B": np.zeros(case.rows, np.uint32),
        "seed": np.uint32(0),
        "sampling": Settings(temperature=0.0).check(config).sampling(config),
        "stop_ids": np.full(engine.STOP_IDS, engine.NO_ID, np.int32),
        "n_steps": np.int32(RECENT),
        "n_top": None,
        "capture": (),
        "end_B": None,
        "end_G": None,
    }


def _arguments(function: Any, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the static and the other arguments that a jitted function takes of these values, by name."""
    names = list(inspect.signature(function).parameters)
    if unknown := [name for name in names if name not in values]:  # also if it has a default: the engine may set it
        raise TypeError(f"{function.__name__} has new parameters {unknown}: give them a value in _engine_values")
    static = {name for name in names if values[name] is None or not _is_arrays(values[name])}
    return {name: values[name] for name in static}, {name: values[name] for name in names if name not in static}


def _is_arrays(value: Any) -> bool:
    """Return whether all leaves of a tree are arrays."""
    return all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))


def _lower(function: Any, values: dict[str, Any]) -> Any:
    """Lower a jitted function for the devices of its model. Arguments are passed by name: their order may change."""
    static, arrays = _arguments(function, values)
    model, mesh = values["model"], values["model"].mesh

    def abstract(leaf: Any, at: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    def divided(leaf: Any) -> Any:  # the cache by heads
        return abstract(leaf, array_sharding(mesh, leaf.shape, parts=1 if leaf.ndim == 4 else None))

    flat = flatten(arrays.pop("params"))
    at = param_shardings(flat, mesh, rules=RULES_BY_HEADS)
    params = unflatten({name: abstract(leaf, at[name]) for name, leaf in flat.items()})
    arrays = jax.tree.map(divided, arrays)
    if formats := programs.cache_formats(model, params, len(values["done_B"])) if "past" in arrays else None:
        k_BNHS = tuple(abstract(leaf, formats.keys) for leaf in arrays["past"].k_BNHS)
        arrays["past"] = dataclasses.replace(arrays["past"], k_BNHS=k_BNHS)
    return function.lower(**static, **arrays, params=params)


def _train(case: Case, mesh: Mesh) -> Any:
    """Lower a training step with AdamW."""
    return lower_train_step(_plan(case, mesh))


def _plan(case: Case, mesh: Mesh) -> Plan:
    """Return the plan of a run."""
    dtype: Any = case.dtype
    recipe = recipes.Recipe(model=recipes.Model(dropout=case.dropout), batch_size=case.rows, compute_dtype=dtype)
    return make_plan(config_of(case), recipe, mesh, case.tokens)
