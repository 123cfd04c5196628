"""Parts of benchmarks/device.py: the device itself, decoding and prefill. A part takes a Job."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from decode import bytes_read
from device_tools import (
    Job,
    bandwidths,
    clocked,
    milliseconds,
    nominal_bandwidth,
    random_params,
    random_prompts,
    seconds_of,
    share,
    timed,
)

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "optax", "numpy"),
    *("orbax-checkpoint", "nvidia-cublas", "nvidia-cudnn-cu13", "torch", "transformers", "triton"),
)
SAMPLINGS = {"greedy": {"temperature": 0}, "top_k 40, top_p 0.9": {"temperature": 1.0, "top_k": 40, "top_p": 0.9}}
H200_TOKEN = {"124M": (0.25, 0.1), "1558M": (1.2, 0.85)}  # ms a token of one row in bfloat16: minimum, aim
ROUNDS = 3


def environment(job: Job) -> None:
    """Say what the device and the libraries are; measure memory, matrix products and the start of a program."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    job.headings("what | value")
    job.row("devices", f"{len(jax.devices())} x {device.device_kind} ({device.platform})")
    job.row("memory that JAX may use", f"{stats['bytes_limit'] / 1e9:.1f} GB" if "bytes_limit" in stats else "n/a")
    job.row("platform version", " ".join(device.client.platform_version.split()))
    job.row("driver", driver())
    job.row("host", f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}")
    job.row("XLA_FLAGS", os.environ.get("XLA_FLAGS", "not set"))
    job.row("Python", platform.python_version())
    for name in PACKAGES:
        try:
            job.row(name, version(name))
        except PackageNotFoundError:
            continue
    memory_rates(job)
    product_rates(job)


def driver() -> str:
    """Return what nvidia-smi says of the first GPU, or n/a."""
    if not (path := shutil.which("nvidia-smi")):
        return "n/a"
    query = [path, "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"n/a: {type(error).__name__}"
    return done.stdout.strip().splitlines()[0]


def memory_rates(job: Job) -> None:
    """Measure the bandwidth of the device's memory, and how long the smallest program takes."""
    import jax
    import jax.numpy as jnp

    nominal = nominal_bandwidth()
    read, change = bandwidths(job.tiny)
    small = jnp.zeros(8)
    add = jax.jit(lambda x: x + 1)
    job.say("")
    job.headings("memory | measured | nominal | share")
    peak = f"{nominal / 1e9:.0f} GB/s" if nominal else "n/a"
    job.row("read (sum of float32)", f"{read / 1e9:.1f} GB/s", peak, share(read, nominal))
    job.row("change (read and written)", f"{change / 1e9:.1f} GB/s", peak, share(change, nominal))
    job.figure("bandwidth", max(read, change))
    job.say("")
    job.headings("smallest program | microseconds")
    job.row("one after another", f"{seconds_of(lambda: add(small)) * 1e6:.1f}")
    job.row("waited for each time", f"{seconds_of(lambda: add(small).block_until_ready()) * 1e6:.1f}")


def product_rates(job: Job) -> None:
    """Measure the rate of matrix products in several shapes and precisions, on random values."""
    import jax
    import jax.numpy as jnp

    from gpt2_jax.training.hardware import peak_flops

    peak = peak_flops(jax.devices()[0])
    job.say("")
    job.headings("matrix product m x k x n | dtype | precision | ms | TFLOP/s | share of the bfloat16 peak")
    shapes = [(16384, 768, 3072), (4096, 4096, 4096), (16384, 1600, 6400), (16384, 768, 50257), (8192, 8192, 8192)]
    cases = [(shape, "bfloat16", None) for shape in shapes]
    cases += [((4096, 4096, 4096), "float32", precision) for precision in (None, "highest")]

    def measure(shape: tuple[int, int, int], dtype: str, precision: str | None) -> None:
        m, k, n = (max(1, side // 128) for side in shape) if job.tiny else shape
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        a, b = draw(jax.random.key(0), (m, k), dtype), draw(jax.random.key(1), (k, n), dtype)
        product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
        seconds = seconds_of(lambda: product(a, b))
        rate = 2 * m * k * n / seconds
        cells = (f"{rate / 1e12:.2f}", share(rate, peak))
        job.row(f"{m} x {k} x {n}", dtype, precision or "default", milliseconds(seconds), *cells)

    job.each({f"product {case}": functools.partial(measure, *case) for case in cases})


def decode_124M(job: Job) -> None:
    """Time decoding at 124M."""
    decode(job, "124M")


def decode_1558M(job: Job) -> None:
    """Time decoding at 1558M."""
    decode(job, "1558M")


def decode(job: Job, size: str) -> None:
    """Time decoding at several numbers of rows, beside the time that the memory needs for the bytes read."""
    label, config = job.config(size, param_dtype="bfloat16", compute_dtype="bfloat16")
    bandwidth = job.figures_of("environment").get("bandwidth") or max(bandwidths(job.tiny))
    nominal = nominal_bandwidth()
    n_prompt, n_new = (8, 33) if job.tiny else (64, 129)
    job.say(f"""\
{label}, random weights, everything in bfloat16, prompts of {n_prompt} tokens. In a token's time, every row gets one.

- `generate`: the time that each further token of a longer call adds: ({n_new} tokens minus 1 token) / {n_new - 1}. It
  includes the loop on the host.
- `call`: one call of the compiled `decode` for 16 tokens, waited for before and after, divided by 16.
- Floor: the bytes that a step must read (weights, and keys and values so far), divided by the bandwidth: the largest
  measured here ({bandwidth / 1e9:.1f} GB/s), and the nominal one. `x floor`: `generate` divided by the measured floor.
- Minimum and aim: what this project wants for one row on an H200, in milliseconds. They hold for no other device.
- Compile: the first call minus a later equal one, prefill included. It is short if an earlier row compiled the same.
""")
    job.headings("rows | sampling | generate, ms/token | call, ms/token | tokens/s | MB/token | measured floor, ms | "
                 "nominal floor, ms | x floor | minimum | aim | compile, s")  # fmt: skip
    params = random_params(config)

    def measure(n_rows: int, sampling: str) -> None:
        run = functools.partial(
            _generate, config, params, random_prompts(config, n_rows, n_prompt), SAMPLINGS[sampling]
        )
        first = timed(lambda: run(n_new))
        run(1)
        pairs = [(timed(lambda: run(n_new)), timed(lambda: run(1))) for _ in range(ROUNDS)]
        whole, one = (statistics.median(column) for column in zip(*pairs, strict=True))
        step = statistics.median(long - short for long, short in pairs) / (n_new - 1)
        n_bytes = bytes_read(config, "bfloat16", n_rows, n_prompt + n_new // 2)
        floors = n_bytes / bandwidth, n_bytes / nominal if nominal else None
        wanted = H200_TOKEN[size] if n_rows == 1 and not job.tiny else ("", "")
        job.row(
            *(n_rows, sampling, milliseconds(step), milliseconds(_call(run, n_new)), f"{n_rows / step:.0f}"),
            *(f"{n_bytes / 1e6:.1f}", *map(milliseconds, floors), f"{step / floors[0]:.2f}", *wanted),
            f"{first - whole:.1f}",
        )
        job.figure(f"{n_rows} rows, {sampling}", step)
        job.figure(f"{n_rows} rows, {sampling}, first token", one)

    rows = (1, 3) if job.tiny else (1, 64, 8)
    cases = [(n_rows, sampling) for n_rows in rows for sampling in SAMPLINGS]
    job.each({f"{label}, {n} rows, {sampling}": functools.partial(measure, n, sampling) for n, sampling in cases})


def _generate(config: Any, params: Any, prompts: Any, sampling: dict[str, Any], n_new: int) -> Any:
    import gpt2_jax

    return gpt2_jax.generate(config, params, prompts, n_new, **sampling)


def _call(run: Any, n_new: int) -> float | None:
    """Return the seconds a token of one full call of the compiled loop; None if the engine no longer has that name."""
    from gpt2_jax.generation import engine
    from gpt2_jax.generation.memory import RECENT

    if not hasattr(engine, "decode") or (n_new - 1) % RECENT:
        return None
    with clocked(engine, "decode") as seconds:
        run(n_new)
    return statistics.median(seconds) / RECENT if len(seconds) == (n_new - 1) // RECENT else None


def prefill(job: Job) -> None:
    """Time the reading of long prompts, up to the first new token."""
    job.say("""Random weights, everything in bfloat16.

- First token: a whole call of `generate` for one new token. Prefill: its compiled prefill alone, waited for.
- tokens/s and the share of the peak are of the prefill. It takes 2 N + 4 L D T operations a token (N without the
  embeddings; attention in full, as in the MFU of training).
- Compile: the first call minus a later equal one.
""")
    job.headings("model | rows x tokens | first token, ms | prefill, ms | tokens/s | share of peak | compile, s")
    cases = {}
    for size in ("124M", "1558M"):
        label, config = job.config(size, param_dtype="bfloat16", compute_dtype="bfloat16")
        params = functools.cache(functools.partial(random_params, config))  # made by the first case that needs them
        for n_rows in (2, 3) if job.tiny else (1, 16):
            cases[f"{label}, {n_rows} rows"] = functools.partial(_prefill, job, label, config, params, n_rows)
    job.each(cases)


def _prefill(job: Job, label: str, config: Any, params: Any, n_rows: int) -> None:
    import jax

    from gpt2_jax.generation import engine
    from gpt2_jax.training.hardware import flops_per_token, peak_flops

    n_tokens = config.n_ctx - 1  # and one new token
    prompts = random_prompts(config, n_rows, n_tokens)
    run = functools.partial(_generate, config, params(), prompts, SAMPLINGS["greedy"], 1)
    first = timed(run)
    whole = statistics.median(timed(run) for _ in range(ROUNDS))
    alone = None
    if hasattr(engine, "prefill"):
        with clocked(engine, "prefill") as seconds:  # a call may read its rows in several groups
            for _ in range(ROUNDS):
                run()
        alone = sum(seconds) / ROUNDS or None
    embeddings = config.param_counts["wte"] + config.param_counts["wpe"]
    flops = flops_per_token(config, n_tokens) / 3 - 2 * embeddings
    speed = n_rows * n_tokens / (alone or whole)
    peak = peak_flops(jax.devices()[0])
    cells = (milliseconds(alone), f"{speed:.0f}", share(speed * flops, peak), f"{first - whole:.1f}")
    job.row(label, f"{n_rows} x {n_tokens}", milliseconds(whole), *cells)
    job.figure(f"{label}, {n_rows} rows, first token", whole)
