"""benchmarks/ahead_of_time.py: what is counted in HLO text, and the command."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "ahead_of_time.py"
F32 = 4  # bytes


def module(name):
    """Import a module of benchmarks/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


hlo_text = module("hlo_text")
hlo_counts = module("hlo_counts")
topology = module("topology")


@pytest.fixture(autouse=True, scope="module")
def _optimized(_programs_of_one_file):
    """Compile as users do: without optimization XLA fuses little."""
    jax.config.update("jax_disable_most_optimizations", False)


def program(function, *shapes, large=np.inf, **options):
    """Compile a function of float32 arrays of these shapes, or of given arrays, for the CPU."""
    arguments = [jax.ShapeDtypeStruct(one, jnp.float32) if isinstance(one, tuple) else one for one in shapes]
    return hlo_counts.Program(jax.jit(function, **options).lower(*arguments).compile().as_text(), large)


def test_a_kernel_reads_its_operands_and_writes_its_result():
    cost = program(lambda x, y: jnp.tanh(x) * y + 1, (7, 300), (7, 300)).total()
    assert cost == hlo_counts.Cost(kernels=1, n_bytes=3 * 7 * 300 * F32)


def test_an_operand_is_read_once():
    cost = program(lambda x: x @ x, (96, 96)).total()
    assert cost.kernels == 1
    assert cost.n_bytes == 2 * 96 * 96 * F32


@pytest.mark.parametrize(
    "read",
    [lambda x, i: jnp.tanh(x[5:8]), lambda x, i: jnp.tanh(lax.dynamic_slice_in_dim(x, i, 3))],
    ids=["slice", "dynamic_slice"],
)
def test_of_a_sliced_operand_the_slice_is_read(read):
    """Two arrays of the slice's size and an index, and not the 1,000 rows."""
    cost = program(read, (1000, 50), jax.ShapeDtypeStruct((), jnp.int32)).total()
    assert 2 * 3 * 50 * F32 <= cost.n_bytes <= 2 * 3 * 50 * F32 + 8


def test_of_an_embedding_table_the_rows_are_read():
    cost = program(lambda x, i: jnp.tanh(x.at[i].get(mode="clip")), (1000, 50), np.zeros(3, np.int32)).total()
    assert 2 * 3 * 50 * F32 <= cost.n_bytes <= 5 * 3 * 50 * F32  # at most: gathered, and then read again


def test_an_update_in_place_writes_the_new_part():
    def update(x, new, i):
        return lax.dynamic_update_slice_in_dim(x, jnp.tanh(new), i, 0)

    shapes = (1000, 50), (3, 50), jax.ShapeDtypeStruct((), jnp.int32)
    cost = program(update, *shapes, donate_argnums=0).total()
    assert 2 * 3 * 50 * F32 <= cost.n_bytes <= 4 * 3 * 50 * F32 + 8
    copied = program(update, *shapes).total()  # XLA must copy what the caller keeps
    assert copied.n_bytes >= 2 * 1000 * 50 * F32


def test_an_update_that_a_kernel_computes_with_is_not_in_place():
    text = """HloModule m

%fused (p0: f32[100,50], p1: f32[3,50], p2: s32[]) -> f32[100,50] {
  %p0 = f32[100,50]{1,0} parameter(0)
  %p1 = f32[3,50]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %u = f32[100,50]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
  ROOT %t = f32[100,50]{1,0} tanh(%u)
}

ENTRY %main (x: f32[100,50], y: f32[3,50], i: s32[]) -> f32[100,50] {
  %x = f32[100,50]{1,0} parameter(0)
  %y = f32[3,50]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[100,50]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%fused
}
"""
    assert hlo_counts.Program(text).total().n_bytes == (2 * 100 * 50 + 3 * 50 + 1) * F32
    in_place = text.replace("tanh(%u)", "bitcast(%u)")
    assert hlo_counts.Program(in_place).total().n_bytes == (2 * 3 * 50 + 1) * F32


def test_a_loop_counts_as_often_as_it_turns():
    def loop(n):
        return lambda x, y: lax.fori_loop(0, n, lambda i, x: jnp.tanh(x) * y, x)

    once, five, nine = (program(loop(n), (40, 50), (40, 50)).total() for n in (2, 5, 9))
    assert nine.kernels - five.kernels == 4 / 3 * (five.kernels - once.kernels) > 0
    turn = (nine.n_bytes - five.n_bytes) / 4
    assert 3 * 40 * 50 * F32 <= turn <= 3 * 40 * 50 * F32 + 64  # and the counter


def test_attributes_may_have_several_lines():
    """Those of a Pallas kernel do, and a line of them begins like the end of a computation."""
    text = """HloModule m

ENTRY %main (x: f32[100,50]) -> f32[100,50] {
  %x = f32[100,50]{1,0} parameter(0)
  %k = f32[100,50]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={a={
"b":"{1}"
}}, metadata={op_name="k"}
  ROOT %t = f32[100,50]{1,0} tanh(%k)
}
"""
    assert hlo_counts.Program(text).total() == hlo_counts.Cost(kernels=2, n_bytes=4 * 100 * 50 * F32)
    assert hlo_counts.Program(text).targets() == {"tpu_custom_call": 1}


COUNTED = """HloModule m

%condition (c: (s32[], f32[40])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[40]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(9)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[40])) -> (s32[], f32[40]) {
  %b = (s32[]{:T(128)}, f32[40]{0:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%j, %one)
  %x = f32[40]{0:T(128)} get-tuple-element(%b), index=1
  %y = f32[40]{0:T(128)} tanh(%x)
  ROOT %t = (s32[]{:T(128)}, f32[40]{0:T(128)}) tuple(%next, %y)
}

ENTRY %main (a: f32[40], k: s32[]) -> (s32[], f32[40]) {
  %a = f32[40]{0:T(128)} parameter(0)
  %k = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%zero)
  %in = (s32[]{:T(128)}, f32[40]{0:T(128)}) tuple(%start, %a)
  ROOT %w = (s32[]{:T(128)}, f32[40]{0:T(128)}) while(%in), condition=%condition, body=%body
}
"""


def test_a_tpu_loop_is_counted_by_its_counter():
    """XLA for a TPU does not write the number of turns down."""
    found = hlo_counts.Program(COUNTED)
    assert found.total().kernels == 9 - 2
    assert found.count_endless() == 0


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("direction=LT", "direction=NE"),
        ("constant(1)", "constant(3)"),
        ("add(%j, %one)", "multiply(%j, %one)"),
        ("tuple(%start, %a)", "tuple(%k, %a)"),
        ("%n = s32[]{:T(128)} constant(9)", "%n = s32[]{:T(128)} get-tuple-element(%c), index=0"),
    ],
)
def test_other_counters_are_not_guessed(was, becomes):
    assert COUNTED.count(was) == 1
    found = hlo_counts.Program(COUNTED.replace(was, becomes))
    assert found.total().kernels == 1
    assert found.count_endless() == 1


def test_loops_without_a_trip_count_are_found():
    def halve(x):
        return lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, lax.fori_loop(0, 3, lambda i, x: x @ x, x))

    found = program(halve, (40, 40))
    assert found.count("while") == 2
    assert found.count_endless() == 1


def test_the_cheapest_branch_of_a_conditional_counts():
    def choose(x, y):
        return lax.cond(x.sum() > 0, lambda: y[:2, :3] * 2, lambda: (y @ y @ y)[:2, :3])

    found = program(choose, (5,), (200, 200))
    assert found.count("conditional") == 1
    assert found.total().n_bytes < 200 * 200 * F32


def test_the_main_loop_is_taken_apart():
    def decode(x, n):
        x = jnp.tanh(x @ x)
        small = lax.while_loop(lambda y: y.sum() < 3, lambda y: y + 1, x[:1, :1])
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[1])), (0, x)), small

    found = program(decode, (96, 96), jax.ShapeDtypeStruct((), jnp.int32))
    step, once = found.split_at_main_loop()
    assert 4 * 96 * 96 * F32 <= step.n_bytes <= 4 * 96 * 96 * F32 + 64
    assert once.n_bytes >= 4 * 96 * 96 * F32
    assert step + once == found.total()


@pytest.mark.parametrize(("large", "copies"), [(300 * 200, 1), (300 * 200 + 1, 0)])
def test_copies_of_large_arrays_are_found(large, copies):
    assert program(lambda x: x.T, (300, 200), large=large).total().copies == copies
    assert program(lambda x: jnp.tanh(x) + 1, (300, 200), large=large).total().copies == 0


def test_products_with_a_transposed_matrix_are_no_copies():
    text = """HloModule m

%fused (p0: bf16[40,30], p1: bf16[40,20]) -> bf16[30,20] {
  %p0 = bf16[40,30]{1,0} parameter(0)
  %t = bf16[30,40]{1,0} transpose(%p0), dimensions={1,0}
  %p1 = bf16[40,20]{1,0} parameter(1)
  ROOT %d = bf16[30,20]{1,0} dot(%t, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[40,30], b: bf16[40,20]) -> bf16[30,20] {
  %a = bf16[40,30]{1,0} parameter(0)
  %b = bf16[40,20]{1,0} parameter(1)
  ROOT %f = bf16[30,20]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused
}
"""
    assert hlo_counts.Program(text, 1).total() == hlo_counts.Cost(1, 2 * (40 * 30 + 40 * 20 + 30 * 20), 0)
    without = text.replace("dot(%t, %p1), lhs", "add(%t, %t), lhs")
    assert hlo_counts.Program(without, 1).total().copies == 1
    in_order = without.replace("dimensions={1,0}", "dimensions={0,1}")  # XLA writes these too
    assert hlo_counts.Program(in_order, 1).total().copies == 0


def test_a_tpu_array_has_whole_tiles_and_is_read_once():
    """A slice of a weight is prefetched into the chip's memory, and read from there."""
    text = """HloModule m

ENTRY %main (w: bf16[100,768]) -> f32[1,50] {
  %w = bf16[100,768]{1,0:T(8,128)(2,1)} parameter(0)
  %s = ((bf16[100,768]{1,0:T(8,128)(2,1)}), bf16[50,768]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w), \
slice={[0:50], [0:768]}
  %d = bf16[50,768]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
  %c = (bf16[100,768]{0,1:T(8,128)(2,1)S(1)}, bf16[100,768]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %e = bf16[100,768]{0,1:T(8,128)(2,1)S(1)} copy-done(%c)
  ROOT %r = f32[1,50]{1,0:T(1,128)} custom-call(%d, %e), custom_call_target="tpu_custom_call"
}
"""
    found = hlo_counts.Program(text, 1)
    assert found.total() == hlo_counts.Cost(1, 2 * 56 * 768 + 2 * 128 * 768 + 4 * 128, 0)
    assert found.targets() == {"tpu_custom_call": 1}


def test_the_workspace_of_a_gpu_library_is_not_counted():
    text = """HloModule m

ENTRY %main (q: bf16[4,12,256,64]) -> bf16[4,12,256,64] {
  %q = bf16[4,12,256,64]{3,1,2,0} parameter(0)
  %a = (bf16[4,12,256,64]{3,1,2,0}, u8[4096]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %z = bf16[4,12,256,64]{3,1,2,0} get-tuple-element(%a), index=0
}
"""
    assert hlo_counts.Program(text).total() == hlo_counts.Cost(1, 2 * 2 * 4 * 12 * 256 * 64, 0)


# ---- the command


def run(*words, **environment):
    command = [sys.executable, str(SCRIPT), "--size", "tiny", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def table(output):
    """Return the rows of a Markdown table as dicts."""
    lines = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
    return [dict(zip(map(str.strip, lines[0]), map(str.strip, line), strict=True)) for line in lines[2:]]


def number(cell):
    return float(cell.replace(",", ""))


def test_the_command_compiles_each_program(tmp_path):
    output = tmp_path / "table.md"
    words = ("--program", "decode", "prefill", "train", "--rows", 3, "--tokens", 40, "--slots", 200)
    done = run(*words, "--dtype", "float32", "--output", output)
    assert done.returncode == 0, done.stderr
    rows = table(output.read_text(encoding="utf-8"))
    assert [row["program"].split(",")[0] for row in rows] == ["decode", "prefill", "train"]
    decode, prefill, train = rows
    n_vocab, n_ctx, width, n_layer = 1000, 1024, 128, 2
    weights = n_vocab * width + n_layer * (12 * width**2 + 13 * width) + 2 * width  # without the positions
    cache = 2 * n_layer * 3 * width  # elements of a slot of each row
    assert number(decode["least MB"]) == pytest.approx((weights + 217 * cache) * F32 / 1e6, rel=5e-3)
    blocks = weights - n_vocab * width
    assert number(prefill["least MB"]) == pytest.approx((blocks + 40 * cache) * F32 / 1e6, rel=5e-3)
    assert number(train["least MB"]) == pytest.approx(6 * (weights + n_ctx * width) * F32 / 1e6, rel=5e-3)
    for row in rows:
        assert row["target"] == "cpu"
        assert number(row["MB moved"]) > number(row["least MB"])
        assert number(row["kernels"]) > 10
        assert row["attention"] == "plain"
        assert row["collectives"] == "0"
        assert number(row["peak MB"]) >= number(row["args MB"]) >= weights * F32 / 1e6


def test_several_devices_share_heads_and_neurons():
    """Two collectives a layer and two more; each device has a quarter of the weights. The two heads become four."""
    words = ("--program", "decode", "prefill", "--rows", 3, "--tokens", 40, "--slots", 200, "--dtype", "float32")
    one, four = (table(run(*words, "--devices", n).stdout) for n in (1, 4))
    assert [row["program"] for row in four] == [row["program"] + ", 4 devices" for row in one]
    assert [row["collectives"] for row in four] == ["6", "5"]
    for row, whole in zip(four, one, strict=True):
        assert number(row["least MB"]) == pytest.approx(number(whole["least MB"]) / 4, rel=0.01)
        assert number(row["args MB"]) < 0.55 * number(whole["args MB"])


def test_more_devices_than_a_target_has_are_refused():
    done = run("--devices", 5)
    assert done.returncode == 2
    assert "--devices must be from 1 to 4" in done.stderr


def test_a_program_that_takes_too_long_is_left_out():
    done = run("--limit", 0.1)
    assert done.returncode == 1
    assert "Left out: cpu, decode, tiny bfloat16, 1 row: not compiled after 0.1 s." in done.stdout


@pytest.mark.parametrize(("target", "package"), [("v5e", "libtpu"), ("h200", "jax-cuda13-plugin")])
def test_the_command_says_what_to_install(target, package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        done = run("--target", target)
        assert done.returncode == 2
        assert done.stdout == ""
        assert f"compiling for a{'n' * (target == 'h200')} {target}".lower() in done.stderr.lower()
        assert "pip install" in done.stderr
        assert package in done.stderr
        assert len(done.stderr.splitlines()) == 1
    else:
        pytest.skip(f"{package} is installed")


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")


@needs_libtpu
def test_decode_on_a_tpu_copies_no_cache_and_has_no_conditional():
    done = run("--target", "v5e", "--rows", 2, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert done.returncode == 0, done.stderr
    (row,) = table(done.stdout)
    assert row["large copies"] == "0 + 0"
    assert row["loops, conditionals"] == "1, 0"  # the loop of steps ends early if all rows have ended
    assert number(row["MB moved"]) <= 1.1 * number(row["least MB"])


@needs_libtpu
def test_decode_on_four_tpus_has_two_collectives_a_layer():
    done = run("--target", "v5e", "--rows", 2, "--devices", 4, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert done.returncode == 0, done.stderr
    (row,) = table(done.stdout)
    assert row["collectives"] == "6"
    assert row["large copies"] == "0 + 0"
    assert row["loops, conditionals"] == "1, 0"


@needs_libtpu
def test_prefill_and_training_on_a_tpu_have_fused_attention():
    """A kernel for each of the two layers; in training, two more for the gradients of each."""
    words = ("--program", "prefill", "train", "--rows", 2, "--tokens", 256)
    done = run("--target", "v5e", *words, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert done.returncode == 0, done.stderr
    assert [row["attention"] for row in table(done.stdout)] == ["2 Mosaic", "6 Mosaic"]


SLICES = """
import json, os, sys
import topology
os.environ |= topology.ENVIRONMENT
import jax
from jax.experimental import topologies
from gpt2_jax import processes
from gpt2_jax.sharding import make_mesh

found = []
for kind, n in json.loads(sys.argv[1]):
    chips = topologies.get_topology_desc(kind, platform="tpu", **({"num_slices": n} if n > 1 else {})).devices
    jax.devices, processes.count = lambda: chips, lambda: len({chip.process_index for chip in chips})
    for model in (1, 2, 4):
        mesh = make_mesh(-1, model)
        rows = [{getattr(chip, "slice_index", 0) for chip in row} for row in mesh.devices]
        found.append([{*mesh.devices.flat} == {*chips}, max(map(len, rows)), len(set.union(*rows))])
print(json.dumps(found))
"""


@needs_libtpu
def test_a_mesh_of_real_slices_has_model_within_a_slice():
    """Of the topologies that libtpu describes, with one process for four chips."""
    kinds = [("v5e:4x4", 1), ("v5e:4x4", 2), ("v5e:2x2", 3), ("v5p:2x2x2", 2), ("v6e:4x4", 2)]
    paths = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    done = subprocess.run(
        [sys.executable, "-c", SLICES, json.dumps(kinds)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [[True, 1, n] for _, n in kinds for _ in range(3)]
