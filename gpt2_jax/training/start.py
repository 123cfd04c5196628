"""What a recipe names, made ready: the model to start from, and the text as tokens."""

from __future__ import annotations

from pathlib import Path

import jax

from gpt2_jax.checkpoints import load, load_tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.model import init_params
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.prepare import prepare
from gpt2_jax.training.recipe import Recipe
from gpt2_jax.training.token_files import Prepared, is_prepared, open_prepared


def start_model(recipe: Recipe) -> tuple[GPT2Config, Params, Tokenizer]:
    """Return config, params and tokenizer that a recipe starts from.

    Raises:
      as `load` and `load_tokenizer`; ValueError: new weights without a vocabulary.

    """
    model = recipe.model
    if not (model.source or model.tokenizer):
        raise ValueError("model.tokenizer must name a vocabulary where model.source is empty: new weights have none")
    tokenizer = load_tokenizer(model.tokenizer or model.source)
    if model.source:
        config, params = load(model.source, dtype="float32")
        return config, params, tokenizer
    config = GPT2Config(tokenizer.n_vocab, model.n_ctx, model.n_embd, model.n_head, model.n_layer)
    return config, new_params(config, recipe.seed), tokenizer


def new_params(config: GPT2Config, seed: int) -> Params:
    """Return random params to train from: the original's initial values, the residual layers' scaled down.

    Those are c_proj of attention and MLP, two a block: times 1/sqrt(2 n_layer), as the paper says (Radford et al. 2019,
    section 2.3). The released code, and `init_params`, leave that out.
    """
    scale = (2 * config.n_layer) ** -0.5
    flat = flatten(init_params(config, jax.random.key(seed, impl="threefry2x32")))
    return unflatten({name: leaf * scale if name.endswith("c_proj/w") else leaf for name, leaf in flat.items()})


def start_data(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> Prepared:
    """Return the tokens that a recipe names; text is tokenised into `folder` first, where it stays for the next start.

    Raises:
      as `prepare` and `open_prepared`.

    """
    data = recipe.data
    if not data.path:
        raise ValueError("data.path must name text or a folder that prepare_data.py wrote: pass --data.path")
    if is_prepared(data.path):
        return open_prepared(data.path, tokenizer)
    if folder.exists():
        return open_prepared(folder, tokenizer)
    settings = {"val_fraction": data.val_fraction, "split": data.split, "seed": recipe.seed}
    return prepare([data.path], folder, tokenizer, field=data.field, **settings)
