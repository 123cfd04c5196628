"""scripts/classify.py: a label and its probability for each text; one message and exit status 2 for any mistake."""

import io
import json

import commands
import jax
import pytest
import tiny_models

import gpt2_jax
from gpt2_jax.commands import classify as command

CONFIG = gpt2_jax.GPT2Config(1281, 13, 12, 3, 1, labels=("ham", "spam"))
TEXTS = [
    "Long live the king!",
    "Win",
    "Give me my robe, put on my crown; I have immortal longings in me",
    'A "quote", too',
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "spam"
    params = tiny_models.random_params(CONFIG, 5, scale=0.3)
    gpt2_jax.save(folder, CONFIG, params, "orbax", gpt2_jax.load_tokenizer("shakespeare"))
    return folder


@pytest.fixture(scope="module")
def expected(model):
    """The probabilities of TEXTS, each alone, cut at n_ctx."""
    config, params = gpt2_jax.load(model)
    tokenizer = gpt2_jax.load_tokenizer(model)
    rows = [tokenizer.encode(text)[:13] for text in TEXTS]
    logits = [
        gpt2_jax.GPT2(config).apply({"params": params}, jax.numpy.array([row]), method="classify")[0] for row in rows
    ]
    return [jax.nn.softmax(one).tolist() for one in logits]


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with commands.config_of_jax_kept():
        yield commands.caller(command.main, capfd)


def lines_of(expected):
    return [f"{CONFIG.labels[row.index(max(row))]}\t{max(row):.4f}" for row in expected]


def test_texts_get_their_label_and_its_probability(run, model, expected):
    done = run("--model", model, *TEXTS)
    assert done.code == 0, done.err
    assert done.out.splitlines() == lines_of(expected)
    assert done.err == "1 of 4 texts have more than 13 tokens, and lose their end\n"


def test_json_has_every_probability(run, model, expected):
    done = run("--model", model, "--json", *TEXTS)
    for line, row in zip(done.out.splitlines(), expected, strict=True):
        found = json.loads(line)
        assert list(found["probabilities"]) == ["ham", "spam"]
        assert list(found["probabilities"].values()) == pytest.approx(row, abs=2e-6)
        assert found["label"] == CONFIG.labels[row.index(max(row))]


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".txt", "-"])
def test_texts_of_a_file(run, model, expected, tmp_path, monkeypatch, kind):
    """With true labels, accuracy and F1 go to standard error."""
    path, best = tmp_path / f"texts{kind}", [line.split("\t")[0] for line in lines_of(expected)]
    labels = ["spam" if best[0] == "ham" else "ham", *best[1:]]  # the first one is wrong
    quoted = [text.replace('"', '""') for text in TEXTS]
    content = {
        ".csv": "y,x\n" + "".join(f'{y},"{x}"\n' for y, x in zip(labels, quoted, strict=True)),
        ".tsv": "y\tx\n" + "".join(f'{y}\t"{x}"\n' for y, x in zip(labels, quoted, strict=True)),
        ".jsonl": "".join(json.dumps({"x": x, "y": y}) + "\n" for y, x in zip(labels, TEXTS, strict=True)),
    }.get(kind, "".join(f"{text}\n" for text in TEXTS))
    if kind == "-":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        done = run("--model", model, "--input", "-")
    elif kind == ".txt":
        path.write_text(content)
        done = run("--model", model, "--input", path)
    else:
        path.write_text(content)
        done = run("--model", model, "--input", path, "--field", "x", "--label-field", "y")
        assert done.err.splitlines()[1].startswith("accuracy 75.0 %, macro F1 0.")
        assert [line.split(":")[0] for line in done.err.splitlines()[2:]] == ["ham", "spam"]
    assert done.code == 0, done.err
    assert done.out.splitlines() == lines_of(expected)


def test_a_line_ends_only_with_a_line_break(run, model, tmp_path):
    """Not with the separators of Unicode, of which str.splitlines knows eight."""
    (tmp_path / "lines.txt").write_bytes("my lord\u2028and lady\r\nthe king\x0c\x85\n".encode())
    done = run("--model", model, "--input", tmp_path / "lines.txt")
    assert done.out == run("--model", model, "my lord\u2028and lady", "the king\x0c\x85").out
    assert len(done.out.splitlines()) == 2


def test_texts_can_be_cut_shorter(run, model):
    tokenizer = gpt2_jax.load_tokenizer(model)
    start = tokenizer.decode(tokenizer.encode(TEXTS[0])[:3])
    cut, alone = run("--model", model, "--n-tokens", "3", TEXTS[0]), run("--model", model, start)
    assert cut.out == alone.out
    assert cut.err == "1 of 1 texts have more than 3 tokens, and lose their end\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "shakespeare", "a text"], "shakespeare is no classifier: it has no labels"),
        (["--model", "MODEL"], "give texts, or --input FILE"),
        (["--model", "MODEL", "a", "--input", "texts.csv"], "give texts, or --input FILE, but not both"),
        (["--model", "MODEL", ""], "text 1 is empty"),
        (["--model", "MODEL", "a", "--field", "x"], "--field and --label-field are for --input"),
        (["--model", "MODEL", "--n-tokens", "0", "a"], "--n-tokens must be 1 or more"),
        (["--model", "MODEL", "--input", "missing.csv"], "no such file: missing.csv"),
        (["--model", "MODEL", "--input", "texts.csv", "--field", "nothing"], 'has no field "nothing"; it has: text, y'),
        (["--model", "MODEL", "--input", "texts.csv", "--label-field", "y"], "the model has no label 'eggs'"),
    ],
)
def test_a_mistake_is_one_sentence(run, model, tmp_path, arguments, message):
    (tmp_path / "texts.csv").write_text("text,y\nsome text,eggs\n")
    done = run(*(model if argument == "MODEL" else argument for argument in arguments))
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("gpt2-classify: ")
    assert message in done.err
    assert done.out == ""
