"""load("124M") and its other names: fetch into the cache folder or find the files there, without extra requests."""

import fake_release
import forward
import jax
import misbehaving_server
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.release import download
from gpt2_jax.release.known import INDEX

NAMES = ("124M", "117M", "gpt2", "GPT2", "124m")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine gives the embedded model's seven files as the 124M. The cache folder is empty."""
    files = fake_release.embedded()
    monkeypatch.setattr(download, "expectations", lambda size: fake_release.expectations(files))
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with misbehaving_server.Server(fake_release.served(files)) as server:
        monkeypatch.setenv("GPT2_JAX_BASE_URL", server.url)
        yield server


def asked(server) -> set[str]:
    return {request.path for request in server.requests}


def test_every_name_of_a_size_is_the_same_files(server, tmp_path, shakespeare):
    """The first load fetches into models/124M of the cache folder. The others send no request."""
    for name in NAMES:
        config, params = gpt2_jax.load(name)
        assert config.to_hparams() == shakespeare[0].to_hparams()
        np.testing.assert_array_equal(params["wte"], shakespeare[1]["wte"])
        assert len(asked(server)) == len(server.requests) <= 7
    assert (tmp_path / "cache" / "models" / "124M" / "model.ckpt.index").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_tokenizer_takes_its_own_files_and_a_config_none(server, tokenizer):
    assert gpt2_jax.load_config("124M") == gpt2_jax.GPT2Config(50257, 1024, 768, 12, 12)
    assert server.requests == []
    assert gpt2_jax.load_tokenizer("gpt2").encode("First Citizen:") == tokenizer.encode("First Citizen:")
    assert {"/124M/encoder.json", "/124M/vocab.bpe"} <= asked(server)
    assert not any("model.ckpt.data" in path for path in asked(server))
    gpt2_jax.load_tokenizer("124M")
    assert len(asked(server)) == len(server.requests)


def test_a_wrong_file_is_fetched_again(server, tmp_path, shakespeare):
    gpt2_jax.load("124M")
    n = len(server.requests)
    index = tmp_path / "cache" / "models" / "124M" / "model.ckpt.index"
    index.write_bytes(index.read_bytes()[:-1])
    config, params = gpt2_jax.load("124M")
    assert [request.path for request in server.requests[n:]] == ["/124M/model.ckpt.index"]
    tokens_BT = forward.some_tokens(config, 1, 5)
    np.testing.assert_array_equal(
        forward.logits_of(config, params, tokens_BT), forward.logits_of(*shakespeare, tokens_BT)
    )


@pytest.mark.parametrize("call", ["load", "download_and_load_gpt2"])
def test_weights_that_turn_out_damaged_are_fetched_once_more(server, tmp_path, shakespeare, call):
    """The size is right, so only a tensor's checksum detects the damage."""
    directory = tmp_path / ("cache/models" if call == "load" else "gpt2") / "124M"
    download.fetch("124M", directory)
    data = directory / "model.ckpt.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    n = len(server.requests)
    _, params = getattr(gpt2_jax, call)("124M")
    np.testing.assert_array_equal(params["wte"], shakespeare[1]["wte"])
    assert {request.path for request in server.requests[n:]} == {f"/124M/{name}" for name in (data.name, INDEX)}


def test_a_size_takes_the_options_of_load(server):
    config, params = gpt2_jax.load("gpt2", dtype="bfloat16", sharding=jax.devices("cpu")[0], keep_copy=False)
    assert config.param_dtype == params["wpe"].dtype == np.dtype("bfloat16")
