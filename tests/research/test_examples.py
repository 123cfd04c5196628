import importlib.util
import inspect
import re
import shlex
import shutil
from pathlib import Path

import matplotlib.image
import pytest
import tyro
from tiny_models import random_params
from vocabularies import real_vocabulary_dir

import gpt2_jax
from gpt2_jax.commands import example

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run an example's main with these arguments in an empty folder, and return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(name, **arguments):
        module = load(name)
        if "output" in inspect.signature(module.main).parameters:
            module.main(**arguments, output=Path("picture.png"))
            assert matplotlib.image.imread("picture.png").std() > 0.01, "the picture is blank"
        else:
            module.main(**arguments)
        return capsys.readouterr().out

    return run


def numbers(text, pattern):
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_is_tested(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"COMMAND: python examples/{name}.py" in text
    assert f'run("{name}"' in Path(__file__).read_text(encoding="utf-8")


def test_transplant(run):
    printed = run("transplant", max_new_tokens=5)
    assert len(re.findall(r"refused.*misshaped", printed)) == 3
    plain, noisy = (numbers(printed, rf"{name} [^│]*│[^│]*│ ([\d.]+)")[0] for name in ("nothing", "attn/c_proj"))
    assert noisy > 1.5 * plain


def test_logit_lens(run):
    printed = run("logit_lens", text="ROMEO:\nO, she doth teach")
    means = numbers(printed, r"resid_\w+ +│ (-[\d.]+)")
    assert len(means) == 5
    assert means[0] < means[1] < means[-1]


def test_induction_heads(run):
    printed = run("induction_heads", n_steps=3)
    assert len(numbers(printed, r"without .*: ([\d.]+) nats")) == 6


def test_patch_a_fact(run):
    printed = run("patch_a_fact")
    shares = numbers(printed, r"h\d/resid_pre: .*, ([\d.]+)")
    assert len(shares) == 4
    assert all(0.2 < share < 1.2 for share in shares)


def test_steer(run):
    printed = run("steer", strengths=(0.0, 3.0), max_new_tokens=17)
    plain, steered = re.findall(r"[+-]\d\.\d +│ ([^│]*)│", printed)
    assert steered.count("love") > plain.count("love")


def test_merge(run):
    printed = run("merge", n_steps=11)
    rows = {
        name.strip(): (float(days), float(count))
        for name, days, count in re.findall(r"^(.*): days ([\d.]+), numbers ([\d.]+)$", printed, re.MULTILINE)
    }
    assert rows["days"][0] < rows["base"][0] - 1
    assert rows["numbers"][1] < rows["base"][1] - 1
    assert all(both < base - 1 for both, base in zip(rows["base + both tasks"], rows["base"], strict=True))


def test_tied_head(run, tokenizer):
    text = "To be, or not to be"
    printed = run("tied_head", text=text)
    n_read = len(set(tokenizer.encode(text)[:-1]))
    assert re.search(rf"embedding +│ [\d.]+ +│ {n_read} of 1,281", printed)
    assert printed.count("1,281 of 1,281") == 2
    assert numbers(printed, r"gradients add up to it: (\S+) of")[0] < 1e-5


def test_temperature_sweep(run):
    printed = run("temperature_sweep", temperatures=(0.1, 1.0), n_draws=257)
    (cold,) = re.findall(r"│ 0\.1 .*", printed)
    assert "100%, 100%" in cold
    drawn, expected = re.search(r"│ 1\.0 +│ (\d+)%, (\d+)%", printed).groups()
    assert abs(int(drawn) - int(expected)) < 13  # four standard deviations of 257 draws


# ---- the commands in the docstrings, and wrong ones


CHEAPER = {
    "steer": ["--max-new-tokens", "2"],
    "temperature_sweep": ["--n-draws", "3"],
    "transplant": ["--max-new-tokens", "2"],
}


@pytest.fixture(scope="module")
def small_124m(tmp_path_factory):
    """Return the folder of a small random model with GPT-2's own vocabulary."""
    config = gpt2_jax.GPT2Config(n_vocab=50257, n_ctx=64, n_embd=4, n_head=2, n_layer=7)
    folder = tmp_path_factory.mktemp("models") / "124M"
    gpt2_jax.save(folder, config, random_params(config, 2))
    for path in real_vocabulary_dir().iterdir():
        if path.name in ("encoder.json", "vocab.bpe"):
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "merge"])  # merge.py documents no other model
def test_the_documented_command_for_124m_runs_with_gpt2s_tokens(name, small_124m, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = load(name)
    lines = re.findall(rf"python examples/{name}.py ((?:.*\\\n)*.*)", module.__doc__)
    (options,) = [line.split("     (")[0].strip(" []") for line in lines if "--model 124M" in line]
    words = shlex.split(options.replace("\\\n", " ").strip("[]"))
    words[words.index("124M")] = str(small_124m)
    tyro.cli(module.main, args=[*words, *CHEAPER.get(name, [])])
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("patch_a_fact", ["--clean", "First"], "equally many tokens, not 1 and 11"),
        ("patch_a_fact", ["--clean", "a", "--corrupted", "a"], "must differ and have"),
        ("patch_a_fact", ["--answer", " Pari"], "two different tokens, not texts of 3 and 1 tokens"),
        ("patch_a_fact", ["--wrong", ""], "two different tokens, not texts of 1 and 0 tokens"),
        ("patch_a_fact", ["--wrong", " S"], "two different tokens, not texts of 1 and 1 tokens"),
        ("logit_lens", ["--text", "a"], "two tokens or more"),
        ("logit_lens", ["--text", "a " * 300], "n_ctx"),
        ("steer", ["--layer", "9"], "no activation name matches"),
        ("steer", ["--prompt", ""], "is empty"),
        ("temperature_sweep", ["--temperatures", "0"], "temperatures must be above 0"),
        ("temperature_sweep", ["--k", "0"], "k must be 1 or more"),
        ("tied_head", ["--text", "a"], "two tokens or more"),
        ("transplant", ["--text", ""], "is empty"),
        ("transplant", ["--max-new-tokens", "-1"], "max_new_tokens must be"),
        ("induction_heads", ["--model", "nothing"], "no such model: 'nothing'"),
        ("merge", ["--model", "nothing"], "no such model: 'nothing'"),
    ],
)
def test_a_wrong_argument_gives_one_line(name, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) as stopped:
        example.run(load(name).main)
    assert stopped.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith(f"{name}.py: ")
    assert written.count("\n") == 1
    assert message in written
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_a_command(name):
    assert "    example.run(main)\n" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")
