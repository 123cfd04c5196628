"""Published interventions, ported: each test does what the method does, and compares with NumPy or changed weights.

In torch each of them is a hook, a loop over layers that registers it, and a loop that removes it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from jax.tree_util import Partial
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax import research

PROMPTS = [[5, 17, 3, 3, 21, 8, 30], [7, 1, 30, 2, 2], [9, 4, 11, 6, 25, 31, 14, 2, 19, 28, 13]]
NEW = 9
BOUND = 1e-5  # relative to the largest value; measured: 5.3e-7


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 4, scale=0.4)


def assert_greedy(params, rows, logprobs, described):
    """Check new tokens and their log-probabilities by one NumPy pass over each whole row. described: edits of each."""
    for prompt, row, found, edits in zip(PROMPTS, rows, logprobs, described, strict=True):
        logits_TV = naive.forward(CONFIG, params, [[*prompt, *row[:-1]]], None, edits)[0][0, len(prompt) - 1 :]
        assert row == logits_TV.argmax(-1).tolist()
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        assert naive.error(found.chosen, logprobs_TV[np.arange(NEW), row]) < BOUND


def generate(params, **changes):
    return gpt2_jax.generate(CONFIG, params, PROMPTS, NEW, temperature=0, logprobs=0, **changes)


def numpy_stream(params, name, ids):
    return naive.forward(CONFIG, params, [ids])[1][name][0]


def test_activation_addition(params):
    """ActAdd (Turner et al. 2023): the difference of two short prompts' streams, added at a longer prompt's front.

    It works on the prompt once, and what the KV cache keeps of it steers all new tokens.
    """
    plus, minus = [12, 33, 6, 20], [12, 2, 9, 15]
    _, seen = research.forward(CONFIG, params, [plus, minus], capture="h1/resid_pre", logits=False)
    change_TD = 5.0 * (seen["h1/resid_pre"][0] - seen["h1/resid_pre"][1])
    edits = [research.add("h1/resid_pre", change_D, positions=i) for i, change_D in enumerate(change_TD)]
    rows, logprobs = generate(params, edits=edits)

    change_TD = 5 * (numpy_stream(params, "h1/resid_pre", plus) - numpy_stream(params, "h1/resid_pre", minus))
    described = [naive.edit("add", "h1/resid_pre", change_D, [i]) for i, change_D in enumerate(change_TD)]
    assert_greedy(params, rows, logprobs, [described] * 3)
    assert rows != generate(params)[0]


def test_contrastive_activation_addition(params):
    """CAA (Rimsky et al. 2024): the mean difference of pairs at their last token, added from each prompt's end on."""
    pairs = [([8, 3, 11], [8, 3, 29]), ([1, 14, 22, 5, 11], [1, 14, 22, 5, 29]), ([30, 11], [30, 29])]
    sides = [
        research.forward(CONFIG, params, list(side), capture="h1/resid_post")[1] for side in zip(*pairs, strict=True)
    ]
    last = [jnp.stack([row[-1] for row in seen["h1/resid_post"]]) for seen in sides]
    steer = research.add("h1/resid_post", 3.0 * (last[0] - last[1]).mean(0), positions=slice(-1, None))
    rows, logprobs = generate(params, edits=steer)

    both = [[numpy_stream(params, "h1/resid_post", ids)[-1] for ids in pair] for pair in pairs]
    vector_D = 3 * np.mean([plus - minus for plus, minus in both], axis=0)
    assert naive.error(steer.value, vector_D) < BOUND
    described = [
        [naive.edit("add", "h1/resid_post", vector_D, range(len(prompt) - 1, CONFIG.n_ctx))] for prompt in PROMPTS
    ]
    assert_greedy(params, rows, logprobs, described)
    assert rows != generate(params)[0]


def test_causal_tracing(params):
    """ROME (Meng et al. 2022): noise on the subject's embeddings, and one state at a time restored, for 5 noises.

    The grid [layer, position] is the mean probability of the answer; the states are restored by three vmaps.
    """
    ids, subject, answer = PROMPTS[0], [1, 2], 11
    noise_5PD = 0.7 * jax.random.normal(jax.random.key(0), (5, len(subject), CONFIG.n_embd))
    _, clean = research.forward(CONFIG, params, [ids], capture="resid_post$")

    def restored(noise_PD, layer, position):
        noise = [research.add("embed", noise_D, positions=p) for p, noise_D in zip(subject, noise_PD, strict=True)]
        edits = [*noise, research.patch("resid_post", clean, positions=position, layers=layer)]
        out, _ = research.forward(CONFIG, params, [ids], edits=edits)
        return jax.nn.softmax(out.logits[0, -1])[answer]

    layers, positions = jnp.arange(CONFIG.n_layer), jnp.arange(len(ids))
    each = jax.vmap(jax.vmap(jax.vmap(restored, (None, None, 0)), (None, 0, None)), (0, None, None))
    grid = each(noise_5PD, layers, positions).mean(0)

    expected = np.zeros((5, *grid.shape))
    _, clean = naive.forward(CONFIG, params, [ids])
    for i, layer, position in np.ndindex(expected.shape):
        name = f"h{layer}/resid_post"
        edits = [naive.edit("add", "embed", noise_5PD[i, j], [p]) for j, p in enumerate(subject)]
        edits.append(naive.edit("replace", name, clean[name], [position]))
        logits_V = naive.forward(CONFIG, params, [ids], edits=edits)[0][0, -1]
        expected[i, layer, position] = np.exp(logits_V[answer]) / np.exp(logits_V).sum()
    assert naive.error(grid, expected.mean(0)) < BOUND
    assert np.ptp(expected.mean(0)) > 0.1 * expected.mean(0).max()


def project_out(direction_D, value, position_BT):
    return value - (value @ direction_D)[..., None] * direction_D


def test_a_direction_is_projected_out_of_every_stream(params):
    """Refusal direction (Arditi et al. 2024): no stream has the direction, in all layers and all generated tokens.

    It equals weights that cannot write it: wte, wpe and the rows that attention and MLP write, orthogonal to it. This
    is exact if the output head is not wte.
    """
    config, untied = research.untie_head(CONFIG, params)
    direction_D = jax.random.normal(jax.random.key(1), (CONFIG.n_embd,))
    direction_D = direction_D / jnp.linalg.norm(direction_D)
    taps = {"resid_(pre|mid|post)$": Partial(project_out, direction_D)}
    options = {"temperature": 0, "logprobs": 0, "capture": "resid_(pre|mid|post)$"}
    rows, logprobs, seen = gpt2_jax.generate(config, untied, PROMPTS, NEW, taps=taps, **options)

    def orthogonal(path, leaf):
        writes = any(entry.key in ("wte", "wpe", "c_proj") for entry in path)
        return leaf - (leaf @ direction_D)[..., None] * direction_D if writes else leaf

    changed = jax.tree_util.tree_map_with_path(orthogonal, untied)
    expected_rows, expected, _ = gpt2_jax.generate(config, changed, PROMPTS, NEW, **options)
    assert rows == expected_rows
    assert rows != gpt2_jax.generate(config, untied, PROMPTS, NEW, temperature=0)
    for ours, theirs in zip(logprobs, expected, strict=True):
        assert naive.error(ours.chosen, theirs.chosen) < BOUND
    for row in seen:
        assert len(row) == 3 * CONFIG.n_layer
        for name, value in row.items():
            assert np.abs(value @ direction_D).max() < BOUND * np.abs(value).max(), name
