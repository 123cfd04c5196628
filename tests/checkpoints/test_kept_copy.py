"""The kept copy of a TensorFlow checkpoint: no TensorFlow import, never out of date, and no failure because of it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import checkpoint_forms as forms
import pytest
from checkpoint_forms import CONFIG, DATA, INDEX, assert_loads_as
from strength import full_only

import gpt2_jax

LOAD = textwrap.dedent("""
    import json, sys
    import checkpoint_forms as forms
    import gpt2_jax
    config, params = gpt2_jax.load(sys.argv[1])
    assert gpt2_jax.load_config(sys.argv[1]) == config
    right = forms.difference(params, forms.random_model(config)) == ""
    print(json.dumps({"right": right, "tensorflow": "tensorflow" in sys.modules, "n_head": config.n_head}))
""")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    forms.import_tensorflow()
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPT2_JAX_KEEP_COPY", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path, cache):
    return forms.write_tensorflow(tmp_path / "model", CONFIG, forms.random_model())


def copies(cache: Path) -> list[Path]:
    return [path for path in sorted(cache.rglob("*")) if path.is_file() and not path.name.endswith(".lock")]


def start(model: Path, **env) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(model)],
        cwd=Path(__file__).parents[1] / "support",
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> dict:
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out) | {"err": err}


@full_only("test_two_processes_at_once has it too")
def test_the_second_load_imports_no_tensorflow(model, cache):
    first, second = answer(start(model)), answer(start(model))
    assert (first["right"], first["tensorflow"]) == (True, True)
    assert (second["right"], second["tensorflow"]) == (True, False)
    assert second["err"] == ""
    assert_loads_as(model, CONFIG, forms.random_model())


def test_two_processes_at_once(model, cache):
    running = [start(model) for _ in range(2)]
    assert all(answer(process)["right"] for process in running)
    assert len(copies(cache)) == 1
    later = answer(start(model))
    assert (later["right"], later["tensorflow"]) == (True, False)
    assert later["err"] == ""


def test_one_verified_copy_in_the_cache_folder(model, cache):
    before = {path: path.read_bytes() for path in model.iterdir()}
    assert_loads_as(model, CONFIG, forms.random_model())
    (copy,) = copies(cache)
    assert copy.parent == cache / "copies"
    assert copy.stat().st_size >= 4 * CONFIG.n_params
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_a_bfloat16_copy_and_a_cast_one(model, cache):
    """The copy has the stored dtype, whatever dtype was requested first."""
    gpt2_jax.load(model, dtype="bfloat16")
    assert_loads_as(model, CONFIG, forms.random_model())
    config = CONFIG.replace(param_dtype="bfloat16")
    flat = forms.random_bits(config, 1)
    forms.write_tensorflow(model.with_name("second"), config, flat)
    for _ in range(2):
        assert_loads_as(model.with_name("second"), config, flat)


# ---- never out of date


def keep_times(path: Path, change):
    """Change a file and restore its times, as cp -p, rsync -t and archives do."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("times", ["new times", "old times"])
def test_changed_weights_are_read_anew(model, cache, times):
    """The size and even the times may be the same: the checksum in the index differs."""
    gpt2_jax.load(model)
    flat = forms.random_model(seed=6)
    other = forms.write_tensorflow(model.with_name("other"), CONFIG, flat)
    for name in (DATA, INDEX):
        content = (other / name).read_bytes()
        assert len(content) == (model / name).stat().st_size
        if times == "old times":
            keep_times(model / name, lambda path, content=content: path.write_bytes(content))
        else:
            (model / name).write_bytes(content)
    for _ in range(2):
        assert_loads_as(model, CONFIG, flat)
    assert len(copies(cache)) == 1, "the copy of what is gone must go too"


def test_changed_hyperparameters_are_read_anew(model, cache):
    gpt2_jax.load(model)
    config = CONFIG.replace(n_head=5)
    content = json.dumps(config.to_hparams())
    assert len(content) == (model / "hparams.json").stat().st_size
    keep_times(model / "hparams.json", lambda path: path.write_text(content))
    assert_loads_as(model, config, forms.random_model())
    (model / "hparams.json").write_text(json.dumps(CONFIG.replace(n_layer=3).to_hparams()))
    with pytest.raises(ValueError, match="h2"):
        gpt2_jax.load(model)


def test_a_pointer_to_another_checkpoint_is_followed(model, cache):
    gpt2_jax.load(model)
    flat = forms.random_model(seed=8)
    forms.write_tensorflow(model, CONFIG, flat, prefix="model-1000")
    assert_loads_as(model, CONFIG, flat)
    keep_times(model / "checkpoint", lambda path: path.write_text('model_checkpoint_path: "model.ckpt"\n'))
    assert_loads_as(model, CONFIG, forms.random_model())


def test_two_directories_have_two_copies(model, cache):
    gpt2_jax.load(model)
    flat = forms.random_model(seed=9)
    other = forms.write_tensorflow(model.with_name("other"), CONFIG, flat)
    for _ in range(2):
        assert_loads_as(other, CONFIG, flat)
        assert_loads_as(model, CONFIG, forms.random_model())
    shutil.rmtree(model)
    other.rename(model)  # another model with the name of the first
    assert_loads_as(model, CONFIG, flat)


@pytest.mark.parametrize("name", [DATA, INDEX, "hparams.json"])
def test_a_copy_does_not_stand_in_for_files_that_are_gone_or_cut(model, cache, name):
    gpt2_jax.load(model)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=name.split("-")[0].removesuffix(".data").removesuffix(".index")):
        gpt2_jax.load(model)
    (model / name).unlink()
    with pytest.raises(FileNotFoundError):
        gpt2_jax.load(model)


# ---- turned off


def test_keep_copy_false_neither_keeps_nor_uses(model, cache):
    gpt2_jax.load(model, keep_copy=False)
    assert not copies(cache)
    gpt2_jax.load(model)
    content = (model / DATA).read_bytes()
    keep_times(model / DATA, lambda path: path.write_bytes(content[:50] + b"\x55\xaa" + content[52:]))
    with pytest.raises(ValueError, match="damaged"):
        gpt2_jax.load(model, keep_copy=False)


def test_the_environment_variable_turns_it_off(model, cache, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_KEEP_COPY", "0")
    assert_loads_as(model, CONFIG, forms.random_model(), keep_copy=True)
    assert not cache.exists() or not copies(cache)


def test_other_forms_are_not_copied(model, cache):
    config, params = gpt2_jax.load(model, keep_copy=False)
    for form in ("huggingface", "orbax"):
        gpt2_jax.save(model.with_name(form), config, params, format=form)
        gpt2_jax.load(model.with_name(form))
    assert not copies(cache)


# ---- problems with the copy do not stop a load


DAMAGES = {
    "cut": lambda c: c[:-1],
    "empty": lambda c: b"",
    "header": lambda c: c[:8],
    "zeros": lambda c: bytes(len(c)),
    "last bit": lambda c: c[:-1] + bytes([c[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_copy_is_rebuilt(model, cache, damage):
    gpt2_jax.load(model)
    (copy,) = copies(cache)
    content = copy.read_bytes()
    copy.write_bytes(damage(content))
    with pytest.warns(UserWarning, match=copy.name) as caught:
        assert_loads_as(model, CONFIG, forms.random_model())
    assert len(caught) == 1
    assert [path.read_bytes() for path in copies(cache)] == [content]


def allow_warnings(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert_loads_as(model, CONFIG, forms.random_model())


def test_a_cache_folder_that_cannot_be_written(model, cache, monkeypatch):
    """A file in place of the folder, a folder in place of the copy, a folder that does not exist."""
    cache.write_text("a file")
    allow_warnings(model)
    cache.unlink()
    cache.mkdir()
    (cache / "copies").write_text("a file")
    allow_warnings(model)
    (cache / "copies").unlink()
    gpt2_jax.load(model)
    (copy,) = copies(cache)
    copy.unlink()
    (copy / "in the way").mkdir(parents=True)
    allow_warnings(model)
    monkeypatch.setenv("GPT2_JAX_CACHE", "/proc/nowhere/at/all")
    allow_warnings(model)


def test_a_full_disk(model, cache, capfd):
    """Files are limited to a few bytes, as on a full disk. The load succeeds and leaves no partial files."""
    resource = pytest.importorskip("resource", reason="limits the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.warns(UserWarning, match=r"no copy of .* could be kept \(.*File too large\)"):
            config, params = gpt2_jax.load(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert forms.difference(params, forms.random_model(config)) == ""
    assert capfd.readouterr().err == ""
    assert not copies(cache)


def test_a_loaded_model_does_not_depend_on_the_copy(model, cache):
    """Other processes may replace or remove the copy while a model that was loaded from it is in use."""
    gpt2_jax.load(model)
    _, params = gpt2_jax.load(model)
    (copy,) = copies(cache)
    forms.write_tensorflow(model, CONFIG, forms.random_model(seed=3))
    gpt2_jax.load(model)
    assert copies(cache) == [copy]
    copy.unlink()
    assert forms.difference(params, forms.random_model()) == ""


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="counts the open files of the process, as Linux shows them"
)
def test_a_loaded_model_holds_few_files_open(tmp_path, cache):
    """A process has 1,024 file descriptors by default: a model with 580 tensors must not hold one for each."""
    model = tmp_path / "shakespeare"
    shutil.copytree(gpt2_jax.embedded_model(), model)
    gpt2_jax.load(model)
    config, params = gpt2_jax.load(model)
    assert len(params["h0"]) == 4  # the params are alive
    opened = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor that lists the folder
            opened.append(str(link.readlink()))
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    [copy] = [str(path) for path in copies(cache) if path.suffix == ".safetensors"]
    assert copy in mapped  # large tensors are mapped
    assert opened.count(copy) <= (0 if sys.version_info >= (3, 13) else 4 * config.n_layer + 2)
