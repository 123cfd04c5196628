"""Our adapter for EleutherAI's harness gives the results of its own adapter for Hugging Face, with the same weights."""

import json
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import vocabulary_forms
from tiny_models import random_params
from vocabulary_makers import EOT

import gpt2_jax
from gpt2_jax.edits import replace
from gpt2_jax.evaluate.harness import language_model
from gpt2_jax.generation.decoding import Completion

pytestmark = pytest.mark.parity

# Relative. Measured: log-probability of a continuation 1.7e-6, of a text 1.4e-7; perplexity 2.4e-7.
BOUND = 8e-6

SPEECH = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

"""
N_CTX = 61  # all tests also use the same few batch sizes, because each new size must be compiled
LONG = 9 * SPEECH  # 486 tokens
GREEDY = {"ROMEO:\n": "Anon, I'll not", "KING": " RICHARD III:\n"}  # greedy continuations
UNTIL = {"until": ["\n\n", "."], "max_gen_toks": 23}


class Harness(NamedTuple):
    """The library, and the same model behind two adapters."""

    lm_eval: Any
    ours: Any
    theirs: Any

    def both(self, kind, *arguments):
        """Send requests of one kind to both models. Each request is a tuple of arguments."""
        return [ask(model, kind, *arguments) for model in (self.ours, self.theirs)]


def ask(model, kind, *arguments, disable_tqdm=True):
    from lm_eval.api.instance import Instance

    requests = [Instance(kind, doc={}, arguments=each, idx=0) for each in arguments]
    return getattr(model, kind)(requests, disable_tqdm=disable_tqdm)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return lm_eval and import what it needs, without network and without the user's cache. Skip if it is missing."""
    reason = "needs the `parity` extra: pip install -e '.[parity]'"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of imports are not about our files
            for name in ("torch", "transformers", "accelerate", "lm_eval"):
                pytest.importorskip(name, reason=reason)
            import datasets.config
            import lm_eval.evaluator
            import lm_eval.models.huggingface
            import lm_eval.tasks
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # in case another file imported it before
        yield lm_eval


@pytest.fixture(scope="module")
def model(library, shakespeare, tokenizer):
    """Return (config, params, tokenizer) of the embedded model, with an n_ctx that is odd and shorter than LONG."""
    config, params = shakespeare
    return config.replace(n_ctx=N_CTX), {**params, "wpe": params["wpe"][:N_CTX]}, tokenizer


@pytest.fixture(scope="module")
def harness(library, model, tmp_path_factory):
    import torch
    import transformers

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with several test processes, more threads wait for each other
    config, params, tokenizer = model
    folder = tmp_path_factory.mktemp("export")
    gpt2_jax.save(folder, config, params, format="huggingface", tokenizer=tokenizer)
    theirs = library.models.huggingface.HFLM(
        pretrained=transformers.GPT2LMHeadModel.from_pretrained(folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        batch_size=3,
    )
    yield Harness(library, language_model(*model, batch_size=4), theirs)
    torch.set_num_threads(n_threads)


def largest_error(ours, theirs):
    """Return the largest relative difference between two lists of numbers."""
    ours, theirs = np.array(ours), np.array(theirs)
    return np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-30))


# ---- whole tasks


def tasks(folder):
    """Return one task of each kind. The tasks read JSON lines files in the folder."""
    questions = [
        {"text": text, "choices": [GREEDY.get(text, " sir"), " the king", "I ", "\nWhat, ho!"], "answer": i % 4}
        for i, text in enumerate([*GREEDY, "All: ", SPEECH, LONG + "JULIET:", LONG + "JULIET: "])
    ]
    texts = [{"text": SPEECH}, {"text": LONG}]
    openings = [{"text": text} for text in ("KING", f"{SPEECH}JULIET:\n", f"{SPEECH}All:\n", LONG)]
    for name, rows in (("questions", questions), ("texts", texts), ("openings", openings)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def task(name, kind, metrics, **fields):
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": files,
            "test_split": "test",
            "output_type": kind,
            "metric_list": [{"metric": metric} for metric in metrics],
            **fields,
        }

    text, choices = {"doc_to_text": "{{text}}"}, {"doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    opening = {"doc_to_target": GREEDY["KING"], "generation_kwargs": {**UNTIL, "do_sample": False}}
    perplexities = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return [
        task("questions", "multiple_choice", ("acc", "acc_norm"), target_delimiter="", **text, **choices),
        task("texts", "loglikelihood_rolling", perplexities, doc_to_text="", doc_to_target="{{text}}"),
        task("openings", "generate_until", ("exact_match",), **text, **opening),
    ]


def test_tasks_come_out_the_same(harness, tmp_path):
    manager = harness.lm_eval.tasks.TaskManager(include_defaults=False)
    ours, theirs = (
        harness.lm_eval.simple_evaluate(model, tasks=tasks(tmp_path), task_manager=manager, bootstrap_iters=0)
        for model in (harness.ours, harness.theirs)
    )

    def answers(results, name):
        return [answer for sample in results["samples"][name] for (answer,) in sample["resps"]]

    logprobs, greedy = zip(*answers(ours, "questions"), strict=True)
    their_logprobs, their_greedy = zip(*answers(theirs, "questions"), strict=True)
    assert largest_error(logprobs, their_logprobs) <= BOUND
    assert greedy == their_greedy
    assert sum(greedy) == len(GREEDY)  # the first choice, for each text in GREEDY
    assert largest_error(answers(ours, "texts"), answers(theirs, "texts")) <= BOUND
    assert answers(ours, "openings") == answers(theirs, "openings")
    assert answers(ours, "openings")[0].startswith(GREEDY["KING"])
    for name, metrics in theirs["results"].items():
        assert ours["results"][name].keys() == metrics.keys()
        for metric, value in metrics.items():
            found = ours["results"][name][metric]
            assert found == value if isinstance(value, str) else largest_error(found, value) <= BOUND, metric


# ---- the conventions, one by one


def test_loglikelihood_of_every_kind_of_pair(harness, tokenizer):
    tokens = tokenizer.encode(LONG)
    full, almost = tokenizer.decode(tokens[:N_CTX]), tokenizer.decode(tokens[: N_CTX - 1])
    assert [len(tokenizer.encode(text)) for text in (full, almost)] == [N_CTX, N_CTX - 1]
    pairs = [
        ("", "First Citizen"),  # after <|endoftext|>
        ("", "<|endoftext|>First Citizen"),  # one <|endoftext|>, not two
        ("<|endoftext|>", "First Citizen"),
        ("All<|endoftext|>", "<|endoftext|>All"),
        ("KING ", "RICHARD III"),  # the space becomes part of the continuation
        ("KING \n ", "RICHARD III"),
        ("Before we pro", "ceed any further"),  # tokens across the border belong to the continuation
        ("na\u00efve \u2014 ", "\u201ctis\U0001f642"),
        *GREEDY.items(),
        ("KING", " RICHARD II"),
        (LONG, "You are all"),  # cut from the left
        ("", full),
        ("<|endoftext|>All", full),  # one token too many
        ("All", almost),
        (LONG.strip(), almost),
    ]
    ours, theirs = harness.both("loglikelihood", *pairs)
    assert largest_error([total for total, _ in ours], [total for total, _ in theirs]) <= BOUND
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {False, True}


def test_loglikelihood_of_texts_of_every_length(harness, tokenizer):
    tokens = tokenizer.encode(LONG)
    lengths = [*range(11), N_CTX - 1, N_CTX, N_CTX + 1, 2 * N_CTX, 2 * N_CTX + 1, 3 * N_CTX - 1]
    texts = [tokenizer.decode(tokens[:n]) for n in lengths]
    assert [len(tokenizer.encode(text)) for text in texts] == lengths
    ours, theirs = harness.both("loglikelihood_rolling", *((text,) for text in (*texts, "All<|endoftext|>All")))
    assert ours[0] == theirs[0] == 0
    assert largest_error(ours[1:], theirs[1:]) <= BOUND


def test_generated_texts_of_every_kind(harness):
    contexts = [LONG + name for name in ("KING", "All:\n", "ROM")]  # cut to as many tokens: HFLM penalizes padding
    kinds = [
        {**UNTIL, "until": "\n\n"},
        {**UNTIL, "until": ["?\n\nCLA", "l you, s", "?"]},  # inside tokens, and over several
        {"max_new_tokens": 23, "num_beams": 1, "temperature": 0.0},
        {**UNTIL, "do_sample": True, "temperature": 0.7, "top_k": 1},
        {**UNTIL, "temperature": 2.3, "top_p": 1e-6},
        {**UNTIL, "repetition_penalty": 1.7},
    ]
    ours, theirs = harness.both("generate_until", *((text, kind) for kind in kinds for text in contexts))
    assert ours == theirs
    assert len(set(ours)) >= 10
    assert ours[:6:5] == [" EDWARD IV:\nWhat, then?", "ARCIUS:\nI'll tel"]


def test_a_sampled_text_depends_on_the_seed_and_its_place(model):
    requests = 8 * [(LONG, {**UNTIL, "do_sample": True, "temperature": 1.0})]
    texts, again, other = (
        ask(language_model(*model, batch_size=4, seed=seed), "generate_until", *requests) for seed in (7, 7, 8)
    )
    assert len({*texts, *other}) == 16
    assert texts == again


def always(params, probabilities):
    """Return params that always give these tokens these probabilities, and all other tokens almost 0."""
    tokens = list(probabilities)
    logits = 30 + np.log([probabilities[token] for token in tokens])
    bias_D = np.linalg.lstsq(np.asarray(params["wte"])[tokens], logits.astype(np.float32))[0]
    return {**params, "ln_f": {"g": np.zeros_like(bias_D), "b": bias_D}}


def test_a_text_ends_before_the_end_of_text(model):
    config, params, tokenizer = model
    ours = language_model(config, always(params, {tokenizer.eot: 1.0}), tokenizer)
    assert ask(ours, "generate_until", *(4 * [(LONG, UNTIL)])) == ["", "", "", ""]


@pytest.mark.parametrize(
    ("form", "end"), [("two files", EOT), ("special first, named", "</s>"), ("no end of text", None)]
)
def test_the_end_of_text_of_every_vocabulary(library, tmp_path, monkeypatch, form, end):
    """The harness takes it as a stop string. Some vocabularies spell it differently, and some have none."""
    tokenizer = vocabulary_forms.load(tmp_path, form)
    assert tokenizer.eot == (None if end is None else tokenizer.tokens[end])
    stops, ends = library.models.utils.handle_stop_sequences, []
    monkeypatch.setattr(
        library.models.utils, "handle_stop_sequences", lambda until, eos: ends.append(eos) or stops(until, eos)
    )
    config = gpt2_jax.GPT2Config(n_vocab=tokenizer.n_vocab, n_ctx=N_CTX, n_embd=6, n_head=3, n_layer=1)
    (a,) = tokenizer.encode("a")
    token, params = a if tokenizer.eot is None else tokenizer.eot, random_params(config, 5)
    wte = np.zeros((config.n_vocab, 6), np.float32)
    wte[token] = 9
    said = {**params, "wte": wte, "ln_f": {"g": np.zeros(6, np.float32), "b": wte[token]}}  # it always predicts `token`
    texts = ask(language_model(config, said, tokenizer), "generate_until", *(4 * [(LONG, UNTIL)]))
    assert texts == 4 * ["a" * 23 if end is None else ""]
    assert ends == 4 * [end]
    if end is None:
        with pytest.raises(ValueError, match="a task without a context needs an end-of-text token"):
            ask(language_model(config, said, tokenizer), "loglikelihood_rolling", ("a",))


@pytest.mark.parametrize(("top_p", "letters"), [(0.5, {"A"}), (0.7, {"A", "B"})])
def test_top_p_keeps_the_token_that_crosses_it(model, top_p, letters):
    config, params, tokenizer = model
    (a,), (b,) = map(tokenizer.encode, "AB")
    ours = language_model(config, always(params, {a: 0.6, b: 0.4}), tokenizer)
    texts = ask(ours, "generate_until", *(4 * [(LONG, {**UNTIL, "temperature": 1.0, "top_p": top_p})]))
    assert {len(text) for text in texts} == {23}
    assert {*"".join(texts)} == letters


def test_an_empty_context_is_the_end_of_text(model):
    empty, end, *_ = ask(
        language_model(*model), "generate_until", *((text, UNTIL) for text in ("", "<|endoftext|>", LONG, LONG))
    )
    assert empty == end
    assert empty


# ---- without the other adapter


@pytest.fixture(scope="module")
def tiny(library, tokenizer):
    """Return (config, params, tokenizer): few positions, one layer, the embedded vocabulary."""
    config = gpt2_jax.GPT2Config(n_vocab=tokenizer.n_vocab, n_ctx=7, n_embd=6, n_head=3, n_layer=1)
    return config, random_params(config, 5), tokenizer


class Told:
    """Records the calls to a cache of the harness."""

    def __init__(self):
        self.answers = []

    def add_partial(self, kind, arguments, answer):
        self.answers.append((kind, arguments, answer))


def test_every_answer_reaches_the_cache(model):
    told = Told()
    ours = language_model(*model, max_gen_toks=23)
    ours.set_cache_hook(told)
    expected = []
    for kind, arguments in (
        ("loglikelihood", [("I", " am"), ("You are", " not"), ("", "I")]),
        ("loglikelihood_rolling", [("I am not what I am",), ("",), ("Ay",)]),
        ("generate_until", [(LONG, {}), (LONG + "I", {}), (LONG + "O", {})]),
    ):
        expected += zip([kind] * 3, arguments, ask(ours, kind, *arguments), strict=True)
    assert len(told.answers) == 9
    assert all(answer in told.answers for answer in expected)


def test_edits_reach_every_answer(tiny, monkeypatch):
    """If the output of the last norm is 0, all tokens are equally likely."""
    nothing = replace("ln_f/out", 0.0)
    edited = language_model(*tiny, max_gen_toks=2, edits=nothing)
    uniform = pytest.approx(-np.log(tiny[0].n_vocab), rel=1e-6)
    assert ask(edited, "loglikelihood", ("", "!"))[0][0] == uniform
    assert ask(edited, "loglikelihood_rolling", ("!",))[0] == uniform

    def complete(config, params, prompts, tokenizer, settings, first_row, edits):
        assert edits.edits == (nothing,)
        return [Completion("said", [], False, None) for _ in prompts]

    monkeypatch.setattr("gpt2_jax.evaluate.harness.complete", complete)
    assert ask(edited, "generate_until", ("I", {}), ("Ay", {})) == ["said", "said"]


def test_taps_reach_every_answer_and_values_of_rows_are_refused(tiny):
    """The harness chooses the rows, so an edit has one value for all of them."""
    tapped = language_model(*tiny, taps={"ln_f/out": lambda value, position_BT: value * 0})
    uniform = pytest.approx(-np.log(tiny[0].n_vocab), rel=1e-6)
    assert ask(tapped, "loglikelihood", ("", "!"))[0][0] == uniform
    with pytest.raises(ValueError, match="each row"):
        language_model(*tiny, edits=replace("ln_f/out", np.zeros(3), each_row=True))
    with pytest.raises(ValueError, match="position"):
        language_model(*tiny, edits=replace("ln_f/out", 0.0, positions=tiny[0].n_ctx))


def test_a_context_of_spaces_is_an_empty_one(tiny):
    spaces, after_the_end = ask(language_model(*tiny), "loglikelihood", ("  ", "I"), ("<|endoftext|>", "  I"))
    assert spaces == pytest.approx(after_the_end)


def test_no_requests_no_answers(tiny):
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        assert ask(language_model(*tiny), kind) == []


def test_progress_and_cuts_are_reported(model, tiny, capsys, caplog):
    for disable in (True, False):
        prompts = [(text, UNTIL) for text in (LONG, "KING", LONG, LONG)]
        ask(language_model(*model), "generate_until", *prompts, disable_tqdm=disable)
        assert ("Running generate_until requests" in capsys.readouterr().err) != disable
        ask(language_model(*tiny), "loglikelihood", ("I", "I"), ("Ay, ay, ay, ay", "I"), disable_tqdm=disable)
        assert ("Running loglikelihood requests" in capsys.readouterr().err) != disable
    said = [record.getMessage() for record in caplog.records if record.name == "gpt2_jax.evaluate.harness"]
    assert [line.split(" do ")[0] for line in said] == 2 * ["3 of 4 contexts", "1 of 2 contexts"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"num_beams": 3, "until": "O"},
            "num_beams=3, which is not supported; these are supported: until, max_gen_toks, do_sample",
        ),
        ({"max_length": 3, "diversity": 1}, "diversity=1, max_length=3"),
        ({"do_sample": True}, "do_sample at a temperature of 0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be"),
        ({"top_p": 0, "temperature": 1.0}, "top_p must be"),
        ({"until": [""]}, "stop_strings must hold strings"),
        ({"max_gen_toks": 7}, "max_gen_toks=7 .* n_ctx, 7"),
    ],
)
def test_what_no_generation_can_be(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ask(language_model(*tiny, max_gen_toks=2), "generate_until", ("I", {}), ("I", kwargs))


@pytest.mark.parametrize("continuation", ["", "Ay, ay, ay, ay"])
def test_what_no_continuation_can_be(tiny, continuation):
    with pytest.raises(ValueError, match=r"from 1 to 7 \(n_ctx\) tokens, not .*I"):
        ask(language_model(*tiny), "loglikelihood", ("I", continuation))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": "auto"}, {"max_gen_toks": -1}])
def test_what_no_argument_can_be(tiny, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number, 1 or more"):
        language_model(*tiny, **wrong)
