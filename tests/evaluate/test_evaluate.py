"""Perplexity: the number, its unit, and the convention that the result states."""

import functools
import math

import numpy as np
import pytest
from tiny_models import CONFIG, chosen_logits, random_params

import gpt2_jax
from gpt2_jax import evaluate
from gpt2_jax.edits import scale

TEXT = 'The king , " said he , is well @-@ known . \n Is he ? \n'
VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate.\n"


@pytest.fixture(scope="module")
def uniform(tokenizer):
    """Return a model with n_ctx 7 that finds every token of the embedded vocabulary equally likely."""
    return chosen_logits(np.zeros(tokenizer.n_vocab))


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """Return a model with n_ctx 41 whose logits depend strongly on all tokens."""
    config = CONFIG.replace(n_vocab=tokenizer.n_vocab)
    return config, random_params(config, 0, scale=0.3)


@pytest.fixture(scope="module")
def measure(uniform, tokenizer):
    return functools.partial(evaluate.perplexity, *uniform, tokenizer)


# ---- the number and its units


def test_every_unit_of_a_known_model(measure, tokenizer):
    n_tokens = len(tokenizer.encode(TEXT)) - 1  # the first has no score
    nats = n_tokens * math.log(1281)
    for per, units in (("token", n_tokens), ("word", 15), ("byte", len(TEXT))):
        got = measure(TEXT, per=per)
        assert got.perplexity == pytest.approx(math.exp(nats / units), rel=1e-5)
        assert got.nats == pytest.approx(nats, rel=1e-6)
        assert got.bits_per_byte == pytest.approx(n_tokens * math.log2(1281) / len(TEXT), rel=1e-6)
        assert (got.documents, got.tokens, got.words, got.lines, got.bytes) == (1, n_tokens, 15, 2, len(TEXT))
        assert (got.per, got.stride, got.bos, got.detokenizer) == (per, 3, False, "none")
        assert f"per {per}: exp(nats / {per}s)" in got.conventions["perplexity"]


def test_words_and_bytes_are_the_original_text_s(measure, tokenizer):
    restored = 'The king, "said he, is well-known.\nIs he?\n'  # a lone quote opens
    got = measure(TEXT, detokenizer="wikitext", per="word")
    assert got.tokens == len(tokenizer.encode(restored)) - 1 < measure(TEXT).tokens
    assert (got.words, got.lines, got.bytes) == (15, 2, len(TEXT))
    assert got.perplexity == pytest.approx(math.exp(got.tokens * math.log(1281) / 15), rel=1e-5)
    with_lines = math.exp(got.tokens * math.log(1281) / 17)
    assert float(got.conventions["lines"].rpartition(" ")[2]) == pytest.approx(with_lines, rel=1e-4)
    assert "before the detokenizer" in got.conventions["words"]
    assert "wikitext" in got.conventions["perplexity"]


def test_bytes_are_utf8(measure):
    assert measure("naïve — ñ").bytes == 13


def test_end_of_text_before_it_scores_the_first_token(measure, tokenizer):
    got = measure(TEXT, bos=True)
    assert got.tokens == len(tokenizer.encode(TEXT))
    assert got.bos
    assert "<|endoftext|> added before it" in got.conventions["perplexity"]
    assert "nothing added before it" in measure(TEXT).conventions["perplexity"]
    assert measure("K", bos=True).tokens == 1  # without bos, no token could be scored


def test_it_is_the_score_of_the_tokens(tiny, tokenizer):
    """Windows and stride are those of `score`. Documents are scored separately, and their sums are added."""
    ids = tokenizer.encode(VERSE * 3)
    assert len(ids) > 2 * tiny[0].n_ctx
    for stride in (None, 7, 41):
        got = evaluate.perplexity(*tiny, tokenizer, VERSE * 3, stride=stride)
        (expected,) = gpt2_jax.score(*tiny, [ids], stride)
        assert got.perplexity == pytest.approx(expected.perplexity, rel=1e-9)
        assert got.nats == pytest.approx(-expected.sum, rel=1e-12)
        assert got.stride == stride or (got.stride, stride) == (20, None)
        assert f"stride {got.stride} of 41" in got.conventions["perplexity"]
    documents = [VERSE * 2, "ROMEO:", VERSE]
    rows = [[tokenizer.eot, *tokenizer.encode(text)] for text in documents]
    got = evaluate.perplexity(*tiny, tokenizer, documents, bos=True, stride=11)
    scores = gpt2_jax.score(*tiny, rows, 11)
    assert got.documents == 3
    assert got.nats == pytest.approx(-sum(one.sum for one in scores), rel=1e-12)
    assert got.perplexity == pytest.approx(math.exp(got.nats / sum(len(row) - 1 for row in rows)), rel=1e-12)


def test_edits_and_progress_reach_the_model(tiny, tokenizer):
    edit, seen = scale("h0/mlp/out", 0.0), []

    def track(batches):
        seen.append(len(batches))
        return batches

    got = evaluate.perplexity(*tiny, tokenizer, VERSE, edits=edit, track=track)
    (expected,) = gpt2_jax.score(*tiny, [tokenizer.encode(VERSE)], edits=edit)
    assert got.nats == pytest.approx(-expected.sum, rel=1e-12)
    assert got.nats != pytest.approx(evaluate.perplexity(*tiny, tokenizer, VERSE).nats, rel=1e-4)
    assert len(seen) == 1
    assert seen[0] > 0


def test_beyond_float64_it_is_infinite(tokenizer):
    logits = np.zeros(tokenizer.n_vocab)
    logits[0] = 900
    got = evaluate.perplexity(*chosen_logits(logits), tokenizer, "ROMEO and JULIET")
    assert got.perplexity == math.inf
    assert math.isfinite(got.nats)


def test_every_convention_is_of_a_field(measure):
    got = measure(TEXT)
    assert got.conventions.keys() == {field for field in vars(got) if field not in ("per", "bos", "detokenizer")} - {
        "conventions"
    }


@pytest.mark.parametrize(
    ("documents", "more", "message"),
    [
        ([], {}, "documents is empty"),
        ("", {}, r"documents\[0\] \(from 0\) is too short to score, with 0 tokens"),
        (["the king", "K"], {}, r"documents\[1\] \(from 0\) is too short to score, with 1 token: .*bos"),
        ("", {"bos": True}, "with 0 tokens"),
        ([b"the king"], {}, r"documents\[0\] must be a str, not bytes"),
        ("the king", {"per": "letter"}, "per must be one of token, word, byte, not 'letter'"),
        ("the king", {"detokenizer": "moses"}, "detokenizer must be one of none, wikitext, ptb, not 'moses'"),
        ("the king", {"stride": 0}, "stride must be a whole number, from 1 to 7, not 0"),
        (" \n \n", {"per": "word"}, "no words"),
    ],
)
def test_mistakes_are_named(measure, documents, more, message):
    with pytest.raises(ValueError, match=message):
        measure(documents, **more)


# ---- against Hugging Face


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory, shakespeare, tokenizer):
    """Return (torch, the embedded model, exported and read by Hugging Face's library)."""
    reason = "needs the `parity` extra: pip install -e '.[parity]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    folder = tmp_path_factory.mktemp("huggingface") / "model"
    gpt2_jax.save(folder, *shakespeare, format="huggingface", tokenizer=tokenizer)
    return torch, transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.mark.parity
def test_perplexity_is_hugging_face_s(hugging_face, shakespeare, tokenizer):
    """The loop of their documentation, with the sum of the losses. Measured relative difference: 1.2e-7."""
    torch, model = hugging_face
    config, stride = shakespeare[0], 97
    ids = tokenizer.encode(VERSE * 17)
    assert len(ids) > config.n_ctx + 2 * stride
    input_ids, nats, previous_end = torch.tensor([ids]), 0.0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + config.n_ctx, len(ids))
        window = input_ids[:, begin:end]
        target = window.clone()
        target[:, : previous_end - end] = -100
        with torch.no_grad():
            logits = model(window).logits
        shifted = target[0, 1:]
        nats += torch.nn.functional.cross_entropy(logits[0, :-1].double(), shifted, reduction="sum").item()
        previous_end = end
        if end == len(ids):
            break
    got = evaluate.perplexity(*shakespeare, tokenizer, VERSE * 17, stride=stride)
    assert got.tokens == len(ids) - 1
    assert got.perplexity == pytest.approx(math.exp(nats / got.tokens), rel=1e-6)


@pytest.mark.parity
def test_last_words_are_hugging_face_s(hugging_face, shakespeare, tokenizer):
    """Each passage alone. Measured differences: 2.2e-6 nats in the sum, 4.4e-7 relative. Greedy tokens are equal."""
    torch, model = hugging_face
    passages = [
        "Good night, good night! parting is such sweet sorrow",
        "O Romeo, Romeo! wherefore art thou Romeo",
        "What, ho! my lord, my noble lord",
        "Give me my robe, put on my crown",
        "KING RICHARD III:\nA horse! a horse! my kingdom for a horse",
    ]
    nats, right, n_tokens = 0.0, 0, 0
    for passage in passages:
        context, _, word = passage.rpartition(" ")
        before, after = tokenizer.encode(context), torch.tensor(tokenizer.encode(f" {word}"))
        with torch.no_grad():
            logits = model(torch.tensor([before + after.tolist()])).logits[0, len(before) - 1 : -1].double()
        nats += torch.nn.functional.cross_entropy(logits, after, reduction="sum").item()
        right += bool((logits.argmax(-1) == after).all())
        n_tokens += len(after)
    got = evaluate.lambada(*shakespeare, tokenizer, passages)
    assert got.nats == pytest.approx(nats, abs=2e-5)
    assert got.perplexity_per_word == pytest.approx(math.exp(nats / 5), rel=4e-6)
    assert got.perplexity_per_token == pytest.approx(math.exp(nats / n_tokens), rel=4e-6)
    assert (got.accuracy, got.tokens) == (right / 5, n_tokens)
    assert 0 < right < 5
