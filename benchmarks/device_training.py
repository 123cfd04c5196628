"""Parts of benchmarks/device.py: training steps, their memory, and whether they repeat. A part takes a Job."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from device_tools import Job, memory_stats, random_params, relative, same_bytes, seconds_of
from trainers import OPTIMIZER, Case

if TYPE_CHECKING:
    from gpt2_jax.training import Plan, TrainState

WANTED = {"124M": ("45 %", "60 %"), "1558M": ("45 %", "60 %")}  # MFU on an H200: minimum, aim


def plan_of(config: Any, case: Case, dropout: float = 0.0) -> Plan:
    """Return the plan of benchmarks/trainers.py, on one device."""
    from gpt2_jax import recipe as recipes
    from gpt2_jax.training import make_plan

    recipe = recipes.Recipe(
        model=recipes.Model(dropout=dropout),
        optimizer=recipes.Optimizer(schedule="constant", **OPTIMIZER),
        mesh=recipes.Mesh(data=1),
        batch_size=case.n_rows,
        accumulate=case.accumulate,
        compute_dtype=cast("Any", case.dtype),
        remat=case.remat,
    )
    return make_plan(config, recipe, n_tokens=case.n_tokens)


def fresh_state(plan: Plan) -> TrainState:
    """Return a state with random params. Nothing passes the host, unlike in `init_state`."""
    import jax

    from gpt2_jax.training.state import bare_state

    def make(params: Any) -> TrainState:
        state = bare_state(plan.recipe, params)
        return dataclasses.replace(state, opt_state=plan.optimizer.init(state.trained(plan.trained)))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.state)
    params = jax.device_put(random_params(plan.config), shardings.params)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def batch_of(config: Any, case: Case) -> Any:
    """Return the random batch of benchmarks/trainers.py, on the device."""
    import jax

    from gpt2_jax.data.batching import Batch

    tokens_BT = case.tokens(config.n_vocab).reshape(case.accumulate, -1, case.n_tokens + 1)
    weights = np.ones(tokens_BT[..., 1:].shape, np.float32)
    return jax.device_put(Batch(tokens=tokens_BT[..., :-1], targets=tokens_BT[..., 1:], weights=weights))


def train_124M(job: Job) -> None:
    """Time training steps at 124M."""
    train(job, "124M", [(n_rows, 1) for n_rows in ((2, 4) if job.tiny else (8, 32))], remat=False)


def train_1558M(job: Job) -> None:
    """Time training steps at 1558M, with the rows that fit; first with a part of the layers, which compile sooner."""
    train(job, "1558M", [(2, 2), (2, 1)] if job.tiny else [(16, 4), (16, 1)], remat=True)


def train(job: Job, size: str, cases: Sequence[tuple[int, int]], remat: bool) -> None:
    """Time training steps in cases (rows, divisor of the layers); halve the rows as long as memory runs out."""
    label, config = job.config(size)
    n_tokens = config.n_ctx
    saving = ", rematerialization" * remat
    job.say(f"""\
{label}, windows of {n_tokens} tokens, bfloat16 products, float32 params and AdamW, no dropout{saving}.

- MFU: 6 N + 12 L D T operations a token, of the device's peak in bfloat16. Minimum and aim: for an H200.
- Peak: of the process so far, so cases are in order of size. Compiled: arguments, results and temporaries by
  `memory_analysis()`. Estimate: `memory_needed(plan)`.
- Losses: of the first step and of the last measured one. The batch is always the same, so the loss must fall.
""")
    job.headings("layers | rows | ms/step | tokens/s | MFU | minimum | aim | compile, s | peak, GB | compiled, GB | "
                 "estimate, GB | losses")  # fmt: skip

    def measure(n_rows: int, divisor: int) -> None:
        few = config.replace(n_layer=config.n_layer // divisor)
        while True:
            try:
                _measure(job, size, few, Case(n_rows, n_tokens, "bfloat16", 1, remat))
                return
            except Exception as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or n_rows == 1 or time.monotonic() > job.until:
                    raise
                job.left_out.append(f"{label}, {n_rows} rows: they do not fit into memory")
            n_rows //= 2
            gc.collect()  # the arrays of the failed step

    job.each(
        {
            f"{label}, {config.n_layer // divisor} layers, {n} rows": functools.partial(measure, n, divisor)
            for n, divisor in cases
        }
    )


def _measure(job: Job, size: str, config: Any, case: Case) -> None:
    """Write one row."""
    import jax

    from gpt2_jax.training import make_train_step
    from gpt2_jax.training.hardware import mfu
    from gpt2_jax.training.memory import memory_needed

    plan = plan_of(config, case)
    state, batch = fresh_state(plan), batch_of(config, case)
    begin = time.perf_counter()
    step = cast("Any", make_train_step(plan)).lower(state, batch).compile()
    compiling = time.perf_counter() - begin
    losses = []

    def one() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        return metrics["loss"]

    seconds = seconds_of(one, 0.2 if job.tiny else 2)
    speed = case.n_rows * case.n_tokens / seconds
    used = mfu(speed, config, case.n_tokens, jax.devices()[:1])
    peak = memory_stats().get("peak_bytes_in_use")
    wanted = ("", "") if job.tiny else WANTED[size]
    job.row(
        *(
            config.n_layer,
            case.n_rows,
            f"{seconds * 1e3:.2f}",
            f"{speed:.0f}",
            f"{used:.1%}" if used else "n/a",
            *wanted,
        ),
        *(f"{compiling:.1f}", f"{peak / 1e9:.2f}" if peak else "n/a", gigabytes(compiled_bytes(step))),
        *(gigabytes(memory_needed(plan)["total"]), f"{float(losses[0]):.4f}, {float(losses[-1]):.4f}"),
    )
    job.figure(f"{config.n_layer} layers, {case.n_rows} rows", seconds)


def gigabytes(n_bytes: float | None) -> str:
    """Return bytes as 10**9 bytes, or n/a."""
    return "n/a" if n_bytes is None else f"{n_bytes / 1e9:.2f}" if n_bytes >= 1e8 else f"{n_bytes / 1e9:.5f}"


def compiled_bytes(step: Any) -> int | None:
    """Return the bytes that a compiled program needs at once; None if the device does not say."""
    found = step.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def resume(job: Job) -> None:
    """Say whether steps repeat bit for bit: a second run, and a run that was saved halfway and restored."""
    from gpt2_jax.training import make_train_step

    label, config = job.config("124M")
    config = config if job.tiny else config.replace(n_layer=4)
    n_steps, case = 8, Case(4, config.n_ctx, "bfloat16", 1, False)
    job.say(f"{label}, {config.n_layer} layers, {case.n_rows} x {case.n_tokens}, bfloat16, AdamW, dropout 0.1; "
            f"{n_steps} steps. All arrays of the state are compared: params, moments, step.\n")  # fmt: skip
    job.headings("compared with an uninterrupted run | equal bit for bit | largest difference of params, relative")
    plan = plan_of(config, case, dropout=0.1)
    batch, step = batch_of(config, case), make_train_step(plan)

    def steps(state: TrainState, n: int) -> TrainState:
        for _ in range(n):
            state, _ = step(state, batch)
        return state

    def compare(what: str, state: TrainState) -> None:
        equal = same_bytes([whole, state])[0]
        flat = zip(_leaves(state.params), _leaves(whole.params), strict=True)
        job.row(what, "yes" if equal else "NO", f"{max(relative(a, b) for a, b in flat if np.any(b)):.1e}")
        job.figure(what, float(equal))

    whole = steps(fresh_state(plan), n_steps)
    job.each({"a second run": lambda: compare("a second run", steps(fresh_state(plan), n_steps))})
    for what, keep in {"saved by Orbax and restored": by_orbax, "saved as .npz and restored": by_npz}.items():

        def resumed(what: str = what, keep: Any = keep) -> None:
            half = steps(fresh_state(plan), n_steps // 2)
            compare(what, steps(keep(plan, half), n_steps - n_steps // 2))

        if keep is by_orbax and not importlib.util.find_spec("orbax"):
            job.left_out.append(f"{what}: Orbax is not installed")
        else:
            job.each({what: resumed})


def _leaves(tree: Any) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def by_orbax(plan: Plan, state: TrainState) -> TrainState:
    """Save and restore a state as a training run does."""
    from gpt2_jax.training.checkpoints import Checkpoints

    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state, wait=True)
        return Checkpoints(folder).restore(plan.state, 1)


def by_npz(plan: Plan, state: TrainState) -> TrainState:
    """Save and restore a state without Orbax."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.npz"
        np.savez(path, *_leaves(state))
        with np.load(path) as arrays:
            leaves = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.state)
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(plan.state), leaves), shardings)
