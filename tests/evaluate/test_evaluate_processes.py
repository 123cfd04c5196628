"""Evaluation over several processes: each does its share of the batches of one process, and the results are equal."""

import json
import random

import numpy as np
import pytest
import several_processes
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax import evaluate, processes
from gpt2_jax.commands import evaluate as command
from gpt2_jax.generation import scoring, shared_batches

PARAMS = random_params(CONFIG, 5)
WORDS = ["the king", "my lord", "of a rose", "and", "thou art", "to", "be", "good night", "sweet", "prince"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Two rows of a batch, and two batches of a process before an exchange: several rounds, the last one incomplete."""
    monkeypatch.setitem(scoring.TOKENS_PER_CALL, "cpu", 64)
    monkeypatch.setattr(shared_batches, "BATCHES_PER_EXCHANGE", 2)


def prompts(n):
    rng = np.random.default_rng(n)
    return [rng.integers(CONFIG.n_vocab, size=rng.integers(2, 100)).tolist() for _ in range(n)]


@pytest.mark.parametrize(("count", "n_prompts"), [(2, 17), (3, 23), (5, 1)])
def test_all_processes_get_the_scores_of_one_bit_for_bit(count, n_prompts, monkeypatch):
    """Also if a process has nothing to do. Each calls the program for its own batches alone."""
    rows = prompts(n_prompts)
    whole = gpt2_jax.score(CONFIG, PARAMS, rows, 30, aside=[3])
    scored, calls, tracked = scoring._scored, [], []
    monkeypatch.setattr(scoring, "_scored", lambda *args: calls.append(1) or scored(*args))

    def score(share):
        def track(batches):
            yield from batches
            tracked.append(len(batches))

        return gpt2_jax.score(CONFIG, PARAMS, rows, 30, aside=[3], share=share, track=track)

    for scores in several_processes.in_threads(count, score):
        for one, other in zip(whole, scores, strict=True):
            assert (one.sum, one.perplexity) == (other.sum, other.perplexity)
            for name in ("logprobs", "greedy", "greedy_aside"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    windows = [window for i, row in enumerate(rows) for window in scoring._windows(i, np.array(row), CONFIG.n_ctx, 30)]
    n_batches = len(list(scoring._batches(windows, CONFIG.n_ctx, 64)))
    assert len(calls) == sum(tracked) == n_batches
    assert sorted(tracked) == sorted(len(range(i, n_batches, count)) for i in range(count))


def test_what_all_have_read_is_deleted():
    texts = several_processes.Texts()
    several_processes.in_threads(2, lambda share: gpt2_jax.score(CONFIG, PARAMS, prompts(17), share=share), texts)
    assert len(texts.names) > 4
    assert sorted(texts.texts) == sorted(texts.names[-2:])


def test_an_error_of_one_process_ends_all():
    """The one that fails raises its own error, and the others raise which one failed, and why."""

    def score(share):
        def fails(batches):
            for i, batch in enumerate(batches):
                if share.index == 1 and i == 2:
                    raise MemoryError("not enough memory: buy more")
                yield batch

        return gpt2_jax.score(CONFIG, PARAMS, prompts(23), share=share, track=fails)

    first, second, third = several_processes.in_threads(3, score)
    assert isinstance(second, MemoryError)
    for error in (first, third):
        assert isinstance(error, processes.PeerError)
        assert str(error) == "the process with index 1 failed: not enough memory: buy more"


def test_unconnected_processes_cannot_exchange():
    with pytest.raises(ValueError, match=r"jax\.distributed\.initialize"):
        gpt2_jax.score(CONFIG, PARAMS, prompts(3), share=processes.Share(1, 2))


def text(seed, n):
    return " ".join(random.Random(seed).choices(WORDS, k=n))


QUESTIONS = [
    evaluate.Question(text(i, 30), f"{text(i, 5)} XXXXX {text(i, 3)}", ("rose", "king", "prince"), "king")
    for i in range(5)
]
TASKS = {
    "perplexity": ([text(i, 5 + 90 * (i % 4)) for i in range(11)], {"stride": 100, "per": "word", "bos": True}),
    "lambada": ([text(i, 3 + 7 * i) for i in range(11)], {}),
    "cloze": (QUESTIONS, {"detokenizer": "ptb"}),
}


@pytest.mark.parametrize("task", TASKS)
def test_measures_are_those_of_one_process(shakespeare, tokenizer, task):
    """To the last digit: the same log-probabilities are summed in the same order."""
    items, more = TASKS[task]
    measure = getattr(evaluate, task)
    whole = measure(*shakespeare, tokenizer, items, **more)
    found = several_processes.in_threads(3, lambda share: measure(*shakespeare, tokenizer, items, **more, share=share))
    assert found == [whole] * 3


@pytest.mark.parametrize(("changes", "culprit"), [({"stride": 9}, "--stride"), ({"limit": 2}, "--limit")])
def test_processes_must_measure_the_same(shakespeare, tmp_path, changes, culprit):
    args = command.Args(tmp_path / "in", "perplexity")
    several = several_processes.in_threads(
        2,
        lambda share: command._check_same(
            command.Args(**vars(args) | (changes if share.index else {})), *shakespeare, ["a"], share
        ),
    )
    assert [str(error) for error in several] == [f"{culprit} is not the same in all processes"] * 2
    for items, seed in ((["a", "b"], 5), (["a"], 6)):

        def check(share, items=items, seed=seed):
            some = (PARAMS, ["a"]) if share.index else (random_params(CONFIG, seed), items)
            command._check_same(args, CONFIG, *some, share)

        name = "FILE" if seed == 5 else "--model"
        assert [str(error) for error in several_processes.in_threads(2, check)] == [
            f"{name} is not the same in all processes"
        ] * 2
    assert several_processes.in_threads(2, lambda share: command._check_same(args, CONFIG, PARAMS, ["a"], share)) == [
        None,
        None,
    ]


def test_the_command_in_processes_that_jax_connects(tmp_path):
    """Two processes with two devices each. The JSON of both is that of one process."""
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"text": one}) for one in TASKS["perplexity"][0]), encoding="utf-8")
    args = (path, "--task", "perplexity", "--json", "--mesh.data", 2)
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_parallel_codegen_split_count=1"}
    outs = []
    for count in (1, 2):
        with several_processes.started(count, "evaluate", *args, cwd=tmp_path, **env) as children:
            for child in children:
                out, err = child.communicate(timeout=120)
                assert child.returncode == 0, err
                outs.append(json.loads(out[out.index("{") :]))  # after a message of Gloo
    assert outs[0] == outs[1] == outs[2]
