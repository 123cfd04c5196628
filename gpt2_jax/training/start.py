"""Loads and checks what a recipe names: the model to start from, and the text as tokens."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import processes
from gpt2_jax.added_tokens import HEADS, pieces_of, with_rows, with_tokens
from gpt2_jax.checkpoints import load, load_config, load_tokenizer, runs
from gpt2_jax.checkpoints.vocabulary import fits
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.examples import PreparedExamples, is_prepared_examples
from gpt2_jax.data.token_files import Prepared, is_prepared, open_prepared
from gpt2_jax.files import expanded
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.model import init_params
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.recipe import OWN, Recipe
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training import hosts
from gpt2_jax.training.classifying import describe_texts
from gpt2_jax.training.frozen import describe
from gpt2_jax.training.memory import check_memory
from gpt2_jax.training.plan import Plan, make_plan
from gpt2_jax.training.start_examples import start_examples
from gpt2_jax.training.start_text import tokenized, whole_pairs

SCORE = "score"  # the head of a classifier in params


def start_tokenizer(recipe: Recipe, run_dir: str | os.PathLike | None = None) -> Tokenizer:
    """Return the tokenizer of a run: that of `run_dir` if it contains a run with a checkpoint, else the recipe's.

    The recipe's gets the tokens of `data.add_tokens`.

    Raises:
      ValueError: new weights have no vocabulary. Errors of `load_tokenizer` are passed on.
    """
    model = recipe.model
    if not (model.source or model.tokenizer):
        raise ValueError("model.tokenizer must name a vocabulary if model.source is empty: new weights have none")
    begun = _begun(run_dir)
    tokenizer = load_tokenizer(begun or model.tokenizer or model.source)
    return tokenizer if begun is not None else with_tokens(tokenizer, recipe.data.add_tokens)


def start_plan(
    recipe: Recipe,
    tokenizer: Tokenizer,
    run_dir: str | os.PathLike | None = None,
    data: Prepared | PreparedExamples | None = None,
) -> Plan:
    """Return the plan of a run, and check that it fits into memory. No weights are read. Arguments: see `start_model`.

    Raises:
      ValueError: as `start_model`.
    """
    begun = _begun(run_dir)
    return _plan_of(recipe, tokenizer, begun, data, _first_config(recipe, tokenizer, begun))


def _first_config(recipe: Recipe, tokenizer: Tokenizer, begun: Path | None) -> GPT2Config:
    """Return the config of the run, if it has begun, or of the source, or of new weights."""
    model = recipe.model
    if begun is not None:
        return runs.read_run(begun).config
    if model.source:
        return load_config(model.source)
    names = ("n_ctx", "n_embd", "n_head", "n_layer", "activation_function")
    names += ("scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
    return GPT2Config(tokenizer.n_vocab, **{name: getattr(model, name) for name in names})


def _plan_of(
    recipe: Recipe,
    tokenizer: Tokenizer,
    begun: Path | None,
    data: Prepared | PreparedExamples | None,
    config: GPT2Config,
) -> Plan:
    """Return the plan of a run that has begun, or that starts from a model with this config."""
    n_tokens, data = 0, whole_pairs(data, begun)
    if isinstance(data, PreparedExamples):
        longest = data.longest - (recipe.objective != "classification")  # the last token is only a target
        n_tokens = recipe.data.n_tokens or min(max(longest, 1), config.n_ctx)
    if begun is None:
        last = max((tokenizer.tokens[token] for token in recipe.data.add_tokens), default=0)
        config = config.replace(labels=(), pooling="last", n_vocab=max(config.n_vocab, last + 1))
    if recipe.objective == "classification" and begun is None:
        if data is None:
            raise ValueError('objective = "classification" needs the data, whose labels the model gets: pass data')
        if not isinstance(data, PreparedExamples) or not data.labels:
            raise ValueError(f'{data.train.path.parent} has no labels, which objective = "classification" needs')
        config = config.replace(labels=data.labels, pooling=recipe.classification.pooling)
    plan = make_plan(config, recipe, n_tokens=n_tokens)
    check_tokenizer(plan, tokenizer)
    check_memory(plan)
    return plan


def start_model(
    recipe: Recipe,
    run_dir: str | os.PathLike | None = None,
    data: Prepared | PreparedExamples | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[Plan, Params | None, Tokenizer]:
    """Return the plan of a run, and the params and the tokenizer that it starts from.

    Args:
      recipe: the recipe.
      run_dir: the run's folder.
      data: from `start_data`. A classifier gets its labels from the data, and examples determine the length of rows.
        Its head is new, unless the source is a classifier with the same labels and pooling. For other objectives, the
        head of a source that is a classifier is left out.
      tokenizer: from `start_tokenizer`; None loads it.

    Params are float32, on the devices of the plan's mesh, where training keeps them. `fit(..., donate=True)` takes over
    their memory. Memory is checked before weights are read. If `run_dir` contains a run with a checkpoint, params are
    None: they are in the checkpoint, and the model source is not read. Errors of `load` and `load_tokenizer` are passed
    on.

    Raises:
      ValueError: new weights have no vocabulary, the plan cannot be made, or the devices have too little memory.
    """
    tokenizer = start_tokenizer(recipe, run_dir) if tokenizer is None else tokenizer
    begun = _begun(run_dir)
    there = _first_config(recipe, tokenizer, begun)
    plan = _plan_of(recipe, tokenizer, begun, data, there)
    if begun is not None:
        return plan, None, tokenizer
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.state.params)
    source = recipe.model.source
    if not source:
        return plan, _placed(flatten(_new_on_host(plan.config, recipe.seed)), shardings), tokenizer
    config = plan.config
    added = recipe.data.add_tokens
    pieces = pieces_of(there, load_tokenizer(recipe.model.tokenizer or source), added) if added else {}
    new_head = (there.labels, there.pooling) != (config.labels, config.pooling)
    head = shardings.pop(SCORE, None) if new_head else None
    if new_head and there.labels:
        shardings |= {SCORE: {"w": plan.whole()}}
    params = load(source, dtype="float32", sharding=shardings)[1]
    if new_head:
        params.pop(SCORE, None)
    plan = with_source(plan, params)
    params = _with_added_rows(plan, params, pieces, tokenizer)
    if head is not None:
        new = _new_on_host(config.replace(n_layer=1, n_vocab=1, n_ctx=1), recipe.seed)
        params[SCORE] = _placed(flatten(new[SCORE]), head)
    return plan, params, tokenizer


def _begun(run_dir: str | os.PathLike | None) -> Path | None:
    """Return the folder if it contains a run with a checkpoint."""
    begun = None if run_dir is None else expanded(run_dir)
    if begun is not None and processes.on_first(functools.partial(_has_checkpoint, begun)):
        return begun
    return None


def _new_on_host(config: GPT2Config, seed: int) -> Params:
    with jax.default_device(_host()):  # the same numbers for all devices
        return new_params(config, seed)


def _placed(flat: dict[str, Any], shardings: Any) -> Params:
    put = (lambda leaf, sharding: hosts.put(np.asarray(leaf), sharding)) if processes.count() > 1 else jax.device_put
    return unflatten({name: put(flat.pop(name), sharding) for name, sharding in flatten(shardings).items()})


def _with_added_rows(plan: Plan, params: Params, pieces: Mapping[str, Sequence[int]], tokenizer: Tokenizer) -> Params:
    """Return params with rows for the added tokens, whose pieces are given."""
    rows = {tokenizer.tokens[token]: ids for token, ids in pieces.items()}
    for name in HEADS if rows else ():
        if name in params:
            grow = functools.partial(with_rows, n_vocab=plan.config.n_vocab, rows=rows)
            params[name] = jax.jit(grow, out_shardings=plan.state.params[name].sharding)(params[name])
    return params


def with_source(plan: Plan, params: Params) -> Plan:
    """Return the plan with the hashes of the params that were read from model.source, if LoRA trains beside them."""
    if not plan.recipe.lora.is_used:
        return plan
    return dataclasses.replace(plan, source=describe(flatten(params), plan.config.param_dtype))


def _has_checkpoint(run_dir: Path) -> bool:
    return runs.is_run(run_dir) and bool(runs.steps(run_dir))


def _host() -> Any:
    """Return the device that makes new params before they are sharded: the CPU, or None if JAX has no CPU backend."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@under_jax_defaults
def new_params(config: GPT2Config, seed: int) -> Params:
    """Return random params for training: GPT-2's initial values, with the residual layers scaled down.

    The scaled layers are the c_proj of attention and of the MLP, two in each block. Their factor is 1/sqrt(2 n_layer),
    as in the paper (Radford et al. 2019, section 2.3). The released code and `init_params` do not scale them.
    """
    scale = (2 * config.n_layer) ** -0.5

    def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf * scale if name.endswith("c_proj/w") else leaf

    params = init_params(config, jax.random.key(seed, impl="threefry2x32"))
    return jax.tree_util.tree_map_with_path(scaled, params)


def check_tokenizer(plan: Plan, tokenizer: Tokenizer | None) -> None:
    """Check that the tokenizer, if there is one, has as many ids as the model, apart from padding and added tokens.

    Raises:
      ValueError: the number of ids does not fit.
    """
    if tokenizer is not None and not fits(tokenizer, plan.config.n_vocab):
        raise ValueError(f"the tokenizer has {tokenizer.n_vocab:,} ids, but the model has {plan.config.n_vocab:,}")


def check_data(
    plan: Plan, data: Prepared | PreparedExamples, tokenizer: Tokenizer | None = None
) -> Prepared | PreparedExamples:
    """Check that the text fits the model and the recipe.

    Returns:
      The text, in which an id without a row in the model is refused when it is read. Only added tokens of the
      tokenizer can have such ids.

    Raises:
      ValueError: the text does not fit.
    """
    n_vocab, monitor = plan.config.n_vocab, plan.recipe.monitor
    if isinstance(data, PreparedExamples):
        _check_examples(plan, data)
    elif plan.recipe.objective != "language_modeling":
        raise ValueError(f"objective {plan.recipe.objective} needs examples: get data from start_data")
    elif plan.recipe.data.pack and not data.manifest:
        raise ValueError("data.pack needs text, or a folder that gpt2-prepare wrote, which knows where documents end")
    own = data.manifest["n_vocab"] if isinstance(data, PreparedExamples) else data.train.n_vocab
    added = tokenizer is not None and tokenizer.n_vocab == own and fits(tokenizer, n_vocab)
    if own > n_vocab and not added:
        raise ValueError(f"the text may have up to {own:,} different ids, the model only {n_vocab:,}")
    if isinstance(data, Prepared) and data.train.n_tokens < 2:
        raise ValueError(f"{data.train.path} has {data.train.n_tokens} tokens: there is nothing to predict")
    if isinstance(data, Prepared) and data.val is not None and data.val.n_tokens < 2:
        raise ValueError(
            f"{data.val.path} has 1 token: there is nothing to predict; increase data.val_fraction, or set it to 0"
        )
    if data.val is not None and (data.manifest or {}).get("val", {}).get("targets") == 0:
        raise ValueError(f"{data.val.path} has no token that counts in the loss: all tokens are prompts")
    if monitor.patience and (data.val is None or not monitor.evaluate_every):
        raise ValueError("monitor.patience needs validation losses: set monitor.evaluate_every, and validation text")
    return data.within(n_vocab)


def described(
    plan: Plan, data: Prepared | PreparedExamples, validation: Mapping[str, Prepared | PreparedExamples] | None = None
) -> list[str]:
    """Return sentences on the model and the data of a run, for its start; `validation` is as in `fit`."""
    said = f"{plan.config.n_params:,} parameters"
    if isinstance(data, PreparedExamples) and plan.recipe.objective == "classification":
        texts = describe_texts(plan, data)
        return [f"{said}; {texts[0]}", *texts[1:]]
    splits = {OWN: data.val}
    if validation:
        splits = {name: text.train if text.val is None else text.val for name, text in validation.items()}
    said += f"; {data.train.n_tokens:,} training tokens"
    for name, split in splits.items():
        said += f", {split.n_tokens if split else 0:,} validation tokens" + f" of {name}" * (name != OWN)
    return [said]


def _check_examples(plan: Plan, data: PreparedExamples) -> None:
    labels = plan.config.labels if plan.recipe.objective == "classification" else ()
    if data.labels != labels:
        raise ValueError(f"the examples have the labels {data.labels}, but the model has {labels}")


def start_data(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> Prepared | PreparedExamples:
    """Return the tokens that a recipe names. Text is first tokenized into `folder`; the next start reads it there.

    Errors of `prepare` and `open_prepared` are passed on.

    Args:
      recipe: the recipe; `data` says what to read.
      tokenizer: the tokenizer for the text.
      folder: RUN/data. If it has tokens of another text, they are replaced, or an error is raised if the run has
        already started.

    Raises:
      FileExistsError: the run's folder contains other things.
      ValueError: no text is named, or the run was started with another text.
    """
    if not recipe.data.path:
        raise ValueError("data.path must name text or a folder that gpt2-prepare wrote: pass --data.path")
    if recipe.data.own_validation():  # all of the text is for training
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, val_fraction=0.0))
    if recipe.objective != "language_modeling":
        return start_examples(recipe, tokenizer, folder)
    if is_prepared_examples(recipe.data.path):
        raise ValueError(f'{recipe.data.path} has examples: set objective to "instruction" or "classification"')
    if is_prepared(recipe.data.path):
        return whole_pairs(open_prepared(recipe.data.path, tokenizer), folder.parent)
    opened: list[Prepared] = []
    processes.on_first(lambda: opened.append(tokenized(recipe, tokenizer, folder)))
    return opened[0] if opened else open_prepared(folder, tokenizer)
