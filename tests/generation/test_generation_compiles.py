"""Compiling once: calls with other settings do not compile, keep no memory, and capture no params."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_models import N_SAID, TEXT_CONFIG
from measures import COMPILATIONS
from strength import campaign
from tiny_models import CONFIG, random_params

import gpt2_jax


@pytest.fixture(scope="module")
def many_params():
    return [random_params(CONFIG, seed) for seed in range(5)]


def some_call(rng):
    """A batch of 5 to 8 prompts of 1 to 23 ids, and any settings; with new tokens it is longer than 32 tokens."""
    prompts = [rng.integers(0, CONFIG.n_vocab, rng.integers(1, 24)).tolist() for _ in range(rng.integers(4, 8))]
    prompts.append(rng.integers(0, CONFIG.n_vocab, 23).tolist())
    settings = {
        "max_new_tokens": int(rng.integers(10, 18)),
        "temperature": float(rng.choice([0, rng.uniform(0.1, 3)])),
        "top_k": int(rng.choice([0, rng.integers(1, 37)])),
        "top_p": float(rng.choice([1, rng.uniform(0.1, 1)])),
        "min_p": float(rng.choice([0, rng.uniform(0, 0.3)])),
        "repetition_penalty": float(rng.choice([1, rng.uniform(0.7, 2)])),
        "top_p_rule": str(rng.choice(["original", "common"])),
        "seed": int(rng.integers(2**32)),
        "stop_ids": rng.choice(CONFIG.n_vocab, rng.integers(0, 7), replace=False).tolist(),
    }
    return prompts, settings


# One call of each kind of sampling: greedy, draws, and draws with top-k or top-p.
EACH_KIND = [{"temperature": 0, "top_k": 5}, {"min_p": 0.1}, {"top_k": 5}]


def compile_all(params, **settings):
    """Compile what `some_call` may need: 5 to 8 rows are decoded together, and prefilled in groups of 8, 4, 2 and 1.

    Each kind of sampling has its own `first` and `decode`, and shares the rest.
    """
    gpt2_jax.generate(CONFIG, params, [[1] * 23] * 7, 17, **settings)
    for kind in EACH_KIND:
        compiled = len(COMPILATIONS)
        gpt2_jax.generate(CONFIG, params, [[1] * 23] * 8, 17, **settings | kind)
        assert len(COMPILATIONS) - compiled <= 2 + 2 * (kind == EACH_KIND[0])  # and prefill and place for eight rows


def held():
    """Number and bytes of the arrays that live on the devices."""
    arrays = jax.live_arrays()
    return len(arrays), sum(array.nbytes for array in arrays)


def test_many_calls_compile_once_and_hold_nothing(many_params):
    """Any settings, seeds, stops, params and lengths of one bucket: nothing compiles after the first call, and the
    memory in use is the same afterwards."""
    rng = np.random.default_rng(1)
    compile_all(many_params[0])
    compiled, before = len(COMPILATIONS), held()
    for call in range(campaign(50, 1000)):
        prompts, settings = some_call(rng)
        gpt2_jax.generate(CONFIG, many_params[call % 5], prompts, **settings)
        assert len(COMPILATIONS) == compiled, (call, settings)
    assert held() == before


def test_logprobs_of_other_settings_compile_nothing(many_params):
    """The number of alternatives is a shape. Nothing else is."""
    rng = np.random.default_rng(2)
    compile_all(many_params[0], logprobs=5)
    compiled, before = len(COMPILATIONS), held()
    for call in range(campaign(11, 31)):
        prompts, settings = some_call(rng)
        gpt2_jax.generate(CONFIG, many_params[call % 5], prompts, logprobs=5, **settings)
    assert len(COMPILATIONS) == compiled
    assert held() == before


def test_sliding_again_compiles_nothing(many_params):
    """Rows that slide at other times or more often reuse compiled programs: two for each bucket of prompt lengths and
    of rows that slide together, and one that makes room."""
    prompts = [list(range(37)), [5], [7] * 19, [1] * 5, [2] * 30]

    def slide(seed):
        for call in range(campaign(5, 13)):
            cut = [prompt[call % 3 :] or [1] for prompt in prompts]
            knobs = {"overflow": "slide", "seed": seed, "top_k": 1 + call}
            gpt2_jax.generate(CONFIG, many_params[(call + seed) % 5], cut, 90 - 3 * call, **knobs)

    gpt2_jax.generate(CONFIG, many_params[0], [prompt[:23] for prompt in prompts], 17, top_k=3)
    compiled = len(COMPILATIONS)
    slide(0)
    assert len(COMPILATIONS) - compiled <= 1 + 2 * 4 * 2  # prefill of 32 or of 41 tokens
    compiled, before = len(COMPILATIONS), held()
    slide(1)
    assert len(COMPILATIONS) == compiled
    assert held() == before


def test_streams_with_other_settings_compile_nothing(tokenizer):
    """Prompts of one bucket, with any stops and settings; also after streams that were not read to the end."""
    params = random_params(TEXT_CONFIG, 1, scale=0.2)
    for kind in EACH_KIND:
        list(gpt2_jax.stream(TEXT_CONFIG, params, [1], tokenizer, N_SAID, **kind))
    compiled = len(COMPILATIONS)
    for seed in range(campaign(11, 31)):
        settings = {
            "seed": seed,
            "top_k": seed % 5,
            "temperature": seed % 4,
            "stop_strings": ["e"] * (seed % 2),
            "stop_ids": [seed] * (seed % 3),
        }
        pieces = gpt2_jax.stream(TEXT_CONFIG, params, [1] * (1 + seed % 27), tokenizer, N_SAID, **settings)
        next(pieces, None)
        if seed % 3:
            list(pieces)
    assert len(COMPILATIONS) == compiled


def test_batch_sizes_of_one_bucket_compile_nothing(many_params):
    """13 to 16 rows are decoded by one program, and prefilled by the programs for 16, 8, 4, 2 and 1 rows."""
    prompt = [1] * 23
    gpt2_jax.generate(CONFIG, many_params[0], [prompt] * 16, 17)
    gpt2_jax.generate(CONFIG, many_params[0], [prompt] * 15, 17)
    compiled = len(COMPILATIONS)
    for n_rows in (13, 14):
        gpt2_jax.generate(CONFIG, many_params[0], [prompt] * n_rows, 17)
    assert len(COMPILATIONS) == compiled


def test_prompt_lengths_fall_into_few_buckets():
    """Prompts of 1 to 126 tokens and one new token: one program per bucket, not one per length."""
    params = random_params(TEXT_CONFIG, 1, scale=0.2)
    compiled = len(COMPILATIONS)
    for length in range(1, 127, campaign(9, 1)):
        gpt2_jax.generate(TEXT_CONFIG, params, [[1] * length], 1, temperature=0)
    buckets, programs_of_a_bucket = 5, 6
    assert len(COMPILATIONS) - compiled <= buckets * programs_of_a_bucket


# ---- no program holds a parameter

DUMPED = """
    import sys
    from pathlib import Path
    import jax, numpy as np
    from tiny_models import random_params
    import gpt2_jax

    config = gpt2_jax.GPT2Config(n_vocab=1009, n_ctx=41, n_embd=264, n_head=3, n_layer=1)
    params = random_params(config, 0)
    settings = {"top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 2, "stop_ids": [5], "overflow": "slide"}
    gpt2_jax.generate(config, params, [[1, 2, 3], [4]], 53, **settings)
    largest = max(path.stat().st_size for path in Path(sys.argv[1]).iterdir())
    captured = jax.jit(lambda x_D: x_D @ params["wte"].T)
    captured(np.zeros(264, np.float32))  # what a captured parameter looks like
    print(largest, max(path.stat().st_size for path in Path(sys.argv[1]).iterdir()))
"""


def test_no_program_holds_a_parameter(tmp_path):
    """In JAX's dump of every program it compiles, none has a constant of 1 MB, which each weight matrix here has."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DUMPED), tmp_path],
        env=os.environ | {"JAX_DUMP_IR_TO": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1] / "support",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    largest, with_a_constant = map(int, done.stdout.split()[-2:])
    assert largest < 2**20 < with_a_constant


def test_other_params_give_other_ids_without_compiling(many_params):
    """Other params give other ids, and the first params give their ids again: no program keeps params."""
    prompts = [[1, 2, 3], [4] * 23, [5], [6], [7]]
    first = gpt2_jax.generate(CONFIG, many_params[0], prompts, 17, temperature=0)
    compiled = len(COMPILATIONS)
    others = [gpt2_jax.generate(CONFIG, params, prompts, 17, temperature=0) for params in many_params[1:]]
    assert all(other != first for other in others)
    assert gpt2_jax.generate(CONFIG, many_params[0], prompts, 17, temperature=0) == first
    assert len(COMPILATIONS) == compiled
