"""The activations of a forward pass by name, and the taps that read and change them.

Shape letters: B batch, T query, S cache slot, D n_embd, N heads, H head width, F mlp width.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import of_tap

Tap = Callable[..., Any]
"""A function (activation, position_BT) -> new activation of the same shape, or None to leave it as it is.

position_BT, int32, has each token's position in the window. The result is cast to the activation's dtype. A tap with
the attribute `takes_keys` gets a third argument: key_position_BS, the position of each slot that attention looks at, -1
where it holds no token.
"""

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
"""The axes of each activation that is always computed, in this order. The names of a block are listed without "h3/".

- embed, pos_embed: the rows of wte and wpe. Their sum is h0/resid_pre.
- resid_pre, resid_mid, resid_post: the residual stream before a block, between attention and MLP, and after the block.
- `ln_*/scale`: sqrt(variance + epsilon); normalized: (x - mean) / scale, before g and b; out: after g and b.
- attn/scores: the input of the softmax, -1e10 where masked; pattern: the output of the softmax.
- attn/z: each head's weighted sum of values. attn/out, mlp/out: what is added to the residual stream, with the bias.
- mlp/pre, mlp/post: the neurons before and after the activation function.

embed and pos_embed have `param_dtype`. scale, normalized, scores and pattern are at least float32. All others have
`compute_dtype`.
"""

BRANCHES = MappingProxyType(
    {
        **dict.fromkeys(("attn/in", "attn/q_in", "attn/k_in", "attn/v_in"), "BTND"),
        "attn/result": "BTND",
        "mlp/in": "BTD",
    }
)
"""The axes of the activations that are computed only on request: what a branch reads and what a head writes.

- attn/in: the copy of the residual stream that each head reads. Its change does not change the stream.
- attn/q_in, attn/k_in, attn/v_in: the copies that each head's queries, keys and values are computed from. They are
  attn/in after its change.
- attn/result: what each head adds to attn/out. Over the heads they sum to attn/out without the bias.
- mlp/in: the copy of resid_mid that the MLP reads.

The inputs are read through their own ln_1 or ln_2. If ln_1's activations are changed too, both changes add up.
"""


def activation_names(config: GPT2Config, branches: bool = False) -> list[str]:
    """Return the names of the activations of a model, in the order of computation.

    `branches=True` includes those of `BRANCHES`, which are computed only on request.
    """
    return list(_names(config.n_layer, branches))


@functools.lru_cache
def _names(n_layer: int, branches: bool) -> tuple[str, ...]:
    names = _BLOCK_WITH_BRANCHES if branches else BLOCK
    return (*BEFORE, *(f"h{i}/{name}" for i in range(n_layer) for name in names), *AFTER)


def _with_branches() -> list[str]:
    names = list(BLOCK)
    for name in BRANCHES:
        later = {"attn/result": "attn/out", "mlp/in": "ln_2/scale"}.get(name, "ln_1/scale")
        names.insert(names.index(later), name)
    return names


_BLOCK_WITH_BRANCHES = _with_branches()
IN_BLOCK = frozenset(_BLOCK_WITH_BRANCHES)


def axes(name: str) -> str:
    """Return the axes of an activation: "BTNH" for "h3/attn/q"."""
    name = re.sub(r"^h\d+/", "", name)
    return BRANCHES[name] if name in BRANCHES else AXES[name]


def layer_of(name: str) -> int | None:
    """Return the layer of an activation, 3 for "h3/attn/q"; None if it is not in a block."""
    found = re.match(r"h(\d+)/", name)
    return int(found[1]) if found else None


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


def dtype_of(config: GPT2Config, name: str) -> Any:
    """Return the dtype of an activation."""
    if name in BEFORE:
        return config.param_dtype
    wide = name.split("/")[-1] in ("scale", "normalized", "scores", "pattern")
    return jnp.promote_types(config.compute_dtype, jnp.float32) if wide else config.compute_dtype


def select(config: GPT2Config, patterns: str | Sequence[str]) -> list[str]:
    r"""Return the activation names that match any of the patterns.

    Args:
      config: the model's config.
      patterns: regular expressions, such as r"h\d+/attn/pattern", "resid_post$" or ".". One that ends in a digit, such
        as "h1", does not match "h10". Activations of `BRANCHES` are chosen by a pattern that matches no other name.

    Raises:
      ValueError: a pattern is not a regular expression, or matches no activation name.
    """
    names, every = activation_names(config), activation_names(config, branches=True)
    chosen = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            whole = rf"(?:{pattern})(?!\d)" if isinstance(pattern, str) and pattern[-1:].isdigit() else pattern
            found = [name for name in names if re.search(whole, name)]
            found = found or [name for name in every if re.search(whole, name)]
        except (re.error, TypeError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if not found:
            raise ValueError(f"no activation name matches {pattern!r}{_like(pattern, names)}")
        chosen.update(found)
    return [name for name in every if name in chosen]


def check_names(config: GPT2Config, names: Sequence[str]) -> None:
    """Check that all names are activations of the model.

    Raises:
      ValueError: the model has no activation of such a name.
    """
    known = activation_names(config, branches=True)
    for name in set(names) - set(known):
        raise ValueError(f"the model has no activation {name!r}{_like(str(name), known)}")


def _like(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3) or [names[0], names[-1]]
    return f"; the names include {', '.join(close)}: activation_names(config) lists them all"


def taps_by_name(config: GPT2Config, taps: Mapping[str, Tap]) -> dict[str, Tap]:
    """Return the tap of each activation, for taps by names and regular expressions. Several apply in their order.

    Raises:
      ValueError: a name or pattern fits no activation, or a tap is not a function.
    """
    if not isinstance(taps, Mapping):
        raise ValueError(f"taps must be a dict of functions by activation name, not {taps!r}")
    known = set(activation_names(config, branches=True))
    found: dict[str, Tap] = {}
    for pattern, tap in taps.items():
        if not callable(tap):
            raise ValueError(f"the tap of {pattern!r} must be a function (value, position_BT), not {tap!r}")
        for name in [pattern] if pattern in known else select(config, [pattern]):
            found[name] = tap if name not in found else InTurn(name, found[name], tap)
    return found


@dataclasses.dataclass(frozen=True)
class InTurn:
    """A tap that applies two taps of one activation, one after the other."""

    name: str
    first: Tap
    second: Tap
    takes_keys = True

    def __call__(self, value: jax.Array, *places: Any) -> jax.Array:
        """Return the activation after both."""
        return call_tap(self.name, self.second, call_tap(self.name, self.first, value, places), places)

    def on_auto_axes(self, outside: Callable[[Tap], Tap]) -> InTurn:
        """Return this tap for values on Auto axes: see `gpt2_jax.explicit_axes.of_tap`."""
        return InTurn(self.name, of_tap(self.first, outside), of_tap(self.second, outside))


def takes_keys(tap: Any) -> bool:
    """Return whether a tap takes key_position_BS. A function says so for a Partial that holds it."""
    inner = getattr(tap, "func", getattr(tap, "__wrapped__", None))
    return bool(getattr(tap, "takes_keys", False)) or (inner is not None and takes_keys(inner))


def call_tap(name: str, tap: Tap, value: jax.Array, places: Sequence[Any]) -> jax.Array:
    """Return what a tap makes of an activation, in its dtype.

    Args:
      name: the activation's name, for messages.
      tap: see `Tap`.
      value: the activation.
      places: position_BT, and key_position_BS for an activation with an axis S.

    Raises:
      ValueError: the tap returned something else than numbers of the activation's shape, or None.
    """
    new = tap(value, *(places if takes_keys(tap) else places[:1]))
    if new is None:
        return value
    try:
        if isinstance(new, str | bytes):
            raise TypeError
        new = jnp.asarray(new)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the tap of {name} must return an array or None, not {new!r}") from error
    if new.shape != value.shape or jnp.issubdtype(new.dtype, jnp.complexfloating):
        raise ValueError(
            f"the tap of {name} returned {new.dtype}{list(new.shape)}: it must return numbers of the activation's "
            f"shape, {list(value.shape)}, or None to leave it as it is"
        )
    return new.astype(value.dtype)


class _Module(Protocol):
    @property
    def path(self) -> tuple[str, ...]: ...


class Taps:
    """The taps and captured activations of one forward pass. Modules call it with each activation.

    Attributes:
      captured: {name: activation} of the activations to keep, with their values after the taps.
    """

    def __init__(
        self, taps: Mapping[str, Tap], capture: Sequence[str] = (), places: Sequence[Any] = (), n_outer: int = 0
    ):
        """Take the taps by name, the names to capture, and the places that taps get: position_BT, key_position_BS.

        `n_outer` is the number of modules that enclose the model.
        """
        self._taps, self._capture, self._places, self._n_outer = taps, tuple(capture), tuple(places), n_outer
        self.captured: dict[str, jax.Array] = {}

    def __bool__(self) -> bool:
        """Return whether there is anything to change or capture."""
        return bool(self._taps or self._capture)

    def without_captured(self) -> Taps:
        """Return the same taps with nothing captured yet, for code that is traced apart, such as rematerialization."""
        taps = Taps(self._taps, self._capture, self._places, self._n_outer)
        return taps if self else self

    def on(self, module: _Module, *names: str) -> bool:
        """Return whether one of the module's activations is changed or captured."""
        return any(name in self._taps or name in self._capture for name in self._names(module, names))

    def change(self, module: _Module, *names: str) -> bool:
        """Return whether one of the module's activations is changed."""
        return any(name in self._taps for name in self._names(module, names))

    def __call__(
        self, module: _Module, name: str, value: jax.Array, mask: jax.Array | None = None, masked: float = 0.0
    ) -> jax.Array:
        """Return the module's activation, changed by its tap if it has one.

        Args:
          module: the module that computed it.
          name: its name in the module.
          value: the activation.
          mask: where a tap may change it; None means everywhere. Elsewhere it becomes `masked` after a tap.
          masked: what the activation is outside of the mask.
        """
        if not self:
            return value
        (full,) = self._names(module, [name])
        if full in self._taps:
            value = call_tap(full, self._taps[full], value, self._places)
            value = value if mask is None else jnp.where(mask, value, jnp.asarray(masked, value.dtype))
        if full in self._capture:
            self.captured[full] = value
        return value

    def _names(self, module: _Module, names: Sequence[str]) -> list[str]:
        return ["/".join([*module.path[self._n_outer :], name]) for name in names]


NO_TAPS = Taps({})
