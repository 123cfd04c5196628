"""TensorFlow reads fetched weights and checks every tensor. Damaged weights are fetched once more."""

import json

import checkpoint_forms as forms
import fake_release
import misbehaving_server as server_that
import pytest
from fake_release import path, put, right_names

from gpt2_jax.checkpoints import released
from gpt2_jax.release import download
from gpt2_jax.release.known import DATA, FILES, INDEX


@pytest.fixture(scope="module", autouse=True)
def _tensorflow():
    """Import TensorFlow once. Its own warnings are not errors."""
    forms.import_tensorflow()


@pytest.fixture(scope="module")
def model():
    return fake_release.embedded()


@pytest.fixture
def server(model, monkeypatch):
    fake_release.use(monkeypatch, model)
    with server_that.Server(fake_release.served(model)) as running:
        yield running


def flipped(body, at):
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def fetch_verified(directory, *servers, **options):
    bases = [getattr(server, "url", server) for server in servers]
    return released.fetch_verified("124M", directory, base_urls=bases, progress=False, backoff=0.0, **options)


def asked(server):
    return sorted(request.path for request in server.requests)


def test_what_arrives_right_is_read_and_stays(tmp_path, server, model):
    assert fetch_verified(tmp_path / "new", server) == tmp_path / "new"
    assert right_names(tmp_path / "new", model) == set(FILES)
    assert asked(server) == sorted(map(path, FILES))
    server.requests.clear()
    fetch_verified(tmp_path / "new", "http://127.0.0.1:9")
    assert server.requests == []


@pytest.mark.parametrize(("name", "at"), [(DATA, 0), (DATA, 7_000_001), (DATA, -1), (INDEX, 100), (INDEX, 900)])
def test_a_flipped_bit_is_found_and_the_weights_are_fetched_again(tmp_path, server, model, name, at):
    put(tmp_path, model | {name: flipped(model[name], at % len(model[name]))})
    with pytest.raises(ValueError, match="damaged"):
        released.verify(tmp_path)
    fetch_verified(tmp_path, server)
    assert right_names(tmp_path, model) == set(FILES)
    assert asked(server) == [path(DATA), path(INDEX)]


def test_a_mirror_that_gives_damaged_weights_is_asked_last_the_second_time(tmp_path, server, model):
    server.always[path(DATA)] = server_that.garbage
    with server_that.Server(fake_release.served(model)) as other:
        fetch_verified(tmp_path, server, other)
        assert asked(other) == [path(DATA), path(INDEX)]
    assert right_names(tmp_path, model) == set(FILES)


def test_weights_that_come_damaged_twice_are_refused_and_removed(tmp_path, server, model):
    server.always[path(DATA)] = server_that.garbage
    with pytest.raises(ValueError, match=rf"damaged.*fetched twice, from {server.url}, and removed: .*--base-url"):
        fetch_verified(tmp_path, server)
    assert asked(server).count(path(DATA)) == 2
    assert right_names(tmp_path, model) == set(FILES) - {DATA, INDEX}


def test_weights_of_another_model_are_found_out(tmp_path, server, model, monkeypatch):
    other = json.loads(model["hparams.json"]) | {"n_head": 2, "n_ctx": 129}
    files = model | {"hparams.json": json.dumps(other).encode()}
    monkeypatch.setattr(download, "expectations", lambda size: fake_release.expectations(files))
    server.files = fake_release.served(files)
    with pytest.raises(ValueError, match="does not hold the GPT-2 that hparams"):
        fetch_verified(tmp_path, server)


def test_another_process_may_have_mended_it_meanwhile(tmp_path, server, model, monkeypatch):
    put(tmp_path, model | {DATA: flipped(model[DATA], 11)})
    real = download._locked

    def later(directory):
        put(tmp_path, model)
        return real(directory)

    monkeypatch.setattr(download, "_locked", later)
    fetch_verified(tmp_path, server)
    assert server.requests == []


def test_another_process_may_have_been_killed_after_removing_them(tmp_path, server, model, monkeypatch):
    put(tmp_path, model | {DATA: flipped(model[DATA], 11)})
    real = download._locked

    def later(directory):
        (tmp_path / INDEX).unlink(missing_ok=True)
        (tmp_path / DATA).unlink(missing_ok=True)
        return real(directory)

    monkeypatch.setattr(download, "_locked", later)
    fetch_verified(tmp_path, server)
    assert right_names(tmp_path, model) == set(FILES)
    assert asked(server) == [path(DATA), path(INDEX)]


def test_a_folder_that_tensorflow_cannot_read_from_is_told_before_the_download(tmp_path, server):
    with pytest.raises(ValueError, match="choose another folder"):
        fetch_verified(tmp_path / "models [1]", server)
    assert server.requests == []


def test_verify_needs_the_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        released.verify(tmp_path)
