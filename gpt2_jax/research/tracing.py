"""Where a model recalls a fact: causal tracing with noise, and attention knockout.

Both run the model many times, each time with another part of it restored or blocked, in one compiled program.

Shape letters: B batch, T query, D n_embd, V vocab, L layers, W layers of a window.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Changes, taps_of
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import END, Edit, Positions, Where, add, replace
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.research._changes import after, changes_of
from gpt2_jax.research._forward import as_params, as_tokens, forward
from gpt2_jax.research._patches import checked_layers, checked_places, groups_of, window_of, windows_of
from gpt2_jax.research.metrics import (
    NUMBERS,
    Metric,
    answer_probability,
    as_place,
    in_order_of,
    judge,
    logits_at,
    metric_of_run,
    traceable,
)
from gpt2_jax.research.patching import activation_patching
from gpt2_jax.research.trees import wide


@struct.dataclass
class CausalTrace:
    """Probabilities of an answer as the next token: means over the samples of noise.

    Attributes:
      answer: int32, the answer's id.
      clean: without noise.
      noised: with noise.
      restored: [L, T], with noise, if one state has its value of the run without noise: that of layer l at token t.
        `restored - noised` is the indirect effect of the state.
    """

    answer: jax.Array
    clean: jax.Array
    noised: jax.Array
    restored: jax.Array


@under_jax_defaults
@whole_on_auto_axes
def causal_tracing(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array | Sequence[Sequence[int]],
    subject: Where | slice,
    key: jax.Array,
    activation: str = "resid_post",
    *,
    answer: Any = None,
    noise: Any = None,
    n_samples: int = 10,
    layers: Where = None,
    window: int = 1,
    positions: Where | slice = None,
    together: int | None = None,
) -> CausalTrace:
    """Hide the subject of a text by noise, and restore one state at a time: which states bring the answer back?

    Gaussian noise is added to the token embeddings of the subject. Then the state of one layer at one token gets its
    value of the run without noise (Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2).
    All states are restored under the same noise. It is `activation_patching` of a run with an edit of "embed".

    Args:
      config, params: the model.
      tokens_BT: one row of ids, [ids]: "The Eiffel Tower is in the city of".
      subject: the positions of the subject: [0, 1, 2, 3, 4] or slice(0, 5).
      key: `jax.random.key(seed)`, for the noise.
      activation: what is restored: "resid_post" of one layer, or "mlp/out" or "attn/out" of a window of layers.
      answer: the answer's id; None means the most likely token of the run without noise.
      noise: the noise's standard deviation; None means 3 times that of all values of wte.
      n_samples: how many samples of noise.
      layers, positions, together: as in `activation_patching`: the rows and columns of the result.
      window: how many layers are restored together, around each layer. The paper takes 10 for "mlp/out" and "attn/out".

    Raises:
      ValueError: as `activation_patching`; several rows; a position of the subject is out of range; the answer is not
        an id; the noise is not a number; or `key` is not a key.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    if tokens_BT.shape[0] != 1:
        raise ValueError(f"causal_tracing takes one row of tokens, not {tokens_BT.shape[0]}")
    hidden = checked_places("subject", subject, tokens_BT.shape[1], from_end=True)
    n_samples = whole_number("n_samples", n_samples, 1)
    noise = 3 * jnp.std(wide(params["wte"])) if noise is None else _number("noise", noise)
    names = dict.fromkeys(itertools.chain.from_iterable(windows_of(config, activation, layers, window)))
    out, clean = forward(config, params, tokens_BT, capture=[f"^{name}$" for name in names])
    logits_BV = out.logits[:, -1]
    answer = logits_BV[0].argmax() if answer is None else answer
    if not isinstance(answer, jax.Array) or answer.shape != ():
        answer = whole_number("answer", answer, 0, config.n_vocab - 1)
    metric = answer_probability(answer)

    rows_BT = jnp.broadcast_to(jnp.asarray(tokens_BT), (n_samples, tokens_BT.shape[1]))
    try:
        noise_BPD = noise * jax.random.normal(key, (n_samples, len(hidden), config.n_embd), jnp.float32)
    except TypeError as error:
        raise ValueError(f"key must be a key, jax.random.key(seed), not {key!r}") from error
    hide = add("embed", jnp.zeros((*rows_BT.shape, config.n_embd), noise_BPD.dtype).at[:, hidden].set(noise_BPD))
    where = {"layers": layers, "window": window, "positions": positions, "edits": hide, "together": together}
    restored = activation_patching(config, params, rows_BT, clean, metric, activation, **where)
    noised = metric_of_run(GPT2(config), params, rows_BT, None, as_place(-1, rows_BT.shape), metric, Changes((hide,)))
    return CausalTrace(jnp.asarray(answer, jnp.int32), metric(logits_BV), noised, restored)


def _number(what: str, value: Any) -> jax.Array:
    number = jnp.asarray(value if isinstance(value, NUMBERS) else np.nan)
    if not isinstance(value, NUMBERS) or number.shape != () or not jnp.issubdtype(number.dtype, jnp.number):
        raise ValueError(f"{what} must be a number, not {value!r}")
    return number


@under_jax_defaults
@whole_on_auto_axes
def attention_knockout(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array | Sequence[Sequence[int]],
    metric: Metric | Mapping[str, Metric],
    key_positions: Positions,
    positions: Positions = -1,
    *,
    heads: Where = None,
    layers: Where = None,
    window: int = 1,
    at: Where = -1,
    mask_BT: jax.Array | None = None,
    edits: Edit | Sequence[Edit] = (),
    taps: Mapping[str, Tap] | None = None,
    together: int | None = None,
) -> Any:
    """Return the metric of runs in which some tokens cannot attend to others, in a window of layers around each: [L].

    It shows through which layers information flows from the tokens at `key_positions` to those at `positions` (Geva et
    al. 2023, "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", section 4). The scores of
    these pairs become -inf before the softmax. Compare the result with the metric without a knockout.

    All layers and windows are one compiled program, in which the layers are traced.

    Args:
      config, params, tokens_BT, metric, at, mask_BT, edits, taps, together: as in `activation_patching`.
      key_positions: the tokens that are not looked at: positions as `replace` takes them. They may differ between rows.
      positions: the tokens that cannot look at them; -1 is the last one of each row.
      heads: the heads in which they cannot; None means all.
      layers: the layers, one window around each; None means all.
      window: how many layers are blocked together, around each of `layers`, cut at the ends of the model. The paper
        takes 9 for 48 layers.

    Raises:
      ValueError: as `forward`; or a layer, head, position or `at` is out of range.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    block = replace("attn/scores", -np.inf, positions, heads, key_positions=key_positions)
    changes_of(config, block, None, tokens_BT, mask_BT)
    window = whole_number("window", window, 1)
    places = checked_layers(config, layers)
    windows_LW = np.full((len(places), config.n_layer), END, np.int32)  # no layer has the number END
    for i, layer in enumerate(places):
        blocked = window_of(config, layer, window)
        windows_LW[i, : len(blocked)] = blocked
    values = _knocked_out(
        GPT2(config),
        params,
        tokens_BT,
        mask_BT,
        block,
        windows_LW,
        groups_of(len(places), together, tokens_BT.size),
        traceable(metric),
        as_place(at, tokens_BT.shape),
        changes_of(config, edits, taps, tokens_BT, mask_BT),
    )
    return in_order_of(metric, values)


@functools.partial(jax.jit, static_argnames="model")
def _knocked_out(
    model: GPT2,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    block: Edit,
    windows_LW: jax.Array,
    groups: jax.Array,
    metric: Metric,
    at_B: jax.Array | None,
    changes: Changes,
) -> Any:
    changed = changes.by_name(model.config)

    def run(layers_W: jax.Array) -> Any:
        taps = after(changed, taps_of(model.config, [block.replace(layers=layers_W)]))  # pyright: ignore[reportAttributeAccessIssue]
        return judge(metric, logits_at(model, params, tokens_BT, mask_BT, at_B, taps))

    values = jax.lax.map(jax.vmap(run), jnp.asarray(windows_LW)[groups])
    return jax.tree.map(lambda value: value.reshape(-1, *value.shape[2:])[: len(windows_LW)], values)
