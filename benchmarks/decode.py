"""Time greedy decoding against Hugging Face torch `generate`, on the same weights, in one run; print a table.

COMMAND: python benchmarks/decode.py --model DIR [--cases 1,64 8,512]     (needs the `parity` extra)

Each library lives in a process of its own, so that neither's threads disturb the other's, and the two take turns: a
ratio is the median over rounds of (Hugging Face's time) / (ours). Prefill is a call for one token; ms a token is what
each further token of a longer call adds. The floor is the bytes of the weights over the read bandwidth measured here.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro


@dataclasses.dataclass
class Args:
    """Time greedy decoding against Hugging Face torch, on the same weights, in one run."""

    model: Path
    """Directory of a checkpoint in OpenAI's layout (benchmarks/random_checkpoint.py makes one)."""
    cases: tuple[str, ...] = ("1,64",)
    """What to time: batch,prompt pairs, in rows and tokens."""
    new_tokens: int = 64
    """Tokens a call adds to each row."""
    rounds: int = 5
    """Turns each library takes at each case."""


def load_ours(directory: Path) -> Callable[[np.ndarray, int], list[list[int]]]:
    """Return greedy(prompts_BP, n_new) -> new ids, by this library."""
    import gpt2_jax

    config, params = gpt2_jax.load(directory)
    return lambda prompts_BP, n_new: gpt2_jax.generate(config, params, prompts_BP, n_new, temperature=0)


def load_hugging_face(directory: Path) -> Callable[[np.ndarray, int], list[list[int]]]:
    """Return greedy(prompts_BP, n_new) -> new ids, by transformers on the same weights (its layout is ours too)."""
    import torch
    import transformers

    import gpt2_jax
    from gpt2_jax.checkpoints.huggingface import hugging_face_name
    from gpt2_jax.params import flatten

    config, params = gpt2_jax.load(directory)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_hparams())).eval()
    state = {hugging_face_name(name): torch.from_numpy(np.array(array)) for name, array in flatten(params).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) == {"lm_head.weight"}, missing  # tied to wte

    def greedy(prompts_BP: np.ndarray, n_new: int) -> list[list[int]]:
        with torch.no_grad():
            prompts_BP = torch.from_numpy(prompts_BP)
            ids = model.generate(
                prompts_BP,
                attention_mask=torch.ones_like(prompts_BP),
                max_new_tokens=n_new,
                min_new_tokens=n_new,
                do_sample=False,
                pad_token_id=0,
            )
        return ids[:, prompts_BP.shape[1] :].tolist()

    return greedy


PEERS = {"ours": load_ours, "Hugging Face": load_hugging_face}


def start(peer: str, directory: Path) -> None:
    """Load the model in a worker process."""
    global greedy
    begin = time.perf_counter()
    greedy = PEERS[peer](directory)
    print(f"{peer}: loaded in {time.perf_counter() - begin:.1f} s, imports included", file=sys.stderr)


def timed(prompts_BP: np.ndarray, n_new: int) -> tuple[float, list[list[int]]]:
    """Return the seconds of one call in a worker process, and its ids."""
    begin = time.perf_counter()
    ids = greedy(prompts_BP, n_new)
    return time.perf_counter() - begin, ids


def read_bandwidth() -> float:
    """Return bytes a second of summing 1 GiB with every core: the best of five."""
    import torch

    block = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - begin)
    return block.nbytes / min(seconds)


def measure(pools: dict[str, ProcessPoolExecutor], args: Args, n_vocab: int, case: str) -> dict[str, float]:
    """Time one case: every library in turn, `args.rounds` times, after a call to compile and warm up."""
    n_rows, n_prompt = map(int, case.split(","))
    prompts_BP = np.random.default_rng(0).integers(n_vocab, size=(n_rows, n_prompt))
    first, per_token, compiling, same = {}, {}, {}, {}
    for peer, pool in pools.items():
        first[peer], per_token[peer] = [], []
        compiling[peer], same[peer] = pool.submit(timed, prompts_BP, args.new_tokens).result()
        pool.submit(timed, prompts_BP, 1).result()
    for _ in range(args.rounds):
        for peer, pool in pools.items():
            one, _ = pool.submit(timed, prompts_BP, 1).result()
            whole, _ = pool.submit(timed, prompts_BP, args.new_tokens).result()
            first[peer].append(one)
            per_token[peer].append((whole - one) / (args.new_tokens - 1))

    def ratio(seconds: dict[str, list[float]]) -> float:
        pairs = zip(seconds["Hugging Face"], seconds["ours"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    result = {"ids equal": float(np.mean(np.equal(same["ours"], same["Hugging Face"])))}
    for peer in pools:
        result |= {
            f"{peer} prefill": statistics.median(first[peer]),
            f"{peer} token": statistics.median(per_token[peer]),
            f"{peer} first call": compiling[peer],
        }
    return result | {"prefill ratio": ratio(first), "token ratio": ratio(per_token)}


def main(args: Args) -> None:
    """Measure and print a Markdown table."""
    import gpt2_jax

    config = gpt2_jax.load_config(args.model)
    bandwidth = read_bandwidth()
    floor = config.param_bytes / bandwidth
    context = multiprocessing.get_context("spawn")
    pools = {
        peer: ProcessPoolExecutor(1, mp_context=context, initializer=start, initargs=(peer, args.model))
        for peer in PEERS
    }
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "transformers"))
    print(
        f"{config.n_params:,} parameters, float32, greedy, {args.new_tokens} new tokens, median of {args.rounds} rounds"
    )
    print(f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {packages}")
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s: the weights alone take {floor * 1e3:.1f} ms a step\n")
    print("| batch, prompt | | prefill ms | ms/step | tok/s | first call s | prefill ratio | step ratio | same ids |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in args.cases:
        result = measure(pools, args, config.n_vocab, case)
        for peer in PEERS:
            prefill, token = result[f"{peer} prefill"], result[f"{peer} token"]
            row = [case, peer, f"{prefill * 1e3:.0f}", f"{token * 1e3:.1f}", f"{int(case.split(',')[0]) / token:.0f}"]
            row += [f"{result[f'{peer} first call']:.1f}"]
            ours = (f"{result['prefill ratio']:.2f}", f"{result['token ratio']:.2f}", f"{result['ids equal']:.0%}")
            print("| " + " | ".join(row + list(ours if peer == "ours" else ("", "", ""))) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
