"""Fused causal attention on accelerators: kernels that compute scores and softmax in blocks and never store them.

On TPUs it is JAX's splash attention, on NVIDIA GPUs cuDNN's. Both are forms of FlashAttention (Dao et al. 2022,
arXiv:2205.14135; Dao 2023, arXiv:2307.08691). Values and gradients equal those of `gpt2_jax.attention` up to rounding.
At padded queries they are finite, but differ.

Shape letters: B batch, T query and slot, N heads, H head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.attention import causal_attention
from gpt2_jax.config import GPT2Config
from gpt2_jax.sharding import array_sharding

SHORTEST = 128  # tokens; shorter calls, such as a decode step, have few scores
BLOCKS = (512, 384, 256, 128)  # tokens of a block of splash attention: the first that divides the padded length
LANES = 128  # splash attention takes a multiple of this many tokens
AMPERE = 8.0  # compute capability of the first GPUs with cuDNN's kernel


class Padding(NamedTuple):
    """Which tokens of a call are real.

    Attributes:
      real_BT: bool, True for real tokens.
      length_B: int32, the number of real tokens of each row if all padding is on the right; None if it may be anywhere.
      segment_BT: int32, the text to which each token belongs, if a row holds several: 1 or more, 0 for padding; else
        None.
    """

    real_BT: jax.Array
    length_B: jax.Array | None = None
    segment_BT: jax.Array | None = None


# ---- which kernel


def kernels(
    config: GPT2Config,
    mesh: Mesh | None,
    n_tokens: int,
    padding: Padding | None,
    tapped: bool = False,
    opened: bool = False,
    dropped: bool = False,
) -> tuple[str, ...]:
    """Return the platforms, "tpu" or "cuda", on which a call takes a fused kernel; none means plain attention.

    The kernels cannot be divided over devices without a mesh, and while a program is traced, it is not known whether
    its arrays are divided. So a call without a mesh takes the kernel of a device only if this process has no other of
    its kind.

    Args:
      config: the model's config. Calls of less than SHORTEST tokens are plain, whatever its `attention`.
      mesh: the devices that the program runs on, or None.
      n_tokens: T. The call has no earlier tokens.
      padding: the padding of the call.
      tapped: the call has taps on any activations.
      opened: the call has taps on scores or pattern.
      dropped: the call has dropout on the attention weights.

    Raises:
      ValueError: `config.attention` is "fused", and this call cannot take a fused kernel.
    """
    if config.attention == "plain" or n_tokens < SHORTEST:
        return ()
    reasons = _reasons(config, mesh, padding, tapped, opened, dropped)
    fitting = tuple(platform for platform, reason in reasons.items() if not reason)
    if config.attention == "fused" and not fitting:
        raise ValueError(f'attention="fused" is impossible here: {next(iter(reasons.values()))}')
    return fitting


def _reasons(
    config: GPT2Config, mesh: Mesh | None, padding: Padding | None, tapped: bool, opened: bool, dropped: bool
) -> dict[str, str]:
    """Return {platform: why its kernel does not serve a call, "" if it does}. There is at least one platform."""
    if opened:
        return {"any": "a fused kernel does not store the scores and the pattern that a tap reads or changes"}
    if dropped:
        how = "set attn_pdrop, in a recipe model.dropout, to 0"
        return {"any": f"a fused kernel has no dropout on attention weights: {how}"}
    found = {}
    for devices in _accelerators(mesh):
        platform = "tpu" if devices[0].platform == "tpu" else "cuda"
        found[platform] = _reason(config, devices[0])
        # JAX's function for cuDNN fails if it is batched by some of its arguments alone, as edits often are.
        if platform == "cuda" and tapped:
            found[platform] = "on a GPU, a fused kernel does not work with taps"
        elif platform == "cuda" and padding is not None and padding.segment_BT is not None:
            found[platform] = "on a GPU, a fused kernel takes one text in a row: set data.pack to false"
        elif platform == "cuda" and padding is not None and padding.length_B is None:
            found[platform] = "on a GPU, a fused kernel takes no mask: leave it out if all tokens are real"
        elif mesh is None and len(devices) > 1:
            how = "say on which the model runs, GPT2(config, mesh=mesh)"
            found[platform] = f"this process has {len(devices)} devices: {how}"
    return found or {"cpu": "a CPU has no fused kernel"}


def _accelerators(mesh: Mesh | None) -> list[list[Any]]:
    """Return the devices of each kind that is not a CPU: of the mesh, or of this process."""
    if mesh is not None:
        found = [list(mesh.devices.flat)]
    else:
        from jax.extend.backend import backends

        found = [client.devices() for client in dict(backends()).values()]
    return [devices for devices in found if devices and devices[0].platform != "cpu"]


def _reason(config: GPT2Config, device: Any) -> str:
    """Return why a device has no fused kernel for a config, or one that only "fused" takes; "" if "auto" takes it."""
    dtype, width, kind = config.compute_dtype.name, config.head_dim, device.device_kind
    tpu = device.platform == "tpu"
    if not (kind not in ("TPU v2", "TPU v3") if tpu else _compute_capability(device) >= AMPERE):
        return f"{kind} has no fused kernel"
    if not tpu:
        dtypes = ("bfloat16", "float16")
    else:
        # How close its float32 products come to those of plain attention has not been measured on a TPU.
        dtypes = ("bfloat16", "float32") if config.attention == "fused" else ("bfloat16",)
    if dtype not in dtypes:
        return f"the kernel of {kind} takes a compute_dtype of {' or '.join(dtypes)}, not {dtype}"
    if not tpu:
        fits = width % 8 == 0 and width <= 128
        return "" if fits else f"the kernel of {kind} takes a head width of a multiple of 8 up to 128, not {width}"
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return f"the kernel of {kind} does not compile with jax_enable_x64"
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if dtype == "bfloat16" and precision not in (None, "default"):
        return f"the kernel of {kind} does not compile in bfloat16 with a default matmul precision of {precision}"
    return ""


def _compute_capability(device: Any) -> float:
    """Return the compute capability of an NVIDIA GPU. That of other devices is 0: AMD's have names, such as gfx90a."""
    try:
        return float(getattr(device, "compute_capability", None) or 0)
    except ValueError:
        return 0.0


# ---- the kernels


# Under jit of its own it is traced and differentiated once, and not once for each layer.
@functools.partial(jax.jit, static_argnames=("divisor", "platforms", "mesh"))
def fused_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    mask_BTS: jax.Array,
    padding: Padding | None,
    divisor: int,
    platforms: tuple[str, ...],
    mesh: Mesh | None,
) -> jax.Array:
    """Causal attention of a call without earlier tokens, by the kernel of the platform that it is compiled for.

    Args:
      q_BTNH, k_BTNH, v_BTNH: queries, keys and values.
      mask_BTS: as in `causal_attention`, which other platforms take.
      padding: the same as padding; None if all tokens are real.
      divisor: the scores are divided by sqrt(H), and by this.
      platforms: what `kernels` returned, not empty.
      mesh: rows are divided over its axis "data" and heads over "model", where their number allows.

    Returns:
      z_BTNH in the dtype of the queries.
    """
    made = {"tpu": splash, "cuda": cudnn}
    arrays = (q_BTNH, k_BTNH, v_BTNH, padding)
    if mesh is not None:
        return _over(mesh, functools.partial(made[platforms[0]], divisor=divisor), q_BTNH.shape)(*arrays)

    def plain(q_BTNH, k_BTNH, v_BTNH, padding):
        del padding  # in mask_BTS
        k_BNHS, v_BNSH = k_BTNH.transpose(0, 2, 3, 1), v_BTNH.transpose(0, 2, 1, 3)
        return causal_attention(q_BTNH, k_BNHS, v_BNSH, mask_BTS, divisor=divisor)

    # Not jax.default_backend(): params may be on another device.
    here = {platform: functools.partial(made[platform], divisor=divisor) for platform in platforms}
    return jax.lax.platform_dependent(*arrays, default=plain, **here)


def _over(mesh: Mesh, kernel: Callable[..., jax.Array], shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    """Return the kernel on the rows and heads of each device. Rows or heads that cannot be shared are not divided."""
    if mesh.size == 1:
        return kernel
    divided, by_rows = array_sharding(mesh, shape, parts=2), array_sharding(mesh, shape[:1])
    specs = (divided.spec, divided.spec, divided.spec, by_rows.spec)
    return jax.shard_map(kernel, mesh=divided.mesh, in_specs=specs, out_specs=divided.spec, check_vma=False)


def splash(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    padding: Padding | None,
    divisor: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """Attention by splash attention, a Pallas kernel for TPUs. `interpret=True` runs it on any device, slowly.

    Real tokens attend to real tokens, and padding to padding. So padding may be anywhere, and gives finite values.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    n_tokens, n_heads, width = q_BTNH.shape[1:]
    # The kernel does not scale. A power of two, such as the 8 of heads of 64, is exact. Others round the queries and
    # their gradients once more: the gradients' error grows by a third.
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTNH = (q_BTNH.astype(wide) / (math.sqrt(width) * divisor)).astype(q_BTNH.dtype)
    q_BNTH, k_BNTH, v_BNTH = (_lengthened(array).transpose(0, 2, 1, 3) for array in (q_BTNH, k_BTNH, v_BTNH))
    ids = None
    if padding is not None:
        id_BT = padding.real_BT if padding.segment_BT is None else padding.segment_BT
        id_BT = _lengthened(id_BT.astype(jnp.int32))
        ids = library.SegmentIds(q=id_BT, kv=id_BT)
    n_padded = q_BNTH.shape[2]
    block = next(size for size in BLOCKS if n_padded % size == 0)
    kernel: Any = library.make_splash_mha_single_device(
        library.MultiHeadMask([library.CausalMask((n_padded, n_padded))] * n_heads),
        block_sizes=library.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        interpret=interpret,
    )
    return jax.vmap(kernel)(q_BNTH, k_BNTH, v_BNTH, ids).transpose(0, 2, 1, 3)[:, :n_tokens]


def cudnn(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    padding: Padding | None,
    divisor: int = 1,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Attention by cuDNN, in float16 or bfloat16. `implementation="xla"` computes the same on any device.

    All queries are computed, also padded ones, so that their values are defined. `padding` needs `length_B`.
    """
    lengths = None
    if padding is not None and padding.length_B is not None:
        lengths = jnp.maximum(padding.length_B, 1)  # no slot at all would give NaN
    scale = 1 / (math.sqrt(q_BTNH.shape[-1]) * divisor)
    how = {"scale": scale, "is_causal": True, "key_value_seq_lengths": lengths, "implementation": implementation}
    return jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, **how)


def _lengthened(array: jax.Array) -> jax.Array:
    """Return an array [B, T, ...] with zeros after T, up to a multiple of LANES. No query of T attends to them."""
    extra = -array.shape[1] % LANES
    return jnp.pad(array, [(0, 0), (0, extra)] + [(0, 0)] * (array.ndim - 2)) if extra else array
