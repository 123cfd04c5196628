"""The pretraining run of chapter 5 of "Build a Large Language Model (From Scratch)", step by step beside torch.

COMMAND: python benchmarks/book_chapter5.py --vocabulary DIR [--layers 12] [--dropout 0.1] [--output FILE.md]

Needs the `parity` extra, and a folder with the encoder.json and vocab.bpe of GPT-2. It takes about 40 minutes and 8 GB
on two CPU cores.

The run of the book: the text "The Verdict", 90 % for training, windows of 256 tokens that do not overlap, batches of 2,
10 epochs, AdamW with learning rate 4e-4 and decay 0.1 of all parameters, and a model of the 124M shape with an output
head of its own and without query, key and value biases. Both programs start from the book's weights, which torch draws
with seed 123, and read the same batches in the same order. Without dropout all losses are equal up to rounding. With
dropout, each draws its own masks.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from turns import where_and_name

TEXT = Path(__file__).resolve().parents[1] / "examples" / "the-verdict.txt"
N_TOKENS, N_ROWS, EPOCHS, RATE, DECAY = 256, 2, 10, 4e-4, 0.1
EVALUATE_EVERY, EVALUATED = 5, 5  # steps, and batches of each split
ENDS = {"train": 0.569, "validation": 6.373}  # the book's, after its last epoch
Step = Callable[[np.ndarray], float]  # ids [rows, T + 1] -> loss before the step
Loss = Callable[[np.ndarray], float]


def windows(ids: list[int]) -> np.ndarray:
    """Return the windows [n, T + 1] of a split."""
    starts = range(0, len(ids) - N_TOKENS, N_TOKENS)
    return np.asarray([ids[start : start + N_TOKENS + 1] for start in starts], np.int32)


def batches(rows: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return the batches of all epochs. The last incomplete one of an epoch is dropped."""
    random, found = np.random.default_rng(seed), []
    for _ in range(EPOCHS):
        order = random.permutation(len(rows))
        found += [rows[order[i : i + N_ROWS]] for i in range(0, len(rows) - N_ROWS + 1, N_ROWS)]
    return found


# ---- ours


def start_ours(config: Any, dropout: float) -> tuple[Step, Loss]:
    """Return a training step and the loss of a batch."""
    import jax

    from gpt2_jax import recipe as recipes
    from gpt2_jax.data.batching import Batch
    from gpt2_jax.training import init_state, make_eval_step, make_plan, make_train_step, model_params

    settings: dict[str, Any] = {"betas": (0.9, 0.999), "schedule": "constant", "clip": 0.0, "decay": ((".*", 1.0),)}
    recipe = recipes.Recipe(
        model=recipes.Model(dropout=dropout),
        data=recipes.Data(n_tokens=N_TOKENS),
        optimizer=recipes.Optimizer(learning_rate=RATE, weight_decay=DECAY, **settings),
        mesh=recipes.Mesh(data=1),
        batch_size=N_ROWS,
        seed=123,
    )
    plan = make_plan(config, recipe)
    train_step, eval_step = make_train_step(plan), make_eval_step(plan)
    state = init_state(plan, book_params(config))

    def batch_of(ids: np.ndarray) -> Batch:
        return Batch(ids[:, :-1], ids[:, 1:], np.ones((len(ids), N_TOKENS), np.float32))

    def step(ids: np.ndarray) -> float:
        nonlocal state
        state, metrics = train_step(state, jax.tree.map(lambda array: array[None], batch_of(ids)))
        return float(metrics["loss"])

    def loss(ids: np.ndarray) -> float:
        nats, n = eval_step(model_params(state, recipe), batch_of(ids))
        return float(nats) / float(n)

    return step, loss


# ---- torch: the book's model


def book_model(config: Any, dropout: float) -> Any:
    """Return a model with the book's layers and names. Torch draws its weights in the book's order, with seed 123."""
    import torch
    from torch import nn
    from torch.nn import functional

    d, n_heads = config.n_embd, config.n_head

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

        def forward(self, x):
            return functional.layer_norm(x, (d,), self.scale, self.shift)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            att = {name: nn.Linear(d, d, bias=False) for name in ("W_query", "W_key", "W_value")}
            self.att = nn.ModuleDict(att | {"out_proj": nn.Linear(d, d)})
            layers = nn.ModuleDict({"0": nn.Linear(d, 4 * d), "2": nn.Linear(4 * d, d)})
            self.ff = nn.ModuleDict({"layers": layers})
            self.norm1, self.norm2 = Norm(), Norm()

        def forward(self, x):
            n_rows, n_tokens, _ = x.shape
            h = self.norm1(x)
            q, k, v = (
                self.att[name](h).view(n_rows, n_tokens, n_heads, -1).transpose(1, 2)
                for name in ("W_query", "W_key", "W_value")
            )
            scores = q @ k.transpose(2, 3) / (d // n_heads) ** 0.5
            later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
            weights = self.drop(torch.softmax(scores.masked_fill(later, -torch.inf), dim=-1))
            x = x + self.drop(self.att["out_proj"]((weights @ v).transpose(1, 2).reshape(x.shape)))
            first, last = self.ff["layers"].values()
            return x + self.drop(last(functional.gelu(first(self.norm2(x)), approximate="tanh")))

        def drop(self, x):
            return functional.dropout(x, dropout, self.training)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok_emb, self.pos_emb = nn.Embedding(config.n_vocab, d), nn.Embedding(config.n_ctx, d)
            self.trf_blocks = nn.ModuleList(Block() for _ in range(config.n_layer))
            self.final_norm, self.out_head = Norm(), nn.Linear(d, config.n_vocab, bias=False)

        def forward(self, ids):
            x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
            x = functional.dropout(x, dropout, self.training)
            for block in self.trf_blocks:
                x = block(x)
            return self.out_head(self.final_norm(x))

    torch.manual_seed(123)
    return Model()


def book_params(config: Any) -> Any:
    """Return the weights that the book's run starts from, as `load` reads them from the book's model."""
    from safetensors.torch import save_file

    import gpt2_jax

    settings = {"vocab_size": config.n_vocab, "context_length": config.n_ctx, "emb_dim": config.n_embd}
    settings |= {"n_heads": config.n_head, "n_layers": config.n_layer, "drop_rate": 0.0, "qkv_bias": False}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(settings), encoding="utf-8")
        save_file(book_model(config, 0.0).state_dict(), Path(folder, "model.safetensors"))
        return gpt2_jax.load(folder)[1]


def start_torch(config: Any, dropout: float) -> tuple[Step, Loss]:
    """Return a training step and the loss of a batch of the book's model."""
    import torch
    from torch.nn import functional

    model = book_model(config, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)

    def of(ids: np.ndarray):
        ids = torch.tensor(ids, dtype=torch.long)
        return functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def step(ids: np.ndarray) -> float:
        model.train()
        optimizer.zero_grad()
        loss = of(ids)
        loss.backward()
        optimizer.step()
        return loss.item()

    def loss(ids: np.ndarray) -> float:
        model.eval()
        with torch.no_grad():
            return of(ids).item()

    return step, loss


# ---- the run


def run(step: Step, loss: Loss, train: np.ndarray, val: np.ndarray, todo: list[np.ndarray], name: str) -> dict:
    """Take all steps. Return the losses of the steps, and those of both splits every few steps and at the end."""
    seen: dict[str, Any] = {"steps": [], "evaluations": []}
    started = time.monotonic()
    for number, ids in enumerate(todo):
        seen["steps"].append(step(ids))
        if number % EVALUATE_EVERY == 0 or number == len(todo) - 1:
            parts = {"train": train[: EVALUATED * N_ROWS], "validation": val}
            found = {
                split: float(np.mean([loss(rows[i : i + N_ROWS]) for i in range(0, len(rows) - N_ROWS + 1, N_ROWS)]))
                for split, rows in parts.items()
            }
            seen["evaluations"].append({"step": number + 1} | found)
            print(f"{name}: step {number + 1} of {len(todo)}, {found}", flush=True)
    seen["seconds"] = time.monotonic() - started
    return seen


def machine_line() -> str:
    """Return the processor and the versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch"))
    return f"{where_and_name()[1]}, Python {platform.python_version()}, {versions}."


def report(args: argparse.Namespace, config: Any, runs: dict[str, dict]) -> str:
    """Return the table."""
    ours, theirs = runs["gpt2-jax"], runs["torch"]
    apart = np.abs(np.subtract(ours["steps"], theirs["steps"]))
    flags = f" --layers {args.layers}" * (args.layers != 12) + f" --dropout {args.dropout}" * (args.dropout > 0)
    lines = [
        f"# Chapter 5 of the book: {config.n_layer} layers, dropout {args.dropout:g}, float32",
        "",
        f"    python benchmarks/book_chapter5.py --vocabulary DIR{flags} --output FILE.md",
        "",
        machine_line(),
        "",
        f"The model has {config.n_params:,} parameters (query, key and value biases, which stay 0, included), and the",
        f"book's initial weights. The text gives {len(ours['steps'])} steps of {N_ROWS} windows of {N_TOKENS} tokens.",
        f"The book's run ends at a training loss of {ENDS['train']} and a validation loss of {ENDS['validation']},",
        "with dropout 0.1. Its windows come in another order.",
        "",
    ]
    if not args.dropout:
        lines += [f"Largest difference of a step's loss: {apart.max():.1e} nats (mean {apart.mean():.1e}).", ""]
    lines += ["| step | training loss | torch | validation loss | torch |", "|---|---|---|---|---|"]
    for one, other in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        cells = [f"{run[split]:.3f}" for split in ("train", "validation") for run in (one, other)]
        lines.append(f"| {one['step']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Time: {ours['seconds']:.0f} s, torch {theirs['seconds']:.0f} s, one after the other in one process.",
    ]
    return "\n".join(lines) + "\n"


def picture(runs: dict[str, dict], path: Path) -> None:
    """Draw the losses of both splits, beside the ends of the book's run."""
    from gpt2_jax import figures

    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for color, (split, end) in zip(("tab:blue", "tab:orange"), ENDS.items(), strict=True):
        for style, (name, run) in zip(("-", "--"), runs.items(), strict=True):
            steps = [one["step"] for one in run["evaluations"]]
            axes.plot(steps, [one[split] for one in run["evaluations"]], style, color=color, label=f"{split}, {name}")
        axes.axhline(end, color=color, linestyle=":", label=f"{split}, end of the book's run")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    figures.save(figure, path)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with encoder.json and vocab.bpe")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout rate, in both")
    output = "file for the table, with a picture (.png) and the numbers (.json) beside it; none: standard output alone"
    parser.add_argument("--output", type=Path, help=output)
    args = parser.parse_args()

    from gpt2_jax import GPT2Config
    from gpt2_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_files(args.vocabulary / "encoder.json", args.vocabulary / "vocab.bpe")
    text = TEXT.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))  # characters, as in the book
    train, val = (windows(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
    config = GPT2Config(tokenizer.n_vocab, N_TOKENS, 768, 12, args.layers, tie_word_embeddings=False, qkv_bias=False)
    todo, runs = batches(train, seed=123), {}
    for name, start in (("gpt2-jax", start_ours), ("torch", start_torch)):
        runs[name] = run(*start(config, args.dropout), train, val, todo, name)
    table = report(args, config, runs)
    print(table)
    if args.output:
        args.output.write_text(table, encoding="utf-8")
        args.output.with_suffix(".json").write_text(json.dumps(runs), encoding="utf-8")
        picture(runs, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
