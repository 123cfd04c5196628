"""Cloze: the model chooses the candidate for which the sentence, from the blank on, is most likely."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax import evaluate
from gpt2_jax.edits import scale
from gpt2_jax.evaluate import Question

CANDIDATES = ("king", "queen", "crown", "overthrow", "a")
QUESTION = Question("The duke is here. He has a sword.", "He gave the XXXXX to me.", CANDIDATES, "king")


@pytest.fixture(scope="module")
def model(tokenizer):
    config = CONFIG.replace(n_vocab=tokenizer.n_vocab, n_ctx=67)
    return config, random_params(config, 0, scale=0.3)


@functools.partial(jax.jit, static_argnums=0)
def logprobs_of(config, params, tokens_1T):
    return jax.nn.log_softmax(gpt2_jax.GPT2(config).apply({"params": params}, tokens_1T).logits[0])


def nats_of(model, ids, n_scored):
    """Return -ln p of the last tokens, from a forward pass over the padded row. No token sees the padding after it."""
    tokens_1T = np.zeros((1, 67), np.int32)
    tokens_1T[0, : len(ids)] = ids
    logprobs_TV = np.asarray(logprobs_of(*model, tokens_1T))
    return -sum(logprobs_TV[t - 1, ids[t]] for t in range(len(ids) - n_scored, len(ids)))


def choice(model, tokenizer, question, **more):
    """Return the candidate that `cloze` chooses: the only answer that it calls correct."""
    right = [
        evaluate.cloze(*model, tokenizer, [dataclasses.replace(question, answer=name)], **more).accuracy
        for name in question.candidates
    ]
    assert sorted(right) == [0.0] * (len(right) - 1) + [1.0]
    return question.candidates[right.index(1.0)]


@pytest.mark.parametrize(
    ("question", "before"),
    [
        ("He gave the XXXXX to me.", "The duke is here. He has a sword. He gave the"),
        ("XXXXX gave me that!", "The duke is here. He has a sword."),
        ('And "XXXXX", said he.', 'The duke is here. He has a sword. And "'),
        (" It is a XXXXX", "The duke is here. He has a sword. It is a"),
    ],
)
def test_it_is_the_most_likely_rest_of_the_sentence(model, tokenizer, question, before):
    asked = dataclasses.replace(QUESTION, question=question)
    text = f"{asked.context} {question.strip()}"
    sums = []
    for name in CANDIDATES:
        ids = tokenizer.encode(text.replace("XXXXX", name))
        n_before = len(tokenizer.encode(before))
        assert tokenizer.decode(ids[:n_before]) == before
        sums.append(nats_of(model, ids, len(ids) - n_before))
    assert choice(model, tokenizer, asked) == CANDIDATES[np.argmin(sums)]


def test_accuracy_is_a_share(model, tokenizer):
    best = choice(model, tokenizer, QUESTION)
    other = next(name for name in CANDIDATES if name != best)
    questions = [dataclasses.replace(QUESTION, answer=answer) for answer in (best, other, best)]
    two = Question("", "He has the XXXXX now.", ("king", "sword"), "king")
    got = evaluate.cloze(*model, tokenizer, [*questions, two])
    assert got.accuracy == (2 + evaluate.cloze(*model, tokenizer, [two]).accuracy) / 4
    assert got.accuracy_by_chance == pytest.approx((3 / 5 + 1 / 2) / 4)
    assert (got.questions, got.cut) == (4, 0)
    assert got.conventions.keys() == vars(got).keys() - {"conventions", "detokenizer"}


def test_a_detokenizer_is_for_the_whole_question(model, tokenizer):
    cut = Question("`` Is he here ? ''", "The XXXXX 's sword is n't .", CANDIDATES, "king")
    plain = Question('"Is he here?"', "The XXXXX's sword isn't.", CANDIDATES, "king")
    got, expected = [], []
    for name in CANDIDATES:
        questions = [dataclasses.replace(one, answer=name) for one in (cut, plain)]
        got.append(evaluate.cloze(*model, tokenizer, questions[:1], detokenizer="ptb").accuracy)
        expected.append(evaluate.cloze(*model, tokenizer, questions[1:]).accuracy)
    assert got == expected
    assert "ptb" in evaluate.cloze(*model, tokenizer, [cut], detokenizer="ptb").conventions["accuracy"]


def test_long_contexts_keep_their_end(model, tokenizer):
    """Text before the last n_ctx tokens has no effect. XXXXX in the context is not a blank."""
    long = dataclasses.replace(QUESTION, context="XXXXX is the king of all. " * 30 + QUESTION.context)
    longer = dataclasses.replace(long, context="My lord! " + long.context)
    assert choice(model, tokenizer, long) == choice(model, tokenizer, longer)
    assert evaluate.cloze(*model, tokenizer, [QUESTION, long, longer]).cut == 2


def test_edits_and_progress_reach_the_model(model, tokenizer):
    """With edits that remove all layers, the choice is that of a model with only embeddings."""
    seen = []
    silent = [scale(f"h{i}/{part}/out", 0.0) for i in range(2) for part in ("attn", "mlp")]
    config, params = model
    muted = {**params, **{f"h{i}": jax.tree.map(np.zeros_like, params[f"h{i}"]) for i in range(2)}}
    track = lambda batches: seen.append(len(batches)) or batches  # noqa: E731
    asked = dataclasses.replace(QUESTION, candidates=CANDIDATES[:3])
    assert choice(model, tokenizer, asked, edits=silent, track=track) == choice((config, muted), tokenizer, asked)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "He gave it to me."}, "must have XXXXX once"),
        ({"question": "XXXXX and XXXXX"}, "must have XXXXX once"),
        ({"question": " XXXXX is here.", "context": " "}, "has nothing before its blank"),
        ({"candidates": ("king",)}, "must have two candidates or more"),
        ({"candidates": ("king", "")}, "must have two candidates or more, none of them empty"),
        ({"answer": "duke"}, "has the answer 'duke', which is not one of its candidates"),
    ],
)
def test_mistakes_are_named(model, tokenizer, change, message):
    wrong = dataclasses.replace(QUESTION, **change)
    with pytest.raises(ValueError, match=rf"questions\[1\] \(from 0\) {message}"):
        evaluate.cloze(*model, tokenizer, [QUESTION, wrong])


def test_no_questions_and_wrong_detokenizers_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="questions is empty"):
        evaluate.cloze(*model, tokenizer, [])
    with pytest.raises(ValueError, match="detokenizer must be one of none, wikitext, ptb, not 'moses'"):
        evaluate.cloze(*model, tokenizer, [QUESTION], detokenizer="moses")
