"""Batches as users have them: each row equals the row alone, with and without cache, on one device or eight."""

import commands
import naive_generation as naive
import numpy as np
import pytest
from strength import campaign, full_only
from tiny_models import CONFIG, random_params

import gpt2_jax

# Thirteen rows. The first is the longest, so every batch of the first ones has the same length.
PROMPTS = [
    list(range(23)), [5], [36, 0], [7] * 19, [2, 7, 1, 8, 2], [0], [11] * 8, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [1, 1],
    [30, 20, 10], [5], [9, 8, 7, 6, 5, 4, 3, 2, 1], [36] * 13,
]  # fmt: skip
KNOBS = {"temperature": 1.4, "top_k": 19, "top_p": 0.97, "min_p": 0.01, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def some_prompts(rng, n_rows):
    """Prompts of 1 to 23 ids, some of them twice, and one of 23 ids: so batches of the same size use one program."""
    prompts = [rng.integers(0, CONFIG.n_vocab, rng.integers(1, 24)).tolist() for _ in range(n_rows)]
    prompts = [prompts[rng.integers(b + 1)] if rng.random() < 0.2 else prompt for b, prompt in enumerate(prompts)]
    prompts[rng.integers(n_rows)] = rng.integers(0, CONFIG.n_vocab, 23).tolist()
    return prompts


# ---- cached = uncached = batched = alone


def test_greedy_ragged_batches_equal_whole_forward_passes(params):
    """Random batches of 1 to 13 prompts: every row equals the slow loop's, id for id."""
    rng = np.random.default_rng(4)
    for case in range(campaign(5, 50)):
        prompts = some_prompts(rng, int(rng.integers(1, 14)))
        rows = gpt2_jax.generate(CONFIG, params, prompts, int(rng.integers(10, 18)), temperature=0)
        assert rows == [naive.greedy(CONFIG, params, *pair) for pair in zip(prompts, rows, strict=True)], case


def test_sampled_ragged_batches_equal_whole_forward_passes(params):
    """Random batches and settings: row i draws what the slow loop draws with the keys of the seed, i and t."""
    rng = np.random.default_rng(5)
    for case in range(campaign(5, 50)):
        prompts = some_prompts(rng, int(rng.integers(1, 14)))
        knobs = {
            "temperature": float(rng.choice([0.6, 1, 1.7])),
            "top_k": int(rng.choice([0, 11])),
            "top_p": float(rng.choice([1, 0.83])),
            "min_p": float(rng.choice([0, 0.03])),
            "repetition_penalty": float(rng.choice([1, 1.3])),
            "top_p_rule": str(rng.choice(["original", "common"])),
        }
        seed = int(rng.integers(2**32))
        rows = gpt2_jax.generate(CONFIG, params, prompts, int(rng.integers(10, 18)), seed=seed, **knobs)
        expected = [
            naive.sampled(CONFIG, params, prompt, row, i, seed, **knobs)
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
        assert rows == expected, (case, knobs)


@full_only("the two tests above have a small model")
def test_the_embedded_model_in_a_ragged_batch_equals_whole_forward_passes(shakespeare, reference):
    """Real text, prompts of 1, 31 and 17 tokens: greedy and sampled rows equal the slow loop's, id for id."""
    config, params = shakespeare
    prompts = [row[:n].tolist() for row, n in zip(reference["tokens"], (1, 31, 17), strict=False)]
    rows = gpt2_jax.generate(config, params, prompts, 31, temperature=0)
    assert rows == [naive.greedy(config, params, *pair) for pair in zip(prompts, rows, strict=True)]
    rows = gpt2_jax.generate(config, params, prompts, 31, seed=3)
    assert rows == [
        naive.sampled(config, params, prompt, row, i, 3)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]


def test_the_penalty_counts_the_prompt_too_and_works_on_greedy(params):
    """A repetition penalty changes greedy rows. They equal the slow loop's, which counts prompt and new tokens."""
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0, repetition_penalty=1.7)
    assert rows == [naive.greedy(CONFIG, params, *pair, 1.7) for pair in zip(PROMPTS, rows, strict=True)]
    assert rows != gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0)


# ---- a row and its neighbours


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {}, KNOBS], ids=["greedy", "plain", "all knobs"])
def test_batches_of_every_size_give_the_same_rows(params, knobs):
    """Batches of 1 to 13 rows, padded to a few sizes: the rows of each equal the first rows of the largest."""
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, seed=5, **knobs)
    for n_rows in campaign((1, 3, 8, 12), range(1, 13)):
        assert gpt2_jax.generate(CONFIG, params, PROMPTS[:n_rows], 17, seed=5, **knobs) == rows[:n_rows], n_rows


@pytest.mark.parametrize("knobs", [{}, KNOBS], ids=["plain", "all knobs"])
def test_a_sampled_row_stays_while_its_neighbours_change_places(params, knobs):
    """Row i keeps its ids for any order of the other rows, and for any other prompts instead of them."""
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, seed=6, **knobs)
    rng = np.random.default_rng(7)
    for i in campaign((0, 5, 12), range(13)):
        others = [PROMPTS[b] for b in rng.permutation(13) if b != i]
        replaced = some_prompts(rng, 12)
        for neighbours in (others, replaced):
            batch = [*neighbours[:i], PROMPTS[i], *neighbours[i:]]
            assert gpt2_jax.generate(CONFIG, params, batch, 17, seed=6, **knobs)[i] == rows[i]


def test_duplicated_prompts_draw_for_themselves(params):
    """Samples of one prompt differ from each other, and sample i does not depend on how many there are."""
    samples = gpt2_jax.generate(CONFIG, params, [PROMPTS[0]] * 13, 17, seed=8)
    assert len(set(map(tuple, samples))) == 13
    assert gpt2_jax.generate(CONFIG, params, [PROMPTS[0]] * 5, 17, seed=8) == samples[:5]


def test_many_rows_of_very_different_lengths(params):
    """More long prompts than run together, with one-token prompts among them: each row equals the slow loop's."""
    prompts = [[b] * (1 if b in (3, 7) else 41 - b % 5) for b in range(16)]
    rows = gpt2_jax.generate(CONFIG, params, prompts, 9, temperature=0, overflow="slide")
    assert rows == [naive.greedy(CONFIG, params, *pair) for pair in zip(prompts, rows, strict=True)]


# ---- params on many devices

EIGHT_DEVICES = """
    import json
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import naive_generation as naive
    from tiny_models import random_params
    import gpt2_jax

    config = gpt2_jax.GPT2Config(n_vocab=64, n_ctx=41, n_embd=16, n_head=4, n_layer=1)
    params = random_params(config, 0)
    prompts = [[5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [63, 0]]
    knobs = {"temperature": 1.5, "top_k": 31, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}

    def spec(leaf):  # every axis that can be: the last over four devices, the first over two
        names = ["data" if leaf.ndim == 2 and leaf.shape[0] % 2 == 0 else None, "model"][-leaf.ndim :]
        return P(*names)

    wrong = []
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
        sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), params)
        assert len(sharded["wte"].addressable_shards) == 8
        assert not sharded["h0"]["attn"]["c_attn"]["w"].is_fully_replicated
        rows = gpt2_jax.generate(config, sharded, prompts, 57, temperature=0, overflow="slide")
        if rows != [naive.greedy(config, params, *pair) for pair in zip(prompts, rows)]:
            wrong.append(f"{kind}: greedy, sliding")
        drawn = gpt2_jax.generate(config, sharded, prompts, 29, seed=4, **knobs)
        if drawn != [naive.sampled(config, params, prompts[i], drawn[i], i, 4, **knobs) for i in range(3)]:
            wrong.append(f"{kind}: sampled")
        stopped = gpt2_jax.generate(config, sharded, prompts, 29, seed=4, stop_ids=drawn[0][7:9], **knobs)
        if stopped != [naive.cut_at_ids(row, drawn[0][7:9]) for row in drawn]:
            wrong.append(f"{kind}: stopped")
    print(json.dumps(wrong))
"""


def test_params_sharded_over_eight_devices_give_the_same_ids():
    """On a mesh of two by four devices, with Auto and with Explicit axes: greedy, sampled, sliding and stopping."""
    assert commands.on_eight_devices(EIGHT_DEVICES) == []
