"""Instructions in gpt2-train, gpt2-generate and gpt2-evaluate: answers, dialogues, files and test sets."""

import http.server
import json
import re
import shutil
import sys
import threading

import commands
import instructions as made
import pytest
import tiny_models
import tiny_runs

import gpt2_jax
from gpt2_jax.commands import _interactive, evaluate, generate
from gpt2_jax.data import TEMPLATES, Conversation, Turn
from gpt2_jax.generation import answer
from gpt2_jax.generation.settings import Settings

OWN = {"prompt": "Q: {instruction} {input}\nA:\n", "prompt_without_input": "Q: {instruction}\nA:\n"}
SHORT = ["--max-new-tokens", 5, "--temperature", 0]
TRAIN = ["--objective", "instruction", "--steps", 2, "--batch-size", 2, "--model.dropout", 0]
TRAIN += ["--instruction.prompt", OWN["prompt"], "--instruction.prompt-without-input", OWN["prompt_without_input"]]
TRAIN += ["--monitor.no-tensorboard", "--monitor.sample-every", 0, "--data.test-fraction", 0.3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """The folder of a run, and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    config = made.CONFIG.replace(n_ctx=64)
    gpt2_jax.save(folder / "model", config, tiny_models.random_params(config, 7, scale=0.3), tokenizer=tokenizer)
    path = made.written(folder / "pairs.json")
    with commands.config_of_jax_kept(), tiny_runs.compiled_once(folder / "compiled"):
        options = [*TRAIN, "--model.source", folder / "model", "--data.path", path, "--run", folder / "run"]
        done = commands.in_a_process("train", *options, cwd=folder)
    assert done.code == 0, done.err
    return folder / "run", done


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Give a caller of a command's `main` in this process."""
    monkeypatch.chdir(tmp_path)
    with commands.config_of_jax_kept():
        yield lambda command, *args: commands.caller(command.main, capfd)(*args)


def expected(folder, tokenizer, asked, settings=None):
    """The answers of the library."""
    template = gpt2_jax.data.load_template(folder)
    assert template is not None
    settings = settings or Settings(max_new_tokens=5, temperature=0)
    return [one.text for one in answer(*gpt2_jax.load(folder), tokenizer, template, asked, settings)]


# ---- gpt2-train


def test_a_run_answers_its_test_split(trained, tokenizer):
    folder, done = trained
    found = json.loads((folder / "responses.json").read_text(encoding="utf-8"))
    lines = (folder / "data" / "test.records.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == [record["instruction"] for record in found]
    assert len(found) == 2
    asked = [Conversation((Turn(record["instruction"], record.get("input") or ""),)) for record in found]
    settings = Settings(max_new_tokens=256, temperature=0, overflow="slide")
    assert [record["response"] for record in found] == expected(folder, tokenizer, asked, settings)
    exact = sum(record["exact_match"] for record in found) / 2
    rouge = sum(record["rouge_l"] for record in found) / 2
    assert f"test, 2 instructions: exact match {exact:.1%}, ROUGE-L {rouge:.3f}; " in done.err
    assert "training examples make 3 rows of" in done.err


# ---- gpt2-generate


def test_the_answer_alone_is_printed(run, trained, tokenizer):
    folder, _ = trained
    done = run(generate, "--model", folder, "--instruction", "Say the king.", "--instruction", "Who?", *SHORT)
    assert done.code == 0, done.err
    assert done.out == "".join(f"{text}\n" for text in expected(folder, tokenizer, ["Say the king.", "Who?"]))
    done = run(generate, "--model", folder / "best", "--instruction", "Say.", "--instruction-input", "the king", *SHORT)
    asked = Conversation((Turn("Say.", "the king"),))
    assert done.out == expected(folder, tokenizer, [asked])[0] + "\n"


def test_a_template_by_name(run, trained, tokenizer):
    """For a model that is no run, and instead of the run's own."""
    folder, _ = trained
    shutil.copytree(folder / "best", "model")
    settings = Settings(max_new_tokens=5, temperature=0)
    for source in ("model", folder):
        done = run(generate, "--model", source, "--instruction", "Say it.", "--template", "plain", *SHORT)
        (text,) = answer(*gpt2_jax.load(folder), tokenizer, TEMPLATES["plain"], ["Say it."], settings)
        assert (done.code, done.out) == (0, text.text + "\n"), done.err
    done = run(generate, "--model", "model", "--instruction", "Say it.")
    assert done.code == 2
    assert re.search(r"model is no run that was trained on instructions, .*: name one with --template", done.err)
    assert run(generate, "--template", "llama", "--instruction", "x").code == 2


def test_a_record_of_another_form_is_named_before_weights_are_loaded(run, tmp_path):
    path = made.written(tmp_path / "a.json", [*made.RECORDS[:2], {"instruction": "Be brief."}])
    options = ["--task", "responses", "--template", "plain"]
    done = run(evaluate, path, *options)
    assert done.code == 2
    assert done.err == (
        f'gpt2-evaluate: {path}, line 1 has an "instruction" without its "output"; it has: instruction\n'
    )
    assert run(evaluate, path, *options, "--limit", "1").code == 0


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--instruction", "a", "--prompt", "b"], "--instruction cannot be given with --prompt"),
        (["--instruction", "a", "--input", "b", "--output", "c"], "--input has its own prompts .* with --instruction"),
        (["--instruction", "a", "--interactive"], "cannot be given with --instruction"),
        (["--instruction-input", "a"], "--instruction-input is for --instruction"),
    ],
)
def test_options_that_do_not_go_together(run, options, culprit):
    done = run(generate, *options)
    assert done.code == 2
    assert re.search(culprit, done.err), done.err


def test_lines_with_instructions(run, trained, tokenizer, tmp_path):
    folder, _ = trained
    messages = [("user", "Who?"), ("assistant", "I."), ("user", "Why?")]
    chat = [{"role": role, "content": content} for role, content in messages]
    lines = [{"instruction": "Say.", "input": "the king"}, {"messages": chat}, {"prompt": "The king"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", "in.jsonl", "--output"]
    done = run(generate, "--model", folder, *files, "out.jsonl", *SHORT)
    assert done.code == 0, done.err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [Conversation((Turn("Say.", "the king"),)), Conversation((Turn("Who?", "", "I."), Turn("Why?")))]
    texts = [sample["text"] for line in found for sample in line["samples"]]
    assert texts[:2] == expected(folder, tokenizer, asked)
    assert found[1]["messages"] == chat
    with_a_bad_line = [*lines, {"instruction": 3}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in with_a_bad_line))
    done = run(generate, "--model", folder, *files, "other.jsonl", *SHORT)
    assert (done.code, (tmp_path / "other.jsonl").exists()) == (2, False)
    assert 'line 4: the line: the field "instruction" is not a text' in done.err
    shutil.copytree(folder / "best", "model")  # without a template
    done = run(generate, "--model", "model", *files, "other.jsonl", *SHORT)
    assert 'line 1 is not a prompt: it must be an object with a string "prompt"' in done.err


class Typed:
    """Standard input with lines."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt=""):
        del prompt
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def talk(run, monkeypatch, folder, *lines, options=()):
    monkeypatch.setattr(_interactive, "input", Typed(*lines), raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    return run(generate, "--model", folder, "--interactive", *SHORT, *options)


def test_a_dialogue_has_a_history(run, trained, tokenizer, monkeypatch):
    folder, _ = trained
    first = expected(folder, tokenizer, ["Who?"])[0]
    second = expected(folder, tokenizer, [Conversation((Turn("Who?", "", first), Turn("Why?")))])[0]
    alone = expected(folder, tokenizer, ["Why?"])[0]
    assert second != alone
    done = talk(run, monkeypatch, folder, "Who?", "Why?", "/reset", "Why?")
    assert done.code == 0, done.err
    assert done.out == f"{first}\n{second}\n{alone}\n"
    assert "/reset begins anew" in done.err
    assert "[a new dialogue]" in done.err


def test_the_oldest_turns_of_a_dialogue_are_dropped(run, trained, tokenizer, monkeypatch):
    """The model reads 64 tokens."""
    folder, _ = trained
    long = "Why is the king so dead and so dead and so dead again?"
    n_long = len(tokenizer.encode(f"Q: {long}\nA:\n"))
    assert n_long * 2 + 11 <= 64 < n_long * 3 + 5
    done = talk(run, monkeypatch, folder, long, long, long)
    assert "[the oldest turn is dropped: the model reads 64 tokens]" in done.err
    first = expected(folder, tokenizer, [long])[0]
    second = expected(folder, tokenizer, [Conversation((Turn(long, "", first), Turn(long)))])[0]
    third = expected(folder, tokenizer, [Conversation((Turn(long, "", second), Turn(long)))])[0]
    assert done.out == f"{first}\n{second}\n{third}\n"
    done = talk(run, monkeypatch, folder, long * 4, "Who?")
    assert "n_ctx is 64" in done.err
    assert done.out == expected(folder, tokenizer, ["Who?"])[0] + "\n"


def test_interactive_texts_instead_of_a_dialogue(run, trained, monkeypatch):
    folder, _ = trained
    done = talk(run, monkeypatch, folder, "The king", options=["--template", "none"])
    assert done.out.startswith("The king")
    assert "Type a prompt." in done.err


# ---- gpt2-evaluate


def test_responses_of_a_file(run, trained, tokenizer, tmp_path):
    folder, _ = trained
    path = made.written(tmp_path / "test.json", made.RECORDS[:3])
    options = ["--task", "responses", "--model", folder]
    done = run(evaluate, path, *options, "--output", "out.json", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (result["task"], result["responses"], result["judge"]) == ("responses", 3, None)
    assert "records" not in result
    assert result["rouge_l"] == pytest.approx(sum(record["rouge_l"] for record in found) / 3)
    done = run(evaluate, path, *options, "--limit", 1)
    rows = {line.split("  ")[0]: line.split()[-1] for line in done.out.splitlines()[2:]}
    assert list(rows) == ["exact match", "rouge l", "responses", "cut"]


def test_a_judge(run, trained, tmp_path, monkeypatch):
    folder, _ = trained
    monkeypatch.setenv("no_proxy", "*")
    path = made.written(tmp_path / "test.json", made.RECORDS[:2])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            data = json.dumps({"choices": [{"message": {"content": "30"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            del args

    options = [path, "--task", "responses", "--model", folder, "--output", "out.json", "--judge-model", "m"]
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        done = run(evaluate, *options, "--judge-url", url)
        server.shutdown()
    assert done.code == 0, done.err
    assert re.search(r"judge +30 +mean score of m, 0 to 100", done.out), done.out
    assert [record["judge"] for record in json.loads((tmp_path / "out.json").read_text())] == [30, 30]
    (tmp_path / "out.json").unlink()
    done = run(evaluate, *options, "--judge-url", url)  # nobody listens any more
    assert done.code == 2
    assert "does not answer" in done.err
    assert len(json.loads((tmp_path / "out.json").read_text())) == 2  # the responses were kept


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--task", "responses"], "the embedded Shakespeare model is no run that was trained on instructions"),
        (["--task", "responses", "--template", "x"], "--template must be alpaca, phi3, plain, not 'x'"),
        (["--task", "responses", "--judge-model", "m"], "--judge-url and --judge-model need each other"),
        (["--task", "responses", "--bos"], "--bos is for --task perplexity, not responses"),
        (["--task", "lambada", "--output", "x"], "--output is for --task responses, not lambada"),
    ],
)
def test_mistakes(run, options, culprit, tmp_path):
    done = run(evaluate, made.written(tmp_path / "a.json"), *options)
    assert done.code == 2
    assert culprit in done.err
