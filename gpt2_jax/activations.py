"""The activations of a forward pass by name, and the taps that read and change them.

Shape letters: B batch, T query, S cache slot, D n_embd, N heads, H head width, F mlp width.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax

from gpt2_jax.config import GPT2Config

Tap = Callable[[jax.Array, jax.Array], jax.Array]
"""A function (activation, position_BT) -> new activation; position_BT, int32: each token's position in the window."""

_NORM = {"scale": "BT1", "normalized": "BTD", "out": "BTD"}
_ATTENTION = {"q": "BTNH", "k": "BTNH", "v": "BTNH", "scores": "BNTS", "pattern": "BNTS", "z": "BTNH", "out": "BTD"}
_MLP = {"pre": "BTF", "post": "BTF", "out": "BTD"}


def _below(room: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{room}/{name}": axes for name, axes in names.items()}


BEFORE = {"embed": "BTD", "pos_embed": "BTD"}
BLOCK = {
    "resid_pre": "BTD",
    **_below("ln_1", _NORM),
    **_below("attn", _ATTENTION),
    "resid_mid": "BTD",
    **_below("ln_2", _NORM),
    **_below("mlp", _MLP),
    "resid_post": "BTD",
}
AFTER = _below("ln_f", _NORM)
AXES = MappingProxyType({**BEFORE, **BLOCK, **AFTER})
"""The axes of each activation, in the order of computation. The names of a block are listed without "h3/".

- embed, pos_embed: the rows of wte and wpe. Their sum is h0/resid_pre.
- resid_pre, resid_mid, resid_post: the residual stream before a block, between attention and MLP, and after the block.
- `ln_*/scale`: sqrt(variance + epsilon); normalized: (x - mean) / scale, before g and b; out: after g and b.
- attn/scores: the input of the softmax, -1e10 where masked; pattern: the output of the softmax.
- attn/z: each head's weighted sum of values. attn/out, mlp/out: what is added to the residual stream, with the bias.
- mlp/pre, mlp/post: the neurons before and after the activation function.

embed and pos_embed have `param_dtype`. scale, normalized, scores and pattern are at least float32. All others have
`compute_dtype`.
"""


def activation_names(config: GPT2Config) -> list[str]:
    """Return the names of all activations of a model, in the order of computation."""
    blocks = [f"h{i}/{name}" for i in range(config.n_layer) for name in BLOCK]
    return [*BEFORE, *blocks, *AFTER]


def axes(name: str) -> str:
    """Return the axes of an activation: "BTNH" for "h3/attn/q"."""
    return AXES[re.sub(r"^h\d+/", "", name)]


def shape(config: GPT2Config, name: str, n_rows: int, n_tokens: int, n_slots: int | None = None) -> tuple[int, ...]:
    """Return the shape of an activation for `n_rows` rows of `n_tokens` tokens. S is T if `n_slots` is None."""
    sizes = {
        "B": n_rows,
        "T": n_tokens,
        "S": n_tokens if n_slots is None else n_slots,
        "D": config.n_embd,
        "N": config.n_head,
        "H": config.head_dim,
        "F": 4 * config.n_embd,
        "1": 1,
    }
    return tuple(sizes[axis] for axis in axes(name))


def select(config: GPT2Config, patterns: str | Sequence[str]) -> list[str]:
    r"""Return the activation names that match any of the patterns.

    Args:
      config: the model's config.
      patterns: regular expressions, such as r"h\d+/attn/pattern", "resid_post$" or ".".

    Raises:
      ValueError: a pattern is not a regular expression, or matches no activation name.
    """
    names = activation_names(config)
    chosen = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = [name for name in names if re.search(pattern, name)]
        except (re.error, TypeError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if not found:
            raise ValueError(f"no activation name matches {pattern!r}{_like(pattern, names)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def check_names(config: GPT2Config, names: Sequence[str]) -> None:
    """Check that all names are activations of the model.

    Raises:
      ValueError: a name is not an activation.
    """
    known = activation_names(config)
    for name in set(names) - set(known):
        raise ValueError(f"the model has no activation {name!r}{_like(str(name), known)}")


def _like(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3) or [names[0], names[-1]]
    return f"; the names include {', '.join(close)}: activation_names(config) lists them all"


class _Module(Protocol):
    @property
    def path(self) -> tuple[str, ...]: ...


class Taps:
    """The taps of one forward pass. Modules call it with each activation. Activations without a tap stay unchanged."""

    def __init__(self, taps: Mapping[str, Tap], position_BT: Any = None, n_outer: int = 0):
        """Take the taps by name. `n_outer` is the number of modules that enclose the model."""
        self._taps, self._position_BT, self._n_outer = taps, position_BT, n_outer

    def on(self, module: _Module, *names: str) -> bool:
        """Return whether one of the module's activations has a tap."""
        return any(self._name(module, name) in self._taps for name in names)

    def __call__(self, module: _Module, name: str, value: jax.Array) -> jax.Array:
        """Return the module's activation, changed by its tap if it has one."""
        tap = self._taps.get(self._name(module, name)) if self._taps else None
        return value if tap is None else tap(value, self._position_BT)

    def _name(self, module: _Module, name: str) -> str:
        return "/".join([*module.path[self._n_outer :], name])


NO_TAPS = Taps({})
