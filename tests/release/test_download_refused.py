"""Fetching from servers without the file: there is no file under the final name, and the message names each server."""

import re
import socket
import ssl
import urllib.error
import urllib.request

import fake_release
import misbehaving_server as server_that
import pytest
from fake_release import fetch, path, right_names

from gpt2_jax.release import download, transfer
from gpt2_jax.release.known import DATA, INDEX

RELEASE = fake_release.made_up()
BODY = RELEASE[DATA]
HALF = len(BODY) // 2 + 1
pytestmark = pytest.mark.usefixtures("small_release")


REFUSED = {
    "404": (server_that.status(404), "404 Not Found"),
    "403": (server_that.status(403), "403 Forbidden"),
    "410": (server_that.status(410), "410 Gone"),
    "401": (server_that.status(401), "401 Unauthorized"),
    "XML": (server_that.page(), r"page \(application/xml\)"),
    "XML that lies": (server_that.page(content_type="application/octet-stream"), "page|instead of"),
    "HTML": (server_that.page(server_that.HTML, "text/html; charset=utf-8"), r"page \(text/html\)"),
    "XHTML": (server_that.page(server_that.HTML, "application/xhtml+xml"), "page"),
    "204": (server_that.page(b"", "text/plain", code=204), "answered 204|0 bytes"),
    "202": (server_that.page(b"later", "text/plain", code=202), "answered 202"),
    "gzip": (server_that.gzipped, "Content-Encoding gzip"),
    "garbage": (server_that.garbage, "wrong file|HTML|page"),
    "too long": (server_that.no_length(b"more"), "more than|does not say"),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["encoder.json", "hparams.json", INDEX, "checkpoint"])
@pytest.mark.parametrize(("behaviour", "told"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_file_is_refused_at_once(tmp_path, server, behaviour, told, name, known, monkeypatch):
    monkeypatch.setattr(download, "expectations", lambda size: fake_release.expectations(RELEASE, known))
    server.always[path(name)] = behaviour
    with pytest.raises(OSError, match=told) as caught:
        fetch(tmp_path, server, files=[name])
    assert not isinstance(caught.value, ConnectionError), "it was reached, and it answered"
    assert f"{server.url}{path(name)}" in str(caught.value)
    assert "--base-url" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert len(server.requests) == 1
    assert right_names(tmp_path, RELEASE) == set()


@pytest.mark.parametrize("content", ["<?xml ?>", " \r\n<!DocType x>", "<HTML>", "\t<Error>"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_page_as_long_as_the_file_is_refused(tmp_path, server, content, encoding):
    content = content.encode(encoding)
    server.files[path(DATA)] = content + b" " * (len(BODY) - len(content))
    with pytest.raises(OSError, match="HTML or XML"):
        fetch(tmp_path, server)
    assert right_names(tmp_path, RELEASE) == set()


def test_a_page_that_comes_in_small_pieces_is_refused(tmp_path, server):
    server.files[path(DATA)] = b"<html>" + b" " * (len(BODY) - 6)
    server.always[path(DATA)] = server_that.slow(1, 0.01, until=8)
    with pytest.raises(OSError, match="HTML or XML"):
        fetch(tmp_path, server)
    assert right_names(tmp_path, RELEASE) == set()


def test_a_page_in_answer_to_a_range_costs_nothing_of_what_is_there(tmp_path, server, mirror):
    (tmp_path / f"{DATA}.part").write_bytes(BODY[:HALF])
    server.always[path(DATA)] = lambda handler, body: (
        handler.head(200, len(body)),
        handler.send(b"<html>" + body[6:]),
    )
    fetch(tmp_path, server, mirror)
    assert mirror.starts(path(DATA)) == [HALF]
    assert right_names(tmp_path, RELEASE) == {DATA}


@pytest.mark.parametrize("delta", [-3, 5])
def test_a_length_that_is_not_the_files_is_refused(tmp_path, server, delta):
    server.always[path(DATA)] = server_that.wrong_length(delta)
    with pytest.raises(OSError, match=f"has a file of {len(BODY) + delta} bytes instead of {len(BODY)}"):
        fetch(tmp_path, server)
    assert right_names(tmp_path, RELEASE) == set()


@pytest.mark.parametrize("delta", [-3, 5])
def test_and_found_out_by_the_content_where_the_size_is_not_known(tmp_path, server, delta, unknown_sizes):
    server.always[path("hparams.json")] = server_that.wrong_length(delta)
    with pytest.raises(OSError, match="wrong file" if delta < 0 else "cut at byte"):
        fetch(tmp_path, server, files=["hparams.json"])
    assert right_names(tmp_path, RELEASE) == set()


def test_an_endless_file_of_unknown_size_is_given_up(tmp_path, server, unknown_sizes, monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST_UNKNOWN", 1000)
    for behaviour in (server_that.right, server_that.chunked()):
        server.always[path(INDEX)] = behaviour
        with pytest.raises(OSError, match=r"which is not a valid size|sends more than the 1000 bytes"):
            fetch(tmp_path, server, files=[INDEX])
        assert not (tmp_path / f"{INDEX}.part").exists()


# ---- the named addresses, and the type of error


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        (server_that.status(500), r"500 Internal Server Error \(3 attempts\)"),
        (server_that.hang_up, "closed connection"),
        (server_that.reset(0), "reset|cut at byte 0"),
        (server_that.cut(0), f"cut at byte 0 of {len(BODY)}"),
        (server_that.stall(None), r"no answer within 0\.2 s"),
        (server_that.stall(0), rf"stalled at byte 0 of {len(BODY)}: no data for 0\.2 s"),
    ],
)
def test_an_address_that_keeps_failing_is_tried_so_often_and_named(tmp_path, server, behaviour, told):
    server.always[path(DATA)] = behaviour
    with pytest.raises(ConnectionError, match=told) as caught:
        fetch(tmp_path, server, timeout=0.2)
    assert f"{server.url}{path(DATA)}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    server.released.set()
    assert right_names(tmp_path, RELEASE) == set()


def test_mirrors_are_tried_in_turn_and_all_are_named(tmp_path, server, mirror):
    server.always[path(DATA)] = server_that.status(404)
    fetch(tmp_path, server, mirror)
    assert right_names(tmp_path, RELEASE) == {DATA}
    assert (len(server.requests), len(mirror.requests)) == (1, 1)

    (tmp_path / DATA).unlink()
    mirror.always[path(DATA)] = server_that.status(500)
    with pytest.raises(OSError, match="cannot fetch") as caught:
        fetch(tmp_path, server, mirror)
    told = str(caught.value)
    assert re.search(f"{server.url}{path(DATA)}: 404 Not Found; {mirror.url}{path(DATA)}: 500 Inter", told)
    assert len(mirror.requests) == 1 + 3


def test_a_mirror_goes_on_where_the_other_was_cut(tmp_path, server, mirror):
    server.script[path(DATA)] = [server_that.cut(HALF)] + [server_that.status(503)] * 3
    fetch(tmp_path, server, mirror)
    assert mirror.starts(path(DATA)) == [HALF]
    assert right_names(tmp_path, RELEASE) == {DATA}


def test_a_mirror_that_gives_a_wrong_file_is_followed_by_the_next(tmp_path, server, mirror):
    server.always[path("encoder.json")] = server_that.garbage
    fetch(tmp_path, server, mirror, files=["encoder.json"])
    assert right_names(tmp_path, RELEASE) == {"encoder.json"}
    assert mirror.starts(path("encoder.json")) == [None], "nothing of the wrong file was kept"


def test_what_was_there_before_is_no_mark_against_a_mirror(tmp_path, server):
    """A bad .part makes the file wrong, so the same address is asked once more, from the start."""
    (tmp_path / "encoder.json.part").write_bytes(b"?" * 100)
    fetch(tmp_path, server, files=["encoder.json"])
    assert server.starts(path("encoder.json")) == [100, None]
    assert right_names(tmp_path, RELEASE) == {"encoder.json"}


def test_nobody_listens_and_no_such_host(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=rf"{nobody}/124M/{DATA}: .*refused.* \(3 attempts\)"):
            fetch(tmp_path, nobody)
    with pytest.raises(OSError, match="not a web address"):
        fetch(tmp_path, f"http://{'a' * 64}.invalid")
    assert right_names(tmp_path, RELEASE) == set()


@pytest.mark.parametrize(
    ("cause", "kind", "attempts"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), ConnectionError, 3),
        (ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate"), OSError, 1),
        ("unknown url type", ConnectionError, 3),
    ],
)
def test_what_happens_before_a_server_is_reached(tmp_path, monkeypatch, cause, kind, attempts):
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        raise urllib.error.URLError(cause)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    told = getattr(cause, "strerror", cause)
    with pytest.raises(kind, match=f"https://example.org/124M/{DATA}: {told}") as caught:
        fetch(tmp_path, "https://example.org")
    assert type(caught.value) is kind
    assert len(asked) == attempts
