"""scripts/generate.py: where prompts come from, and what is printed for each. Every option reaches the library."""

import io
import math
import os
import re
import socket
import sys
from pathlib import Path

import jax
import pytest
from fake_models import TEXT_CONFIG, speaker

import gpt2_jax
from gpt2_jax.generation import Completion, Settings, complete

SAID = "One \U0001f468\u200d\U0001f469\u200d\U0001f467 two \u6f22\u5b57.\nThree"


@pytest.fixture(scope="module")
def texts(shakespeare, tokenizer):
    """texts([prompt, ...], n_new, ...) -> the library's texts for these rows, with the script's top_k."""

    def given(prompts, max_new_tokens, **settings):
        rows = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts]
        settings = {"top_k": 40, "stop_ids": [tokenizer.eot], **settings}
        completions = complete(*shakespeare, rows, tokenizer, Settings(max_new_tokens, **settings))
        return [completion.text for completion in completions]

    return given


@pytest.fixture(scope="module")
def speaking(tokenizer, tmp_path_factory):
    """Return options of a model that generates SAID after a prompt of one token, and then only `<|endoftext|>`."""
    directory = tmp_path_factory.mktemp("speaking") / "model"
    params = speaker(tokenizer.encode(SAID))
    gpt2_jax.save(directory, TEXT_CONFIG, params, format="huggingface", tokenizer=tokenizer)
    return ["--model", directory, "--prompt", "", "--max-new-tokens", len(tokenizer.encode(SAID)) + 3]


def assert_refused(done, culprit):
    """There is only one line, and it names what is wrong."""
    assert (done.code, done.out) == (2, ""), done
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("gpt2-generate: ")
    assert re.search(culprit, done.err), done.err


# ---- where prompts come from


def test_prompts_and_then_files(run, tmp_path):
    """They are in the given order. The titles go to stderr."""
    (tmp_path / "a").write_text("KING:\n", encoding="utf-8")
    (tmp_path / "b").write_text("To be", encoding="utf-8")
    files = ["--prompt-file", tmp_path / "a", "--prompt-file", tmp_path / "b"]
    done = run(*files, "--prompt", "ROMEO:", "--prompt=", "--prompt", "ROMEO:", "--max-new-tokens", 0)
    assert (done.code, done.out) == (0, "ROMEO:\n\nROMEO:\nKING:\nTo be\n")
    assert done.err.splitlines()[1:-1] == [f"--- prompt {i} of 5, sample 1 of 1" for i in range(1, 6)]


def test_samples_of_prompts(run, texts):
    """All samples of a prompt come before those of the next prompt. Each row has its own draws."""
    options = ["--prompt", "ROMEO:", "--prompt=", "--num-samples", 2, "--max-new-tokens", 11, "--seed", 3]
    rows = ["ROMEO:", "ROMEO:", "", ""]
    samples = texts(rows, 11, seed=3)
    assert len(set(samples)) == 4
    done = run(*options)
    assert done.out == "".join(f"{prompt}{sample}\n" for prompt, sample in zip(rows, samples, strict=True))
    assert done.err.splitlines()[1:-1] == [f"--- prompt {i} of 2, sample {j} of 2" for i in (1, 2) for j in (1, 2)]
    assert run(*options, "--no-echo").out == "".join(f"{sample}\n" for sample in samples)
    assert "sample" not in run("--prompt", "ROMEO:", "--max-new-tokens", 0).err  # a single one needs no title


def test_the_batch_size_changes_nothing(run, texts):
    """Four rows: one at a time, in batches with a remainder, and all at once."""
    options = ["--prompt", "ROMEO:", "--prompt", "My lord, ", "--num-samples", 2, "--no-echo", "--max-new-tokens", 11]
    rows = ["ROMEO:"] * 2 + ["My lord, "] * 2
    assert [run(*options, "--batch-size", size).out for size in (1, 3, 100)] == [
        "".join(f"{text}\n" for text in texts(rows, 11))
    ] * 3


FILES = {
    "a text": (b"To be", "To be"),
    "one newline at the end goes": (b"To be\n", "To be"),
    "as Windows writes it": (b"To be\r\n", "To be"),
    "the second newline is text": (b"To\nbe\n\n", "To\nbe\n"),
    "byte order mark": ("\ufeffcaf\xe9 \U0001f98a\n".encode(), "caf\xe9 \U0001f98a"),
    "white space is text": (b" \tTo be  ", " \tTo be  "),
    "empty": (b"", ""),
    "a newline alone": (b"\n", ""),
}


@pytest.mark.parametrize(("data", "prompt"), FILES.values(), ids=FILES)
def test_prompt_files(run, tmp_path, data, prompt):
    (tmp_path / "prompt.txt").write_bytes(data)
    done = run("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 0)
    assert (done.code, done.out) == (0, prompt + "\n")


def test_a_prompt_file_in_the_home_folder(run, tmp_path, monkeypatch):
    """The shell leaves `--prompt-file=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("home", encoding="utf-8")
    assert run("--prompt-file=~/x", "--max-new-tokens", 0).out == "home\n"


@pytest.fixture
def stdin(monkeypatch, tmp_path):
    """stdin(data, kind) replaces standard input by a pipe, a socket or a file."""
    opened = []

    def put(data: bytes, kind: str) -> None:
        if kind == "pipe":
            reading, writing = os.pipe()
            os.write(writing, data)
            os.close(writing)
            opened.append(os.fdopen(reading))
        elif kind == "socket":
            reading, writing = socket.socketpair()
            writing.sendall(data)
            writing.close()
            opened.append(os.fdopen(reading.detach()))
        else:
            (tmp_path / "stdin").write_bytes(data)
            opened.append((tmp_path / "stdin").open())
        monkeypatch.setattr(sys, "stdin", opened[-1])

    yield put
    for file in opened:
        file.close()


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_standard_input(run, stdin, kind):
    """It is the prompt if there is no other prompt, or if - is given."""
    for options, prompt in [([], "To be"), (["--prompt-file", "-"], "To be"), (["--prompt", "x"], "x")]:
        stdin("\ufeffTo be\n".encode(), kind)
        assert run(*options, "--max-new-tokens", 0).out == f"{prompt}\n"
    stdin(b"", kind)
    assert run("--max-new-tokens", 0).out == "\n"
    stdin(b"caf\xe9", kind)
    assert_refused(run("--max-new-tokens", 0), "standard input is not UTF-8")


def test_no_standard_input(run, monkeypatch):
    """/dev/null and a closed standard input are not prompts. A command that needs standard input reports an error."""
    with Path(os.devnull).open() as null:
        monkeypatch.setattr(sys, "stdin", null)
        assert run("--max-new-tokens", 0).out == "\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert run("--max-new-tokens", 0).out == "\n"
    for option in ("--prompt-file=-", "--interactive"):
        assert_refused(run(option), "standard input is closed")


def test_no_standard_output(main, monkeypatch, capfd):
    """`>&-` is not an error."""
    monkeypatch.setattr(sys, "stdout", None)
    main(["--prompt", "x", "--max-new-tokens", "0"])
    assert "0 tokens" in capfd.readouterr().err


# ---- where a sample ends


def test_the_end_of_a_text_ends_a_sample(run, speaking):
    done = run(*speaking)
    assert (done.code, done.out) == (0, SAID + "\n")
    assert run(*speaking, "--no-stop-at-eot").out == SAID + "<|endoftext|>" * 3 + "\n"


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["o \u6f22"], "One \U0001f468\u200d\U0001f469\u200d\U0001f467 tw"),
        (["Three", "\n", "zzz"], SAID.removesuffix("\nThree")),
        (["e\U0001f468", "\u200d\U0001f469"], "One \U0001f468"),
        (["O"], ""),
        (["Four"], SAID),
        (["<|endoftext|>"], SAID),
    ],
)
def test_stop_strings(run, speaking, stops, text):
    """They may begin and end inside a token. The earliest one counts. A string that does not appear has no effect."""
    options = [word for stop in stops for word in ("--stop", stop)]
    done = run(*speaking, *options, "--temperature", 0)
    assert (done.code, done.out) == (0, text + "\n")


def test_a_stop_string_in_the_prompt_stops_nothing(run, texts):
    done = run("--prompt", "ROMEO:", "--stop", "ROMEO", "--max-new-tokens", 7, "--temperature", 0)
    assert done.out == "ROMEO:" + texts(["ROMEO:"], 7, temperature=0)[0] + "\n"


# ---- options that reach the library


SAMPLING = {
    "top_p_rule": {"top_p": 0.7, "top_p_rule": "common"},
    "min_p": {"min_p": 0.4},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "all": {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 2**32 - 1},
}


@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING)
def test_sampling(run, texts, settings):
    """With each setting, the text is the library's, and differs from the text without the setting."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    done = run("--prompt", "ROMEO:", "--max-new-tokens", 23, "--no-echo", *options)
    assert done.out == texts(["ROMEO:"], 23, **settings)[0] + "\n"
    others = {"top_p": settings.get("top_p", 1.0)} if "top_p_rule" in settings else {}
    assert done.out != texts(["ROMEO:"], 23, **others)[0] + "\n"


def test_sliding_beyond_the_context(run, texts):
    done = run("--prompt", "ROMEO:", "--max-new-tokens", 300, "--overflow", "slide", "--no-echo")
    assert (done.code, done.out) == (0, texts(["ROMEO:"], 300, overflow="slide")[0] + "\n")


@pytest.mark.parametrize(("options", "dtype"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")])
def test_dtypes(run, monkeypatch, options, dtype):
    """The dtype of the weights, and of products."""
    seen = []

    def completed(config, params, rows, *args):
        seen.extend([config.compute_dtype, *{str(leaf.dtype) for leaf in jax.tree.leaves(params)}])
        return [Completion("!", [0], False, None) for _ in rows]

    monkeypatch.setattr("gpt2_jax.generation.complete", completed)
    assert run("--prompt", "O", *options).out == "O!\n"
    assert seen == [dtype, dtype]


def test_the_table_of_log_probabilities(run, shakespeare, tokenizer):
    """After each sample, one line per token: its own value and the alternatives, as in `generate`."""
    done = run("--prompt", "ROMEO:", "--max-new-tokens", 11, "--logprobs", 3, "--num-samples", 2, "--batch-size", 1)
    knobs = {"top_k": 40, "stop_ids": [tokenizer.eot], "logprobs": 3}
    parts = [
        gpt2_jax.generate(*shakespeare, [tokenizer.encode("ROMEO:")], 11, first_row=row, **knobs) for row in range(2)
    ]
    rows, logprobs = ([part[i][0] for part in parts] for i in range(2))
    out = done.out
    for ids, given in zip(rows, logprobs, strict=True):
        text = f"ROMEO:{tokenizer.decode(ids)}\n"
        assert out.startswith(text)
        title, *lines = out.removeprefix(text).split("\n")[: 1 + len(ids)]
        assert title.split() == ["logprob", "p", "token", "alternatives"]
        out = out.removeprefix("\n".join([text + title, *lines]) + "\n")
        for i, line in enumerate(lines):
            logprob, p, rest = re.fullmatch(r" *(-?\d+\.\d{3}) +(\d+\.\d)%  (.*)", line).groups()
            assert float(logprob) == pytest.approx(given.chosen[i], abs=6e-4)
            assert float(p) / 100 == pytest.approx(math.exp(given.chosen[i]), abs=6e-4)
            token, *alternatives = re.findall(r"""('(?:\\.|[^'])*'|"(?:\\.|[^"])*")(?: +(\d+\.\d)%)?""", rest)
            assert token == (repr(tokenizer.decode([ids[i]])), "")
            assert [name for name, _ in alternatives] == [
                repr(tokenizer.decode([j])) for j in given.top_ids[i].tolist()
            ]
            values = [float(value) / 100 for _, value in alternatives]
            assert len(values) == 3
            assert values == pytest.approx([math.exp(value) for value in given.top[i]], abs=6e-4)
    assert out == ""


def test_the_same_text_with_log_probabilities_and_without(run):
    """Also without new tokens."""
    options = ["--prompt", "ROMEO:", "--max-new-tokens", 11]
    assert run(*options, "--logprobs", 3).out.startswith(run(*options).out)
    title, *rest = run("--prompt", "x", "--max-new-tokens", 0, "--logprobs", 0).out.removeprefix("x\n").split("\n")
    assert title.startswith("logprob")
    assert rest == [""]


def test_a_terminal_that_cannot_show_a_character(main, speaking, monkeypatch):
    """It becomes a question mark."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    main([str(word) for word in speaking])
    assert out.getvalue().decode() == re.sub(r"[^\x00-\x7f]", "?", SAID) + "\n"


# ---- what is refused

REFUSED = {
    "a missing file": (["--prompt-file", "no-such.txt"], "no-such.txt"),
    "a folder": (["--prompt-file", "."], r"\."),
    "standard input twice": (["--prompt-file=-", "--prompt-file=-"], "standard input.*once"),
    "no such home": (["--prompt-file=~no-such-user/x"], "~no-such-user"),
    "a prompt of several too long": (["--prompt", "a", "--prompt", "x " * 300, "--max-new-tokens=5"], r"prompts\[1\]"),
    "min-p above 1": (["--min-p=1.5"], "min_p.*1.5"),
    "min-p below 0": (["--min-p=-0.1"], "min_p.*-0.1"),
    "min-p nan": (["--min-p=nan"], "min_p.*nan"),
    "penalty 0": (["--repetition-penalty=0"], "repetition_penalty"),
    "penalty below 0": (["--repetition-penalty=-1"], "repetition_penalty"),
    "penalty inf": (["--repetition-penalty=inf"], "repetition_penalty"),
    "penalty nan": (["--repetition-penalty=nan"], "repetition_penalty"),
    "an empty stop": (["--stop="], "stop"),
    "a stop that is no text": (["--stop=\udcff"], r"--stop is not UTF-8 text: b'\\xff'"),
    "a prompt that is no text": (["--prompt=caf\udce9"], r"--prompt is not UTF-8 text: b'caf\\xe9'"),
    "bad lines of nothing": (["--prompt=x", "--skip-bad-lines"], "--skip-bad-lines.*--input"),
    "input and standard input": (["--input=-", "--output=y", "--prompt-file=-"], "--input.*--prompt-file"),
    "logprobs below 0": (["--logprobs=-1"], "logprobs.*-1"),
    "logprobs of more than all": (["--logprobs=1282"], "logprobs.*1282"),
    "batch size 0": (["--batch-size=0"], "batch-size.*0"),
    "batch size below 0": (["--batch-size=-5"], "batch-size.*-5"),
    "seed too large": (["--seed=4294967296"], "seed"),
    "no room": (["--max-new-tokens=256"], "n_ctx is 256.*slide"),
    "input without output": (["--input", "x"], "--output"),
    "output without input": (["--output", "x"], "--input"),
    "input and a prompt": (["--input", "x", "--output", "y", "--prompt", "z"], "--input.*--prompt"),
    "input and a prompt file": (["--input", "x", "--output", "y", "--prompt-file", "z"], "--input.*--prompt-file"),
    "interactive and a prompt": (["--interactive", "--prompt", "x"], "--interactive.*--prompt"),
    "interactive and a prompt file": (["--interactive", "--prompt-file", "-"], "--interactive.*--prompt-file"),
    "interactive and input": (["--interactive", "--input", "x", "--output", "y"], "--interactive.*--input"),
    "interactive and samples": (["--interactive", "--num-samples", "2"], "--interactive.*--num-samples"),
    "interactive and prompt logprobs": (["--interactive", "--prompt-logprobs"], "--interactive.*--prompt-logprobs"),
    "interactive and logprobs": (["--interactive", "--logprobs", "0"], "--interactive.*--logprobs"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "culprit"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_weights_are_read(run, options, culprit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt2_jax, "load", None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    assert_refused(run(*options), culprit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--overflow=wrap", "--top-p-rule=mine", "--dtype=float16", "--logprobs=x"])
def test_words_that_are_none(run, option):
    """The parser of the command line rejects these, and names them in a box."""
    done = run("--prompt", "x", option)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert option.split("=")[0] in done.err
