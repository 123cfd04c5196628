"""What a recipe names, made ready and checked: the model to start from, and the text as tokens."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from gpt2_jax.checkpoints import load, load_config, load_tokenizer, runs
from gpt2_jax.config import GPT2Config
from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.sources import STDIN, Fields, Sources
from gpt2_jax.data.token_files import Prepared, is_prepared, open_prepared
from gpt2_jax.files import expanded, replacing_file, sha256_of
from gpt2_jax.model import init_params
from gpt2_jax.params import Params
from gpt2_jax.recipe import Recipe
from gpt2_jax.tokenizer import Tokenizer, fingerprint
from gpt2_jax.training.memory import check_memory
from gpt2_jax.training.plan import Plan, make_plan

ORIGIN = "origin.json"  # in the folder of tokens: what text they were made of, and how


def start_model(recipe: Recipe, run_dir: str | os.PathLike | None = None) -> tuple[Plan, Params | None, Tokenizer]:
    """Return the plan of a run, and params and tokenizer that it starts from; params on the host.

    What a step will need is checked before weights are read. Where `run_dir` holds a run with a checkpoint, params are
    None: they are there, and the source is not looked at.

    Raises:
      as `load` and `load_tokenizer`; ValueError: new weights without a vocabulary, or as `make_plan` and
        `check_memory`.
    """
    model = recipe.model
    if not (model.source or model.tokenizer):
        raise ValueError("model.tokenizer must name a vocabulary where model.source is empty: new weights have none")
    begun = None if run_dir is None else expanded(run_dir)
    if begun is not None and not (runs.is_run(begun) and runs.steps(begun)):
        begun = None
    tokenizer = load_tokenizer(begun or model.tokenizer or model.source)
    if begun is not None:
        config = runs.read_run(begun).config
    elif model.source:
        config = load_config(model.source)
    else:
        config = GPT2Config(tokenizer.n_vocab, model.n_ctx, model.n_embd, model.n_head, model.n_layer)
    plan = make_plan(config, recipe)
    check_tokenizer(plan, tokenizer)
    check_memory(plan)
    if begun is not None:
        return plan, None, tokenizer
    with jax.default_device(_host()):
        params = load(model.source, dtype="float32")[1] if model.source else new_params(config, recipe.seed)
    return plan, params, tokenizer


def _host() -> Any:
    """Return where params wait until they are divided over the devices: the CPU, or None where JAX may not have it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def new_params(config: GPT2Config, seed: int) -> Params:
    """Return random params to train from: the original's initial values, the residual layers' scaled down.

    Those are c_proj of attention and MLP, two a block: times 1/sqrt(2 n_layer), as the paper says (Radford et al. 2019,
    section 2.3). The released code, and `init_params`, leave that out.
    """
    scale = (2 * config.n_layer) ** -0.5

    def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf * scale if name.endswith("c_proj/w") else leaf

    params = init_params(config, jax.random.key(seed, impl="threefry2x32"))
    return jax.tree_util.tree_map_with_path(scaled, params)


def check_tokenizer(plan: Plan, tokenizer: Tokenizer | None) -> None:
    """Check that the tokenizer, if there is one, has the model's ids.

    Raises:
      ValueError: it has not.
    """
    if tokenizer is not None and tokenizer.n_vocab != plan.config.n_vocab:
        raise ValueError(f"the tokenizer has {tokenizer.n_vocab:,} ids, the model n_vocab = {plan.config.n_vocab:,}")


def check_data(plan: Plan, data: Prepared) -> None:
    """Check that the text fits the model and the recipe.

    Raises:
      ValueError: it does not.
    """
    n_vocab, monitor = plan.config.n_vocab, plan.recipe.monitor
    if data.train.n_vocab > n_vocab:
        raise ValueError(f"the text has {data.train.n_vocab:,} different ids at most, the model only {n_vocab:,}")
    if data.train.n_tokens < 2:
        raise ValueError(f"{data.train.path} has {data.train.n_tokens} tokens: there is nothing to predict")
    if data.val is not None and data.val.n_tokens < 2:
        raise ValueError(
            f"{data.val.path} has 1 token, and nothing to predict: make data.val_fraction larger, or 0 to do without"
        )
    if data.val is not None and (data.manifest or {}).get("val", {}).get("targets") == 0:
        raise ValueError(f"{data.val.path} has no token that counts: all of it is prompts")
    if monitor.patience and (data.val is None or not monitor.evaluate_every):
        raise ValueError("monitor.patience needs validation losses: text to validate on, and monitor.evaluate_every")


def start_data(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> Prepared:
    """Return the tokens that a recipe names; text is tokenised into `folder` first, where it stays for the next start.

    Args:
      recipe: whose `data` to read.
      tokenizer: whose ids to make.
      folder: RUN/data. Where the run has begun with another text it is refused; where it has not, replaced.

    Raises:
      FileExistsError: the run's folder holds other things.
      ValueError: no text is named, or the run has begun with another.
      as `prepare` and `open_prepared`.
    """
    data, run_dir = recipe.data, folder.parent
    if not data.path:
        raise ValueError("data.path must name text or a folder that prepare_data.py wrote: pass --data.path")
    if is_prepared(data.path):
        return open_prepared(data.path, tokenizer)
    runs.check_free(run_dir)
    settings = {"val_fraction": data.val_fraction, "split": data.split, "seed": recipe.seed}
    origin = {"text": _digest(recipe, tokenizer), "tokenizer": fingerprint(tokenizer)} | settings
    told = _origin(folder)
    if folder.exists() and runs.is_run(run_dir):
        if told is not None and origin["text"] != STDIN and told["text"] != origin["text"]:
            raise ValueError(f"{run_dir} holds a run on another text than {data.path}: choose another folder (--run)")
        return open_prepared(folder, tokenizer)
    if folder.exists() and told == origin and origin["text"] != STDIN:
        return open_prepared(folder, tokenizer)
    (folder / ORIGIN).unlink(missing_ok=True)
    prepared = prepare([data.path], folder, tokenizer, field=data.field, overwrite=folder.exists(), **settings)
    with replacing_file(folder / ORIGIN) as temporary:
        temporary.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    return prepared


def _digest(recipe: Recipe, tokenizer: Tokenizer) -> str:
    """Return the sha256 of the text that a recipe names: of its files in order, and the field that is read of them."""
    if recipe.data.path == STDIN:
        return STDIN
    digest = hashlib.sha256()
    found = Sources([recipe.data.path], Fields(recipe.data.field), tokenizer.n_vocab, tokenizer.eot)
    for file in filter(None, found.files):  # None is standard input
        kind = file.suffix.lower()
        field = recipe.data.field if kind in (".jsonl", ".csv") else ""
        digest.update(f"{kind} {field} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _origin(folder: Path) -> dict[str, Any] | None:
    """Return what is known of the text that a folder of tokens was made of; None if nothing is."""
    path = folder / ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
