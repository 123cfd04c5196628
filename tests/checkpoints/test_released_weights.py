"""The released 124M weights. These tests run only with GPT2_JAX_124M=DIR, a folder with OpenAI's files.

`gpt2-doctor --verify DIR` runs the same checks. The numbers are in `gpt2_jax.inspection.known_values`.
"""

import os

import pytest

import gpt2_jax
from gpt2_jax.inspection import verification
from gpt2_jax.inspection.known_values import KNOWN

DIRECTORY = os.environ.get("GPT2_JAX_124M", "")
pytestmark = pytest.mark.skipif(not DIRECTORY, reason="needs the released weights: set GPT2_JAX_124M to their folder")
KNOWN_124M = KNOWN["124M"]


@pytest.fixture(scope="module")
def released():
    return gpt2_jax.load(DIRECTORY)


@pytest.fixture(scope="module")
def vocabulary():
    return gpt2_jax.load_tokenizer(DIRECTORY)


def assert_all_pass(checks, n_checks):
    assert [check for check in checks if check["result"] != "pass"] == []
    assert len(checks) == n_checks


def test_the_tensors_are_the_release_s(released):
    assert released[0] == gpt2_jax.SIZES["124M"]
    assert released[1]["wte"].shape == (50257, 768)
    assert_all_pass(verification.check_tensors(*released, KNOWN_124M), 4)
    assert_all_pass(verification.check_values(*released, KNOWN_124M), 4)


def test_the_vocabulary_is_the_release_s(released, vocabulary):
    assert_all_pass(verification.check_vocabulary(released[0], vocabulary, KNOWN_124M), 13)


def test_greedy_continuations(released, vocabulary):
    assert_all_pass(verification.check_greedy(*released, vocabulary, KNOWN_124M), 2)
