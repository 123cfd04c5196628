"""Long lists are divided by the memory that they need, with the same ids; running out of memory is one sentence."""

from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax.generation import Settings, complete, memory
from gpt2_jax.generation.buckets import bucket_rows
from gpt2_jax.generation.engine import decode_rows


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@given(st.integers(1, 5000), st.integers(1, 2000))
def test_the_calls_are_alike_and_fit(n_rows, most):
    """No call, rounded up to its bucket, needs more than the limit, and there are no more calls than that takes."""
    limit = most * memory.row_bytes(CONFIG, 30)
    with mock.patch.object(memory, "CPU_BYTES", limit):
        n_together = memory.rows_together(CONFIG, {"w": jax.numpy.zeros(1)}, n_rows, 30)
    assert n_together == n_rows <= most or bucket_rows(n_together) <= most
    largest = max((n for n in range(1, most + 1) if bucket_rows(n) == n), default=1)
    assert n_rows <= most or -(-n_rows // n_together) == -(-n_rows // largest)


def test_the_released_size_fits_on_a_cpu():
    """1,500 prompts of 900 tokens took a cache of 106 GB; a call of 48 rows takes 3.4 GB."""
    config = gpt2_jax.config.SIZES["124M"]
    n_together = memory.rows_together(config, {"w": jax.numpy.zeros(1)}, 1500, 928)
    assert config.cache_bytes(n_together, 1024) < 4 * 2**30
    assert 32 <= n_together <= 48


def test_a_divided_list_gives_the_ids_of_one_call(params, monkeypatch, tokenizer):
    prompts = [[i % 37] * (1 + i % 5) for i in range(11)]
    settings = {"seed": 3, "first_row": 7, "logprobs": 2}
    whole = gpt2_jax.generate(CONFIG, params, prompts, 9, **settings)
    calls = []

    def counted(model, params, prompts, *args, **kwargs):
        calls.append(len(prompts))
        return decode_rows(model, params, prompts, *args, **kwargs)

    monkeypatch.setattr("gpt2_jax.generation.decoding.decode_rows", counted)
    monkeypatch.setattr(memory, "CPU_BYTES", 5 * memory.row_bytes(CONFIG, 14))
    ids, logprobs = gpt2_jax.generate(CONFIG, params, prompts, 9, **settings)
    assert calls == [4, 4, 3]
    assert ids == whole[0]
    for ours, theirs in zip(logprobs, whole[1], strict=True):
        # Measured 0, of log-probabilities down to -7.5. Products of another batch size may round differently elsewhere.
        np.testing.assert_allclose(ours.chosen, theirs.chosen, rtol=0, atol=2e-6)  # 4 units in the last place
    completions = complete(CONFIG, params, prompts, tokenizer, Settings(9, seed=3, logprobs=2), first_row=7)
    assert [one.ids for one in completions] == ids
    monkeypatch.setattr(memory, "CPU_BYTES", 1)
    assert gpt2_jax.generate(CONFIG, params, prompts[:2], 9, **settings)[0] == ids[:2]  # at least one row a call


def test_errors_of_a_divided_list_name_the_row_of_the_list(monkeypatch):
    params = random_params(CONFIG, 0)
    params["wpe"] = params["wpe"].at[4].set(np.nan)
    monkeypatch.setattr(memory, "CPU_BYTES", 1)
    with pytest.raises(ValueError, match=r"^prompts\[2\]: the logits"):
        gpt2_jax.generate(CONFIG, params, [[1], [2], [3, 3, 3, 3, 3]], 2)


def test_the_memory_of_a_device_is_the_limit_where_it_is_known():
    """Half of what the params leave free. What else is in memory must not count: equal calls are divided alike."""

    class Device:
        platform = "gpu"
        in_use = 10**8

        def memory_stats(self):
            self.in_use += 10**8
            return {"bytes_limit": 10**9, "bytes_in_use": self.in_use}

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    devices = {Device()}
    leaf = mock.Mock(shape=(50, 10**6), dtype=np.dtype(np.float32), sharding=one, devices=lambda: devices)
    n_rows = memory.rows_together(CONFIG, {"w": leaf}, 10**6, 30)
    assert 0.3e9 < bucket_rows(n_rows) * memory.row_bytes(CONFIG, 30) <= 0.4e9
    assert memory.rows_together(CONFIG, {"w": leaf}, 10**6, 30) == n_rows


LARGE = gpt2_jax.GPT2Config(n_vocab=5, n_ctx=2**20, n_embd=8, n_head=1, n_layer=1)


def test_out_of_memory_is_one_sentence(monkeypatch, tokenizer):
    """A real one: an array of 3 TB."""
    large = random_params(LARGE, 0)
    monkeypatch.setattr(memory, "CPU_BYTES", 2**60)
    message = r"^not enough memory to decode 100000 rows of up to 1048576 tokens together: this takes about \d+\.\d GB"
    with pytest.raises(MemoryError, match=message):
        gpt2_jax.generate(LARGE, large, [[1]] * 10**5, 2**20 - 1)


def test_out_of_memory_in_score_is_one_sentence(params):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
    with (
        mock.patch("gpt2_jax.generation.scoring._logprobs", side_effect=error),
        pytest.raises(MemoryError, match=r"^not enough memory to score 1 windows of 32 tokens together"),
    ):
        gpt2_jax.score(CONFIG, params, [[1, 2, 3]])
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with (
        mock.patch("gpt2_jax.generation.scoring._logprobs", side_effect=other),
        pytest.raises(jax.errors.JaxRuntimeError),
    ):
        gpt2_jax.score(CONFIG, params, [[1, 2, 3]])
