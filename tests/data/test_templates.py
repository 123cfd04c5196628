"""Templates and conversations: the texts, what of them counts in the loss, and what is refused."""

import json

import instructions as made
import numpy as np
import pytest

from gpt2_jax.data import TEMPLATES, Conversation, Template, Turn, load_template
from gpt2_jax.data.conversations import conversation_of
from gpt2_jax.data.templates import instruction_examples, save_template, template_of
from gpt2_jax.recipe import Instruction, Recipe

ALPACA = TEMPLATES["alpaca"]
CHAT = Conversation((Turn("Who?", answer="I."), Turn("Why?", answer="So.")), system="Be short.")


def joined(template, conversation):
    return "".join(text + ("<|END|>" if answer else "") for text, answer in template.texts(conversation))


@pytest.mark.parametrize("record", made.RECORDS)
def test_alpaca_is_the_form_of_the_book(record):
    conversation = conversation_of(record)
    assert ALPACA.texts(conversation) == [(made.prompt(record), False), (record["output"], True)]


def test_other_templates():
    turn = (Turn("Ask.", "It", "Yes"),)
    assert joined(TEMPLATES["phi3"], Conversation(turn)) == "<|user|>\nAsk.\nIt\n<|assistant|>\nYes<|END|>"
    assert joined(TEMPLATES["plain"], Conversation(turn)) == "Ask.\nIt\nYes<|END|>"
    assert joined(TEMPLATES["plain"], Conversation((Turn("Ask.", "", "Yes"),))) == "Ask.\nYes<|END|>"
    own = template_of(Instruction(prompt="Q: {instruction} {{{input}}}\nA:", prompt_without_input="Q: {instruction}\n"))
    assert joined(own, Conversation(turn)) == "Q: Ask. {It}\nA:Yes<|END|>"
    assert joined(own, Conversation((Turn("Ask.", "", "Yes"),))) == "Q: Ask.\nYes<|END|>"


def test_a_system_message_replaces_the_preamble_and_each_answer_ends():
    assert joined(TEMPLATES["phi3"], CHAT) == (
        "<|system|>\nBe short.\n<|user|>\nWho?\n<|assistant|>\nI.<|END|><|user|>\nWhy?\n<|assistant|>\nSo.<|END|>"
    )
    assert joined(ALPACA, CHAT) == (
        "Be short.\n\n### Instruction:\nWho?\n\n### Response:\nI.<|END|>"
        "### Instruction:\nWhy?\n\n### Response:\nSo.<|END|>"
    )


@pytest.mark.parametrize("record", made.RECORDS)
def test_the_answer_and_one_end_of_text_count(tokenizer, record):
    example = ALPACA.example(tokenizer, conversation_of(record))
    ids, labels = made.ids_and_labels(tokenizer, record)
    assert example.ids.tolist() == ids
    assert example.counts.tolist() == [int(label != -100) for label in labels]
    assert ids.count(tokenizer.eot) == 1  # also if the instruction has the characters of its text
    everything = ALPACA.example(tokenizer, conversation_of(record), "all")
    assert everything.counts.all()


def test_a_prompt_has_the_ids_that_were_trained(tokenizer):
    """Also in a dialogue: up to its last answer, an example is the prompt."""
    example = ALPACA.example(tokenizer, CHAT)
    open_end = CHAT._replace(turns=(CHAT.turns[0], CHAT.turns[1]._replace(answer=None)))
    prompt = ALPACA.prompt_ids(tokenizer, open_end)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.ids[len(prompt) :].tolist() == [*tokenizer.encode("So."), tokenizer.eot]
    assert prompt.count(tokenizer.eot) == 1
    assert example.counts.sum() == len([*tokenizer.encode("I."), *tokenizer.encode("So.")]) + 2
    one = ALPACA.prompt_ids(tokenizer, "Turn around the words.", "lord, lady")
    assert one == tokenizer.encode(made.prompt(made.RECORDS[1]))


def test_forms_of_conversations():
    messages = [("system", "Be short."), ("user", "Who?"), ("assistant", "I."), ("user", "Why?"), ("assistant", "So.")]
    record = {"messages": [{"role": role, "content": content} for role, content in messages]}
    assert conversation_of(record) == CHAT
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[role], "value": content} for role, content in messages]
    assert conversation_of({"conversations": shared}) == CHAT
    asked = conversation_of(record, answered=False)
    assert asked.turns[-1] == Turn("Why?")
    assert conversation_of({"messages": record["messages"][:-1]}, answered=False) == asked
    assert conversation_of({"instruction": "Who?", "output": "I."}, answered=False).turns == (Turn("Who?"),)


def roles(*names):
    return {"messages": [{"role": name, "content": "x"} for name in names]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r'line 7 has no "instruction" and "output", or "messages"; it has: text'),
        ({"instruction": "a"}, r'line 7 has an "instruction" without its "output"'),
        ({"instruction": "a", "output": 3}, r'line 7: the field "output" is not a text: 3'),
        ({"instruction": "a", "input": ["b"], "output": "c"}, r'the field "input" is not a text'),
        ({"messages": "a"}, r'"messages" must be a list of objects, each with "role" and "content"'),
        ({"messages": [{"role": "user"}]}, r'"messages" must be a list of objects'),
        (roles("user"), r'"messages" ends without an answer'),
        (roles("assistant", "user"), r"must be user and assistant in turn, not assistant, user"),
        (roles("user", "user", "assistant"), r"must be user and assistant in turn"),
        (roles("system"), r"must be user and assistant in turn, not none"),
        (roles("user", "tool"), r"must be user and assistant in turn, not user, tool"),
    ],
)
def test_another_record_is_refused(tokenizer, record, message):
    with pytest.raises(ValueError, match=message):
        list(instruction_examples([(record, "line 7")], tokenizer, ALPACA))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Q: {question}"}, r"prompt has the field \{question\}, but can have only \{input\} and \{instr"),
        ({"prompt": "Q: {instruction!r}"}, r"has the field \{instruction!r\}"),
        ({"prompt": "Q: {instruction.real}"}, r"has the field \{instruction.real\}"),
        ({"prompt": "Q: {input}"}, r"prompt must have the field \{instruction\}"),
        ({"prompt": "Q: {instruction"}, r"prompt is no template"),
        ({"prompt": "{instruction}", "prompt_without_input": "{input}"}, r"prompt_without_input has the field"),
    ],
)
def test_another_field_of_a_template_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        template_of(Instruction(**fields))


def test_a_recipe_refuses_an_unknown_template():
    with pytest.raises(ValueError, match="template must be one of alpaca, phi3, plain"):
        Instruction(template="llama")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="prompt_without_input"):
        Instruction(prompt_without_input="{instruction}")
    assert Recipe().instruction == Instruction()


def test_a_folder_holds_its_template(tmp_path):
    template = Template("recipe", "{instruction}\u00e9{input}", preamble="{")
    assert load_template(tmp_path) is None
    assert load_template("124M") is None
    save_template(template, tmp_path)
    (tmp_path / "best").mkdir()
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "best", tmp_path / "checkpoints" / "3"):
        assert load_template(folder) == template
    (tmp_path / "template.json").write_text(json.dumps({"gpt2_jax_template": 1}))
    with pytest.raises(ValueError, match="is not a template of this version"):
        load_template(tmp_path)


def test_targets_of_the_first_tokens(tokenizer, tmp_path):
    """Counted over blocks of examples, as the masks are read."""
    from gpt2_jax.data import examples as module

    masks = [np.array(mask, np.uint8) for mask in ([1, 0, 1, 1], [0, 0, 0], [1], [0, 1, 1, 1, 1])]
    made_of = [module.Example(np.zeros(len(mask), np.int32), mask) for mask in masks]
    train = module.write_examples(tmp_path / "x", made_of, tokenizer, val_fraction=0).train
    for block in (module.BLOCK, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BLOCK", block)
            for size in (1, 2, 3, 9):
                assert train.n_targets(size).tolist() == [int(mask[1:size].sum()) for mask in masks]
