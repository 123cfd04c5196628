"""Fetching from servers that fail at times: missing bytes are requested again, and the file is right in the end."""

import fake_release
import misbehaving_server as server_that
import pytest
from fake_release import fetch, path, right_names
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2_jax.release import download, transfer
from gpt2_jax.release.known import DATA, FILES, INDEX

RELEASE = fake_release.made_up()
BODY = RELEASE[DATA]
HALF = len(BODY) // 2 + 1
pytestmark = pytest.mark.usefixtures("small_release")


def test_all_seven_files_arrive_right_several_at_once(tmp_path, server, monkeypatch):
    now, counts = set(), []

    def counted(url, *args, **options):
        now.add(url)
        counts.append(len(now))
        transfer.transfer(url, *args, **options)
        now.remove(url)

    monkeypatch.setattr(download, "transfer", counted)
    for name in FILES:
        server.always[path(name)] = server_that.slow(1 + len(RELEASE[name]) // 3, 0.02)
    assert fetch(tmp_path / "new" / "124M", server, files=FILES, jobs=3) == tmp_path / "new" / "124M"
    assert right_names(tmp_path / "new" / "124M", RELEASE) == set(FILES)
    assert sorted(asked.path for asked in server.requests) == sorted(map(path, FILES))
    assert max(counts) == 3
    assert not list(tmp_path.rglob("*.part"))
    assert {asked.headers["Accept-Encoding"] for asked in server.requests} == {"identity"}


# ---- failures that another attempt repairs

MENDED = {
    "500": [server_that.status(500)] * 2,
    "503 with Retry-After": [server_that.status(503, Retry_After="0")],
    "429": [server_that.status(429)],
    "408": [server_that.status(408)],
    "hang up": [server_that.hang_up] * 2,
    "cut": [server_that.cut(HALF), server_that.cut(97)],
    "cut at 0": [server_that.cut(0)],
    "reset": [server_that.reset(HALF), server_that.reset(0)],
    "stall": [server_that.stall(HALF), server_that.stall(None)],
    "Range ignored": [server_that.cut(HALF), server_that.ignores_range()],
    "Range ignored and cut": [server_that.cut(HALF), server_that.ignores_range(97)],
    "another range": [server_that.cut(HALF), server_that.wrong_range(0)],
    "a later range": [server_that.cut(HALF), server_that.wrong_range(HALF + 1)],
    "an earlier range, no length": [server_that.cut(HALF), server_that.wrong_range(HALF - 1, says_length=False)],
    "a later range, no length": [server_that.cut(HALF), server_that.wrong_range(HALF + 1, says_length=False)],
    "416": [server_that.cut(HALF), server_that.refuses_range],
    "no length": [server_that.no_length()],
    "chunked": [server_that.chunked()],
    "chunked, cut": [server_that.chunked(HALF), server_that.chunked(10)],
    "no length, cut": [lambda handler, body: server_that.no_length()(handler, body[:HALF])],
}


@pytest.mark.parametrize("behaviours", MENDED.values(), ids=MENDED)
def test_what_a_retry_mends_ends_right(tmp_path, server, behaviours):
    server.script[path(DATA)] = list(behaviours)
    fetch(tmp_path, server, timeout=0.3)
    assert right_names(tmp_path, RELEASE) == {DATA}
    assert server.script[path(DATA)] == [], "every misbehaviour was met"


@pytest.mark.parametrize("behaviours", MENDED.values(), ids=MENDED)
def test_and_where_only_the_server_knows_the_size(tmp_path, server, behaviours, unknown_sizes):
    server.script[path(INDEX)] = [b for b in behaviours if b not in MENDED["no length"] + MENDED["no length, cut"]]
    fetch(tmp_path, server, files=[INDEX], timeout=0.3)
    assert right_names(tmp_path, RELEASE) == {INDEX}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.sampled_from(["cut", "reset"]), st.integers(1, len(BODY) // 2)), max_size=12))
def test_any_number_of_cuts_anywhere_ends_right(tmp_path_factory, cuts):
    """More cuts than attempts. Each attempt brought new bytes, so none counts."""
    directory = tmp_path_factory.mktemp("cuts")
    with server_that.Server(fake_release.served(RELEASE)) as server:
        server.script[path(DATA)] = [getattr(server_that, kind)(n) for kind, n in cuts]
        fetch(directory, server, attempts=2)
        assert right_names(directory, RELEASE) == {DATA}
        if all(kind == "cut" for kind, _ in cuts):  # a reset may lose bytes in transit
            assert server.sent(path(DATA)) == len(BODY)


def test_a_resume_asks_for_exactly_what_is_missing(tmp_path, server):
    server.script[path(DATA)] = [server_that.cut(1009), server_that.cut(13), server_that.stall(211)]
    fetch(tmp_path, server, timeout=0.3)
    assert server.starts(path(DATA)) == [None, 1009, 1022, 1233]
    assert server.sent(path(DATA)) == len(BODY)


def test_a_range_that_went_wrong_is_not_asked_for_again(tmp_path, server):
    server.always[path(DATA)] = server_that.wrong_range(3)
    (tmp_path / f"{DATA}.part").write_bytes(BODY[:HALF])
    fetch(tmp_path, server)
    assert server.starts(path(DATA)) == [HALF, None]
    assert right_names(tmp_path, RELEASE) == {DATA}


def test_a_range_of_a_file_of_another_length_is_refused(tmp_path, server):
    server.always[path(DATA)] = server_that.wrong_range(HALF, total=len(BODY) + 4)
    (tmp_path / f"{DATA}.part").write_bytes(BODY[:HALF])
    with pytest.raises(OSError, match=f"has a file of {len(BODY) + 4} bytes instead of {len(BODY)}"):
        fetch(tmp_path, server)


def test_pauses_double_up_to_a_limit_and_follow_retry_after(tmp_path, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(transfer, "_pause", lambda stop, seconds: pauses.append(seconds))
    answers = [server_that.status(500)] * 4
    answers += [server_that.status(503, Retry_After=text) for text in ("17", "86400", "Wed, 21 Oct 2015 07:28:00 GMT")]
    server.script[path(DATA)] = [*answers, server_that.status(503, Retry_After="soon")]
    fetch(tmp_path, server, attempts=9, backoff=0.01)
    for k, pause in enumerate(pauses[:4]):
        assert 0.005 * 2**k <= pause <= 0.01 * 2**k
    assert pauses[4:6] == [17.0, transfer.LONGEST_PAUSE]
    assert all(pause < 2 for pause in pauses[6:])
    assert len(pauses) == 8


def test_progress_resets_the_pauses(tmp_path, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(transfer, "_pause", lambda stop, seconds: pauses.append(seconds))
    server.script[path(DATA)] = [server_that.status(500)] * 2 + [server_that.cut(5)] + [server_that.status(500)] * 2
    fetch(tmp_path, server, attempts=3, backoff=1.0)
    assert [round(pause * 2) <= bound for pause, bound in zip(pauses, (2, 4, 2, 2, 4), strict=True)] == [True] * 5


def test_a_whole_part_of_unknown_size_is_dropped_when_the_server_has_no_more(tmp_path, server, unknown_sizes):
    (tmp_path / f"{INDEX}.part").write_bytes(RELEASE[INDEX])
    fetch(tmp_path, server, files=[INDEX])
    assert server.starts(path(INDEX)) == [len(RELEASE[INDEX]), None]
    assert right_names(tmp_path, RELEASE) == {INDEX}


def test_a_file_asked_for_twice_is_fetched_once(tmp_path, server):
    fetch(tmp_path, server, files=[DATA, DATA])
    assert len(server.requests) == 1
