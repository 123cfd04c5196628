"""Responses to instructions: exact match, ROUGE-L, and a judge behind an OpenAI-compatible address."""

import http.server
import json
import threading

import instructions as made
import pytest

from gpt2_jax.data import TEMPLATES
from gpt2_jax.evaluate import Judge, _responses, judge, judged, responses, rouge_l
from gpt2_jax.generation import Completion, answer, answers, generate

ALPACA = TEMPLATES["alpaca"]


@pytest.fixture
def model():
    return made.CONFIG, made.params()


# ---- the measures


@pytest.mark.parametrize(
    ("response", "expected", "score"),
    [
        ("The king is dead.", "the KING is dead", 1.0),
        ("the cat sat on the mat", "the cat was on the mat", 10 / 12),
        ("police killed the gunman", "the gunman killed police", 2 * 2 / 8),  # the gunman, in this order
        ("a b c d", "d c b a", 2 / 8),
        ("a b", "c", 0.0),
        ("", "a", 0.0),
        ("...", "!", 1.0),  # no words
        ("\u00c9t\u00e9", "\u00e9t\u00e9 42", 2 / 3),
    ],
)
def test_rouge_l(response, expected, score):
    assert rouge_l(response, expected) == pytest.approx(score)


def test_rouge_l_is_that_of_google_s_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score is not installed")
    theirs = scorer.RougeScorer(["rougeL"], use_stemmer=False)
    texts = [record["output"] for record in made.RECORDS] + ["Good night to the king, sir.", "dead dead king"]
    for one in texts:
        for other in texts:
            if one and other:
                assert rouge_l(one, other) == pytest.approx(theirs.score(other, one)["rougeL"].fmeasure)


def test_answers_are_greedy_ends_at_the_end_of_text_and_keep_their_order(model, tokenizer):
    asked = [record["instruction"] for record in made.RECORDS]
    found = answer(*model, tokenizer, ALPACA, asked, batch_size=2)
    for instruction, completion in zip(asked, found, strict=True):
        prompt = ALPACA.prompt_ids(tokenizer, instruction)
        how = {"temperature": 0, "overflow": "slide", "stop_ids": [tokenizer.eot]}
        (ids,) = generate(*model, [prompt], 256, **how)
        assert completion.ids == ids
        assert completion.text == tokenizer.decode(ids)


def test_exact_match_rouge_and_cut(monkeypatch, model, tokenizer):
    given = [" The king is dead.\n", "lady lord", "War", "", "", "Good day to you all."]
    asked = []

    def complete(config, params, prompts, tokenizer, settings, rows):
        del config, params, tokenizer, settings
        asked.extend(zip(rows, prompts, strict=True))
        return [Completion(given[i], [], stopped=i != 3, logprobs=None) for i in rows]

    monkeypatch.setattr(answers, "complete", complete)
    found = responses(*model, tokenizer, ALPACA, made.RECORDS, batch_size=4)
    assert [record["exact_match"] for record in found.records] == [True, False, False, False, True, True]
    assert (found.exact_match, found.responses, found.cut, found.judge) == (3 / 6, 6, 1, None)
    expected = [rouge_l(one, record["output"]) for one, record in zip(given, made.RECORDS, strict=True)]
    assert found.rouge_l == pytest.approx(sum(expected) / 6)
    assert found.records[0] == {**made.RECORDS[0], "response": given[0], "exact_match": True, "rouge_l": 1.0}
    assert {i: tokenizer.decode(ids) for i, ids in asked} == {i: made.prompt(one) for i, one in enumerate(made.RECORDS)}
    assert set(found.conventions) == {"exact_match", "rouge_l", "responses", "cut"}


def test_the_last_answer_of_a_conversation_is_expected(monkeypatch, model, tokenizer):
    seen = []

    def answered(config, params, tokenizer, template, asked, *more):
        del config, params, tokenizer, template, more
        seen.extend(asked)
        return [Completion("So.", [], stopped=True, logprobs=None)]

    monkeypatch.setattr(_responses, "answer", answered)
    messages = [("user", "Who?"), ("assistant", "I."), ("user", "Why?"), ("assistant", "So.")]
    record = {"messages": [{"role": role, "content": content} for role, content in messages]}
    found = responses(*model, tokenizer, ALPACA, [record])
    assert found.records == [{**record, "output": "So.", "response": "So.", "exact_match": True, "rouge_l": 1.0}]
    assert [turn.answer for turn in seen[0].turns] == ["I.", None]


def test_bad_records_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="records is empty"):
        responses(*model, tokenizer, ALPACA, [])
    with pytest.raises(ValueError, match=r'records\[1\] \(from 0\) has an "instruction" without its "output"'):
        responses(*model, tokenizer, ALPACA, [made.RECORDS[0], {"instruction": "a"}])


# ---- the judge


class Handler(http.server.BaseHTTPRequestHandler):
    """Replies with what the test scripted, and records the requests."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers, json.loads(body)))  # pyright: ignore
        status, text = self.server.replies.pop(0)  # pyright: ignore
        if status == 0:  # the connection breaks
            self.close_connection = True
            return
        data = text if isinstance(text, bytes) else json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        del args


@pytest.fixture
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as one:
        one.seen, one.replies = [], []  # pyright: ignore
        one.url = f"http://127.0.0.1:{one.server_port}/v1"  # pyright: ignore
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(judge.KEY, raising=False)


ASKED = ("Say {it}.", "the king", "The king.", "A {king}.")


@pytest.mark.parametrize(
    ("reply", "score"),
    [("85", 85), (" Score: 85.\n", 85), ("85/100", 85), ("100.0", 100), ("0", 0)]
    + [(reply, None) for reply in ("good", "", "101", "-5", "8.5", "between 70 and 80")],
)
def test_a_reply_is_a_number(server, reply, score):
    server.replies = [(200, reply)]
    assert Judge(server.url, "llama3").score(*ASKED) == score


def test_a_request_is_that_of_openai_and_the_key_goes_only_there(server, monkeypatch):
    server.replies = [(200, "7"), (200, "7")]
    Judge(server.url + "/", "llama3").score(*ASKED)
    monkeypatch.setenv(judge.KEY, "secret")
    Judge(server.url, "llama3").score("Say.", "", "a", "b")
    (path, headers, body), (_, with_key, short) = server.seen
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], len(body["messages"])) == ("llama3", 0, 1)
    text = body["messages"][0]["content"]
    assert all(part in text for part in ASKED)
    assert "Input" not in short["messages"][0]["content"]
    assert headers["Authorization"] is None
    assert with_key["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("first", [(500, b"oops"), (429, b""), (0, b"")])
def test_there_is_one_more_try(server, first):
    server.replies = [first, (200, "40")]
    assert Judge(server.url, "m").score(*ASKED) == 40
    server.replies = [first, first, (200, "40")]
    with pytest.raises(OSError, match=r"the judge at http://127.0.0.1:\d+/v1 (refused: HTTP|does not answer)"):
        Judge(server.url, "m").score(*ASKED)


def test_a_refusal_names_the_key_but_does_not_show_it(server, monkeypatch):
    monkeypatch.setenv(judge.KEY, "secret")
    server.replies = [(401, b"wrong key: secret")]
    with pytest.raises(OSError, match=r"refused: HTTP 401 Unauthorized; is OPENAI_API_KEY set\?") as error:
        Judge(server.url, "m").score(*ASKED)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("data", [b"<html>", b"{}", b'{"choices": []}', b"[]"])
def test_a_reply_of_another_form_is_no_score(server, data):
    server.replies = [(200, data)]
    assert Judge(server.url, "m").score(*ASKED) is None


def test_nobody_listens():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as one:
        port = one.server_port
    with pytest.raises(OSError, match=r"does not answer \(.*refused\): is it running\?"):
        Judge(f"http://127.0.0.1:{port}/v1", "m").score(*ASKED)


def test_a_slow_judge_is_given_up():
    """The server listens, but never replies."""
    timed_out = pytest.raises(OSError, match=r"does not answer .*timed out")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as one, timed_out:
        Judge(f"http://127.0.0.1:{one.server_port}/v1", "m", timeout=0.05).score(*ASKED)


def test_an_address_and_a_name_are_needed():
    with pytest.raises(ValueError, match="must begin with http"):
        Judge("localhost:11434", "m")
    with pytest.raises(ValueError, match="needs the name of its model"):
        Judge("http://localhost:11434/v1", "")


def test_scores_are_averaged_and_missing_ones_counted(server, monkeypatch, model, tokenizer):
    done = [Completion("x", [], stopped=True, logprobs=None)] * 3
    monkeypatch.setattr(_responses, "answer", lambda *args: done)
    found = responses(*model, tokenizer, ALPACA, made.RECORDS[:3])
    server.replies = [(200, "10"), (200, "no"), (200, "60")]
    with_scores = judged(found, Judge(server.url, "llama3"))
    assert (with_scores.judge, with_scores.unjudged) == (35.0, 1)
    assert [record["judge"] for record in with_scores.records] == [10, None, 60]
    assert "judge" not in found.records[0]
    server.replies = [(200, "no")] * 3
    assert judged(found, Judge(server.url, "llama3")).judge is None
