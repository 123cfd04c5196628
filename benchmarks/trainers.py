"""The libraries that benchmarks/train.py times, each in its own process; all take the same steps.

Every loader returns steps(n), which takes n optimizer steps on the same batch. It returns their losses when they are on
the host, so a measured time includes the wait for the device. All train with AdamW as in OPTIMIZER, clipped gradients,
no dropout, and float32 params and optimizer state. A library is imported only in the process that needs it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from turns import forget_peak, save_weights

Steps = Callable[[int], list[float]]

OPTIMIZER = {"learning_rate": 1e-4, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1, "clip": 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """The settings of a step: its shape, the dtype of its products ("float32", "bfloat16"), and how memory is saved."""

    n_rows: int
    n_tokens: int
    dtype: str
    accumulate: int
    remat: bool

    def tokens(self, n_vocab: int) -> np.ndarray:
        """Return int32 [rows, tokens + 1], the same for every library."""
        return np.random.default_rng(0).integers(n_vocab, size=(self.n_rows, self.n_tokens + 1), dtype=np.int32)


def load_ours(folder: Path, case: Case, where: str) -> Steps:
    """Load this library; JAX finds the device by itself."""
    import gpt2_jax
    from gpt2_jax import recipe as recipes
    from gpt2_jax.data.batching import Batch
    from gpt2_jax.training import init_state, make_plan, make_train_step

    config, params = gpt2_jax.load(folder / "hf", dtype="float32")
    config = config.replace(compute_dtype=case.dtype, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    recipe = recipes.Recipe(
        model=recipes.Model(dropout=0.0),
        optimizer=recipes.Optimizer(schedule="constant", **OPTIMIZER),
        mesh=recipes.Mesh(data=1),
        batch_size=case.n_rows,
        accumulate=case.accumulate,
        compute_dtype=case.dtype,
        remat=case.remat,
    )
    plan = make_plan(config, recipe)
    state = init_state(plan, params)
    del params
    train_step = make_train_step(plan)
    tokens_BT = case.tokens(config.n_vocab).reshape(case.accumulate, -1, case.n_tokens + 1)
    weights = np.ones(tokens_BT[..., 1:].shape, np.float32)
    batch = Batch(tokens=tokens_BT[..., :-1], targets=tokens_BT[..., 1:], weights=weights)

    def steps(n: int) -> list[float]:
        nonlocal state
        losses = []
        for _ in range(n):
            state, metrics = train_step(state, batch)
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]

    return steps


def load_torch(folder: Path, case: Case, where: str, compiled: bool = False) -> Steps:
    """Load Hugging Face torch with its fastest attention and optimizer; in bfloat16 under autocast."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if where == "gpu" else "cpu"
    if where == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32, the default in JAX
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation="sdpa", use_cache=False, **no_dropout
    )
    model.to(device).train()
    if case.remat:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch_adamw(model)
    tokens_BT = torch.from_numpy(case.tokens(model.config.vocab_size).astype(np.int64)).to(device)
    parts = tokens_BT.reshape(case.accumulate, -1, case.n_tokens + 1)

    def loss_of(tokens_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            logits_BTV = model(tokens_BT[:, :-1]).logits
            return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())

    if compiled:
        loss_of = torch.compile(loss_of)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in parts:
            loss = loss_of(part) / len(parts)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip"])
        optimizer.step()
        return total

    return lambda n: torch.stack([step() for _ in range(n)]).tolist()


def torch_adamw(model: Any) -> Any:
    """Return torch's fused AdamW, with decay on matrices only."""
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    words = {"lr": OPTIMIZER["learning_rate"], "betas": OPTIMIZER["betas"], "eps": OPTIMIZER["epsilon"]}
    return torch.optim.AdamW(groups, fused=True, **words)


def load_torch_compiled(folder: Path, case: Case, where: str) -> Steps:
    """Load Hugging Face torch under torch.compile."""
    return load_torch(folder, case, where, compiled=True)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library to time.

    Attributes:
      load: (folder, case, where) -> steps.
      package: the package that must be installed.
      devices: devices on which it runs by default: "cpu", "gpu".
    """

    load: Callable[[Path, Case, str], Steps]
    package: str
    devices: tuple[str, ...]


PEERS = {
    "ours": Peer(load_ours, "jax", ("cpu", "gpu")),
    "torch": Peer(load_torch, "transformers", ("cpu",)),
    "torch-compiled": Peer(load_torch_compiled, "transformers", ("gpu",)),
}


def prepare(source: str, random: bool, folder: Path) -> dict[str, int]:
    """Write the weights that every library starts from, and return the model's hparams."""
    return save_weights(source, random, folder)[0].to_hparams()


def device_flops() -> float | None:
    """Return the device's peak operations per second; None if that is not known."""
    import jax

    from gpt2_jax.training.hardware import peak_flops

    return peak_flops(jax.devices()[0])


def start(name: str, folder: Path, case: Case, where: str) -> None:
    """Load a library in a worker process, and reset the peak memory after that."""
    global steps
    steps = PEERS[name].load(folder, case, where)
    forget_peak(where)


def timed(n: int) -> tuple[float, list[float]]:
    """Return the seconds of n steps in a worker process, and their losses."""
    begin = time.perf_counter()
    losses = steps(n)
    return time.perf_counter() - begin, losses
