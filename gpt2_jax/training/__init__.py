"""Training: text to tokens, the optimizer step, and runs that can be resumed."""

from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.batching import Batch, batches, windows
from gpt2_jax.data.token_files import Prepared, open_prepared
from gpt2_jax.recipe import Recipe
from gpt2_jax.training.loop import Fitted, fit
from gpt2_jax.training.start import new_params, start_data, start_model
from gpt2_jax.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    model_params,
)

__all__ = [
    "Batch",
    "Fitted",
    "Prepared",
    "Recipe",
    "TrainState",
    "abstract_state",
    "batches",
    "fit",
    "init_state",
    "make_eval_step",
    "make_train_step",
    "model_params",
    "new_params",
    "open_prepared",
    "prepare",
    "start_data",
    "start_model",
    "windows",
]
