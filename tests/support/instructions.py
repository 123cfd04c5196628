"""Records of instructions, and their texts written by hand."""

import json

import jax
import numpy as np
import tiny_models
import training_steps as ts

import gpt2_jax
from gpt2_jax.training import init_state, make_plan, make_train_step, start_data
from gpt2_jax.training.objective import train_batches

CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=131, n_embd=12, n_head=3, n_layer=1)
RECORDS = [
    {"instruction": "Say the king.", "input": "", "output": "The king is dead."},
    {"instruction": "Turn around the words.", "input": "lord, lady", "output": "lady, lord"},
    {"instruction": "What is love?", "output": "War."},
    {"instruction": "Name the queen <|endoftext|> of hearts.", "input": None, "output": "She has no name here, sir."},
    {"instruction": "Be brief.", "input": "", "output": ""},
    {"instruction": "Speak to the people of the house.", "input": "all of {them}", "output": "Good day to you all."},
]
BEGINNING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
SGD = {"name": "sgd", "momentum": 0.0, "learning_rate": 1.0}  # a step subtracts the gradient


def prompt(record) -> str:
    """The prompt of a record in Alpaca's form."""
    more = f"\n\n### Input:\n{record['input']}" if record.get("input") else ""
    return f"{BEGINNING}{record['instruction']}{more}\n\n### Response:\n"


def ids_and_labels(tokenizer, record, everything=False):
    """The ids of a record, and the labels for Hugging Face: -100 where a token is no target."""
    asked, answer = tokenizer.encode(prompt(record)), [*tokenizer.encode(record["output"]), tokenizer.eot]
    return [*asked, *answer], (asked if everything else [-100] * len(asked)) + answer


def written(path, records=RECORDS):
    """Write records to a .json file."""
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def recipe(path, **changes):
    """A recipe that trains on all records of a file."""
    data = {"path": str(path), "val_fraction": 0.0} | changes.pop("data", {})
    return ts.recipe(objective="instruction", data=data, **{"batch_size": len(RECORDS), "steps": 3} | changes)


def plan_and_data(recipe, tokenizer, folder, config=CONFIG):
    """The plan and the examples of a recipe."""
    data = start_data(recipe, tokenizer, folder / "data")
    return planned(recipe, data, config), data


def planned(recipe, data, config=CONFIG):
    """The plan of a recipe for a model of this config, whose rows are as long as the longest example."""
    n_tokens = recipe.data.n_tokens or min(data.longest - 1, config.n_ctx)
    return make_plan(ts.config_of(recipe, config), recipe, n_tokens=n_tokens)


def params(config=CONFIG):
    return tiny_models.random_params(config, 7, scale=0.3)


def loss_and_gradients(plan, data):
    """Loss and gradients of the first step, from what an SGD step with rate 1 changes."""
    before = params(plan.config)
    state = init_state(plan, before)
    stream = train_batches(plan, data)
    batch = next(stream)
    stream.close()
    parts = jax.tree.map(lambda leaf: leaf.reshape(plan.recipe.accumulate, -1, *leaf.shape[1:]), batch)
    state, metrics = make_train_step(plan)(state, parts)
    after = ts.flat(state.params)
    gradients = {name: np.asarray(leaf, np.float64) - after[name] for name, leaf in ts.flat(before).items()}
    return float(metrics["loss"]), gradients, batch
