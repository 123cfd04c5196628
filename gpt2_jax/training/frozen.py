"""What a run with LoRA keeps apart from its checkpoints: the frozen params. The best model is what was trained, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax import processes
from gpt2_jax.checkpoints import bases, runs
from gpt2_jax.checkpoints.saving import save, save_change
from gpt2_jax.lora import merge_lora
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training import hosts
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.state import TrainState, candidates, model_params


def describe(params: Mapping[str, Any], dtype: Any = None) -> dict[str, list[Any]]:
    """Return {name: [dtype, shape, sha256]} of flat params, cast to a dtype if one is given.

    The params may be on any devices. All processes must call this, and get the result.
    """
    if processes.count() == 1:
        return bases.describe(params.items(), dtype)
    found: dict[str, list[Any]] = {}
    for name, leaf in params.items():
        whole = flatten(hosts.gathered({name: leaf}))  # one tensor at a time
        found |= bases.describe(whole.items(), dtype)
    return processes.on_first(lambda: found)


def settle_base(plan: Plan, state: TrainState, run_dir: Path) -> bases.Base | None:
    """Return what the checkpoints of a run name as their base; None without LoRA. Write RUN/base if that is needed.

    If the frozen params are those of the recipe's model.source, the checkpoints name it. Params that it does not have,
    such as a new head, are in the checkpoints. Otherwise RUN/base holds the model, also the params that are trained.

    Raises:
      OSError: RUN/base cannot be written.
    """
    if state.lora is None:
        return None
    trained = set(candidates(state, plan.recipe))
    frozen = {name: leaf for name, leaf in flatten(state.params).items() if name not in trained}
    found = describe(frozen)
    source = {name: leaf for name, leaf in (plan.source or {}).items() if name in found}
    if source and all(found[name] == leaf for name, leaf in source.items()):
        return bases.of_source(plan.recipe.model.source, source)
    base = bases.of_run(found)
    bases.write(run_dir, base, flatten(state.params))
    return base


def save_best(
    plan: Plan, state: TrainState, base: bases.Base | None, run_dir: Path, tokenizer: Tokenizer | None
) -> None:
    """Save RUN/best: the model, or what LoRA has trained if the frozen params are kept elsewhere.

    All processes call this. The dtype is float32, also after training in float64.

    Raises:
      OSError: the folder cannot be written.
    """
    config = plan.config.replace(param_dtype="float32", compute_dtype="float32")
    best = run_dir / runs.BEST
    if base is None:
        params = _on_host(model_params(state, plan.recipe))
        processes.on_first(lambda: save(best, config, params, "orbax", tokenizer))
        return
    own = {name: leaf for name, leaf in flatten(state.params).items() if name not in base["leaves"]}
    lora, new = state.lora or {}, {name: pair for name, pair in (state.lora or {}).items() if name in own}
    own = _on_host(merge_lora(unflatten(own), new, plan.recipe.lora.alpha))  # a new head is stored with its pair merged
    pairs = _on_host({name: pair for name, pair in lora.items() if name not in new})
    settings = {"alpha": plan.recipe.lora.alpha, "dropout": plan.recipe.lora.dropout}
    processes.on_first(lambda: save_change(best, config, own, pairs, settings, base, tokenizer))


def _on_host(params: Params) -> Params:
    """Return params in float32, in process 0 if there are several."""
    params = hosts.gathered(params) if processes.count() > 1 else params
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.float32), params)
