"""What one of the processes of benchmarks/processes.py does. All processes of a layout call these functions together.

Every function returns {name of a time: seconds, or a list of them}. It begins when the others do, or waits for them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Times = dict[str, Any]
COLLECTIVE = re.compile(r" (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Case:
    """The work.

    Attributes:
      folder: has the weights, the text as tokens, and prompts.
      batch, tokens, accumulate: rows of a step, tokens of a row, and parts of a step.
      dtype: of the matrix products, "float32" or "bfloat16".
      new_tokens: tokens that each prompt is continued by.
    """

    folder: Path
    batch: int
    tokens: int
    accumulate: int
    dtype: Any
    new_tokens: int


class _Here:
    """What this process keeps between the calls."""

    case: Case
    plan: Any
    state: Any
    step: Any
    text: Any
    stream: Any
    stop: Any
    own: Any  # params on the devices of this process


def clock(times: Times, name: str, call: Callable[[], Any]) -> Any:
    """Call a function, wait for its arrays, and add its time."""
    import jax

    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    times.setdefault(name, []).append(time.perf_counter() - begin)
    return result


def connect(index: int, n: int, port: int, n_devices: int, where: str) -> Times:
    """Import JAX, and connect to the other processes. On GPUs, each process sees its own."""
    os.dup2(2, 1)  # Gloo, of which JAX makes collectives on a CPU, writes to standard output
    if where == "cpu":
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n_devices}"
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        numbers = visible if any(visible) else [str(number) for number in range(n * n_devices)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(numbers[index * n_devices : (index + 1) * n_devices])
    times: Times = {"pid": os.getpid()}
    begin = time.perf_counter()
    import jax

    times["import"] = time.perf_counter() - begin
    if n > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", n, index)
    if (found := jax.device_count()) != n * n_devices:
        raise ValueError(f"{n} x {n_devices} devices are asked for, and JAX finds {found}")
    return times | {"connect": time.perf_counter() - begin - times["import"]}


def load(case: Case) -> Times:
    """Load the weights as `gpt2-train` does, and compile the step."""
    import jax

    import gpt2_jax
    from gpt2_jax import processes, sharding
    from gpt2_jax import recipe as recipes
    from gpt2_jax.data import batches, open_prepared
    from gpt2_jax.params import flatten, unflatten
    from gpt2_jax.training import hosts, init_state, make_plan
    from gpt2_jax.training.signals import Stop
    from gpt2_jax.training.step import lower_train_step

    times: Times = {}
    here, here.case, source = _Here, case, case.folder / "hf"
    config = gpt2_jax.load_config(source)
    recipe = recipes.Recipe(
        model=recipes.Model(dropout=0.0),
        data=recipes.Data(n_tokens=case.tokens),
        optimizer=recipes.Optimizer(schedule="constant", learning_rate=1e-4),
        batch_size=case.batch,
        accumulate=case.accumulate,
        compute_dtype=case.dtype,
    )
    here.plan = plan = make_plan(config, recipe)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.state.params)
    params = clock(times, "load", lambda: gpt2_jax.load(source, dtype="float32", sharding=shardings)[1])
    here.state = init_state(plan, params, donate=True)
    here.step = clock(times, "compile", lambda: lower_train_step(plan).compile())
    times["collectives"] = len(COLLECTIVE.findall(here.step.as_text()))
    here.text = open_prepared(case.folder / "tokens", n_vocab=config.n_vocab).train
    here.stream = batches(here.text, plan.n_tokens, case.batch, recipe.seed)
    here.stop = hosts.CommonStop(plan.mesh) if processes.count() > 1 else Stop()
    mesh = sharding.make_mesh(devices=jax.local_devices())  # as `gpt2-generate --mesh.data -1`
    own = sharding.param_shardings(flatten(gpt2_jax.abstract_params(config)), mesh, gathered=(sharding.DATA,))
    here.own = gpt2_jax.load(source, dtype="float32", sharding=unflatten(own))[1]
    return times


def train(n: int) -> Times:
    """Take steps as `fit` does: place a batch, dispatch, wait for the metrics of the step before, ask for signals."""
    here, seconds, losses = _Here, [], []
    begin = time.perf_counter()

    def fetch(loss: Any) -> None:
        nonlocal begin
        losses.append(float(loss))
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()

    pending = None
    for _ in range(n):
        here.state, metrics = here.step(here.state, _placed(next(here.stream)))
        if pending is not None:
            fetch(pending)
        pending = metrics["loss"]
        here.stop.agree()
    fetch(pending)
    return {"step": seconds, "losses": losses}


def parts(n: int) -> Times:
    """Time parts of a step alone, while the devices have nothing else to do. In a step, the host's parts overlap it."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    here, times = _Here, {}
    everywhere = NamedSharding(here.plan.mesh, PartitionSpec())
    gather = jax.jit(lambda params: params, out_shardings=everywhere)
    gather(here.state.params)
    for _ in range(n):
        clock(times, "gather", lambda: gather(here.state.params))
    _ask_for_signals()  # waits for the slowest process
    for _ in range(n):
        batch = next(here.stream)
        clock(times, "batch", lambda batch=batch: _placed(batch))
        clock(times, "signals", _ask_for_signals)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _ask_for_signals() -> Any:
    _Here.stop.agree()
    return getattr(_Here.stop, "_asked", None)


def _placed(batch: Any) -> Any:
    import jax

    from gpt2_jax import processes
    from gpt2_jax.training import hosts

    plan, sharding = _Here.plan, _Here.plan.over_rows(None)
    put = hosts.put if processes.count() > 1 else jax.device_put
    return jax.tree.map(lambda x: put(x.reshape(plan.recipe.accumulate, -1, x.shape[-1]), sharding), batch)


def save(run: Path) -> Times:
    """Save a checkpoint until it is complete, and restore it."""
    from gpt2_jax.training.checkpoints import Checkpoints

    times: Times = {}
    with Checkpoints(run) as checkpoints:
        clock(times, "save", lambda: checkpoints.save(1, _Here.state, wait=True))
        clock(times, "restore", lambda: checkpoints.restore(_Here.plan.state))
    folder = run / "checkpoints" / "1"
    return times | {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}


def evaluate() -> Times:
    """Score rows of the text as `gpt2-evaluate` does."""
    from gpt2_jax.generation.scoring import score
    from gpt2_jax.processes import share

    here, times = _Here, {}
    n_rows, n_tokens = 4 * here.case.batch, here.case.tokens
    ids = here.text.read(0, n_rows * n_tokens)[0].reshape(n_rows, n_tokens)
    scores = clock(times, "evaluate", lambda: score(here.plan.config, here.own, ids.tolist(), share=share()))
    return times | {"nats": -sum(one.sum for one in scores)}


def generate(target: Path) -> Times:
    """Complete a file of prompts as `gpt2-generate --input` does."""
    from gpt2_jax import generate
    from gpt2_jax.generation.jsonl import complete_file
    from gpt2_jax.processes import share

    here, times = _Here, {}
    source = here.case.folder / "prompts.jsonl"

    def complete(batch: list[dict[str, Any]], _indices: Any) -> list[dict[str, Any]]:
        prompts = [json.loads(fields["prompt"]) for fields in batch]
        rows: Any = generate(here.plan.config, here.own, prompts, max_new_tokens=here.case.new_tokens, temperature=0)
        return [{"samples": row} for row in rows]

    def run() -> None:
        complete_file(source, target, complete, {}, here.case.batch, shown=False, share=share())

    clock(times, "generate", run)
    return times
