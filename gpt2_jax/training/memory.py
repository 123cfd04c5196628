"""The memory that a step needs, computed before anything is compiled, and whether a device has it."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import jax

from gpt2_jax.attention import SMALLEST_BLOCK
from gpt2_jax.config import GPT2Config
from gpt2_jax.sharding import DATA, MODEL
from gpt2_jax.training.loss import CHUNK
from gpt2_jax.training.plan import Plan, attention_kernels

ESTIMATED = ("gathered", "activations")
UNSURE = 0.25  # the estimates may be too high by this share: a run that may fit is not refused


def memory_needed(plan: Plan) -> dict[str, int]:
    """Return the peak bytes of a step on one device, by part, and their "total".

    "parameters" and "optimizer" are exact: the part of the state that one device holds. "gradients" are those of the
    trained parameters. They count twice if a step has several parts, because their sum and the latest part exist at the
    same time. "gathered" is the copy of the parameters that is not divided along `data`, if that axis divides them.
    "activations" are an estimate of what the blocks keep for the backward pass, and of the logits in the loss. On a CPU
    they are what a step needs beside the gradients, which take the place of activations.

    The total was compared with `memory_analysis()` of the compiled step. On a CPU it is 1.00 times that value for 124M
    at 4, 8 and 32 rows of 256 tokens, and at 8 of 1,024 (1.03 with LoRA, 0.98 with remat). It is 0.9 to 1.1 times for
    small models (1.2 in bfloat16, which keeps less).
    On an H200 and a TPU v5p, in bfloat16 and windows of 1,024 tokens, it is 0.96 to 1.03 times for 124M and 355M, with
    fused and plain attention (1.10 with remat).
    """
    state = plan.state
    gradients = _local_bytes(state.trained(plan.trained))
    parts = {
        "parameters": _local_bytes((state.params, state.lora)),
        "gradients": gradients * (2 if plan.recipe.accumulate > 1 else 1),
        "optimizer": _local_bytes((state.opt_state, state.average)),
        "gathered": 0 if plan.mesh.shape[DATA] == 1 else _local_bytes(state.params, plan.gathered),
        "activations": _on_cpu(plan, gradients) if plan.on_cpu else _on_accelerator(plan),
    }
    return parts | {"total": sum(parts.values())}


def _local_bytes(tree: Any, shardings: Any = None) -> int:
    """Return the bytes of abstract arrays on one device, by their own shardings or the given ones."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree) if shardings is None else shardings
    sizes = jax.tree.map(lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _on_accelerator(plan: Plan) -> int:
    """Return the bytes of activations if XLA fuses elementwise operations and keeps the inputs of products.

    Each block keeps, in widths of the residual stream: the stream twice, two norms, q, k and v, the attention output,
    and the MLP's inner activations before and after GELU. On a GPU it also keeps the tanh in between. Plain attention
    keeps weights and scores, a fused kernel neither. With `remat`, the stream of each block is kept, and
    all of this for only one block (or the logits, if they are larger).
    """
    config, n_rows, n_tokens, n_parts = plan.config, plan.n_rows, plan.n_tokens, plan.mesh.shape[MODEL]
    itemsize, on_tpu = config.compute_dtype.itemsize, plan.mesh.devices.flat[0].platform == "tpu"
    if on_tpu:  # its products take bfloat16 by default
        itemsize = 2
    stream = n_rows * n_tokens * config.n_embd * itemsize
    dropped = config.attn_pdrop > 0
    fused = attention_kernels(config, plan.recipe, plan.mesh, n_tokens)
    # Of each attention weight: its value, the float32 score and the mask of dropout. For a TPU this was measured.
    weight = (5 if on_tpu else itemsize + 4) + dropped
    weights = 0 if fused else n_rows * config.n_head * _n_seen(n_tokens) * weight
    block = 4 * stream + ((12 if on_tpu else 16) * stream + weights) // n_parts
    logits = _logits_held(plan) * (_wide(config) + itemsize) // n_parts  # and their gradient
    if plan.recipe.remat:
        return _n_kept(plan) * stream + max(block, logits)
    return _n_kept(plan) * block + logits


def _n_kept(plan: Plan) -> int:
    """Return the number of blocks whose activations the backward pass reads: those from the lowest trained one on."""
    n_layer, lowest = plan.config.n_layer, plan.config.n_layer
    for name in plan.trained:
        layer = re.match(r"h(\d+)/", name)
        after = name.startswith(("ln_f/", "score/", "lm_head"))
        lowest = min(lowest, int(layer[1]) if layer else n_layer if after else 0)
    return n_layer - lowest


def _on_cpu(plan: Plan, gradients: int = 0) -> int:
    """Return the bytes of activations that XLA for CPUs reserves; the factors were measured on the compiled step.

    A step keeps the results of products: each block keeps, in widths of the residual stream, its input, q, k and v, the
    attention output before and after its projection, and the MLP before its activation function; and the attention
    scores. In the loss, the gradient of the logits exists beside the logits, or beside that of the head. The peak is in
    the loss, or in the backward pass of the last block. Products are in float32 for any compute_dtype. With
    `remat`, a block keeps its input only, until its backward pass. Adafactor's updates take as much as the gradients.

    Args:
      plan: the plan of the run.
      gradients: bytes of one set of gradients. They take the place of activations that are no longer needed.
    """
    config, n_rows, n_tokens, n_parts = plan.config, plan.n_rows, plan.n_tokens, plan.mesh.shape[MODEL]
    itemsize = _wide(config)
    stream = n_rows * n_tokens * config.n_embd * itemsize
    weights = n_rows * config.n_head * _n_seen(n_tokens) * itemsize
    block = 2 * stream + (8 * stream + weights) / n_parts
    backward = 4.5 * stream + (13 * stream + 1.85 * weights) / n_parts
    logits = _logits_held(plan)
    head = itemsize * config.n_vocab * config.n_embd / n_parts if logits and _trains_head(plan) else 0
    loss = itemsize * logits / n_parts + max(itemsize * logits / n_parts, head) + 6 * stream
    if 0 < logits < n_rows * n_tokens * config.n_vocab:  # the gradient of the head is a sum over chunks
        loss += itemsize * config.n_vocab * config.n_embd / n_parts
    if plan.mesh.size > 1 and logits:  # copies of the head and of its gradient, divided as the loss needs them
        loss += 2.5 * itemsize * config.n_vocab * config.n_embd / n_parts
    kept = _n_kept(plan) * block
    if plan.recipe.remat:
        kept, backward = _n_kept(plan) * stream, 1.1 * (block + backward)
    most = max(kept + max(loss, backward) - gradients, backward)
    if plan.recipe.optimizer.name == "adafactor":  # its updates are made of all gradients before one is applied
        most = max(most, gradients)
    return int(most)


def _trains_head(plan: Plan) -> bool:
    """Return whether the output head gets a gradient."""
    return not {"wte", "lm_head"}.isdisjoint(plan.trained)


def _wide(config: GPT2Config) -> int:
    """Return the bytes of one number in the loss."""
    return max(4, config.compute_dtype.itemsize)


def _n_seen(n_tokens: int) -> int:
    """Return how many attention weights a head has, as `causal_attention` computes them in blocks of queries."""
    size = max(SMALLEST_BLOCK, -(-n_tokens // 4))
    ends = [min(start + size, n_tokens) for start in range(0, n_tokens, size)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))


def _logits_held(plan: Plan) -> int:
    """Return how many logits a device with the whole vocabulary holds at once. A classifier's few do not count."""
    if plan.recipe.objective == "classification":
        return 0
    return _n_logits(plan.config, plan.n_rows, plan.n_tokens)


def _n_logits(config: GPT2Config, n_rows: int, n_tokens: int) -> int:
    """Return how many logits there are at once in the chunks of `token_loss`."""
    n_chunks = min(n_tokens, -(-n_rows * n_tokens * config.n_vocab // CHUNK))
    return n_rows * -(-n_tokens // n_chunks) * config.n_vocab


def check_memory(plan: Plan, available: int | None = None) -> dict[str, int]:
    """Return the result of `memory_needed`, if a device of the mesh has enough memory.

    Args:
      plan: the plan of the run.
      available: bytes of a device. None asks the first device of this process. If it gives no limit, nothing is
        checked.

    Raises:
      ValueError: the step does not fit, even if the estimated parts take a quarter less. The message lists the parts
        and what would reduce them.
    """
    parts = memory_needed(plan)
    available = _available(plan) if available is None else available
    least = parts["total"] - UNSURE * sum(parts[name] for name in ESTIMATED)
    if available is None or least <= available:
        return parts
    raise _too_large(plan, f"about {gigabytes(parts['total'])}", available, parts)


def check_compiled(plan: Plan, compiled: Any, available: int | None = None) -> int | None:
    """Return the peak bytes of a compiled step on one device, by XLA's own figures, if a device has as many.

    Args:
      plan: the plan of the run.
      compiled: the step, from `lower_train_step(plan).compile()`.
      available: as in `check_memory`.

    Returns:
      The bytes: arguments, results that do not take their place, and temporaries. None if the backend does not say.

    Raises:
      ValueError: the step does not fit. The message lists what would reduce it.
    """
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total += sizes.temp_size_in_bytes
    available = _available(plan) if available is None else available
    if available is not None and total > available:
        raise _too_large(plan, gigabytes(total), available, memory_needed(plan))
    return total


def _available(plan: Plan) -> int | None:
    return device_memory(plan.mesh.local_devices[0])


def _too_large(plan: Plan, needed: str, available: int, parts: dict[str, int]) -> ValueError:
    return ValueError(
        f"training would take {needed} on each device, which has {gigabytes(available)}:\n"
        f"{memory_table(parts)}\nTo use less: {'; '.join(_advice(plan))}."
    )


def memory_table(parts: dict[str, int]) -> str:
    """Return the parts of `memory_needed` as lines of text."""
    return "\n".join(f"  {name:<12}{gigabytes(size):>10}" for name, size in parts.items())


def gigabytes(size: float) -> str:
    """Return bytes as "1.23 GB" (`10**9` bytes), or as "1.23 MB" if small."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _advice(plan: Plan) -> list[str]:
    """Return the ways to make a step smaller that the recipe does not use yet."""
    recipe, advice = plan.recipe, []
    if plan.n_rows > 1:
        advice.append(f"a larger accumulate (now {recipe.accumulate}) or smaller batch_size (now {recipe.batch_size})")
    if not recipe.remat:
        advice.append("remat = true")
    if recipe.compute_dtype != "bfloat16" and not plan.on_cpu:
        advice.append('compute_dtype = "bfloat16"')
    if not recipe.lora.is_used:
        if recipe.optimizer.name == "adamw":
            advice.append('optimizer.name = "adafactor"')
        advice.append("frozen parameters (optimizer.learning_rates of 0)")
        advice.append("LoRA (for example lora.rank = 8)")
    return [*advice, "a smaller data.n_tokens", "more devices"]


def device_memory(device: Any) -> int | None:
    """Return the bytes that programs may use on a jax.Device; None if the device gives no limit.

    For a CPU this is the machine's memory, or the limit of the process (cgroups) if that is lower, divided by the
    number of CPU devices in this process.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and some systems lack these names
        return None
    return int(min(machine, _cgroup_limit())) // jax.local_device_count("cpu")


def _cgroup_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the lowest memory limit of Linux's control groups for this process: its own group and all above it."""
    files = [root / "memory" / "memory.limit_in_bytes"]  # version 1
    for line in own.read_text().splitlines() if own.exists() else []:
        if line.startswith("0::"):  # version 2
            group = root / line[3:].lstrip("/")
            files += [folder / "memory.max" for folder in (group, *group.parents) if folder.is_relative_to(root)]
    limits = [file.read_text().strip() for file in [*files, root / "memory.max"] if file.is_file()]
    return min((int(limit) for limit in limits if limit.isdigit()), default=math.inf)
