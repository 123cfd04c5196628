"""Parts of benchmarks/device.py: whether the numbers are right, and how much they are rounded. A part takes a Job."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
from device_tools import Job, random_params, random_prompts, relative
from fidelity import compare_logits

ROOT = Path(__file__).resolve().parents[1]
BOUND = 1e-5  # of the largest logit, in full float32; measured on 2 CPU cores (AVX2): 8.3e-7
FILES = (  # tests of arithmetic on a device, without TensorFlow, tyro and Grain; 2 CPU cores need 90 s
    *("core/test_attention.py", "core/test_kv_cache.py", "core/test_model.py", "core/test_model_precision.py"),
    *("generation/test_generate.py", "generation/test_generation_sampling.py", "training/test_training_loss.py"),
)


def embedded() -> tuple[Any, Any]:
    """Return the embedded model's config and params, read without TensorFlow.

    A TensorFlow checkpoint in one file holds its tensors one after another, in the order of their names. `checks`
    compares the values with known ones.
    """
    import gpt2_jax
    from gpt2_jax.model import abstract_params
    from gpt2_jax.params import flatten, unflatten

    folder = gpt2_jax.embedded_model()
    config = gpt2_jax.load_config(folder)
    shapes = {name: leaf.shape for name, leaf in flatten(abstract_params(config)).items()}
    values = np.fromfile(folder / "model.ckpt.data-00000-of-00001", "<f4")
    if len(values) != config.n_params:
        raise ValueError(f"{folder} has {len(values)} values, not {config.n_params}")
    names = sorted(shapes)
    ends = np.cumsum([np.prod(shapes[name]) for name in names])[:-1]
    parts = zip(names, np.split(values, ends), strict=True)
    return config, unflatten({name: part.reshape(shapes[name]) for name, part in parts})


def known_values(job: Job, config: Any, params: Any) -> None:
    """Write whether single values of the weights are the known ones; raise ValueError if not."""
    from gpt2_jax.inspection.known_values import known_for
    from gpt2_jax.inspection.verification import check_values

    wrong = [check for check in check_values(config, params, known_for(config)) if check["result"] != "pass"]
    job.row("known values of the weights", f"{len(wrong)} wrong", "FAIL" if wrong else "pass")
    if wrong:
        raise ValueError(f"{wrong[0]['check']} is {wrong[0]['found']}")


def near(job: Job, what: str, ours: Callable[[], Any], theirs: Any) -> None:
    """Write whether logits agree within the bound; raise ValueError if not."""
    error = relative(ours(), theirs)
    job.row(what, f"{error:.1e}", "pass" if error <= BOUND else "FAIL")
    if not error <= BOUND:
        raise ValueError(f"the difference is {error:.1e}")


def equal(job: Job, what: str, found: Any, expected: Any) -> None:
    """Write whether all ids are equal; raise ValueError if not."""
    same = [sum(a == b for a, b in zip(*rows, strict=True)) for rows in zip(found, expected, strict=True)]
    counts = ", ".join(f"{n} of {len(row)}" for n, row in zip(same, expected, strict=True))
    job.row(what, f"{counts} ids equal", "pass" if found == expected else "FAIL")
    if found != expected:
        raise ValueError("ids differ")


def checks(job: Job) -> None:
    """Compare the embedded model with the results of OpenAI's TensorFlow graph, in full float32."""
    import jax

    import gpt2_jax

    jax.config.update("jax_default_matmul_precision", None if jax.default_backend() == "cpu" else "highest")
    config, params = embedded()
    with np.load(ROOT / "tests" / "fixtures" / "shakespeare_reference.npz") as arrays:
        reference = dict(arrays)
    tokens, true = reference["tokens"], reference["logits"]
    prompts, n_new = tokens[:2, :9].tolist(), 24 if job.tiny else 120
    logits = jax.jit(lambda params, *args: gpt2_jax.GPT2(config).apply({"params": params}, *args))
    job.say(f"The embedded model in float32, precision `highest`. Differences are divided by the largest logit; the "
            f"bound is {BOUND:.0e}.\n")  # fmt: skip
    job.headings("check | found | result")

    def cached() -> Any:
        cache, parts, start = gpt2_jax.init_cache(config, len(tokens), tokens.shape[1]), [], 0
        for n in (40, 40, 17):
            out = logits(params, tokens[:, start : start + n], None, cache)
            cache, start = out.cache, start + n
            parts.append(np.asarray(out.logits))
        return np.concatenate(parts, axis=1)

    def padded() -> Any:
        wide = np.pad(tokens, ((0, 0), (7, 5)), constant_values=-1)
        return logits(params, wide, wide >= 0).logits[:, 7:-5]

    def greedy(device: Any = None) -> Any:
        with jax.default_device(device):
            placed = jax.device_put(params, device)
            return gpt2_jax.generate(config, placed, prompts, n_new, temperature=0)

    def cpu() -> Any:
        return jax.devices("cpu")[0]

    expected = reference["greedy"][:, 9 : 9 + n_new].tolist()
    plain = functools.cache(lambda: np.asarray(logits(params, tokens).logits))
    job.each({
        "known values": lambda: known_values(job, config, params),
        "logits": lambda: near(job, "logits, against TensorFlow on a CPU", plain, true),
        "cached": lambda: near(job, "with a cache in three calls, against without", cached, plain()),
        "padded": lambda: near(job, "padded on both sides, against without", padded, plain()),
        "greedy": lambda: equal(job, "greedy ids, against TensorFlow on a CPU", greedy(), expected),
        "greedy on the CPU": lambda: equal(job, "greedy ids, against this CPU's", greedy(), greedy(cpu())),
    })  # fmt: skip


def fidelity(job: Job) -> None:
    """Compare logits in three precisions with float64 on the CPU, and a row alone with the same row among others."""
    import jax

    label, config = job.config("124M")
    params = jax.tree.map(np.asarray, random_params(config))
    tokens = np.array(random_prompts(config, 2, 16 if job.tiny else 64))
    job.say(f"{label}, random weights, {tokens.size} positions, against float64 on the CPU with the same float32 "
            "weights. Differences are divided by the largest logit.\n")  # fmt: skip
    job.headings("dtype, precision | largest | root mean square | mean KL | largest KL | top-1 equal")
    truth = _truth(config, params, tokens)
    ways = {"float32, highest": ("float32", "highest"), "float32, default": ("float32", None)}
    ways["bfloat16, weights too"] = ("bfloat16", None)

    with tempfile.TemporaryDirectory() as folder:
        true, ours = Path(folder) / "true.npy", Path(folder) / "ours.npy"
        np.save(true, truth.reshape(-1, config.n_vocab))

        def measure(label: str, dtype: str, precision: str | None) -> None:
            with jax.default_matmul_precision(precision):
                found = _logits(config, dtype)(_cast(params, dtype), tokens)
            np.save(ours, np.asarray(found).reshape(-1, config.n_vocab))
            job.row(label, *compare_logits(ours, true))

        job.each({name: functools.partial(measure, name, *way) for name, way in ways.items()})
    _rows(job, config, params, {name: ways[name] for name in reversed(ways)})


def _truth(config: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logits in float64, computed on the CPU."""
    import jax

    jax.config.update("jax_enable_x64", True)
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(_logits(config, "float64")(_cast(params, "float64"), tokens))
    finally:
        jax.config.update("jax_enable_x64", False)


def _logits(config: Any, dtype: str) -> Callable[..., Any]:
    import jax

    import gpt2_jax

    model = gpt2_jax.GPT2(config.replace(param_dtype=dtype, compute_dtype=dtype))
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)


def _cast(params: Any, dtype: str) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def _rows(job: Job, config: Any, params: Any, ways: dict[str, tuple[str, str | None]]) -> None:
    """Compare greedy ids and their log-probabilities: a row alone, and the same row among 8 and 64."""
    import jax

    import gpt2_jax

    n_prompt, n_new = (5, 9) if job.tiny else (32, 32)
    prompts = random_prompts(config, 64, n_prompt)
    job.say(f"\nOne row alone and among others: {n_new} greedy tokens. The differences are those of the "
            "log-probabilities of the ids up to the first that differs.\n")  # fmt: skip
    job.headings("dtype, precision | rows | equal ids | largest difference")

    def run(dtype: str, precision: str | None, n_rows: int) -> tuple[list[int], list[float]]:
        weights, few = _cast(params, dtype), config.replace(param_dtype=dtype, compute_dtype=dtype)
        with jax.default_matmul_precision(precision):
            found = gpt2_jax.generate(few, weights, prompts[:n_rows], n_new, temperature=0, logprobs=1)
        ids, logprobs = cast("tuple[list[list[int]], list[Any]]", found)
        return ids[0], list(logprobs[0].chosen)

    alone = functools.cache(functools.partial(run, n_rows=1))

    def measure(label: str, way: tuple[str, str | None], n_rows: int) -> None:
        (ids, logprobs), (expected, of_alone) = run(*way, n_rows), alone(*way)
        n_equal = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b), n_new)
        worst = np.abs(np.subtract(logprobs, of_alone)[:n_equal]).max() if n_equal else np.nan
        job.row(label, n_rows, f"{n_equal} of {n_new}", f"{worst:.1e}")

    rows = (3, 5) if job.tiny else (8, 64)
    cases = [(name, way, n_rows) for name, way in ways.items() for n_rows in rows]
    job.each({f"{case[2]} rows, {case[0]}": functools.partial(measure, *case) for case in cases})


def tests(job: Job) -> None:
    """Run some of the repository's own tests on the device, and count their results."""
    if missing := [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]:
        job.left_out.append(f"the tests: {' and '.join(missing)} not installed")
        return
    files = FILES[:1] if job.tiny else FILES
    job.say("Tests that need TensorFlow, to load the embedded model, end in an error where it is not installed.\n")
    job.headings("file | passed | failed | errors | skipped | seconds | the first that did not pass")
    job.each({name: functools.partial(_test, job, name) for name in files})


def _test(job: Job, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-W", "default"]
        command += ["-p", "no:cacheprovider", f"--junitxml={results}", str(ROOT / "tests" / name)]
        left = max(1, job.until - time.monotonic())
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, timeout=left, check=False)
        suite = next(ElementTree.parse(results).iter("testsuite"))
    kinds = ("failure", "error", "skipped")
    cases = list(suite.iter("testcase"))
    n_failed, n_errors, n_skipped = (sum(case.find(kind) is not None for case in cases) for kind in kinds)
    bad = (f"{case.get('name')}: {found.get('message')}" for case in cases for found in case if found.tag in kinds[:2])
    first = next(bad, "").partition("\n")[0][:160].replace("|", "\\|")
    n_passed = len(cases) - n_failed - n_errors - n_skipped
    job.row(name, n_passed, n_failed, n_errors, n_skipped, f"{float(suite.get('time', 'nan')):.0f}", first)
    if n_failed:
        raise ValueError(f"{n_failed} tests failed")
