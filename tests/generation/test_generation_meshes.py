"""Generation and scoring on meshes of eight CPU devices: the results of one device, and the collectives of programs."""

import json
import os

import commands
import pytest

IDS = """
    import json, logging, sys
    import jax, numpy as np
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_log_compiles", True)
    import gpt2_jax
    import naive_generation as naive
    from tiny_models import random_params
    from gpt2_jax import research
    from gpt2_jax.params import flatten, unflatten
    from gpt2_jax.sharding import make_mesh, param_shardings

    class Compiled(logging.Handler):  # the names of all programs that are compiled
        names = []

        def emit(self, record):
            self.names += [record.args[0]] if record.msg.startswith("Compiling") else []

    logging.getLogger("jax").addHandler(Compiled())
    logging.getLogger("jax").propagate = False
    config = gpt2_jax.GPT2Config(n_vocab=67, n_ctx=41, n_embd=48, n_head=3, n_layer=2)
    params = random_params(config, 0)
    prompts = [[5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [63, 0], [7, 8, 9]]
    knobs = {"temperature": 1.5, "top_k": 31, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    edits = [research.replace("h1/attn/z", 0.0, heads=[1]), research.scale("h0/mlp/out", 0.5)]

    def generated(params, **how):
        return gpt2_jax.generate(config, params, prompts, 57, temperature=0, overflow="slide", **how)

    def scores(params):
        params = jax.tree.map(lambda leaf: leaf.astype("float64"), params)
        wide = config.replace(param_dtype="float64", compute_dtype="float64")
        found = gpt2_jax.score(wide, params, [*prompts[1:], 9 * prompts[1]], 20)
        return np.concatenate([one.logprobs for one in found])

    one = {"edited": generated(params, edits=edits), "scores": scores(params)}
    found = {}
    for name in sys.argv[1:]:
        mesh = make_mesh(*map(int, name.split("x")))
        divided = jax.tree.map(jax.device_put, params, unflatten(param_shardings(flatten(params), mesh)))
        Compiled.names.clear()
        rows = generated(divided)
        compiled = Compiled.names.count("jit(decode)")
        drawn = gpt2_jax.generate(config, divided, prompts, 29, seed=4, **knobs)
        found[name] = {
            "greedy": rows == [naive.greedy(config, params, *pair) for pair in zip(prompts, rows)],
            "drawn": drawn == [naive.sampled(config, params, prompts[i], drawn[i], i, 4, **knobs) for i in range(4)],
            "edited": generated(divided, edits=edits) == one["edited"] != rows,
            "programs": compiled,
            "far": np.abs(scores(divided) - one["scores"]).max(),
        }
    print(json.dumps(found, default=float))
"""
MESHES = ["1x2", "1x3", "1x8", "2x4", "4x1"]


@pytest.fixture(scope="module")
def found():
    return commands.on_eight_devices(IDS, *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_ids_of_one_device(found, mesh):
    """Three heads on 2, 3, 4 and 8 devices; four rows on 1, 2 and 4. Greedy and sliding, drawn, and with edits."""
    assert found[mesh]["greedy"]
    assert found[mesh]["drawn"]
    assert found[mesh]["edited"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_scores_of_one_device(found, mesh):
    """In float64, and with a prompt of several windows. Measured: 4.8e-14, of log-probabilities down to -16."""
    assert found[mesh]["far"] <= 1e-12


@pytest.mark.parametrize("mesh", MESHES)
def test_the_loop_compiles_once_on_a_mesh(found, mesh):
    assert found[mesh]["programs"] == 1


COLLECTIVES = """
    import json, sys
    sys.path.append(sys.argv.pop())
    import jax, numpy as np
    import gpt2_jax
    from gpt2_jax.generation import decoding, engine, programs
    from gpt2_jax.params import flatten, unflatten
    from gpt2_jax.sharding import make_mesh, param_shardings
    from hlo_counts import Program
    from tiny_models import random_params

    texts = {}

    def kept(program):  # programs as generation calls them, with its arrays
        def call(*args):
            texts.setdefault(program.__name__, program.lower(*args).compile().as_text())
            return program(*args)
        return call

    for name in ("prefill", "first", "decode"):
        setattr(engine, name, kept(getattr(programs, name)))
    found = {}
    for name in sys.argv[1:]:
        n_layer, *sizes, n_head = map(int, name.split("x"))
        config = gpt2_jax.GPT2Config(n_vocab=67, n_ctx=64, n_embd=16 * n_head, n_head=n_head, n_layer=n_layer)
        mesh, params = make_mesh(*sizes), random_params(config, 0)
        params = jax.tree.map(jax.device_put, params, unflatten(param_shardings(flatten(params), mesh)))
        texts.clear()
        gpt2_jax.generate(config, params, [[1, 2, 3], [4]], 40)
        counted = {key: Program(text) for key, text in texts.items()}
        found[name] = {key: program.count_collectives() for key, program in counted.items()}
        found[name]["loops"] = counted["decode"].count_endless()
    print(json.dumps(found))
"""


def test_a_layer_has_two_collectives():
    """The sums after the two c_proj. Two more: the embeddings are gathered, and the logits are added.

    Where rows are divided, the loop's end depends on all of them: one more. Heads divide evenly in the first two cases,
    and get heads of zeros in the next two. The only loop of unknown length is that over tokens.
    """
    benchmarks = commands.ROOT / "benchmarks"
    cases = ["2x1x4x4", "5x1x4x4", "2x1x4x3", "2x2x4x3", "2x2x1x3"]
    found = commands.on_eight_devices(COLLECTIVES, *cases, benchmarks)
    for name in cases:
        n_layer, data, model, _ = map(int, name.split("x"))
        layers, more, ends = (2 * n_layer, 1, int(data > 1)) if model > 1 else (0, 0, 1)
        expected = {"prefill": layers + more, "first": more, "decode": layers + 2 * more + ends, "loops": 1}
        assert found[name] == expected, name


def test_the_command_generates_on_a_mesh(tmp_path):
    """The same text as on one device. What does not fit the devices is one sentence."""
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
    words = ("--prompt", "To be", "--num-samples", 2, "--max-new-tokens", 9)

    def run(*options):
        return commands.in_a_process("generate", *words, *options, cwd=tmp_path, **flags)

    one, mesh = run(), run("--mesh.data", 2, "--mesh.model", -1)
    assert mesh.code == 0, mesh.err
    assert mesh.out == one.out
    for options, message in [
        (("--mesh.model", 9), "a mesh of data=1 times model=9 needs 9 devices, but there are 8"),
        (("--mesh.data", 0), "--mesh.data must be 1 or more, or -1 for all devices that are left, not 0"),
        (("--mesh.data", -1, "--mesh.model", -1), "--mesh.data and --mesh.model cannot both be -1: set one of them"),
    ]:
        refused = run(*options)
        assert (refused.code, refused.out, refused.err) == (2, "", f"gpt2-generate: {message}\n")


def test_the_command_evaluates_on_a_mesh(tmp_path):
    """Measured: 3.3e-7 of the perplexity."""
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
    text = tmp_path / "text.txt"
    text.write_text("Shall I compare thee to a summer's day?", encoding="utf-8")
    found = [
        json.loads(
            commands.in_a_process(
                "evaluate", text, "-t", "perplexity", "--json", "--mesh.model", n, cwd=tmp_path, **flags
            ).out
        )["perplexity"]
        for n in (1, 4)
    ]
    assert found[1] == pytest.approx(found[0], rel=2e-6)
