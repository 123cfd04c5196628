"""GPT2 on meshes with Explicit axes, as jax.make_mesh makes them, against the same calls on one device."""

import textwrap

import jax
import pytest
from commands import on_eight_devices
from tiny_models import CONFIG, random_params

import gpt2_jax

BOUND = 1e-12  # of absolute differences in float64; measured up to 1.6e-14
START = """
    import contextlib, functools, json
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from tiny_models import random_params
    import gpt2_jax
    from gpt2_jax.params import flatten, unflatten
    from gpt2_jax.sharding import param_shardings

    jax.config.update("jax_enable_x64", True)
    EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
    config = gpt2_jax.GPT2Config(
        n_vocab=37, n_ctx=21, n_embd=24, n_head=4, n_layer=1, param_dtype="float64", compute_dtype="float64",
        embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1,
    )
    model, rng = gpt2_jax.GPT2(config), np.random.default_rng(0)
    params = jax.tree.map(np.asarray, random_params(config, 0, 0.3))
    tokens, mask = rng.integers(0, 37, (4, 9)), rng.random((4, 9)) > 0.3

    def mesh_of(*kinds):
        return jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)

    def divide(params, mesh):
        flat = flatten(params)
        shardings = param_shardings(flat, mesh)
        return unflatten({name: jax.device_put(leaf, shardings[name]) for name, leaf in flat.items()})

    def error(found, expected):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        return max(float(abs(np.asarray(one) - np.asarray(other)).max()) for one, other in pairs)

    def spec(array, mesh):
        sharding = jax.typeof(array).sharding
        assert sharding.mesh == mesh.abstract_mesh, sharding
        return sharding.spec

    def logits(params, tokens, mask=None, **how):
        return model.apply({"params": params}, tokens, mask, **how).logits

    mesh = mesh_of(EXPLICIT, EXPLICIT)
    sharded = divide(params, mesh)
    rows = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    whole = NamedSharding(mesh, P())
    uses = (contextlib.nullcontext, functools.partial(jax.set_mesh, mesh))
    errors = {}
"""
END = """
    print(json.dumps(errors))
"""


def errors_of(code: str) -> dict[str, float]:
    return on_eight_devices(textwrap.dedent(START) + textwrap.dedent(code) + textwrap.dedent(END))


LOGITS_AND_GRADIENTS = """
    def loss(remat, params, tokens, mask):
        out = gpt2_jax.GPT2(config, remat=remat).apply({"params": params}, tokens, mask)
        return (out.logits**2).mean(), out.logits

    grads_of = lambda remat: jax.value_and_grad(functools.partial(loss, remat), has_aux=True)
    expected = jax.jit(grads_of(False))(params, tokens, mask)
    odd = jax.jit(grads_of(False))(params, tokens[:3], mask[:3])
    three = jax.device_put(tokens[:3], whole)  # two devices cannot share three rows equally
    for i, use in enumerate(uses):
        with use():
            found = jax.jit(grads_of(False))(sharded, rows, mask)
            errors[f"divided {i}"] = error(found, expected)
            assert spec(found[0][1], mesh) == P("data", None, None)
            for name, grad in flatten(found[1]).items():
                given = flatten(sharded)[name]
                assert jax.typeof(grad) == jax.typeof(given) and grad.sharding == given.sharding, name
            errors[f"NumPy tokens {i}"] = error(jax.jit(grads_of(True))(sharded, tokens, mask), expected)
            errors[f"remat {i}"] = error(jax.jit(grads_of("elementwise"))(sharded, rows, mask), expected)
            errors[f"three rows {i}"] = error(jax.jit(grads_of(True))(sharded, three, mask[:3]), odd)
            errors[f"without jit {i}"] = error(logits(sharded, rows, mask), expected[0][1])
            if i:  # without a mesh in use, JAX cannot compute gradients outside of jit, whatever the function is
                errors["without jit, gradients"] = error(grads_of(False)(sharded, rows, mask), expected)
"""


def test_logits_and_gradients():
    """Gradients are divided as their params are; logits have the rows of the tokens."""
    assert max(errors_of(LOGITS_AND_GRADIENTS).values()) < BOUND


CACHES = """
    def steps(params, tokens, cache):
        out = model.apply({"params": params}, tokens[:, :5], cache=cache)
        def step(cache, token_B):
            out = model.apply({"params": params}, token_B[:, None], cache=cache)
            return out.cache, out.logits[:, 0]
        cache, logits = jax.lax.scan(step, out.cache, tokens[:, 5:].T)
        return jnp.concatenate([out.logits, logits.swapaxes(0, 1)], 1), cache

    def placed(cache, *axes):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*axes[: x.ndim // 2]))), cache)

    expected = jax.jit(logits)(params, tokens)
    empty = gpt2_jax.init_cache(config, 4, 13)
    caches = {"rows": placed(empty, "data"), "rows and heads": placed(empty, "data", "model"), "whole": placed(empty)}
    for i, use in enumerate(uses):
        with use():
            for name, cache in caches.items():
                found, after = jax.jit(steps)(sharded, rows, cache)
                errors[f"{name} {i}"] = error(found, expected)
                assert spec(found, mesh) == P("data", None, None)
                assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, cache), name
            fresh = gpt2_jax.init_cache(config, 4, 13)
            out = model.apply({"params": sharded}, rows, cache=fresh)
            errors[f"without jit {i}"] = error(out.logits, expected)
            # If a mesh is in use, JAX puts a new array on each of its devices, whole. Else the cache gets the rows.
            assert spec(out.cache.k_BNHS[0], mesh) == (P("data", None, None, None), P(None, None, None, None))[i]
            inside = jax.jit(lambda params, tokens: steps(params, tokens, gpt2_jax.init_cache(config, 4, 13))[0])
            if i:
                errors["made inside"] = error(inside(sharded, rows), expected)
"""


def test_a_cache_stays_divided_as_it_is():
    """So a cache can be the state of a scan. Steps of one token give the logits of the whole rows."""
    assert max(errors_of(CACHES).values()) < BOUND


TAPS_AND_DROPOUT = """
    names = gpt2_jax.activations.activation_names(config)

    def tapped(shift, params, tokens):
        seen = {}
        def tap(name, value, position_BT):
            seen[name] = value
            return value + shift * (position_BT.sum() > 0)  # the shift is on the mesh outside of the model
        taps = {name: functools.partial(tap, name) for name in names}
        return logits(params, tokens, taps=taps), seen

    def dropped(params, tokens, key):
        return logits(params, tokens, deterministic=False, rngs={"dropout": key})

    expected = jax.jit(tapped)(0.01, params, tokens)
    expected_dropped = jax.jit(dropped)(params, tokens, jax.random.key(3))
    assert error(expected_dropped, logits(params, tokens)) > 0.1
    for i, use in enumerate(uses):
        with use():
            shift = jax.device_put(np.float64(0.01), whole)
            for how, function in (("", tapped), ("jit ", jax.jit(tapped))):
                found = function(shift, sharded, rows)
                errors[f"{how}taps {i}"] = error(found, expected)
                assert {spec(value, mesh)[0] for value in found[1].values()} == {"data"}
            for how, function in (("", dropped), ("jit ", jax.jit(dropped))):
                found = function(sharded, rows, jax.random.key(3))
                errors[f"{how}dropout {i}"] = error(found, expected_dropped)
"""


def test_taps_and_dropout():
    """Taps get values with the rows of the tokens, on the caller's axes. Dropout draws the same entries."""
    assert max(errors_of(TAPS_AND_DROPOUT).values()) < BOUND


OTHER_CALLS = """
    import flax.linen as nn

    class Outer(nn.Module):
        def setup(self):
            self.gpt2 = gpt2_jax.GPT2(config)

        def __call__(self, tokens_BT):
            return self.gpt2.hidden(tokens_BT)[0].sum(-1)

    def hidden_first(params, tokens):
        h_BTD, _ = model.apply({"params": params}, tokens_BT=tokens, method="hidden")
        return model.apply({"params": params}, h_BTD, method="unembed")

    by_data = dict(mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    outer = lambda params, tokens: Outer().apply({"params": {"gpt2": params}}, tokens)
    expected, sums = jax.jit(logits)(params, tokens), jax.jit(outer)(params, tokens)
    half = mesh_of(EXPLICIT, AUTO)
    half_rows = jax.device_put(tokens, NamedSharding(half, P("data")))
    for i, use in enumerate(uses):
        with use():
            errors[f"methods {i}"] = error(jax.jit(hidden_first)(sharded, rows), expected)
            errors[f"bound {i}"] = error(model.bind({"params": sharded})(rows).logits, expected)
            errors[f"inside another module {i}"] = error(jax.jit(outer)(sharded, rows), sums)
            together = jax.jit(jax.vmap(logits, (None, 0)))(sharded, np.stack([tokens, tokens[::-1]]))
            errors[f"vmap {i}"] = error(together, np.stack([expected, expected[::-1]]))
            for axes in ({"data", "model"}, {"data"}):
                mapped = jax.jit(jax.shard_map(logits, axis_names=axes, **by_data))
                errors[f"Manual axes {axes} {i}"] = error(mapped(jax.device_put(params, whole), rows), expected)
            try:
                divided = jax.jit(jax.vmap(lambda params, row: logits(params, row[None])[0], (None, 0)))
                errors[f"vmap over rows {i}"] = error(divided(jax.device_put(params, whole), rows), expected)
            except ValueError as refused:  # from jax 0.12 on
                assert "give the rows as one batch" in str(refused), refused
    with jax.set_mesh(mesh):
        automatic = divide(params, mesh_of(AUTO, AUTO))
        errors["params on Auto axes"] = error(jax.jit(logits)(automatic, rows), expected)
        new = gpt2_jax.init_params(config, jax.random.key(0))
        assert {spec(leaf, mesh) for leaf in jax.tree.leaves(new)} == {P(None), P(None, None)}
    for i, use in enumerate((contextlib.nullcontext, functools.partial(jax.set_mesh, half))):
        with use():
            found = jax.jit(jax.value_and_grad(lambda params, tokens: (logits(params, tokens) ** 2).mean()))
            value, grads = found(divide(params, half), half_rows)
            errors[f"one Explicit axis {i}"] = abs(float(value - (expected**2).mean()))
            assert spec(grads["wte"], half) == P(None, "data")
    errors["new params"] = error(new, gpt2_jax.init_params(config, jax.random.key(0)))
"""


def test_other_calls_and_other_axes():
    """Methods, bound and nested modules, vmap, shard_map, a mesh with one Explicit axis, new params."""
    assert max(errors_of(OTHER_CALLS).values()) < BOUND


FLOAT32 = """
    small = config.replace(param_dtype="float32", compute_dtype="float32")
    params = jax.tree.map(np.float32, params)
    model = gpt2_jax.GPT2(small)
    errors["float32"] = error(jax.jit(logits)(divide(params, mesh), rows), jax.jit(logits)(params, tokens))
"""


def test_float32():
    assert errors_of(FLOAT32)["float32"] < 2e-5  # measured 3.1e-6


FUSED = """
    from gpt2_jax import fused_attention
    import gpt2_jax.model

    small = config.replace(n_ctx=130, param_dtype="float32", compute_dtype="float32")
    params = jax.tree.map(np.asarray, random_params(small, 0, 0.3))
    sharded, tokens = divide(params, mesh), rng.integers(0, 37, (4, 130))
    expected = gpt2_jax.GPT2(small).apply({"params": params}, tokens).logits
    gpt2_jax.model.kernels = lambda *args, **how: ("tpu",)
    fused_attention.splash = functools.partial(fused_attention.splash, interpret=True)
    model = gpt2_jax.GPT2(small, mesh=mesh)
    errors["fused"] = error(jax.jit(logits)(sharded, jax.device_put(tokens, NamedSharding(mesh, P("data")))), expected)
"""


def test_fused_attention_with_an_explicit_mesh():
    assert errors_of(FUSED)["fused"] < 5e-5  # measured 6.0e-6


@pytest.mark.parametrize("mesh", [None, jax.sharding.AxisType.Auto])
def test_without_explicit_axes_the_program_is_unchanged(mesh):
    model, params = gpt2_jax.GPT2(CONFIG), random_params(CONFIG, 0)
    if mesh is not None:
        place = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(mesh,)), jax.P())
        params = jax.device_put(params, place)
    call = jax.make_jaxpr(lambda params, tokens: model.apply({"params": params}, tokens).logits)
    assert "reshard" not in str(call(params, jax.numpy.ones((2, 5), int)))
