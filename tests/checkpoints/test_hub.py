"""Models on the Hugging Face hub by id, from a fake hub on this machine. The second load uses the cache, offline."""

import json
import os

import checkpoint_forms as forms
import foreign_models as foreign
import forks
import pytest
from fake_hub import FakeHub

import gpt2_jax
from gpt2_jax.checkpoints import pickles

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each call")
CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=11, n_embd=6, n_head=3, n_layer=2)


@pytest.fixture(scope="module")
def hub(tmp_path_factory, model_dir):
    """Repositories of one file, of shards, with pickles too or only, of adapters, and of another architecture."""
    folder, flat = tmp_path_factory.mktemp("repositories"), forms.random_model(CONFIG)
    tensors = forms.hf_tensors(flat, prefix="")
    for name, shards in (("one", 1), ("sharded", 3), ("both", 1)):
        forms.write_huggingface(folder / name, CONFIG, tensors, shards=shards)
        forms.copy_vocabulary(model_dir, folder / name, ("vocab.json", "merges.txt"))
        (folder / name / "README.md").write_text("# A model")
    (folder / "both" / "pytorch_model.bin").write_bytes(b"\x80\x04." * 999)
    forms.write_huggingface(folder / "llama", CONFIG, tensors, model_type="llama")
    foreign.write_flax(folder / "flax", CONFIG, flat)
    (folder / "flax" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text(json.dumps(forms.hf_config(CONFIG)))
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for name in pickles.ADAPTERS:
        (folder / name).mkdir()
        (folder / name / name).write_bytes(b"\x80\x04.")
        (folder / name / "adapter_config.json").write_text("{}")
    files = {
        f"owner/{path.name}": {file.name: file.read_bytes() for file in path.iterdir()} for path in folder.iterdir()
    }
    with FakeHub(files) as hub:
        yield hub


@pytest.fixture(scope="module")
def fork():
    with forks.Forks("hub_loader") as fork:
        yield fork


@pytest.fixture
def call(hub, fork, tmp_path):
    """call("owner/name", "load", ...) -> the results of the functions in a new process, or the error."""

    def call(name: str, *functions: str, **env: str) -> dict:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        own["GPT2_JAX_CACHE"] = str(tmp_path / "cache")
        err = tmp_path / "err"
        ended = fork(name=name, functions=functions, env=own | env, err=str(err))
        assert not ended.killed
        assert "Traceback" not in err.read_text()
        return {"error": ended.error, "kinds": ended.kinds} if ended.error else ended.said[0]

    return call


@pytest.mark.parametrize("name", ["one", "sharded"])
def test_a_model_of_the_hub_and_again_without_it(hub, call, tmp_path, tokenizer, name):
    """All three calls, then the same from the hub's cache without a hub. Nothing is fetched twice."""
    functions = ("load_config", "load_tokenizer", "load")
    expected = {
        "load_config": CONFIG.to_hparams(), "load_tokenizer": tokenizer.encode("First Citizen:"), "load": "",
        "imported": [],
    }  # fmt: skip
    asked = len(hub.requests)
    assert call(f"owner/{name}", *functions) == expected
    fetched = [request for request in hub.requests[asked:] if request.startswith("GET") and "/resolve/" in request]
    assert fetched
    assert len(set(fetched)) == len(fetched), "a file was fetched twice"
    assert not any("README" in request for request in fetched)
    assert any(path.is_file() for path in (tmp_path / "hf").rglob("config.json"))
    asked = len(hub.requests)
    assert call(f"owner/{name}", *functions, HF_HUB_OFFLINE="1") == expected
    assert len(hub.requests) == asked
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the discard port: no server answers
    assert call(f"owner/{name}", *functions, **dead) == expected


def test_pickles_are_not_even_fetched(hub, call):
    asked = len(hub.requests)
    assert call("owner/both", "load")["load"] == ""
    assert not any("pytorch_model.bin" in request for request in hub.requests[asked:])


def test_a_repository_of_pickles_is_refused_with_the_line_that_converts_it(hub, call):
    asked = len(hub.requests)
    answer = call("owner/pickled", "load")
    assert "ValueError" in answer["kinds"]
    assert "pytorch_model.bin" in answer["error"]
    assert "save_pretrained" in answer["error"]
    assert "owner/pickled" in answer["error"]
    assert not any("pytorch_model.bin" in request for request in hub.requests[asked:])


def test_a_repository_of_a_pickled_adapter_is_refused_with_what_to_do(call):
    answer = call("owner/adapter_model.bin", "load")
    assert "ValueError" in answer["kinds"]
    assert "owner/adapter_model.bin holds adapter_model.bin: this is an adapter of PEFT in a pickle" in answer["error"]


def test_a_repository_of_an_adapter_is_fetched(call):
    """This one is malformed: its config says nothing."""
    answer = call("owner/adapter_model.safetensors", "load")
    assert "ValueError" in answer["kinds"]
    assert "adapter_config.json is malformed: it names no peft_type" in answer["error"]


@pytest.mark.parametrize("function", ["load", "load_config", "load_tokenizer"])
def test_no_such_repository(call, function):
    answer = call("owner/nothing", function)
    assert "FileNotFoundError" in answer["kinds"]
    assert "owner/nothing" in answer["error"]
    assert "\n" not in answer["error"]


def test_no_hub_and_nothing_in_the_cache(call):
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        answer = call("owner/one", "load", **env)
        assert "OSError" in answer["kinds"], answer
        assert "owner/one" in answer["error"]
        assert "\n" not in answer["error"]


def test_another_model_is_refused_by_the_field(call):
    answer = call("owner/llama", "load")
    assert "ValueError" in answer["kinds"]
    assert "model_type" in answer["error"]
    assert "llama" in answer["error"]


@pytest.mark.parametrize("wrong", ["a/b/c", "owner/", "own er/name", "-/-", "owner/na--me"])
def test_what_is_no_id_is_refused_without_asking(hub, call, wrong):
    asked = len(hub.requests)
    answer = call(wrong, "load")
    assert {"FileNotFoundError", "ValueError"} & set(answer["kinds"]), answer
    assert wrong.rstrip("/") in answer["error"]
    assert len(hub.requests) == asked


def test_a_revision(hub, call):
    asked = len(hub.requests)
    assert call("owner/one@v2.0", "load")["load"] == ""
    asked_for = [request for request in hub.requests[asked:] if "owner/one" in request]
    assert any("/revision/v2.0" in request for request in asked_for)
    assert not any("/main" in request for request in asked_for)


def test_the_line_that_converts_keeps_the_revision(call):
    assert 'from_pretrained("owner/pickled", revision="v2.0")' in call("owner/pickled@v2.0", "load")["error"]
    assert 'from_pretrained("owner/pickled").save' in call("owner/pickled", "load")["error"]


def test_a_repository_of_flax(hub, call):
    """Its msgpack file is fetched, because there are no safetensors. Its pickle is not."""
    asked = len(hub.requests)
    assert call("owner/flax", "load")["load"] == ""
    assert any("flax_model.msgpack" in request for request in hub.requests[asked:])
    assert not any("pytorch_model.bin" in request for request in hub.requests[asked:])
    assert call("owner/flax", "load", HF_HUB_OFFLINE="1")["load"] == ""


def test_offline_with_only_the_tokenizer_in_the_cache(call):
    """It is not known what weights the repository holds, so the message does not speak of pickles."""
    call("owner/one", "load_tokenizer")
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        answer = call("owner/one", "load", **env)
        assert "ConnectionError" in answer["kinds"], answer
        assert "its weights are not in the hub's cache" in answer["error"]
        assert "pickle" not in answer["error"]
