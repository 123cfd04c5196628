"""The released 124M weights, where they are at hand: GPT2_JAX_124M=DIR, a folder with OpenAI's files, runs these."""

import os

import numpy as np
import pytest

import gpt2_jax

DIRECTORY = os.environ.get("GPT2_JAX_124M", "")
pytestmark = pytest.mark.skipif(not DIRECTORY, reason="needs the released weights: set GPT2_JAX_124M to their folder")


@pytest.fixture(scope="module")
def released():
    return gpt2_jax.load(DIRECTORY)


def test_the_embedding_is_the_release_s(released):
    config, params = released
    wte = np.asarray(params["wte"])
    assert config == gpt2_jax.SIZES["124M"]
    assert wte.shape == (50257, 768)
    np.testing.assert_allclose(wte[:3, 0], [-0.11010301, 0.04034033, -0.12746179], rtol=1e-6)
    np.testing.assert_allclose(wte[0, -1], 0.04531523, rtol=1e-6)


def test_greedy_ids(released):
    expected = [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
    assert gpt2_jax.generate(*released, [[464, 3290]], max_new_tokens=18, temperature=0) == [expected]


def test_greedy_text(released):
    tokenizer = gpt2_jax.load_tokenizer(DIRECTORY)
    prompt = tokenizer.encode("Alan Turing theorized that computers would one day become")
    [ids] = gpt2_jax.generate(*released, [prompt], max_new_tokens=40, temperature=0)
    assert tokenizer.decode(ids) == (
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform complex "
        "calculations, and it can perform these calculations in a way that is very similar to the human brain."
    )
