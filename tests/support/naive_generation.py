"""The expected results of generate: full forward passes in NumPy float64 without cache, padding or batch.

Everything is teacher-forced: the functions return what the slow loop picks at each place, given the tokens before it.
By induction, a row that agrees at every place is the row of the slow loop.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference

from gpt2_jax import sampling

PLAIN = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "top_p_rule": "original",
}


def windows(ids, n_ctx):
    """The tokens that the model sees after each id with `overflow="slide"`. When a new id would exceed n_ctx, only the
    last n_ctx // 2 ids are kept, including the new one."""
    seen, all_seen = [], []
    for i in ids:
        seen = [*seen, i]
        if len(seen) > n_ctx:
            seen = seen[-max(1, n_ctx // 2) :]
        all_seen.append(seen)
    return all_seen


def logits_before(config, params, prompt, row):
    """[n, V] float64: for each token of `row`, the logits after the prompt and the row's tokens before it."""
    params, ids = numpy_reference.as_float64(params), [*prompt, *row]
    if len(ids) <= config.n_ctx:  # one pass gives all positions: each sees only earlier ones
        return numpy_reference.row(params, ids[:-1], config.n_head)[len(prompt) - 1 :]
    seen = windows(ids[:-1], config.n_ctx)[len(prompt) - 1 :]
    return np.stack([numpy_reference.row(params, window, config.n_head)[-1] for window in seen])


def penalised(logits_V, ids, penalty):
    """CTRL's penalty for the tokens that a row already holds."""
    held = np.isin(np.arange(len(logits_V)), ids)
    return np.where(held, np.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V)


def greedy(config, params, prompt, row, penalty=1.0):
    """The most likely token at each place of `row`."""
    logits_nV = logits_before(config, params, prompt, row)
    held = ([*prompt, *row[:t]] for t in range(len(row)))
    return [int(np.argmax(penalised(*pair, penalty))) for pair in zip(logits_nV, held, strict=True)]


def sampled(config, params, prompt, row, index, seed, **knobs):
    """The draws of row `index` of a call at each place of `row`. Keys depend only on seed, index and place."""
    n_rows = -(-len(row) // 32) * 32  # so that `pick` compiles once
    logits_nV = np.zeros((n_rows, config.n_vocab), np.float32)
    logits_nV[: len(row)] = logits_before(config, params, prompt, row)
    seen_nV = np.zeros((n_rows, config.n_vocab), bool)
    for t in range(len(row)):
        seen_nV[t, [*prompt, *row[:t]]] = True
    key = jax.random.fold_in(jax.random.key(seed), index)
    return _pick(logits_nV, key, _knobs(**knobs), seen_nV)[: len(row)].tolist()


@jax.jit
def _pick(logits_nV, key, knobs, seen_nV):
    key_n = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits_nV)))
    return sampling.pick(logits_nV, key_n, knobs, seen_nV)


def _knobs(**knobs):
    knobs = PLAIN | knobs
    return sampling.Sampling(
        temperature=np.float32(knobs["temperature"]),
        top_k=np.int32(knobs["top_k"]),
        top_p=np.float32(knobs["top_p"]),
        min_p=np.float32(knobs["min_p"]),
        repetition_penalty=np.float32(knobs["repetition_penalty"]),
        keep_crossing=np.bool_(knobs["top_p_rule"] == "common"),
    )


def cut_at_ids(row, stop_ids):
    """The row before the first of the ids."""
    return row[: next((t for t, i in enumerate(row) if i in stop_ids), len(row))]


def cut_at_strings(tokenizer, row, stop_strings):
    """The ids that end before a stop string, and the text before it. The first token that completes one decides."""
    stops = [stop.encode() for stop in stop_strings]
    for n in range(1, len(row) + 1):
        spoken = b"".join(map(tokenizer.token_bytes, row[:n]))
        begins = [spoken.find(stop) for stop in stops if stop in spoken]
        if begins:
            ends = np.cumsum([len(tokenizer.token_bytes(i)) for i in row[:n]])
            return row[: int((ends <= min(begins)).sum())], spoken[: min(begins)].decode(errors="replace")
    return row, tokenizer.decode(row)
