"""LAMBADA: a last word is correct if greedy decoding gives it, with or without the stop-word filter."""

import functools

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, chosen_logits, random_params

import gpt2_jax
from gpt2_jax import evaluate
from gpt2_jax.edits import scale

PROMPTS = [
    "ROMEO:\nO,", "Give me my", "God save the", "I have a", "What is the", "the king is", "To be or not to",
    "KING RICHARD II:\nWhat says", "my lord of", "Now is the winter of our", "I will not be", "Come, come, my good",
    "with all my", "in the name of", "he is a most", "and so I take my", "the duke of",
]  # fmt: skip


@jax.jit
def _last_logits(params, tokens_1T, n):
    config = gpt2_jax.load_config(gpt2_jax.embedded_model())
    return gpt2_jax.GPT2(config).apply({"params": params}, tokens_1T).logits[0, n - 1]


def decoded(params, ids, n_new, banned=()):
    """Greedy decoding with one full forward pass per token. The first step cannot choose a token of `banned`."""
    ids = list(ids)
    for step in range(n_new):
        tokens_1T = np.zeros((1, 41), np.int32)
        tokens_1T[0, : len(ids)] = ids
        logits_V = np.array(_last_logits(params, tokens_1T, len(ids)))
        if step == 0:
            logits_V[list(banned)] = -np.inf
        ids.append(int(logits_V.argmax()))
    return ids[-n_new:]


@pytest.fixture(scope="module")
def model(tokenizer):
    """model({token: logit, ...}) -> a model that always gives these logits, and 0 for all other tokens."""

    def build(logits):
        logits_V = np.zeros(tokenizer.n_vocab)
        for text, logit in logits.items():
            (token,) = tokenizer.encode(text)
            logits_V[token] = logit
        return chosen_logits(logits_V)

    return build


@pytest.fixture(scope="module")
def passages(shakespeare, tokenizer):
    """Return (context, word) pairs for the embedded model: prompts with a greedy word, and with another word."""
    pairs = []
    for prompt in PROMPTS:
        ids = decoded(shakespeare[1], tokenizer.encode(prompt), 8)
        word = tokenizer.decode(ids).lstrip(" ").split(" ")[0].split("\n")[0]
        if tokenizer.encode(f" {word}") == ids[: len(tokenizer.encode(f" {word}"))]:
            pairs.append((prompt, word))
    assert len(pairs) > 8
    return [*pairs, *((prompt, "overthrown") for prompt in PROMPTS[:3]), *((prompt, "king") for prompt in PROMPTS)]


def test_it_is_greedy_decoding(shakespeare, tokenizer, passages):
    """One pass over the passage gives the result of decoding, for words of one token and of several."""
    targets = [tokenizer.encode(f" {word}") for _, word in passages]
    assert {len(target) for target in targets} >= {1, 2}
    right = [
        decoded(shakespeare[1], tokenizer.encode(context), len(target)) == target
        for (context, _), target in zip(passages, targets, strict=True)
    ]
    assert 8 < sum(right) < len(right) - 8
    got = evaluate.lambada(*shakespeare, tokenizer, [f"{context} {word}" for context, word in passages])
    assert got.accuracy == sum(right) / len(right)
    for i in (0, 1, right.index(False)):
        alone = evaluate.lambada(*shakespeare, tokenizer, [f"{passages[i][0]} {passages[i][1]}\n"])
        assert alone.accuracy == right[i]


def test_with_the_filter_it_is_greedy_decoding_without_stop_words(shakespeare, tokenizer, passages):
    stop_ids = [tokenizer.encode(f" {form}") for word in evaluate.STOP_WORDS for form in (word, word.capitalize())]
    stop_ids = {ids[0] for ids in stop_ids if len(ids) == 1}
    assert len(stop_ids) > 40
    # The passages of the fixture, and the words that decoding gives without stop words.
    words = [(context, *decoded(shakespeare[1], tokenizer.encode(context), 1, stop_ids)) for context in PROMPTS]
    words = [(context, tokenizer.decode([token]).strip()) for context, token in words]
    words = [(context, word) for context, word in [*passages, *words] if word and " " not in word]
    right, without = 0, 0
    for context, word in words:
        target = tokenizer.encode(f" {word}")
        banned = stop_ids - {target[0]} if len(target) > 1 else stop_ids
        before = tokenizer.encode(context)
        right += (
            decoded(shakespeare[1], before, len(target), banned) == target and word.lower() not in evaluate.STOP_WORDS
        )
        without += decoded(shakespeare[1], before, len(target)) == target
    got = evaluate.lambada(*shakespeare, tokenizer, [f"{context} {word}" for context, word in words])
    assert got.accuracy_with_stop_word_filter == right / len(words)
    assert got.accuracy == without / len(words)
    assert right != without
    assert got.stop_words == sum(word.lower() in evaluate.STOP_WORDS for _, word in words) > 0


def test_the_filter_passes_over_stop_words(model, tokenizer):
    config, params = model({" the": 9, " What": 8, " king": 7, " crown": 6})

    def accuracies(passage, **more):
        got = evaluate.lambada(config, params, tokenizer, [passage], **more)
        return got.accuracy, got.accuracy_with_stop_word_filter, got.stop_words

    assert accuracies("Long live king") == (0, 1, 0)
    assert accuracies("Long live the") == (1, 0, 1)  # greedy, but a stop word
    assert accuracies("Long live What") == (0, 0, 1)
    assert accuracies("Long live crown") == (0, 0, 0)
    assert accuracies("Long live the", stop_words=["king"]) == (1, 1, 0)
    assert accuracies("Long live king", stop_words=["a"]) == (0, 0, 0)
    assert accuracies("Long live the", stop_words=()) == (1, 1, 0)
    assert accuracies("Long live the", stop_words=["overthrown"]) == (1, 1, 0)  # no stop word is one token


def test_a_word_may_go_on_from_a_stop_word(model, tokenizer):
    """The token "may" is a stop word, but "mayor" is not: its first token counts as for any other word."""
    assert tokenizer.encode(" mayor") == [*tokenizer.encode(" may"), *tokenizer.encode("or")]
    for logits, right in (
        ({" may": 9, "or": 9, " king": 8}, (1, 1)),
        ({" may": 9, "or": 9, " king": 10}, (0, 0)),
        ({" may": 9, "or": 8}, (0, 0)),
        ({" may": 9, "or": 9, " the": 10}, (0, 0)),  # the second step has no filter
    ):
        got = evaluate.lambada(*model(logits), tokenizer, ["Long live mayor"])
        assert (got.accuracy, got.accuracy_with_stop_word_filter, got.stop_words) == (*right, 0)


def test_perplexities_of_known_probabilities(model, tokenizer):
    config, params = model({})
    got = evaluate.lambada(config, params, tokenizer, ["Long live the king", "a a overthrown"])
    n_tokens = 1 + len(tokenizer.encode(" overthrown"))
    assert n_tokens > 2
    assert (got.passages, got.tokens) == (2, n_tokens)
    assert got.nats == pytest.approx(n_tokens * np.log(1281), rel=1e-6)
    assert got.perplexity_per_token == pytest.approx(1281, rel=1e-5)
    assert got.perplexity_per_word == pytest.approx(1281 ** (n_tokens / 2), rel=1e-5)
    assert got.conventions.keys() == vars(got).keys() - {"conventions"}


def test_long_passages_keep_their_end(tokenizer):
    """A passage that is too long counts as its last n_ctx + 1 tokens. The model reads all of them except the last."""
    config = CONFIG.replace(n_vocab=tokenizer.n_vocab)
    params = random_params(config, 0, scale=0.3)
    long = "the king and " * 40 + "the queen"
    got = evaluate.lambada(config, params, tokenizer, [long, "Long live the king"])
    assert got.cut == 1
    row = tokenizer.encode(long)[-config.n_ctx - 1 :]
    logits_TV = gpt2_jax.GPT2(config).apply({"params": params}, np.int32([row[:-1]])).logits[0]
    n_last = len(tokenizer.encode(" queen"))
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    nats = -sum(logprobs_TV[t - 1, row[t]] for t in range(len(row) - n_last, len(row)))
    assert evaluate.lambada(config, params, tokenizer, [long]).nats == pytest.approx(nats, rel=1e-5)


def test_edits_and_progress_reach_the_model(shakespeare, tokenizer):
    seen = []
    measure = functools.partial(evaluate.lambada, *shakespeare, tokenizer, ["Long live the king"])
    got = measure(edits=scale("h3/mlp/out", 0.0), track=lambda batches: seen.append(len(batches)) or batches)
    assert got.nats != pytest.approx(measure().nats, rel=1e-3)
    assert seen == [1]


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([], "passages is empty"),
        (["Long live", "king"], r"passages\[1\] \(from 0\) has no space before its last word, 'king'"),
        ([""], r"passages\[0\] \(from 0\) has no space"),
        ([{"text": "a b"}], r"passages\[0\] must be a str, not dict"),
    ],
)
def test_mistakes_are_named(shakespeare, tokenizer, passages, message):
    with pytest.raises(ValueError, match=message):
        evaluate.lambada(*shakespeare, tokenizer, passages)
