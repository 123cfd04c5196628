"""Direct logit attribution: how much each part of the model contributes to a token's logit.

The residual stream is the sum of the embeddings and of what each layer adds. The last step to a logit,

    ((x - mean(x)) / scale * g + b) @ head[token],

is linear in x if ln_f's scale is held at its value in the run. So the logit is a sum too: each part p of the stream
contributes ((p - mean(p)) / scale * g) @ head[token], and ln_f's bias contributes b @ head[token]. `head` is `wte`, or
`lm_head` if the head is not tied. (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al.
2022, "Interpretability in the Wild", section 3.1.)

Shape letters: B batch, T query, P positions asked for, L layers, D n_embd, N heads, H head width, F mlp width.
"""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from gpt2_jax.checks import choice, whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import may_return_nan, under_jax_defaults
from gpt2_jax.params import Params, output_head
from gpt2_jax.research._changes import changes_of
from gpt2_jax.research._forward import as_params, as_tokens, forward, places, slots

By = Literal["component", "head", "neuron"]

STREAM = r"resid_|^ln_f/"
# For each way to split: the captured activations, and a pattern of activations that may not be edited. If they were
# edited, the parts would not add up.
DIVISIONS = {
    "component": (("attn/out", "mlp/out"), STREAM),
    "head": (("attn/z", "mlp/out"), rf"{STREAM}|attn/out|attn/result"),
    "neuron": (("attn/out", "mlp/post"), rf"{STREAM}|mlp/out"),
}
ORDER = ("attn/out", "attn/z", "attn/c_proj/b", "mlp/out", "mlp/post", "mlp/c_proj/b")


@struct.dataclass
class Attribution:
    """The logits of B x P tokens, or differences of two logits, and the parts that sum to them.

    Attributes:
      parts: {"embed": [B, P], "pos_embed": [B, P], ..., "ln_f/b": [B, P]}. Between them are the parts with a value for
        each layer [L, B, P], each head [L, N, B, P], or each neuron [L, F, B, P]. By component: "attn/out" and
        "mlp/out". By head: "attn/z" for each head, "attn/c_proj/b" and "mlp/out". By neuron: "attn/out", "mlp/post"
        for each neuron, and "mlp/c_proj/b".
      logits: [B, P], the model's logits, at least float32. NaN at a position where the row has no token.
    """

    parts: dict[str, jax.Array]
    logits: jax.Array

    def flat(self) -> tuple[list[str], jax.Array]:
        """Return the parts one by one: labels, "h3/attn/z/7" for head 7 of layer 3, and values [parts, B, P].

        They are in the order of computation. ln_f/b is the last.
        """
        whole = self.logits.ndim
        layered = {name: part for name, part in self.parts.items() if part.ndim > whole}
        labels, values = ["embed", "pos_embed"], [self.parts["embed"][None], self.parts["pos_embed"][None]]
        for layer in range(len(next(iter(layered.values())))):
            for name, part in layered.items():
                one = part.ndim == whole + 1
                labels += [f"h{layer}/{name}"] if one else [f"h{layer}/{name}/{i}" for i in range(part.shape[1])]
                values.append(part[layer][None] if one else part[layer])
        return [*labels, "ln_f/b"], jnp.concatenate([*values, self.parts["ln_f/b"][None]])


@may_return_nan
@whole_on_auto_axes
def logit_attribution(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    answers: Any,
    against: Any = None,
    positions: Any = None,
    by: By = "component",
    edits: Edit | Sequence[Edit] = (),
) -> Attribution:
    """Split the logits of some tokens into the contributions of the model's parts. The parts sum to the logits.

    It computes in at least float32, from activations of `compute_dtype`. If that is bfloat16, the parts sum to the
    logits only up to the bfloat16 rounding of the residual stream.

    Args:
      config, params: the model.
      tokens_BT, mask_BT: as `forward` takes them.
      answers: ids of the tokens whose logits are split: one id, several [P], or [B, P]. For one id per row use
        [B, 1].
      against: ids of the tokens whose logits are subtracted, in the same forms. None subtracts nothing.
      positions: the positions whose logits are split, in the same forms. They count a row's tokens from 0, or back from
        -1, without padding. None means the last token of each row. The three arguments broadcast to one shape, [B, P].
      by: what the parts are: "component", "head" or "neuron".
      edits: as `forward` takes them, but not of an activation that is a sum of parts.

    Raises:
      ValueError: as `forward`; a bad argument; ids or positions out of range (where their values are known); or an edit
        of the residual stream, of ln_f, or of an activation that is split further.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    edits = _check_edits(config, edits, DIVISIONS[choice("by", by, DIVISIONS)][1], tokens_BT, mask_BT)
    n_rows, n_tokens = jnp.shape(tokens_BT)
    asked = _alike(
        n_rows,
        answers=_whole("answers", answers, config.n_vocab),
        against=_whole("against", against, config.n_vocab),
        positions=_whole("positions", positions, n_tokens, least=-n_tokens),
    )
    parts, logits = _attribute(config, by, params, tokens_BT, mask_BT, asked, edits)
    order = ["embed", "pos_embed", *(name for name in ORDER if name in parts), "ln_f/b"]
    return Attribution({name: parts[name] for name in order}, logits)


@under_jax_defaults
def residual_parts(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    layer: int | None = None,
    edits: Edit | Sequence[Edit] = (),
) -> dict[str, jax.Array]:
    """Return the parts that sum to the residual stream before a layer: {"embed", ..., "h1/mlp/out"}, each [B, T, D].

    Args:
      config, params: the model.
      tokens_BT, mask_BT: as `forward` takes them.
      layer: the parts sum to this layer's resid_pre. None, or n_layer, means the stream after the last layer.
      edits: as `forward` takes them, but not of the residual stream itself.

    Raises:
      ValueError: as `forward`; the layer is out of range; or an edit of the residual stream.
    """
    n_layers = config.n_layer if layer is None else whole_number("layer", layer, 0, config.n_layer)
    tokens_BT = as_tokens(config, tokens_BT)
    edits = _check_edits(config, edits, "resid_", tokens_BT, mask_BT)
    blocks = [f"^h{i}/(attn|mlp)/out$" for i in range(n_layers)]
    _, parts = forward(config, params, tokens_BT, mask_BT, capture=["^embed$", "^pos_embed$", *blocks], edits=edits)
    return parts


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attribute(
    config: GPT2Config,
    by: By,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    asked: dict[str, jax.Array],
    edits: tuple[Edit, ...],
) -> tuple[dict[str, jax.Array], jax.Array]:
    names = DIVISIONS[by][0]
    capture = ["^(embed|pos_embed|ln_f/(scale|out))$", *(f"{name}$" for name in names)]
    _, captured = forward(config, params, tokens_BT, mask_BT, capture=capture, edits=edits)
    place_BT, at_BP = places(mask_BT, tokens_BT.shape), asked["positions"]
    last_B1 = place_BT.max(-1, keepdims=True)
    at_BP = last_B1 if at_BP is None else jnp.where(at_BP < 0, at_BP + last_B1 + 1, at_BP)
    slots_BP = jnp.broadcast_to(slots(place_BT, at_BP), asked["answers"].shape)
    wide = jnp.promote_types(config.compute_dtype, jnp.float32)

    def at(name: str) -> jax.Array:
        x = captured[name].astype(wide)
        return jax.vmap(lambda row, slots: row.at[slots].get(mode="fill", fill_value=jnp.nan))(x, slots_BP)

    # The params, rounded as the model rounds them, except those of ln_f.
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(config.compute_dtype).astype(wide), params)
    params = rounded | {"ln_f": jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(wide), params["ln_f"])}
    with jax.default_matmul_precision("highest"):
        head_VD = output_head(params)
        unembed_BPD = _rows(head_VD, asked["answers"])
        if asked["against"] is not None:
            unembed_BPD = unembed_BPD - _rows(head_VD, asked["against"])
        # (p - mean(p)) @ u = p @ (u - mean(u)): so the vector that multiplies the part is centered, not the part.
        read_BPD = unembed_BPD * params["ln_f"]["g"]
        read_BPD = (read_BPD - read_BPD.mean(-1, keepdims=True)) / at("ln_f/scale")
        parts = {name: jnp.einsum("BPD,BPD->BP", at(name), read_BPD) for name in ("embed", "pos_embed")}
        for name in names:
            layers = [_part(config, name, params[f"h{i}"], at(f"h{i}/{name}"), read_BPD) for i in range(config.n_layer)]
            parts |= {key: jnp.stack([layer[key] for layer in layers]) for key in layers[0]}
        parts["ln_f/b"] = jnp.where(slots_BP < tokens_BT.shape[1], unembed_BPD @ params["ln_f"]["b"], jnp.nan)
        logits_BP = jnp.einsum("BPD,BPD->BP", at("ln_f/out"), unembed_BPD)
    return parts, logits_BP


def _part(config: GPT2Config, name: str, block: Params, value: jax.Array, read_BPD: jax.Array) -> dict[str, jax.Array]:
    """Return a layer's contribution along `read`: one value [B, P], or one per head or neuron and one for the bias."""
    if name.endswith("/out"):
        return {name: jnp.einsum("BPD,BPD->BP", value, read_BPD)}
    room = name.split("/")[0]
    c_proj = block[room]["c_proj"]
    along = jnp.einsum("BPD,KD->BPK", read_BPD, c_proj["w"])  # for each row of c_proj: K is N * H, or F
    units = value.reshape(along.shape) * along
    if name == "attn/z":
        units = units.reshape(*units.shape[:2], config.n_head, config.head_dim).sum(-1)
    return {name: jnp.moveaxis(units, -1, 0), f"{room}/c_proj/b": read_BPD @ c_proj["b"]}


def _rows(head_VD: jax.Array, ids: jax.Array) -> jax.Array:
    return head_VD.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _alike(n_rows: int, **values: Any) -> dict[str, Any]:
    """Return arrays broadcast to one shape, [B, P]; None stays None."""
    try:
        shape = np.broadcast_shapes((n_rows, 1), *(jnp.shape(x) for x in values.values() if x is not None))
    except ValueError:
        shape = ()
    if len(shape) != 2 or shape[0] != n_rows:
        shapes = ", ".join(f"{name} {list(jnp.shape(x))}" for name, x in values.items() if x is not None)
        raise ValueError(f"{shapes} must broadcast to [B, P], with B = {n_rows} rows: pass one per row as [B, 1]")
    return {name: x if x is None else jnp.broadcast_to(x, shape) for name, x in values.items()}


def _whole(name: str, values: Any, limit: int, least: int = 0) -> Any:
    """Return whole numbers from `least` to limit - 1 as an array; None stays None."""
    if values is None:
        return None
    known = not any(isinstance(value, Tracer) for value in jax.tree.leaves(values))
    array = np.asarray(values) if known else jnp.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.integer) or (known and ((array < least) | (array >= limit)).any()):
        raise ValueError(f"{name} must be whole numbers from {least} to {limit - 1}, not {reprlib.repr(values)}")
    return array.astype(np.int32)


def _check_edits(
    config: GPT2Config, edits: Edit | Sequence[Edit], refused: str, tokens_BT: jax.Array, mask_BT: jax.Array | None
) -> tuple[Edit, ...]:
    edits = changes_of(config, edits, None, tokens_BT, mask_BT).edits
    for edit in edits:
        if re.search(refused, edit.name):
            raise ValueError(f"the parts do not add up if {edit.name} is edited: edit the parts instead")
    return edits
