"""`fit` on a tiny model: what it measures, saves and refuses, when it stops, and that it resumes from any point."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from unittest import mock

import commands
import jax
import numpy as np
import pytest
import tiny_models
from strength import full_only
from train_states import assert_same
from training_steps import recipe

import gpt2_jax
from gpt2_jax.params import flatten
from gpt2_jax.training import fit, loop, make_plan, observer, open_prepared, prepare
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.optimizer import make_schedule
from gpt2_jax.training.plan import training_config

CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=13, n_embd=6, n_head=3, n_layer=1)  # the embedded vocabulary's ids
TEXT = "".join(f"The {i % 7} of {'thee' if i % 3 else 'thou'} and the {i * i % 11}.\n" for i in range(83))
PROMPTS = ("The ", "")
SMALL = {
    "steps": 7,
    "batch_size": 3,
    "model": {"dropout": 0.1},
    "data": {"n_tokens": 11},
    "optimizer": {"schedule": "cosine", "learning_rate": 0.01},
    "monitor": {"evaluate_every": 3, "save_every": 5, "sample_every": 0, "tensorboard": False},
}


def small(**changes):
    """The recipe SMALL with changes; changes of a part are dicts."""
    merged = SMALL | changes
    return recipe(**{k: {**SMALL[k], **v} if isinstance(v, dict) and k in SMALL else v for k, v in merged.items()})


def random_weights(config=CONFIG):
    return tiny_models.random_params(config, 7, scale=0.3)


WILD = {"optimizer": {"learning_rate": 2.0, "schedule": "constant"}}  # so high that the model soon gets worse


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory):
    """Compile quickly and cache the programs: otherwise each `fit` would compile them again."""
    before = jax.config.read("jax_disable_most_optimizations")
    with commands.config_of_jax_kept():
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    return prepare([folder / "text.txt"], folder / "tokens", tokenizer, val_fraction=0.2, split="tail", shown=False)


@pytest.fixture
def run(tmp_path, data):
    """Give call(recipe, ...) -> Fitted for the run in tmp_path / "run"; the slow curve is drawn only on request."""

    def call(recipe, config=CONFIG, params=None, text=data, tokenizer=None, name="run", curve=False):
        params = random_weights(config) if params is None else params
        with contextlib.nullcontext() if curve else mock.patch.object(loop, "plot_curve"):
            return fit(make_plan(config, recipe), params, text, tmp_path / name, tokenizer)

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """The folder of a run of small(): copy it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(make_plan(CONFIG, small()), random_weights(), data, folder)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(folder, name="loss"):
    """{step: value} of one number in metrics.jsonl."""
    return {line["step"]: line[name] for line in lines(folder / "metrics.jsonl") if name in line}


def state_of(folder, recipe, config=CONFIG, step=None):
    return Checkpoints(folder).restore(make_plan(config, recipe).state, step)


def assert_same_params(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], name)


def plain_loss(config, params, tokens, n_tokens):
    """Nats a token over consecutive windows, from all logits."""
    ids = tokens.read(0, tokens.n_tokens)[0]
    n_windows = (len(ids) - 1) // n_tokens
    inputs = ids[: n_windows * n_tokens].reshape(n_windows, n_tokens)
    targets = ids[1 : n_windows * n_tokens + 1].reshape(n_windows, n_tokens)
    log_p = jax.nn.log_softmax(gpt2_jax.GPT2(config).apply({"params": params}, inputs).logits.astype("float32"))
    return -float(np.take_along_axis(np.asarray(log_p), targets[..., None], -1).mean())


class Noticing:
    """Replaces a function of a module, and calls `act` before the `at`-th call."""

    def __init__(self, monkeypatch, name, act, at, owner=observer):
        self.was, self.n, self.act, self.at = getattr(owner, name), 0, act, at
        monkeypatch.setattr(owner, name, lambda *args, **named: self(*args, **named))

    def __call__(self, *args, **named):
        self.n += 1
        if self.n == self.at:
            self.act()
        return self.was(*args, **named)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


# ---- what is measured and kept


def test_a_run_measures_keeps_and_speaks_as_often_as_it_should(tmp_path, run, data, tokenizer, capfd, monkeypatch):
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, state: (saved.append(step), save(self, step, state))[1])
    wanted = small(monitor={"sample_every": 2, "prompts": PROMPTS, "sample_tokens": 5})
    fitted = run(wanted, tokenizer=tokenizer, curve=True)
    folder = tmp_path / "run"
    out, err = capfd.readouterr()
    assert out == ""
    assert "each device needs about" in err
    assert re.search(r"the compiled step needs [\d.]+ MB of memory on each device", err)
    assert (fitted.step, fitted.stopped, fitted.signal) == (7, "", None)
    assert list(metrics(folder)) == [1, 2, 3, 4, 5, 6, 7]
    assert list(metrics(folder, "val_loss")) == [0, 3, 6, 7]
    assert [line["step"] for line in lines(folder / "samples.jsonl")] == [2, 2, 4, 4, 6, 6, 7, 7]
    assert saved == [5, 7]
    assert err.count("occur verbatim in the training text") == 8
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    losses = metrics(folder, "val_loss")
    assert fitted.best_loss == min(losses.values()) == losses[fitted.best_step]
    assert losses[7] < losses[0] - 0.05
    assert f"the best validation loss is {fitted.best_loss:.4f}, after step {fitted.best_step}" in err
    # `load` gives the model of that step, checked by the definition of the loss
    config, params = gpt2_jax.load(folder)
    assert plain_loss(config, params, data.val, 11) == pytest.approx(fitted.best_loss, abs=2e-5)
    assert plain_loss(CONFIG, random_weights(), data.val, 11) == pytest.approx(losses[0], abs=2e-5)
    assert plain_loss(CONFIG, fitted.params, data.val, 11) == pytest.approx(losses[7], abs=2e-5)
    assert metrics(folder, "perplexity")[7] == pytest.approx(math.exp(losses[7]))
    assert_same_params(state_of(folder, wanted).params, fitted.params)
    # the samples are what the model of the last step writes with these settings
    settings = {"temperature": 1.0, "top_k": 40, "seed": wanted.seed, "stop_ids": [tokenizer.eot]}
    rows = [tokenizer.encode("The "), [tokenizer.eot]]
    written = gpt2_jax.generate(CONFIG, fitted.params, rows, 5, overflow="slide", **settings)
    last = lines(folder / "samples.jsonl")[-2:]
    assert [line["text"] for line in last] == [tokenizer.decode(row) for row in written]
    assert [line["prompt"] for line in last] == list(PROMPTS)
    # every function that takes a model takes the run's folder
    assert gpt2_jax.load_tokenizer(folder).encode("thou") == tokenizer.encode("thou")
    assert math.isfinite(gpt2_jax.score(config, params, [tokenizer.encode("The thou")])[0].sum)


def test_the_best_model_is_kept_and_not_the_last(tmp_path, run, data):
    fitted = run(small(**WILD, monitor={"evaluate_every": 1}))
    losses = metrics(tmp_path / "run", "val_loss")
    assert fitted.best_step == min(losses, key=losses.get) < 7
    config, params = gpt2_jax.load(tmp_path / "run")
    assert plain_loss(config, params, data.val, 11) == pytest.approx(fitted.best_loss, abs=2e-5)
    _, last = gpt2_jax.load(tmp_path / "run" / "checkpoints" / "7")
    assert_same_params(last, fitted.params)


def test_validation_may_be_of_some_windows_in_bfloat16_or_not_at_all(tmp_path, run, data):
    few = small(monitor={"evaluate_windows": 2})
    run(few)
    ids, _ = data.val.read(0, 2 * 11 + 1)
    config, params = training_config(CONFIG, few), random_weights()
    score = gpt2_jax.score(config, params, [ids[:12].tolist(), ids[11:].tolist()])
    expected = -sum(s.sum for s in score) / 22
    assert metrics(tmp_path / "run", "val_loss")[0] == pytest.approx(expected, abs=2e-5)
    run(small(steps=1, compute_dtype="bfloat16"), name="half")
    assert gpt2_jax.load(tmp_path / "half")[1]["wte"].dtype == np.float32
    train_alone = dataclasses.replace(data, val=None)
    for name, text, changes in (("no text", train_alone, {}), ("never", data, {"evaluate_every": 0})):
        fitted = run(small(monitor=changes), text=text, name=name)
        assert (fitted.best_step, fitted.best_loss) == (None, math.inf)
        assert metrics(tmp_path / name, "val_loss") == {}
        assert not (tmp_path / name / "best").exists()
        assert_same_params(gpt2_jax.load(tmp_path / name)[1], fitted.params)


def test_a_run_in_float64_keeps_a_model_in_float32(tmp_path, run):
    with jax.enable_x64(True):
        fitted = run(small(steps=2, compute_dtype="float64"))
        assert fitted.params["wte"].dtype == np.float64
    config, params = gpt2_jax.load(tmp_path / "run" / "best")
    assert params["wte"].dtype == config.compute_dtype == np.float32
    np.testing.assert_allclose(params["wte"], fitted.params["wte"], rtol=1e-6)


def test_patience_ends_a_run_and_it_stays_ended(tmp_path, run, capfd):
    wild = small(**WILD, monitor={"evaluate_every": 1, "patience": 2})
    fitted = run(wild)
    assert fitted.step == fitted.best_step + 2 < 7
    assert f"no better than step {fitted.best_step}" in fitted.stopped
    assert fitted.signal is None
    assert f"stopped after step {fitted.step} (checkpoint saved)" in capfd.readouterr().err
    again = run(wild)
    assert (again.step, again.best_step, again.stopped) == (fitted.step, fitted.best_step, fitted.stopped)
    more = dataclasses.replace(wild, monitor=dataclasses.replace(wild.monitor, patience=3))
    assert run(more).step == fitted.step + 1


# ---- what is not a number


def test_a_run_that_would_skip_for_ever_ends(tmp_path, run, monkeypatch):
    """NaN weights make every step a skipped step."""
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    params = random_weights()
    params["ln_f"]["g"] = params["ln_f"]["g"].at[0].set(np.nan)
    fitted = run(small(monitor={"on_nan": "skip"}), params=params)
    assert fitted.failed
    assert fitted.stopped.startswith("step 3 changed nothing, like the 2 before it: ")
    assert fitted.step < 7


def test_a_run_that_has_lost_its_checkpoints_does_not_begin_anew(tmp_path, run):
    """The metrics of the earlier training are not overwritten."""
    wanted = small(monitor={"save_every": 2})
    run(wanted)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="metrics up to step 7, but its checkpoints are gone"):
        run(wanted)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_loss_that_is_no_number(tmp_path, run, choice, capfd):
    params = random_weights()
    params["ln_f"]["g"] = params["ln_f"]["g"].at[0].set(np.nan)
    poisoned = small(monitor={"on_nan": choice, "evaluate_every": 2})
    fitted = run(poisoned, params=params)
    err = capfd.readouterr().err
    folder = tmp_path / "run"
    assert "step 1 changed nothing: the loss or its gradient is not a finite number" in err
    assert (fitted.best_step, fitted.best_loss) == (None, math.inf)
    assert not (folder / "best").exists()  # no evaluation was finite
    assert fitted.step == (2 if choice == "stop" else 7)
    assert fitted.failed == fitted.stopped.startswith("step 1 changed nothing: the loss") == (choice == "stop")
    assert set(metrics(folder).values()) == {None}
    assert_same_params(state_of(folder, poisoned).params, params)


def test_weights_that_overflow_are_stopped_at_and_what_is_saved_is_finite(tmp_path, run):
    absurd = small(steps=9, optimizer={"learning_rate": 1e30, "name": "sgd"}, monitor={"evaluate_every": 2})
    fitted = run(absurd)
    assert re.match("step [23] changed nothing: the loss or its gradient is not a finite number", fitted.stopped)
    assert fitted.step < 9
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state_of(tmp_path / "run", absurd)))
    assert fitted.best_step == 0
    assert_same_params(gpt2_jax.load(tmp_path / "run")[1], random_weights())


def test_validation_losses_that_are_no_numbers_are_not_called_overfitting(tmp_path, run, monkeypatch, capfd):
    """Also by the run that finds them in the file."""
    losses = iter([5.0, math.nan, math.nan])
    monkeypatch.setattr(observer.Observer, "measure", lambda *_: (next(losses), None))
    wanted = small(steps=4, monitor={"evaluate_every": 2})
    for _ in range(2):
        assert run(wanted).best_step == 0
        err = capfd.readouterr().err
        assert "after step 0; the validation losses since then are not finite: the model is broken" in err
        assert "overfits" not in err


@pytest.mark.parametrize("choice", ["ignore", "skip", "stop"])
def test_a_spike(tmp_path, run, finished, choice, capfd):
    """The running mean is set to a tenth of its value, so that the next loss is a spike."""
    shutil.copytree(finished, tmp_path / "run")
    state = state_of(tmp_path / "run", small())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "7")
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(5, state.replace(step=state.step - 2, mean_loss=state.mean_loss / 10))
    capfd.readouterr()
    fitted = run(small(monitor={"on_spike": choice, "spike": 3.0}))
    told = [step for step, skipped in metrics(tmp_path / "run", "skipped").items() if skipped]
    assert told == {"ignore": [], "skip": [6, 7], "stop": [6]}[choice]
    assert fitted.step == (6 if choice == "stop" else 7)
    assert fitted.failed == fitted.stopped.startswith("step 6 changed nothing: the loss, ") == (choice == "stop")
    said = capfd.readouterr().err.splitlines()
    assert sum(bool(re.match(r"step \d changed nothing: the loss, [\d.]+, is a spike", line)) for line in said) == len(
        told
    )
    if choice != "ignore":
        assert_same_params(fitted.params, state.params)


# ---- what is trained


def test_lora_gives_plain_weights(tmp_path, run):
    wanted = small(lora={"rank": 2, "alpha": 3.0}, optimizer={"learning_rate": 0.1})
    fitted = run(wanted)
    state = state_of(tmp_path / "run", wanted)
    config, params = gpt2_jax.load(tmp_path / "run" / "checkpoints" / "7")
    assert config.n_embd == CONFIG.n_embd
    before = flatten(random_weights())
    for name, leaf in flatten(params).items():
        expected = np.asarray(before[name], np.float64)
        if pair := state.lora.get(name):
            expected = expected + 3.0 / 2 * np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
            assert np.abs(expected - before[name]).max() > 0.01
        np.testing.assert_allclose(leaf, expected, atol=1e-6)
    np.testing.assert_allclose(flatten(fitted.params)["wte"], before["wte"])
    best = gpt2_jax.load(tmp_path / "run")[1]
    gpt2_jax.save(tmp_path / "plain", CONFIG, best)  # also as a plain model in OpenAI's format
    assert_same_params(gpt2_jax.load(tmp_path / "plain")[1], best)


def test_frozen_weights_stay(tmp_path, run):
    run(small(optimizer={"learning_rates": [["wte|wpe", 0.0], [".*", 1.0]]}))
    params, before = gpt2_jax.load(tmp_path / "run" / "checkpoints" / "7")[1], random_weights()
    np.testing.assert_array_equal(params["wte"], before["wte"])
    assert (np.asarray(params["ln_f"]["g"]) != before["ln_f"]["g"]).all()


def test_a_text_shorter_than_a_window_is_trained_on_and_told(tmp_path, run, tokenizer):
    (tmp_path / "short.txt").write_text("thou and thee")
    text = prepare([tmp_path / "short.txt"], tmp_path / "short", tokenizer, val_fraction=0, shown=False)
    n_tokens = len(tokenizer.encode("thou and thee"))
    assert 2 < n_tokens < 11
    with pytest.warns(UserWarning, match=rf"has {n_tokens} tokens, fewer than the 12 of a window"):
        fitted = run(small(), text=text)
    losses = metrics(tmp_path / "run")
    assert fitted.step == 7
    assert losses[7] < losses[1] - 0.3


# ---- taken up again


def test_stopped_by_a_signal_anywhere_it_goes_on_as_if_it_never_was(tmp_path, run, tokenizer, monkeypatch):
    """The signal comes in a step, in an evaluation, before a sample, or in the last evaluation."""
    wanted = small(monitor={"sample_every": 3, "prompts": PROMPTS, "sample_tokens": 3})
    straight = run(wanted, tokenizer=tokenizer, name="straight")
    moments = [
        ("jax", "device_get", 2, jax),  # in a step
        ("the evaluation after step 3", "val_batches", 1, observer),
        ("the sample after step 3", "generate", 1, observer),
        ("the last evaluation", "val_batches", 2, observer),
        ("the last sample", "generate", 2, observer),
    ]
    ended = []
    for number, (_, name, at, owner) in enumerate(moments):
        at += name == "val_batches" and not number  # the one at step 0
        with monkeypatch.context() as patch:
            Noticing(patch, name, interrupt, at, owner)
            ended.append(run(wanted, tokenizer=tokenizer))
    assert [one.signal for one in ended[:-1]] == ["SIGINT"] * (len(ended) - 1)
    assert all("received SIGINT" in one.stopped for one in ended if one.signal)
    last = run(wanted, tokenizer=tokenizer)
    assert (last.step, last.stopped) == (7, "")
    ours, theirs = tmp_path / "run", tmp_path / "straight"
    assert_same(state_of(ours, wanted), state_of(theirs, wanted))
    for name in ("loss", "val_loss", "best"):
        assert metrics(ours, name) == metrics(theirs, name)
    assert lines(ours / "samples.jsonl") == lines(theirs / "samples.jsonl")
    assert (last.best_step, last.best_loss) == (straight.best_step, straight.best_loss)
    assert_same_params(gpt2_jax.load(ours)[1], gpt2_jax.load(theirs)[1])


def test_a_second_ctrl_c_does_not_wait(tmp_path, run, monkeypatch):
    def twice():
        interrupt()
        interrupt()

    before = signal.getsignal(signal.SIGINT)
    Noticing(monkeypatch, "device_get", twice, 6, jax)
    with pytest.raises(KeyboardInterrupt):
        run(small())
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert run(small()).step == 7  # from the checkpoint of step 5


def test_a_finished_run_says_so_and_is_gone_on_with_for_more_steps(tmp_path, run, capfd):
    """With a constant rate, the result is that of the longer run. Otherwise the rates follow the longer schedule."""
    constant = {"schedule": "constant", "warmup_steps": 2}
    for schedule, optimizer in (("constant", constant), ("cosine", {})):
        short, long = (small(steps=steps, optimizer=optimizer) for steps in (4, 7))
        run(short, name=schedule)
        capfd.readouterr()
        assert run(short, name=schedule).step == 4
        err = capfd.readouterr().err
        assert "all 4 steps are done" in err
        assert "resuming" not in err
        assert run(long, name=schedule).step == 7
        err = capfd.readouterr().err
        assert "steps = 4 and now has 7" in err
        assert "resuming after step 4" in err
        rates = metrics(tmp_path / schedule, "learning_rate")
        expected = [make_schedule(short.optimizer, 4)(i) for i in range(4)]
        expected += [make_schedule(long.optimizer, 7)(i) for i in range(4, 7)]
        assert list(rates.values()) == pytest.approx([float(rate) for rate in expected])
        assert list(metrics(tmp_path / schedule, "val_loss")) == [0, 3, 4, 6, 7]
    run(small(steps=7, optimizer=constant), name="straight")
    assert_same(state_of(tmp_path / "constant", long), state_of(tmp_path / "straight", long))


def test_another_recipe_is_refused_and_nothing_changed(tmp_path, run, finished):
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    for changes, name in (
        ({"batch_size": 6}, "recipe.batch_size was 3 and is 6"),
        ({"optimizer": {"learning_rate": 0.5}}, "recipe.optimizer.learning_rate was 0.01 and is 0.5"),
        ({"model": {"dropout": 0.5}}, "recipe.model.dropout was 0.1 and is 0.5"),
    ):
        with pytest.raises(ValueError, match=re.escape(name)):
            run(small(**changes))
    assert before == {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}


def test_what_does_not_fit_together_is_refused_before_anything_is_written(tmp_path, run, data, tokenizer):
    n_vocab = {"config": CONFIG.replace(n_vocab=37)}
    one = dataclasses.replace(data, val=dataclasses.replace(data.val, n_tokens=1))
    np.array([700] * 9000 + [1281], "<u2").tofile(tmp_path / "bare.bin")  # the run would end at the step that reads it
    for wanted, others, message in (
        (small(data={"n_tokens": 14}), {}, "data.n_tokens, 14, must not be more than the model's n_ctx, 13"),
        (small(), n_vocab, "the text may have up to 1,281 different ids, the model only 37"),
        (small(), n_vocab | {"tokenizer": tokenizer}, "the tokenizer has 1,281 ids, but the model has 37"),
        (small(monitor={"patience": 2, "evaluate_every": 0}), {}, "monitor.patience needs validation losses"),
        (small(monitor={"patience": 2}), {"text": dataclasses.replace(data, val=None)}, "monitor.patience needs"),
        (small(), {"text": one}, "val.bin has 1 token: there is nothing to predict"),
        (small(), {"text": open_prepared(tmp_path / "bare.bin", n_vocab=1281)}, "token 9,000 is the id 1281, outside"),
        (small(mesh={"data": 3}), {}, "devices"),
        (small(batch_size=10**7), {}, "To use less: "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(wanted, **others)
    assert not (tmp_path / "run").exists()


def test_a_model_whose_rows_are_no_padding_trains(tmp_path, run, tokenizer):
    """1,287 rows and 1,281 ids may be two models, but training goes on, and samples none of the other rows."""
    sampled = {**SMALL["monitor"], "sample_every": 3, "prompts": PROMPTS, "sample_tokens": 3}
    assert run(small(monitor=sampled), CONFIG.replace(n_vocab=1287), tokenizer=tokenizer).step == 7
    with pytest.warns(UserWarning, match="ids 1,281 to 1,286 are never sampled"):
        assert gpt2_jax.load_tokenizer(tmp_path / "run").n_vocab == 1281


def test_fit_outside_the_main_thread(tmp_path, run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(small())))
    thread.start()
    thread.join()
    assert found[0].step == 7


# ---- on several devices


SAMPLED = {"sample_every": 3, "prompts": ("The ",), "sample_tokens": 3}
ON_EIGHT = """
    import json, os, signal, sys, jax
    sys.path.append(sys.argv[3])
    from test_fit import *
    from gpt2_jax.training import open_prepared

    folder, text, tokenizer = sys.argv[1], open_prepared(sys.argv[2]), gpt2_jax.load_tokenizer("shakespeare")
    assert len(jax.devices()) == 8
    dispatched = loop._Steps.dispatched

    def stopped(self, number, *rest):
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return dispatched(self, number, *rest)

    loop._Steps.dispatched = stopped
    wanted = small(batch_size=8, mesh={"data": -1}, monitor=SAMPLED)
    fitted = fit(make_plan(CONFIG, wanted), random_weights(), text, folder, tokenizer)
    assert fitted.signal == "SIGTERM" and fitted.step == 5, fitted
    print(json.dumps(len(fitted.params["wte"].sharding.device_set)))
"""


@full_only("a state saved on eight is restored on one in test_training_checkpoints.py")
def test_begun_on_eight_devices_and_gone_on_with_on_one(tmp_path, run, data, tokenizer):
    """The same losses except for rounding, and the same samples."""
    assert commands.on_eight_devices(ON_EIGHT, tmp_path / "run", data.train.path.parent, Path(__file__).parent) == 8
    wanted = small(batch_size=8, monitor=SAMPLED)
    begun = metrics(tmp_path / "run")
    assert list(begun) == [1, 2, 3, 4, 5]
    for name in ("run", "straight"):
        assert run(wanted, tokenizer=tokenizer, name=name).step == 7
    for kind in ("loss", "val_loss", "grad_norm"):
        ours, theirs = metrics(tmp_path / "run", kind), metrics(tmp_path / "straight", kind)
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-5)
    assert lines(tmp_path / "run" / "samples.jsonl") == lines(tmp_path / "straight" / "samples.jsonl")
