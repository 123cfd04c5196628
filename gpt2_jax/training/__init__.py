"""Training: the plan of a run, its step, its loop, its checkpoints, and what it reports.

Text and tokens are in `gpt2_jax.data`, recipes in `gpt2_jax.recipe`, and run folders in `gpt2_jax.checkpoints.runs`.
"""

from gpt2_jax.data import Batch, Prepared, batches, open_prepared, prepare, windows
from gpt2_jax.recipe import Recipe
from gpt2_jax.training.loop import Fitted, fit
from gpt2_jax.training.plan import Plan, make_plan
from gpt2_jax.training.start import new_params, start_data, start_model, start_plan, start_tokenizer
from gpt2_jax.training.state import TrainState, model_params
from gpt2_jax.training.step import init_state, make_eval_step, make_train_step

__all__ = [
    "Batch",
    "Fitted",
    "Plan",
    "Prepared",
    "Recipe",
    "TrainState",
    "batches",
    "fit",
    "init_state",
    "make_eval_step",
    "make_plan",
    "make_train_step",
    "model_params",
    "new_params",
    "open_prepared",
    "prepare",
    "start_data",
    "start_model",
    "start_plan",
    "start_tokenizer",
    "windows",
]
