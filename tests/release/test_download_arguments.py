"""Arguments of `fetch` (sizes, addresses, numbers), what is known of the release, and the progress bars."""

import hashlib
import io
import subprocess
import sys
import urllib.request

import fake_release
import hypothesis
import misbehaving_server as server_that
import pytest
from fake_release import fetch, right_names
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax.release import download, known
from gpt2_jax.release.known import DATA, FILES, INDEX

RELEASE = fake_release.made_up()
NAMES = {
    "124M": ["124M", "117M", "gpt2", "GPT2", "124m"],
    "355M": ["355M", "345M", "gpt2-medium", "GPT2-Medium"],
    "774M": ["774M", "762M", "gpt2-large"],
    "1558M": ["1558M", "1542m", "gpt2-xl", "GPT2-XL"],
}


@pytest.fixture
def server(monkeypatch):
    fake_release.use(monkeypatch, RELEASE)
    with server_that.Server(fake_release.served(RELEASE) | fake_release.served(RELEASE, "1558M")) as running:
        yield running


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in NAMES.items() for name in names])
def test_a_size_goes_by_many_names(size, name):
    assert download.size_of(name) == size


@pytest.mark.parametrize(
    "name", ["", "124", "gpt-2", "gpt3", "distilbert/distilgpt2", "124M ", "models/124M", None, 124]
)
def test_what_is_no_size(name, tmp_path):
    assert download.size_of(name) is None
    with pytest.raises(ValueError, match=r"no released GPT-2 is called .*124M, 355M, 774M, 1558M"):
        download.fetch(name, tmp_path)


# ---- what is known of the release

KNOWN = {  # FACTS: bytes of checkpoint, hparams.json, index, meta, data
    "124M": (77, 90, 5215, 471155, 497_759_232),
    "355M": (77, 91, 10399, 926519, 1_419_292_672),
    "774M": (None, None, None, None, 3_096_120_320),
    "1558M": (None, None, None, None, 6_230_444_800),
}


@pytest.mark.parametrize("size", KNOWN)
def test_the_sizes_of_the_released_files(size):
    expected = download.expectations(size)
    assert set(expected) == set(FILES)
    names = ("checkpoint", "hparams.json", INDEX, "model.ckpt.meta", DATA)
    assert tuple(expected[name].size for name in names) == KNOWN[size]
    assert (expected["encoder.json"].size, expected["vocab.bpe"].size) == (1_042_301, 456_318)


def test_the_released_vocabulary_is_known_and_the_hparams_are_those_of_the_size(tmp_path):
    import vocabularies

    expected = download.expectations("124M")
    real = vocabularies.real_vocabulary_dir()
    for name in ("encoder.json", "vocab.bpe"):
        assert expected[name].wrong(real / name) is None
        body = bytearray((real / name).read_bytes())
        body[-5] ^= 1
        (tmp_path / name).write_bytes(body)
        found = hashlib.sha256(body).hexdigest()
        assert expected[name].wrong(tmp_path / name).startswith(f"its sha256 is {found} instead of ")
    hparams = '{"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}'
    (tmp_path / "hparams.json").write_text(hparams + " " * (90 - len(hparams)))
    assert expected["hparams.json"].wrong(tmp_path / "hparams.json") is None
    assert "another model" in known.is_hparams(gpt2_jax.SIZES["355M"])(tmp_path / "hparams.json")
    embedded = gpt2_jax.embedded_model()
    assert expected["checkpoint"].wrong(embedded / "checkpoint") is None
    assert known.is_index(embedded / INDEX) is None


# ---- the directory and the addresses


def test_the_default_directory_is_in_the_cache(tmp_path, server, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))
    assert download.fetch("gpt2-xl", base_urls=[server.url + "/"], progress=False) == tmp_path / "cache/models/1558M"
    assert right_names(tmp_path / "cache" / "models" / "1558M", RELEASE) == set(FILES)


@pytest.mark.parametrize("spelled", ["{dead}/gone,{alive}", " {alive}/ , {dead}", "{alive}"])
def test_the_environment_names_one_or_several_addresses(tmp_path, server, monkeypatch, spelled):
    monkeypatch.setenv("GPT2_JAX_BASE_URL", spelled.format(dead=f"{server.url}/none", alive=server.url))
    download.fetch("124M", tmp_path, ["checkpoint"], progress=False)
    assert right_names(tmp_path, RELEASE) == {"checkpoint"}
    base = f"{server.url}/none"
    with pytest.raises(OSError, match="404"):
        download.fetch("124M", tmp_path, ["vocab.bpe"], [base], progress=False)  # an argument takes precedence


def test_without_any_the_mirrors_are_asked_in_turn(monkeypatch):
    for value in (None, "", " , "):
        monkeypatch.setenv("GPT2_JAX_BASE_URL", value) if value else monkeypatch.delenv("GPT2_JAX_BASE_URL", False)
        assert known.base_addresses(None) == download.MIRRORS
    assert known.base_addresses("https://example.org/gpt2/") == ("https://example.org/gpt2",)


BAD = ["", "example.org", "ftp://example.org", "file:///tmp", "http://", "http://:80", "http://a:b", "http://a:99999",
       "http://me:secret@a", "http://a/?x=1", "http://a/#x", "http://a b", "http://[::1", "http://\xe9.org",
       "http://a\n/"]  # fmt: skip


@pytest.mark.parametrize("base", BAD)
def test_what_is_no_address_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match="is not a base address: it must look like https://"):
        fetch(tmp_path, base)
    assert list(tmp_path.iterdir()) == []


@hypothesis.given(st.text(max_size=30) | st.text("htps:/ab@?#%[]1. ", max_size=9).map("http://".__add__))
def test_any_text_is_an_address_or_refused_in_one_sentence(text):
    """urllib can build a request from every accepted address."""
    refusal = None
    try:
        (base,) = known.base_addresses([text])
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert urllib.request.Request(f"{base}/124M/vocab.bpe").host
    else:
        assert refusal.endswith("is not a base address: it must look like https://example.org/models")
        assert "\n" not in refusal


WRONG = [{"timeout": 0}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"attempts": 0}, {"attempts": 1.5},
         {"backoff": -1}, {"timeout": "30"}, {"jobs": 0}, {"jobs": True}, {"files": ["model.bin"]}]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_and_files_that_cannot_be(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if "files" not in wrong else "is not a file of the release"):
        fetch(tmp_path, "http://127.0.0.1:9", **wrong)
    with pytest.raises(ValueError, match="no base address"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- bars


def test_bars_name_the_files_and_are_shown_on_request_or_on_a_terminal(tmp_path, server, capsys, monkeypatch):
    fetch(tmp_path / "a", server, files=FILES, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "GPT-2 124M, into" in err
    assert all(name in err for name in FILES)
    fetch(tmp_path / "b", server, files=FILES, progress=None)
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    fetch(tmp_path / "c", server, files=FILES, progress=None)
    assert DATA[:10] in terminal.getvalue()


def test_importing_the_downloader_imports_no_client_no_lock_and_no_bars():
    code = "import sys, jax, flax; before = set(sys.modules); import gpt2_jax.release.download; "
    code += "print([m for m in ('urllib.request', 'filelock', 'rich.progress') if m in set(sys.modules) - before])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
