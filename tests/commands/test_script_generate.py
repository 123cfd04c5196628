"""scripts/generate.py: only text on stdout; one clear message and exit status 2 for any mistake."""

import json
import re
import shutil
from pathlib import Path

import commands
import pytest

import gpt2_jax

OPTIONS = [
    "--model", "--prompt", "--prompt-file", "--input", "--output", "--interactive", "--max-new-tokens", "--temperature",
    "--top-k", "--top-p", "--top-p-rule", "--min-p", "--repetition-penalty", "--seed", "--num-samples", "--stop",
    "--stop-at-eot", "--no-stop-at-eot", "--overflow", "--logprobs", "--dtype", "--echo", "--no-echo", "--batch-size",
]  # fmt: skip


@pytest.fixture(scope="module")
def expected(shakespeare, tokenizer):
    """expected(prompt, ...) -> the continuations from the library."""

    def continuations(prompt: str, *, num_samples: int = 1, **knobs) -> list[str]:
        ids = tokenizer.encode(prompt) or [tokenizer.eot]
        return [tokenizer.decode(row) for row in gpt2_jax.generate(*shakespeare, [ids] * num_samples, **knobs)]

    return continuations


def model_lines(err: str) -> list[str]:
    """Return the lines that name the embedded model and say how to get GPT-2."""
    lines = [line for line in err.splitlines() if "shakespeare" in line.lower()]
    return [line for line in lines if re.search("124M|download|README", line)]


# ---- what is printed


def test_the_first_command_of_a_newcomer(tmp_path):
    """No arguments, another directory. stdout has text. stderr has one line: the model, and how to get GPT-2."""
    done = commands.in_a_process("generate", cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(done.out.strip()) > 20
    assert len(model_lines(done.err)) == 1, done.err
    assert "shakespeare" not in done.out.lower()
    assert list(tmp_path.iterdir()) == []


def test_greedy_output_is_prompt_and_continuation(tmp_path, run, expected):
    """The bytes are those of the library: in a process and in this one, with the model named and by default."""
    args = ["--prompt", "ROMEO:\nWhat light", "--max-new-tokens", "29", "--temperature", "0"]
    text = "ROMEO:\nWhat light" + expected("ROMEO:\nWhat light", max_new_tokens=29, temperature=0)[0] + "\n"
    done = commands.in_a_process("generate", *args, cwd=tmp_path)
    assert (done.code, done.out) == (0, text), done.err
    for model in ([], ["--model", commands.ROOT / "models" / "shakespeare"]):
        again = run(*args, *model)
        assert (again.code, again.out) == (0, text), again.err


def test_sampled_output_follows_the_options(run, expected):
    """Each option reaches the library. The same seed gives the same text, another seed gives another."""
    knobs = {"max_new_tokens": 23, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}

    def sample(**changes) -> str:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in (knobs | changes).items()]
        done = run("--prompt", "JULIET:", *options)
        assert done.code == 0, done.err
        return done.out

    first = sample()
    assert first == "JULIET:" + expected("JULIET:", **knobs)[0] + "\n"
    assert sample() == first
    others = [sample(**{name: value}) for name, value in
              [("seed", 6), ("temperature", 1.5), ("top_k", 2), ("top_p", 0.2), ("max_new_tokens", 22)]]  # fmt: skip
    assert first not in others


def test_several_samples(run, expected):
    """Three samples in order, each after its prompt, with only white space between them."""
    options = ["--temperature", 1.25, "--top-k", 0, "--top-p", 1, "--max-new-tokens", 19, "--seed", 7]
    done = run("--prompt", "KING:", "--num-samples", 3, *options)
    samples = expected("KING:", num_samples=3, temperature=1.25, top_k=0, top_p=1.0, max_new_tokens=19, seed=7)
    assert done.code == 0
    assert len(set(samples)) == 3
    rest = done.out
    for sample in samples:
        before, found, rest = rest.partition("KING:" + sample)
        assert found, (sample, done.out)
        assert before.strip() == ""
    assert rest.strip() == ""


def test_empty_prompt_is_end_of_text(run, expected):
    """A text without a prompt starts after `<|endoftext|>`, like the unconditional samples of OpenAI's code."""
    done = run("--prompt", "", "--max-new-tokens", 31, "--temperature", 0)
    assert done.code == 0
    assert done.out.removeprefix("<|endoftext|>") == expected("", max_new_tokens=31, temperature=0)[0] + "\n"


def test_end_of_text_in_a_prompt_is_text(run, expected):
    """A prompt that contains these characters is not an error, and does not start a new document."""
    done = run("--prompt", "a<|endoftext|>b", "--max-new-tokens", 3, "--temperature", 0)
    continuation = expected("a<|endoftext|>b", max_new_tokens=3, temperature=0)[0]
    assert (done.code, done.out) == (0, "a<|endoftext|>b" + continuation + "\n")


def test_zero_new_tokens_give_the_prompt(run):
    done = run("--prompt", "To be", "--max-new-tokens", 0)
    assert (done.code, done.out) == (0, "To be\n")


def test_help_names_every_option(run):
    done = run("--help")
    assert done.code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    assert [option for option in OPTIONS if not re.search(rf"{option}(?![\w-])", plain)] == []


def test_wrong_argument_in_a_process(tmp_path):
    """A process of its own, like the calls below in this one: exit status 2, empty stdout, no traceback."""
    done = commands.in_a_process("generate", "--top-p", "0", "--prompt", "x", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert re.search("top.p", done.err)


# ---- what is refused


def assert_refused(done: commands.Run, culprit: str) -> None:
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "Error(" not in done.err
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.err)
    assert re.search(culprit, plain), plain


BAD_OPTIONS = [
    (["--max-new-tokens=-1"], "max.new.tokens.*-1|-1.*max.new.tokens"),
    (["--max-new-tokens=2.5"], "max.new.tokens"),
    (["--max-new-tokens=many"], "max.new.tokens"),
    (["--max-new-tokens=256"], r"n_ctx|context"),
    (["--max-new-tokens=1", "--prompt", "x " * 300], r"n_ctx|context"),
    (["--top-p=0"], "top.p"),
    (["--top-p=1.5"], "top.p"),
    (["--top-p=nan"], "top.p"),
    (["--top-k=-1"], "top.k"),
    (["--top-k=x"], "top.k"),
    (["--temperature=-0.5"], "temperature"),
    (["--temperature=nan"], "temperature"),
    (["--temperature=inf"], "temperature"),
    (["--temperature=hot"], "temperature"),
    (["--seed=-1"], "seed"),
    (["--seed=x"], "seed"),
    (["--num-samples=0"], "num.samples"),
    (["--num-samples=-3"], "num.samples"),
    (["--no-such-option=1"], "no-such-option"),
    (["--model", "no-such-model"], "no-such-model"),
    (["--model", str(commands.SCRIPTS / "generate.py")], r"generate\.py"),
    (["--model", ""], "."),
]


@pytest.mark.parametrize(("options", "culprit"), BAD_OPTIONS, ids=lambda x: str(x)[:40])
def test_bad_options(run, options, culprit):
    """The message names each wrong value, and there is never a traceback."""
    args = options if "--prompt" in options else ["--prompt", "ROMEO:", *options]
    assert_refused(run(*args), culprit)


DATA = "model.ckpt.data-00000-of-00001"
INDEX = "model.ckpt.index"


@pytest.fixture
def broken(model_dir, tmp_path):
    """Return a copy of the embedded model that a test may break."""
    directory = tmp_path / "broken-model"
    directory.mkdir()
    for path in model_dir.iterdir():
        if path.is_file() and path.suffix != ".meta":
            shutil.copyfile(path, directory / path.name)
    return directory


def edit_json(path: Path, **changes) -> None:
    """Change or add entries of a JSON object. None deletes an entry."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


BREAKAGES = {
    "no hparams": (lambda d: (d / "hparams.json").unlink(), r"hparams\.json"),
    "no index": (lambda d: (d / INDEX).unlink(), r"model\.ckpt|checkpoint"),
    "no data": (lambda d: (d / DATA).unlink(), r"model\.ckpt"),
    "no encoder": (lambda d: (d / "encoder.json").unlink(), r"encoder\.json"),
    "no merges": (lambda d: (d / "vocab.bpe").unlink(), r"vocab\.bpe"),
    "truncated data": (lambda d: truncate(d / DATA, 7_000_001), r"model\.ckpt"),
    "data short of a byte": (lambda d: truncate(d / DATA, 14_212_095), r"model\.ckpt"),
    "empty data": (lambda d: truncate(d / DATA, 0), r"model\.ckpt"),
    "flipped bit": (lambda d: flip_a_bit(d / DATA, 9_000_001), r"model\.ckpt"),
    "truncated index": (lambda d: truncate(d / INDEX, 901), r"model\.ckpt"),
    "page instead of index": (lambda d: (d / INDEX).write_text("<Error>NoSuchBucket</Error>"), r"model\.ckpt"),
    "hparams cut off": (lambda d: truncate(d / "hparams.json", 40), r"hparams\.json"),
    "hparams empty": (lambda d: truncate(d / "hparams.json", 0), r"hparams\.json"),
    "hparams not utf-8": (lambda d: (d / "hparams.json").write_bytes(b'{"n_\xff": 1}'), r"hparams\.json"),
    "hparams a list": (lambda d: (d / "hparams.json").write_text("[1281, 256]"), r"hparams\.json"),
    "unknown hparam": (lambda d: edit_json(d / "hparams.json", n_experts=8), "n_experts"),
    "missing hparam": (lambda d: edit_json(d / "hparams.json", n_layer=None), "n_layer"),
    "hparam of a wrong type": (lambda d: edit_json(d / "hparams.json", n_layer="4"), "n_layer"),
    "negative hparam": (lambda d: edit_json(d / "hparams.json", n_layer=-4), "n_layer"),
    "heads that do not divide": (lambda d: edit_json(d / "hparams.json", n_head=3), "n_head"),
    "more layers than saved": (lambda d: edit_json(d / "hparams.json", n_layer=5), "h4"),
    "fewer layers than saved": (lambda d: edit_json(d / "hparams.json", n_layer=3), "h3"),
    "other width": (lambda d: edit_json(d / "hparams.json", n_embd=252), "252"),
    "other context": (lambda d: edit_json(d / "hparams.json", n_ctx=255), "wpe"),
    "hparams that do not match": (lambda d: edit_json(d / "hparams.json", n_vocab=1283), r"1,?283"),
}


@pytest.mark.parametrize(("breakage", "culprit"), BREAKAGES.values(), ids=BREAKAGES)
def test_broken_models(run, broken, breakage, culprit):
    """One thing is broken in a copy of the model. The message on stderr names it."""
    breakage(broken)
    assert_refused(run("--model", broken, "--prompt", "ROMEO:", "--max-new-tokens", 3), culprit)


def test_a_copy_of_the_model_is_a_model(run, broken, expected):
    """The copy that the tests above break works before it is broken, without the graph file."""
    done = run("--model", broken, "--prompt", "ROMEO:", "--max-new-tokens", 3, "--temperature", 0)
    assert (done.code, done.out) == (0, "ROMEO:" + expected("ROMEO:", max_new_tokens=3, temperature=0)[0] + "\n")
