"""Activations of a dataset in files: the values of `forward`, no padding, few programs, the same bytes after a kill."""

import json
import os
import random
import shutil

import commands
import forks
import jax
import ml_dtypes
import numpy as np
import pytest
from killed_harvester import CAPTURE, HOW, some_documents
from strength import campaign
from tiny_models import CONFIG, random_params

from gpt2_jax import files, research
from gpt2_jax.activations import axes
from gpt2_jax.research import _harvest, _harvest_files, _harvest_program, stored

DOCUMENTS = some_documents(23, 100)
STORABLE = [name for name in research.activation_names(CONFIG) if "S" not in axes(name)]
BOUND = 2e-6  # relative to the largest value of an activation; measured: 6.5e-7 at most


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, scale=0.2)


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def windows(documents, max_tokens, skip_first):
    """(document, start, ids) of each window, and the rows that are stored, one by one."""
    found, rows = [], []
    for i, ids in enumerate(documents):
        for start in range(0, len(ids), max_tokens):
            window = ids[start : start + max_tokens]
            kept = range(skip_first, len(window))
            found += [(i, start, window)] if kept else []
            rows += [(window[t], i, start + t) for t in kept]
    return found, rows


@pytest.mark.parametrize(("max_tokens", "skip_first"), [(None, 0), (33, 2), (7, 0)])
def test_values_are_those_of_each_text_alone(params, tmp_path, max_tokens, skip_first):
    patterns = [f"^{name}$" for name in STORABLE]
    how = {"max_tokens": max_tokens, "skip_first": skip_first, "shard_bytes": 300_000}
    got = research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", patterns, **how)
    found, rows = windows(DOCUMENTS, max_tokens or CONFIG.n_ctx, skip_first)
    assert got.names == tuple(STORABLE)
    assert len(got) == len(rows)
    for name, column in zip(("tokens", "document", "position"), zip(*rows, strict=True), strict=True):
        assert got[name].dtype == np.int32
        assert got[name][:].tolist() == list(column)
    alone = [research.forward(CONFIG, params, [ids], capture=patterns)[1] for _, _, ids in found]
    for name in STORABLE:
        expected = np.concatenate([np.asarray(one[name][0])[skip_first:] for one in alone])
        assert got[name].shape == expected.shape
        assert got[name].dtype == np.float32
        error = np.abs(got[name][:] - expected).max() / np.abs(expected).max()
        assert error <= BOUND, name


def test_the_files_are_plain_npy(params, tmp_path):
    """One shard after another is everything. Their sizes are about those that were asked for."""
    whole = research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "whole", CAPTURE)
    parts = research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "parts", CAPTURE, shard_bytes=15_000)
    assert len(list((tmp_path / "whole").glob("shard-*"))) == 1
    shards = sorted((tmp_path / "parts").glob("shard-*"))
    assert len(shards) > 4
    for name in ("h0/attn/q", "h1/mlp/out", "tokens", "document", "position"):
        arrays = [np.load(shard / f"{name}.npy", mmap_mode="r") for shard in shards]
        assert [len(array) for array in arrays] == parts.manifest["shards"]
        assert np.allclose(np.concatenate(arrays), whole[name][:], rtol=0, atol=1e-6)  # measured: 4.8e-7
    sizes = [sum(path.stat().st_size for path in shard.rglob("*.npy")) for shard in shards]
    assert max(sizes) < 15_000 + 41 * 108 + 5 * 128  # one window more, and the headers
    assert min(sizes[:-1]) > 15_000 - 41 * 108


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_dtypes(params, tmp_path, dtype):
    """The values of float32, rounded. bfloat16 is in the files as its bits."""
    wide = research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "wide", CAPTURE)
    got = research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", CAPTURE, store_dtype=dtype)
    for name in got.names:
        assert got[name].dtype == dtype
        assert np.array_equal(got[name][:], wide[name][:].astype(dtype))
    raw = np.load(tmp_path / "out" / "shard-00000" / "h1" / "mlp" / "out.npy")
    assert raw.dtype == ("float16" if dtype == "float16" else "uint16")
    assert np.array_equal(raw.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else raw.dtype), got["h1/mlp/out"][:])


def test_the_manifest_says_what_is_there(params, tmp_path):
    about = {"model": "tiny", "sources": [{"name": "a.txt"}]}
    got = research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", CAPTURE, about=about, **HOW)
    read = json.loads((tmp_path / "out" / "activations.json").read_text())
    assert read == got.manifest
    assert (read["model"], read["sources"]) == ("tiny", [{"name": "a.txt"}])
    assert read["activations"] == {
        "h0/attn/q": {"axes": "NH", "shape": [3, 4], "dtype": "float32"},
        "h1/mlp/out": {"axes": "D", "shape": [12], "dtype": "float32"},
    }
    other = research.harvest(CONFIG, random_params(CONFIG, 1), DOCUMENTS, tmp_path / "other", CAPTURE)
    assert other.manifest["params"] != read["params"]
    assert other.manifest["documents"] == read["documents"]


# ---- how it runs


def test_few_programs_and_what_is_told(params, tmp_path):
    """One program for each length that is told. The blocks above the last captured activation are not run."""
    _harvest_program._captured.clear_cache()
    told = []
    documents = some_documents(200, 41)
    research.harvest(CONFIG, params, documents, tmp_path / "out", "h0/mlp/out", shard_bytes=20_000, tell=told.append)
    n_tokens = sum(map(len, documents))
    n_shards = len(list((tmp_path / "out").glob("shard-*")))
    assert told[0] == f"size: {n_tokens * 60 / 1e3:.2f} kB, {n_tokens:,} tokens of 60 bytes each, in {n_shards} shards"
    assert told[1].startswith("time: about ")
    assert told[2:] == ["programs: 2, for texts of up to 32, 41 tokens"]
    assert _harvest_program._captured._cache_size() == 2
    told.clear()
    research.harvest(CONFIG, params, documents, tmp_path / "out", "h0/mlp/out", shard_bytes=20_000, tell=told.append)
    assert told[1:] == [f"already there: {n_shards} of {n_shards} shards; left: 0 bytes"]


def test_the_blocks_above_are_not_computed(tmp_path):
    """They may hold anything."""
    params = random_params(CONFIG, 0)
    expected = research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "one", "h0/resid_post")
    params["h1"] = jax.tree.map(lambda leaf: leaf * np.nan, params["h1"])
    got = research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "two", "h0/resid_post")
    assert np.array_equal(got["h0/resid_post"][:], expected["h0/resid_post"][:])
    stops = {"embed": 0, "h0/attn/q": 1, "h1/resid_pre": 2, "ln_f/out": None}
    for name, stop in stops.items():
        assert _harvest_program.Program(CONFIG, params, ("embed", name), np.dtype(np.float32), 1).stop == stop


def test_the_next_batch_is_started_before_the_values_are_fetched(params, tmp_path, monkeypatch):
    order = []
    start, get = _harvest_program.Program.start, jax.device_get

    def started(*args):
        order.append("start")
        return start(*args)

    def fetched(values):
        order.append("fetch")
        return get(values)

    monkeypatch.setattr(_harvest_program.Program, "start", started)
    monkeypatch.setattr(_harvest.jax, "device_get", fetched)
    research.harvest(CONFIG, params, some_documents(120), tmp_path / "out", CAPTURE, **HOW)
    n = order.count("start")
    assert n > 9
    assert order == ["start", *["start", "fetch"] * (n - 1), "fetch"]


def test_rows_are_divided_over_devices(tmp_path):
    """Eight devices give the values of one."""
    code = """
        import sys, jax, numpy as np
        from killed_harvester import CAPTURE, some_documents
        from tiny_models import CONFIG, random_params
        from gpt2_jax import research
        from gpt2_jax.params import flatten, unflatten
        from gpt2_jax.sharding import make_mesh, param_shardings

        params, documents = random_params(CONFIG, 0, scale=0.2), some_documents(23, 100)
        one = research.harvest(CONFIG, params, documents, sys.argv[1] + "/one", CAPTURE)
        found = []
        for size in [(8, 1), (2, 3)]:
            shardings = param_shardings(flatten(params), make_mesh(*size))
            divided = jax.tree.map(jax.device_put, params, unflatten(shardings))
            got = research.harvest(CONFIG, divided, documents, f"{sys.argv[1]}/{size[0]}", CAPTURE)
            assert got.manifest["computed"]["mesh"] == {"data": size[0], "model": size[1]}, got.manifest["computed"]
            assert got["tokens"][:].tolist() == one["tokens"][:].tolist()
            found += [float(np.abs(got[name][:] - one[name][:]).max()) for name in got.names]
        print(found)
    """
    found = commands.on_eight_devices(code, str(tmp_path))
    assert max(found) < 3e-6  # measured: 9.5e-7
    assert len(found) == 4


def test_the_time_is_told_without_compilation(monkeypatch):
    """A batch of 100 rows takes two seconds, and each of two programs another minute."""
    now, told = [0.0], []
    monkeypatch.setattr(_harvest.time, "perf_counter", lambda: now[0])
    clock = _harvest._Clock(10_000, told.append)
    for batch in range(30):
        n_tokens = 32 if batch < 5 else 64
        with clock.starting(n_tokens):
            now[0] += 60 if batch in (0, 5) else 0
        now[0] += 2
        clock.after(10_000 - 100 * (batch + 1))
    assert told == ["time: about 3 minutes, at 50 tokens per second"]  # for 9,100 rows
    assert clock.lengths == {32, 64}
    assert [_harvest._duration(seconds) for seconds in (9, 99, 300, 7200)] == [
        *("9 seconds", "99 seconds", "5 minutes", "2.0 hours")
    ]


def test_too_little_memory_is_told(params, tmp_path, monkeypatch):
    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")

    monkeypatch.setattr(_harvest_program, "_captured", exhausted)
    with pytest.raises(MemoryError, match="not enough memory to capture activations of 16 texts of 41 tokens together"):
        research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", CAPTURE)


def test_many_activations_run_in_small_batches(params):
    """What two calls return is in memory."""
    sizes = [2**9, 2**20, 2**40]
    programs = [_harvest_program.Program(CONFIG, params, ("embed",), np.dtype(np.float32), size) for size in sizes]
    assert [program.tokens_per_call for program in programs] == [1024, 512, 1]


# ---- resumed


class StopError(Exception):
    pass


def stopped_after(n):
    """A check that raises before batch n, counted from 0."""
    calls = iter(range(n))

    def check():
        if next(calls, None) is None:
            raise StopError

    return check


@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_stopped_and_continued(params, tmp_path, n):
    """The bytes of an uninterrupted run, without what is there already."""
    documents = some_documents()
    research.harvest(CONFIG, params, documents, tmp_path / "one", CAPTURE, **HOW)
    with pytest.raises(StopError):
        research.harvest(CONFIG, params, documents, tmp_path / "two", CAPTURE, check=stopped_after(n), **HOW)
    there = {path: path.stat().st_ino for path in (tmp_path / "two").glob("shard-*")}
    batches = []
    got = research.harvest(CONFIG, params, documents, tmp_path / "two", CAPTURE, check=lambda: batches.append(1), **HOW)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert {path: path.stat().st_ino for path in there} == there
    assert len(batches) >= len(got.manifest["shards"]) - len(there)
    got.check()
    del batches[:]
    research.harvest(CONFIG, params, documents, tmp_path / "two", CAPTURE, check=lambda: batches.append(1), **HOW)
    assert batches == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each kill")
def test_killed_at_random_moments(tmp_path, monkeypatch):
    """A shard is whole or absent, and the same call gives the bytes of an uninterrupted one."""
    rng = random.Random(os.getpid())
    target, states = tmp_path / "work" / "out", []
    target.parent.mkdir()
    with forks.Forks("killed_harvester") as fork:
        whole = fork(target=str(tmp_path / "one"), folder=tmp_path / "one")
        assert whole.error == ""
        expected, n_batches = everything(tmp_path / "one"), len(whole.said) - 1
        moments = [{"operation": step} for step in range(0, whole.operations, campaign(whole.operations // 2, 3))]
        moments += [{"delay": rng.uniform(0, whole.seconds)} for _ in range(campaign(3, 20))]
        moments += [{"until": lambda said: len(said) > n_batches // 2}]
        for moment in moments:
            shutil.rmtree(target, ignore_errors=True)
            ended = fork(target=str(target), folder=target.parent, **moment)
            assert ended.error == ""
            there = everything(target) if target.exists() else {}
            for path, data in there.items():
                if path.parts[0].startswith("shard-"):
                    assert expected[path] == data, path
            names = {path.parts[0] for path in there if path.parts[0].startswith("shard-")}
            assert {path for path in expected if path.parts[0] in names} <= there.keys()
            again = fork(target=str(target), folder=target.parent)
            assert (again.error, everything(target)) == ("", expected)
            assert all(path.name == ".lock" or not path.name.startswith(".") for path in target.iterdir())
            states.append(len(names))
    print(f"\nshards after {len(states)} kills: {states}")
    assert len(set(states)) > 1


def test_an_error_of_the_disk_is_told(params, tmp_path, monkeypatch):
    """Also if it comes from the thread that writes. What is there stays."""
    write, count = _harvest_files.Writer.write, []

    def full(self, shard, arrays):
        count.append(shard)
        if len(count) == 3:
            raise OSError(28, "No space left on device")
        write(self, shard, arrays)

    monkeypatch.setattr(_harvest_files.Writer, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        research.harvest(CONFIG, params, some_documents(), tmp_path / "out", CAPTURE, **HOW)
    assert len(list((tmp_path / "out").glob("shard-*"))) == 2
    with pytest.raises(ValueError, match=r"out is not complete: it has 2 of \d+ shards; repeat the command"):
        research.open_activations(tmp_path / "out")


# ---- refused


def test_other_work_is_refused(params, tmp_path):
    """With one sentence, and nothing is changed."""
    documents = some_documents()
    research.harvest(CONFIG, params, documents, tmp_path / "out", CAPTURE, **HOW)
    before = everything(tmp_path / "out")

    def again(match, params=params, documents=documents, capture=CAPTURE, **how):
        with pytest.raises(ValueError, match=f"out was begun with {match}: repeat the command that began it"):
            research.harvest(CONFIG, params, documents, tmp_path / "out", capture, **(HOW | how))

    again("another model", params=random_params(CONFIG, 1))
    again("other texts", documents=documents[:-1])
    again("other texts", documents=[[1 - documents[0][0] % 2, *documents[0][1:]], *documents[1:]])
    again("other texts", documents=[documents[0] + documents[1][:1], documents[1][1:], *documents[2:]])
    again("other activations, or another dtype for them", capture="h1/attn/q")
    again("other activations, or another dtype for them", store_dtype="float16")
    again("another max_tokens, skip_first or shard size", skip_first=0)
    again("another max_tokens, skip_first or shard size", max_tokens=28)
    again("another max_tokens, skip_first or shard size", shard_bytes=10_000)
    again("another choice of checksums", checksums=False)
    assert everything(tmp_path / "out") == before


def test_other_files_are_refused(params, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("three weeks of work")
    with pytest.raises(FileExistsError, match=r"files that are not part of stored activations \(notes\.txt\)"):
        research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", CAPTURE)
    with pytest.raises(FileExistsError, match=r"notes\.txt is a file"):
        research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out" / "notes.txt", CAPTURE)
    assert everything(tmp_path / "out").keys() == {(tmp_path / "out" / "notes.txt").relative_to(tmp_path / "out")}
    (tmp_path / "empty").mkdir()
    assert len(research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "empty", CAPTURE)) == sum(map(len, DOCUMENTS))


def test_a_second_process_is_refused(params, tmp_path):
    def check():
        with pytest.raises(ValueError, match="another process is writing to"):
            research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", CAPTURE)

    research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", CAPTURE, check=check)


def test_a_disk_with_too_little_room_is_refused_before_anything_is_computed(params, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_harvest_files.shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    need = sum(map(len, DOCUMENTS)) * 108 / 1000
    with pytest.raises(OSError, match=f"need {need:.2f} kB, but the disk of .*out has 50.00 kB left: capture fewer"):
        research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", CAPTURE, check=lambda: pytest.fail("computed"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"capture": "attn/pattern"}, r"h0/attn/pattern has as many values per token as its text has tokens"),
        ({"capture": "."}, r"h0/attn/scores has as many values per token"),
        ({"capture": "resid_pots"}, "no activation name matches 'resid_pots'"),
        ({"capture": ()}, "capture is empty"),
        ({"documents": []}, "there are no documents"),
        ({"documents": [[1], []]}, r"documents\[1\] is empty"),
        ({"documents": [[1], [37]]}, r"documents\[1\] holds the id 37, outside the vocabulary of 37 ids"),
        ({"documents": "text"}, "there are no documents"),
        ({"max_tokens": 42}, "max_tokens must be a whole number, from 1 to 41, not 42"),
        ({"skip_first": 41}, "skip_first must be a whole number, from 0 to 40, not 41"),
        ({"documents": [[1, 2]], "skip_first": 2}, "no text has more than 2 tokens, which are left out"),
        ({"store_dtype": "int8"}, "store_dtype must be one of float32, float16, bfloat16, not 'int8'"),
        ({"shard_bytes": 0}, "shard_bytes must be a whole number, 1 or more, not 0"),
    ],
)
def test_what_cannot_be_done_is_refused(params, tmp_path, change, match):
    how = {"documents": DOCUMENTS, "capture": CAPTURE} | change
    with pytest.raises(ValueError, match=match):
        research.harvest(CONFIG, params, folder=tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused(tmp_path):
    """In the text that has them. Padding does not count."""
    params = random_params(CONFIG, 0)
    params["wte"] = params["wte"].at[36].set(np.nan)
    documents = [[1, 2], [3] * 5, [4, 36, 5], [6]]
    with pytest.raises(ValueError, match=r"h0/resid_post is NaN, infinite or too large for float32 in text 2, counted"):
        research.harvest(CONFIG, params, documents, tmp_path / "out", "h0/resid_post")
    padding = research.harvest(CONFIG, params, [[1, 2], [3]], tmp_path / "fine", "h0/resid_post")
    assert len(padding) == 3
    params["wte"] = params["wte"].at[0].set(np.nan)  # the token that padding has
    assert len(research.harvest(CONFIG, params, [[1, 2], [3]], tmp_path / "embed", "^embed")) == 3
    params["wte"] = params["wte"].at[36].set(70_000)  # more than float16 has
    with pytest.raises(ValueError, match=r"^embed is NaN, infinite or too large for float16 in text 2"):
        research.harvest(CONFIG, params, documents, tmp_path / "half", "^embed", store_dtype="float16")
    got = research.harvest(CONFIG, params, documents, tmp_path / "wide", "^embed", store_dtype="bfloat16")
    assert float(got["embed"][8][0]) == float(ml_dtypes.bfloat16(70_000))


# ---- the reader


@pytest.fixture(scope="module")
def got(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "out"
    return research.harvest(CONFIG, params, some_documents(), folder, CAPTURE, **HOW)


def test_rows_are_indexed_as_an_array(got):
    assert len(got.manifest["shards"]) > 9
    for name in ("h0/attn/q", "tokens"):
        rows, array = got[name], np.asarray(got[name])
        assert (rows.shape, rows.dtype, len(rows)) == (array.shape, array.dtype, len(array))
        n = len(rows)
        mask = np.arange(n) % 7 == 3
        indices = [5, -1, n - 1, -n, slice(None), slice(3, 300), slice(-50, None), slice(n, None), slice(300, 3, -2)]
        indices += [slice(1, None, 9), [4, 800, 4, -2], [], np.array([[]])[0], mask, np.int64(7), slice(None, None, -1)]
        for index in indices:
            expected = array[index] if not (isinstance(index, list | np.ndarray) and not len(index)) else array[:0]
            assert np.array_equal(rows[index], expected), index
            assert rows[index].dtype == array.dtype
    for index in (n, -n - 1, [0, n], 1.5, (1, 2), mask[1:], [[1]]):
        with pytest.raises(IndexError):
            rows[index]


def test_names_that_are_there(got):
    assert got.names == ("h0/attn/q", "h1/mlp/out")
    assert "h1/mlp/out" in got
    assert "position" in got
    assert "h1/attn/q" not in got
    with pytest.raises(KeyError, match=r"has no 'h1/attn/q'; it has h0/attn/q, h1/mlp/out, tokens, document, position"):
        got["h1/attn/q"]


@pytest.mark.parametrize("pool_bytes", [1, 20_000, 2**28])
@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_an_epoch_has_each_token_once(got, pool_bytes, size):
    names = ["document", "position", "h1/mlp/out"]
    batches = list(got.batches(names, size, 5, pool_bytes=pool_bytes))
    n = len(got)
    assert [len(batch["document"]) for batch in batches] == [size] * (n // size) + [n % size] * (n % size > 0)
    places = np.concatenate([np.stack([batch["document"], batch["position"]], 1) for batch in batches]).tolist()
    values = np.concatenate([batch[names[2]] for batch in batches])
    rows = {tuple(place): row for place, row in zip(places, values, strict=True)}
    expected = np.stack([got["document"][:], got["position"][:]], 1).tolist()
    assert sorted(places) == expected
    assert places != expected
    array = got["h1/mlp/out"][:]
    assert all(np.array_equal(rows[tuple(place)], array[i]) for i, place in enumerate(expected))


def test_the_seed_and_the_epoch_give_the_order(got):
    def order(*args, **how):
        return np.concatenate(list(got.batches("h1/mlp/out", 64, *args, **how)))

    assert np.array_equal(order(5), order(5))
    assert not np.array_equal(order(5), order(6))
    assert not np.array_equal(order(5), order(5, 1))
    assert np.array_equal(order(5, 0), order(5))


def test_a_batch_has_rows_from_everywhere(got):
    """With one pool as among all rows: the mean document of a batch varies as that of independent draws does."""
    document = got["document"][:]
    means = [batch.mean() for seed in range(20) for batch in got.batches("document", 100, seed) if len(batch) == 100]
    expected = document.std() / 10
    assert 0.8 * expected < np.std(means) < 1.2 * expected  # measured: 0.98; without a shuffle 9.6
    first = next(iter(got.batches("document", 100, 0, pool_bytes=64 * 4 * 8)))  # of 8 blocks
    assert len({number // 5 for number in first}) > 4


def test_no_number_out_of_range(got):
    for how in ({"size": 0}, {"seed": -1}, {"epoch": -1}, {"pool_bytes": float("nan")}):
        with pytest.raises(ValueError, match=f"^{next(iter(how))} must be"):
            next(iter(got.batches("tokens", **({"size": 1, "seed": 0} | how))))


def test_damage_is_noticed(got, tmp_path):
    def copied(name):
        shutil.copytree(got.folder, tmp_path / name)
        return tmp_path / name

    folder = copied("changed")
    path = folder / "shard-00003" / "h1" / "mlp" / "out.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00003.*out\.npy has changed: its sha256 is"):
        research.open_activations(folder).check()
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match=r"out\.npy is damaged"):
        research.open_activations(folder)["h1/mlp/out"][:]
    np.save(path, np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match=r"out\.npy is damaged: it has float32\(3, 3\), and not float32\(\d+, 12\)"):
        research.open_activations(folder)["h1/mlp/out"][:]

    folder = copied("missing")
    shutil.rmtree(folder / "shard-00003")
    with pytest.raises(ValueError, match="missing is not complete: it has"):
        research.open_activations(folder)
    with pytest.raises(FileNotFoundError, match=r"has no activations\.json: it was not written by gpt2-activations"):
        research.open_activations(tmp_path)
    manifest = files.read_object(folder / stored.MANIFEST)
    wrong = {"version": {"gpt2_jax_activations": 2}, "is damaged": {"shards": [1, -1]}, "does not describe": None}
    wrong["is damaged$"] = {"activations": {"x": {"dtype": "int8", "shape": [1]}}}
    for match, change in wrong.items():
        (folder / stored.MANIFEST).write_text(json.dumps({} if change is None else manifest | change))
        with pytest.raises(ValueError, match=match):
            research.open_activations(folder)


def test_without_checksums_there_is_nothing_to_compare(params, tmp_path):
    with pytest.raises(ValueError, match="was written without checksums"):
        research.harvest(CONFIG, params, DOCUMENTS, tmp_path / "out", CAPTURE).check()
