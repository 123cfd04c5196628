"""Measured values and the paper's figures: which figure belongs to which value, and how each value is computed."""

import math

import pytest

from gpt2_jax import evaluate
from gpt2_jax.evaluate import paper

PASSAGES = ["Give me my robe, put on my crown", "What, ho! my lord, my noble lord", "Long live the king"]
VERSE = "Shall I compare thee to a summer 's day ?\nThou art more lovely and more temperate .\n"


@pytest.fixture(scope="module")
def lambada(shakespeare, tokenizer):
    return evaluate.lambada(*shakespeare, tokenizer, PASSAGES)


@pytest.fixture(scope="module")
def wikitext(shakespeare, tokenizer):
    return evaluate.perplexity(*shakespeare, tokenizer, VERSE, detokenizer="wikitext", per="word")


def test_lambada(lambada):
    rows = {row["measure"]: (row["found"], row["paper"]) for row in paper.compare_lambada(lambada, "1558M")}
    assert rows == {
        "LAMBADA accuracy with stop-word filter": (lambada.accuracy_with_stop_word_filter, 0.6324),
        "LAMBADA accuracy": (lambada.accuracy, None),
        "LAMBADA perplexity per word": (lambada.perplexity_per_word, 8.63),
        "LAMBADA perplexity per token": (lambada.perplexity_per_token, 8.63),
    }


def test_wikitext(wikitext):
    """18 words and 2 line ends. There are fewer after the detokenizer."""
    rows = {row["measure"]: (row["found"], row["paper"]) for row in paper.compare_wikitext2(wikitext, "355M")}
    n_words = len(VERSE.split())
    assert rows == {
        "WikiText-2 perplexity per word": (pytest.approx(math.exp(wikitext.nats / n_words)), 22.76),
        "WikiText-2 perplexity per word or line end": (pytest.approx(math.exp(wikitext.nats / (n_words + 2))), 22.76),
        "WikiText-2 perplexity per token": (pytest.approx(math.exp(wikitext.nats / wikitext.tokens)), None),
    }
    assert rows["WikiText-2 perplexity per word"][0] == pytest.approx(wikitext.perplexity)


def test_a_model_that_is_not_in_the_paper(lambada, wikitext):
    for size in (None, "shakespeare"):
        rows = [*paper.compare_lambada(lambada, size), *paper.compare_wikitext2(wikitext, size)]
        assert {row["paper"] for row in rows} == {None}


def test_every_row_says_how(lambada, wikitext):
    for row in [*paper.compare_lambada(lambada, "124M"), *paper.compare_wikitext2(wikitext, "124M")]:
        assert len(row["ours"]) > 10
        assert row["papers"].startswith("not in Table 3" if row["paper"] is None else "Table 3")
