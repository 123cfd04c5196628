"""Each row of docs/coming_from/books.md on instructions."""

import dataclasses
import json

import coming_from
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.commands import _responses
from gpt2_jax.data import TEMPLATES
from gpt2_jax.recipe import from_dict
from gpt2_jax.training.objective import rows_of

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
TINY = {
    "objective": "instruction",
    "steps": 2,
    "batch_size": 4,
    "model": {"source": "", "tokenizer": "shakespeare", "n_ctx": 128, "n_embd": 12, "n_head": 3, "n_layer": 1},
    "monitor": {"tensorboard": False, "evaluate_every": 0, "sample_every": 0},
}
ENTRY = {"instruction": "What is love?", "input": "", "output": "It is a smoke."}


@pytest.fixture(scope="module")
def tokenizer():
    return gpt2_jax.load_tokenizer("shakespeare")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """The recipe, the plan, the data and the folder of a run with the shares of the row on the splits."""
    folder = tmp_path_factory.mktemp("instructions")
    records = [{**ENTRY, "instruction": f"What is {i}?", "output": f"It is {i * i}."} for i in range(40)]
    (folder / "pairs.json").write_text(json.dumps(records))
    recipe = coming_from.parse("--data.test-fraction 0.1 --data.val-fraction 0.05").recipe
    data = dataclasses.replace(recipe.data, path=str(folder / "pairs.json"))
    recipe = dataclasses.replace(from_dict(training.Recipe, TINY), data=data)
    data = training.start_data(recipe, tokenizer, folder / "run" / "data")
    plan, params, _ = training.start_model(recipe, folder / "run", data)
    training.fit(plan, params, data, folder / "run", tokenizer)
    return recipe, plan, data, folder / "run"


def first_line(name):
    return TEMPLATES[name].prompt.splitlines()[0]


@CHECKS("InstructionDataset(data, tokenizer)")
def dataset(row, trained, tokenizer):
    """A pair is a prompt, its answer and the end of text. The recipe has the hyperparameters of the book's chapter."""
    assert row.parse().recipe.objective == "instruction"
    _, _, data, _ = trained
    text = tokenizer.decode(data.train.read(0)[0].tolist())
    assert text.endswith("<|endoftext|>")
    assert "### Instruction:\nWhat is " in text
    recipe = training.Recipe.from_toml(coming_from.commands.ROOT / "configs" / "instruct_alpaca.toml")
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay, recipe.batch_size) == (5e-5, 0.1, 8)


@CHECKS("format_input(entry)", "format_input for Phi-3 (exercise 7.1)")
def format_input(row, tokenizer):
    """The texts are those of the book, written out."""
    name = row.parse().recipe.instruction.template
    found = tokenizer.decode(TEMPLATES[name].prompt_ids(tokenizer, ENTRY["instruction"]))
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    texts = {
        "alpaca": f"{task}\n\n### Instruction:\nWhat is love?\n\n### Response:\n",
        "phi3": "<|user|>\nWhat is love?\n<|assistant|>\n",
    }
    assert found == texts[name]


@CHECKS("custom_collate_fn(batch, allowed_max_length=1024)", "masking the instruction (exercise 7.2)")
def collate(row, trained, tokenizer):
    """One pair in a row. The answer and one end of text count; the prompt and the padding do not."""
    parsed = row.parse().recipe
    assert (parsed.data.n_tokens, parsed.instruction.loss_on) in ((1024, "answers"), (0, "answers"))
    _, plan, data, _ = trained
    one = rows_of(plan, data, data.train).read(0)
    counted = np.asarray(one.targets)[np.asarray(one.weights) > 0].tolist()
    text = tokenizer.decode(data.train.read(0)[0].tolist())
    answer = text.removesuffix("<|endoftext|>").rpartition("### Response:\n")[2]
    assert counted == [*tokenizer.encode(answer), tokenizer.eot]
    assert len(one.tokens) == plan.n_tokens


@CHECKS("train_data, test_data, val_data = data[:935], data[935:1045], data[1045:]")
def splits(row, trained):
    """The shares of the row are those of the run: see the fixture."""
    recipe, _, data, _ = trained
    parsed = row.parse().recipe.data
    assert (parsed.test_fraction, parsed.val_fraction) == (recipe.data.test_fraction, recipe.data.val_fraction)
    assert [len(split) for split in (data.train, data.test, data.val)] == [34, 4, 2]


@CHECKS("LoRA (exercise 7.4)")
def lora(row):
    args = row.parse()
    assert training.Recipe.from_toml(coming_from.commands.ROOT / args.config).lora.rank > 0


@CHECKS("generate(...) and the response after the prompt")
def generate(row, trained, tokenizer):
    """As a greedy continuation of the prompt, cut at the end of text."""
    _, _, _, run = trained
    config, params = gpt2_jax.load(run)
    template = gpt2_jax.data.load_template(run)
    (found,) = row.run(config=config, params=params, tokenizer=tokenizer, template=template)
    prompt = template.prompt_ids(tokenizer, ENTRY["instruction"])
    how = {"temperature": 0.0, "overflow": "slide", "stop_ids": [tokenizer.eot]}
    (ids,) = gpt2_jax.generate(config, params, [prompt], 256, **how)
    assert found.text == tokenizer.decode(ids)


@CHECKS("instruction-data-with-response.json")
def with_response(row, trained):
    _, _, _, run = trained
    assert row.code[0] == _responses.OUTPUT
    _responses.after_training(run)
    found = json.loads((run / row.code[0]).read_text(encoding="utf-8"))
    assert len(found) == 4
    assert {"instruction", "output", "response", "exact_match", "rouge_l"} <= set(found[0])


@CHECKS('generate_model_scores(test_data, "model_response", model="llama3")')
def scores(row):
    args = row.parse()
    assert (args.task, args.judge_url, args.judge_model) == ("responses", "http://localhost:11434/v1", "llama3")
