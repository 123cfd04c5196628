"""What memory a step takes, before anything is compiled, and whether a device has it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax

from gpt2_jax.attention import SMALLEST_BLOCK
from gpt2_jax.config import GPT2Config
from gpt2_jax.sharding import DATA, MODEL
from gpt2_jax.training.loss import CHUNK
from gpt2_jax.training.plan import Plan

ESTIMATED = ("gathered", "activations")
UNSURE = 0.25  # they may be so much less than estimated: a run that may fit is not refused


def memory_needed(plan: Plan) -> dict[str, int]:
    """Return the bytes that a step takes on one device at its peak, by part, and their "total".

    "parameters" and "optimizer" are exact: of the abstract state, what one device holds. "gradients" are of what is
    trained, twice where a step has several parts, whose sum and latest there are. "gathered" are the parameters whole
    along `data`, where that divides them. "activations" are an estimate of what the blocks keep for the backward pass,
    and of the loss's logits.

    Against `memory_analysis()` of the compiled step the total is, for a CPU, 1.02 times that for 124M at 4 rows of 256
    tokens, and 0.95 to 1.25 times for small models, also on meshes (1.3 with LoRA, where less is kept); for a TPU v5p
    0.9 to 1.1, with and without `remat`. For GPUs it was not compared.
    """
    state = plan.state
    parts = {
        "parameters": _local_bytes((state.params, state.lora)),
        "gradients": _local_bytes(state.trained(plan.trained)) * (2 if plan.recipe.accumulate > 1 else 1),
        "optimizer": _local_bytes(state.opt_state),
        "gathered": 0 if plan.mesh.shape[DATA] == 1 else _local_bytes(state.params, plan.gathered),
        "activations": (_on_cpu if plan.on_cpu else _on_accelerator)(plan),
    }
    return parts | {"total": sum(parts.values())}


def _local_bytes(tree: Any, shardings: Any = None) -> int:
    """Return the bytes of abstract arrays that one device holds, by their own shardings or by these."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree) if shardings is None else shardings
    sizes = jax.tree.map(lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _on_accelerator(plan: Plan) -> int:
    """Return the bytes of activations where XLA fuses what is elementwise, and keeps what products take.

    Those are of each block, in widths of the residual stream: the stream twice, two norms, q, k and v, what attention
    gives, and the MLP's inner part before and after GELU; and the attention weights. `remat` keeps the stream of each
    block, and all that of one.
    """
    config, n_rows, n_tokens, n_parts = plan.config, plan.n_rows, plan.n_tokens, plan.mesh.shape[MODEL]
    itemsize = config.compute_dtype.itemsize
    if plan.mesh.devices.flat[0].platform == "tpu":  # whose products take bfloat16 unless asked for more
        itemsize = 2
    stream = n_rows * n_tokens * config.n_embd * itemsize
    weights = n_rows * config.n_head * _n_seen(n_tokens) * itemsize
    block = 4 * stream + (12 * stream + weights) // n_parts
    logits = _n_logits(config, n_rows, n_tokens) * (_wide(config) + itemsize)  # and their gradient
    if plan.recipe.remat:
        return config.n_layer * stream + max(block, logits)
    return config.n_layer * block + logits


def _on_cpu(plan: Plan) -> int:
    """Return the bytes of activations as XLA for CPUs reserves them: factors measured on the compiled step.

    It fuses less, computes bfloat16 in float32, and takes what `remat` would compute again as computed already.
    """
    config, n_rows, n_tokens, n_parts = plan.config, plan.n_rows, plan.n_tokens, plan.mesh.shape[MODEL]
    itemsize = _wide(config)
    stream = n_rows * n_tokens * config.n_embd * itemsize
    weights = n_rows * config.n_head * _n_seen(n_tokens) * itemsize
    block = 4 * stream + (20.5 * stream + 2 * weights) / n_parts
    return int(config.n_layer * block + 4 * stream + 2.25 * itemsize * _n_logits(config, n_rows, n_tokens))


def _wide(config: GPT2Config) -> int:
    """Return the bytes of a number of the loss."""
    return max(4, config.compute_dtype.itemsize)


def _n_seen(n_tokens: int) -> int:
    """Return the attention weights of a head, as `causal_attention` computes them: in blocks of queries."""
    size = max(SMALLEST_BLOCK, -(-n_tokens // 4))
    ends = [min(start + size, n_tokens) for start in range(0, n_tokens, size)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))


def _n_logits(config: GPT2Config, n_rows: int, n_tokens: int) -> int:
    """Return how many logits one device has at once, as `token_loss` takes them in chunks."""
    n_chunks = min(n_tokens, -(-n_rows * n_tokens * config.n_vocab // CHUNK))
    return n_rows * -(-n_tokens // n_chunks) * config.n_vocab


def check_memory(plan: Plan, available: int | None = None) -> dict[str, int]:
    """Return what `memory_needed` does, if one device of the mesh can have it.

    Args:
      plan: of the run.
      available: bytes of a device; None asks the first of this process, and checks nothing where that does not say.

    Raises:
      ValueError: it cannot fit, even if what is estimated takes a quarter less. The message has the parts,
        and what can be done.
    """
    parts = memory_needed(plan)
    if available is None:
        available = device_memory(plan.mesh.local_devices[0])
    least = parts["total"] - UNSURE * sum(parts[name] for name in ESTIMATED)
    if available is None or least <= available:
        return parts
    raise ValueError(
        f"training would take about {gigabytes(parts['total'])} on each device, which has {gigabytes(available)}:\n"
        f"{memory_table(parts)}\nWhat takes less: {'; '.join(_advice(plan))}."
    )


def memory_table(parts: dict[str, int]) -> str:
    """Return the parts of `memory_needed` as lines of text."""
    return "\n".join(f"  {name:<12}{gigabytes(size):>10}" for name, size in parts.items())


def gigabytes(size: float) -> str:
    """Return bytes as "1.23 GB" (10**9 bytes), small ones as "1.23 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _advice(plan: Plan) -> list[str]:
    """Return what makes a step smaller, of that which the recipe does not do yet."""
    recipe, advice = plan.recipe, []
    if plan.n_rows > 1:
        advice.append(f"a larger accumulate, now {recipe.accumulate}, or a smaller batch_size, now {recipe.batch_size}")
    if not recipe.remat and not plan.on_cpu:
        advice.append("remat = true")
    if recipe.compute_dtype != "bfloat16" and not plan.on_cpu:
        advice.append('compute_dtype = "bfloat16"')
    if not recipe.lora.rank:
        if recipe.optimizer.name == "adamw":
            advice.append('optimizer.name = "adafactor"')
        advice.append("freezing parameters by optimizer.learning_rates of 0")
        advice.append("LoRA, by lora.rank = 8 say")
    return [*advice, "fewer data.n_tokens", "more devices"]


def device_memory(device: Any) -> int | None:
    """Return the bytes that a jax.Device lets programs use; None where it does not say.

    For a CPU that is the machine's memory, or less where the process is limited (cgroups), divided by the number of
    devices that this process makes of it.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and some systems not these names
        return None
    return int(min(machine, _cgroup_limit())) // jax.local_device_count("cpu")


def _cgroup_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the least memory that Linux's control groups leave this process: its own group and all above it."""
    files = [root / "memory" / "memory.limit_in_bytes"]  # version 1
    for line in own.read_text().splitlines() if own.exists() else []:
        if line.startswith("0::"):  # version 2
            group = root / line[3:].lstrip("/")
            files += [folder / "memory.max" for folder in (group, *group.parents) if folder.is_relative_to(root)]
    limits = [file.read_text().strip() for file in [*files, root / "memory.max"] if file.is_file()]
    return min((int(limit) for limit in limits if limit.isdigit()), default=math.inf)
