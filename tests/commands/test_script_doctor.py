"""scripts/doctor.py without --verify: its report on packages, machine, devices and cache. It writes nothing."""

import importlib.metadata
import re
import shutil
import sys

import commands
import fake_release
import jax
import pytest

from gpt2_jax.checkpoints import copies
from gpt2_jax.commands import _doctor_cache, _doctor_machine, _doctor_packages
from gpt2_jax.commands import doctor as command


@pytest.fixture
def run(capfd, cache):
    """Call the entry point in this process."""
    return commands.caller(command.main, capfd)


def named(items, name) -> dict:
    [item] = [item for item in items if item["name"] == name]
    return item


# ---- the report


def test_the_report_names_every_package(run):
    found = commands.report(run)
    names = [re.match(r"[\w-]+", line)[0] for line in commands.PROJECT["dependencies"]]
    shown = [item["name"] for item in found["packages"]]
    assert set(names) - {"tensorflow", "tensorflow-cpu"} <= set(shown)
    assert {"python", "jaxlib"} <= set(shown)
    assert sum(name.startswith("tensorflow") for name in shown) == 1
    assert named(found["packages"], "jax")["version"] == jax.__version__
    assert named(found["packages"], "gpt2_jax")["version"] == commands.PROJECT["version"]
    assert [item["extra"] for item in found["optional"]] == [
        name for name in commands.PROJECT["optional-dependencies"] if name not in ("cuda13", "cuda12", "tpu")
    ]


def test_the_report_of_the_machine(run, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    found = commands.report(run)
    assert found["machine"]["processors"] >= found["machine"]["usable_processors"] >= 1
    assert found["machine"]["environment"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".5"
    assert found["jax"]["backend"] == jax.default_backend()
    assert [device["kind"] for device in found["jax"]["devices"]] == [one.device_kind for one in jax.devices()]
    if sys.platform == "linux":
        assert found["machine"]["memory_bytes"] >= found["machine"]["available_bytes"] > 2**20


def test_the_tables(run):
    """Without a terminal the report is plain text. It has the same facts as the JSON."""
    done = run()
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    rows = [line.split() for line in done.out.splitlines()]
    assert ["jax", jax.__version__, ">=0.10.2", "ok"] in rows
    assert ["124M", "474.7", "MiB", "absent", "0", "B", "gpt2-download", "124M"] in rows
    assert any(row[:2] == ["operating", "system"] for row in rows)
    titles = ("Packages", "Machine", "Devices", "Cache folder", "Released sizes", "Optional packages")
    assert all(f"{title}\n" in done.out for title in titles)
    n_problems = len(commands.report(run)["problems"])
    assert done.out.count("\nProblem ") == n_problems
    assert ("No problems found." in done.out) == (n_problems == 0)


def test_nothing_is_written(run, cache, tmp_path):
    found = commands.report(run)["cache"]
    assert (found["path"], found["exists"], found["writable"], found["bytes"]) == (str(cache), False, True, 0)
    assert commands.tree(tmp_path) == set()


def test_what_the_cache_folder_holds(run, cache, monkeypatch):
    """One size is complete, one has a partial file, one has a wrong file, and one is absent."""
    files = fake_release.embedded()
    fake_release.use(monkeypatch, files)
    models = cache / "models"
    fake_release.put(models / "124M", files)
    fake_release.put(models / "355M", {name: body for name, body in files.items() if name != "vocab.bpe"})
    (models / "355M" / "vocab.bpe.part").write_bytes(b"#ver")
    fake_release.put(models / "774M", files | {"encoder.json": files["encoder.json"][:-1] + b"]"})
    (cache / "copies").mkdir()
    copies.copy_path(models / "124M").write_bytes(b"x" * 7)
    (cache / "compiled").mkdir()
    (cache / "compiled" / "jit_a-1-cache").write_bytes(b"y" * 5)
    (cache / "compiled" / "jit_a-1-atime").write_bytes(b"z")
    before = commands.tree(cache)
    found = commands.report(run)
    assert commands.tree(cache) == before
    n_bytes = sum(map(len, files.values()))
    sizes = {item["size"]: item for item in found["releases"]}
    assert {size: item["state"] for size, item in sizes.items()} == {
        "124M": "complete", "355M": "partial", "774M": "partial", "1558M": "absent",
    }  # fmt: skip
    assert {size: item["do"] for size, item in sizes.items()} == {
        "124M": None, **{size: f"gpt2-download {size}" for size in ("355M", "774M", "1558M")},
    }  # fmt: skip
    assert (sizes["124M"]["bytes"], sizes["124M"]["copy_bytes"]) == (n_bytes, 7)
    assert sizes["355M"]["wrong"] == {"vocab.bpe": "it is not there"}
    assert sizes["355M"]["bytes"] == n_bytes - len(files["vocab.bpe"]) + 4
    assert sizes["774M"]["wrong"].keys() == {"encoder.json"}
    assert found["cache"]["copies"] == {"number": 1, "bytes": 7}
    assert (found["cache"]["compiled"]["number"], found["cache"]["compiled"]["bytes"]) == (1, 5)
    told = [one["problem"] for one in found["problems"] if "complete" in one["problem"]]
    assert told[0] == "355M is not complete (absent: vocab.bpe)"
    assert told[1].startswith("774M is not complete (encoder.json: its sha256 is ")
    assert "PARTIAL" in run().out


def test_a_cache_folder_that_cannot_be_written(run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o755)
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "file" / "cache"))
    found = commands.report(run)
    assert not found["cache"]["writable"]
    assert found["cache"]["do"] in [one["do"] for one in found["problems"]]
    monkeypatch.setattr(_doctor_cache, "cache_dir", raising(OSError("there is no home folder")))
    found = commands.report(run)
    assert found["cache"]["path"] is None
    assert "there is no home folder" in [one["problem"] for one in found["problems"]]
    assert "there is no home folder" in run().out


def raising(error):
    def function(*args):
        raise error

    return function


def absent(monkeypatch, *names, **versions):
    """Make the named packages absent, and give other packages another version."""
    real = importlib.metadata.version

    def version(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name.replace("-", "_")) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_absent_and_old_packages(run, monkeypatch):
    there = {"transformer_lens": "4.3", "accelerate": "1.0", "peft": "1.0"}  # whether or not this environment has them
    absent(monkeypatch, "optax", "torch", "lm-eval", jax="0.4.1", transformers="4.9", **there)
    found = commands.report(run)
    jax_needs = next(line for line in commands.PROJECT["dependencies"] if line.startswith("jax"))
    assert {"problem": "optax is absent", "do": "pip install 'optax>=0.2.6'"} in found["problems"]
    assert {"problem": f"jax 0.4.1 is not {jax_needs[3:]}", "do": f"pip install '{jax_needs}'"} in found["problems"]
    [parity] = [item for item in found["optional"] if item["extra"] == "parity"]
    assert parity["absent"] == ["torch", "lm-eval"]
    assert parity["do"] == "pip install 'torch>=2.6' 'lm-eval>=0.4.13' 'transformers>=5.0'"
    assert parity["problem"] == "transformers 4.9 is not >=5.0"
    out = run().out
    assert "PROBLEM: optax is absent" in out
    assert "  What to do: pip install 'optax>=0.2.6'\n" in out


def test_needs_of_an_installed_package(monkeypatch, tmp_path):
    """Without a clone, the metadata of the package give the same requirements."""
    in_clone = _doctor_packages.project()
    assert in_clone["needs"]["parity"] == commands.PROJECT["optional-dependencies"]["parity"]
    monkeypatch.setattr(_doctor_packages, "PYPROJECT", tmp_path / "none")
    absent(monkeypatch)
    lines = ["jax>=0.10.2", 'torch>=2.6; extra == "parity"', "x>1; python_version < '3' and extra == 'parity'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    found = _doctor_packages.project()
    assert found["needs"] == {"": lines[:1], "parity": lines[1:]}
    assert named(_doctor_packages.installed(), "jax")["needs"] == ">=0.10.2"
    [parity] = _doctor_packages.optional()
    assert [*parity["installed"], *parity["absent"]] == ["torch"]
    monkeypatch.setattr(importlib.metadata, "metadata", raising(importlib.metadata.PackageNotFoundError("gpt2-jax")))
    assert [item["name"] for item in _doctor_packages.installed()] == ["python", "gpt2_jax"]


def test_a_package_that_cannot_be_imported(run, monkeypatch):
    monkeypatch.setattr(
        _doctor_packages,
        "installed",
        raising(ModuleNotFoundError("No module named 'packaging'", name="packaging.requirements")),
    )
    found = commands.report(run)
    problem = "a part of this report failed: No module named 'packaging'"
    assert {"problem": problem, "do": "pip install --upgrade packaging"} in found["problems"]
    assert problem in run().out


# ---- accelerators that JAX does not see


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without accelerators, and without their packages."""
    monkeypatch.setattr(_doctor_machine, "DEVICES", tmp_path)
    monkeypatch.setattr(_doctor_machine, "NVIDIA_VERSION", tmp_path / "version")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    absent(monkeypatch, "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu")
    return tmp_path


def driver(machine, version):
    text = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Wed Oct  9\nGCC version: 12.2.0\n"
    (machine / "version").write_text(text)


def test_an_nvidia_gpu_that_jax_does_not_see(machine, monkeypatch):
    assert _doctor_machine.unseen({"cpu"}) == []
    (machine / "nvidia0").touch()
    assert _doctor_machine.unseen({"gpu"}) == []
    for version, extra in (("580.65.06", "cuda13"), ("570.86.15", "cuda12")):
        driver(machine, version)
        [item] = _doctor_machine.unseen({"cpu"})
        assert item["do"] == f"pip install 'jax[{extra}]' (the extra {extra})"
        assert item["problem"] == (
            f"JAX does not see an NVIDIA GPU, but {machine / 'nvidia0'} suggests that there is one"
        )
    absent(monkeypatch, jax_cuda12_plugin="0.4.1")
    [item] = _doctor_machine.unseen({"cpu"})
    assert "jax-cuda12-plugin 0.4.1 does not fit jaxlib" in item["problem"]
    absent(monkeypatch, jax_cuda12_plugin=importlib.metadata.version("jaxlib"))
    [item] = _doctor_machine.unseen({"cpu"})
    assert item["do"] == "to see JAX's own error, run JAX_PLATFORMS=cuda gpt2-doctor"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert _doctor_machine.unseen({"cpu"})[0]["do"] == "unset JAX_PLATFORMS"


def test_an_nvidia_gpu_of_which_only_the_tool_is_there(machine, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    [item] = _doctor_machine.unseen({"cpu"})
    assert "nvidia-smi suggests that there is one" in item["problem"]
    assert item["do"] == "pip install 'jax[cuda13]' (the extra cuda13)"


def test_a_tpu_that_jax_does_not_see(machine, monkeypatch):
    (machine / "accel0").touch()
    assert _doctor_machine.unseen({"tpu"}) == []
    [item] = _doctor_machine.unseen({"cpu"})
    assert item["do"] == "pip install 'jax[tpu]' (the extra tpu)"
    (machine / "accel0").unlink()
    absent(monkeypatch, libtpu="0.0.9")
    [item] = _doctor_machine.unseen({"cpu"})
    assert item["do"] == "to see JAX's own error, run JAX_PLATFORMS=tpu gpt2-doctor"


def test_a_jax_that_does_not_start(run, machine, monkeypatch):
    (machine / "nvidia0").touch()
    monkeypatch.setattr(jax, "devices", raising(RuntimeError("Unable to initialize\nbackend 'cuda'")))
    found = commands.report(run)
    assert found["jax"]["backend"] is None
    problems = [one["problem"] for one in found["problems"]]
    assert "JAX does not start: Unable to initialize backend 'cuda'" in problems
    assert any("NVIDIA" in problem for problem in problems)
    assert "PROBLEM: JAX does not start" in run().out


def test_as_a_process_of_its_own(tmp_path):
    done = commands.in_a_process("doctor", cwd=tmp_path, GPT2_JAX_CACHE=str(tmp_path / "cache"))
    assert (done.code, done.err) == (0, "")
    assert "Released sizes\n" in done.out
    assert commands.tree(tmp_path) == set()
