import importlib.util
import inspect
import re
from pathlib import Path

import matplotlib.image
import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run an example's main with these arguments in an empty folder, and return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(name, **arguments):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
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
