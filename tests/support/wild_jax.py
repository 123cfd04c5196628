"""Forms that JAX code leaves: transformers 4's Flax classes, and Orbax trees of any interface, with a config beside."""

import json
import logging
from pathlib import Path

import checkpoint_forms as forms
import numpy as np
import safetensors.numpy
import wild_model
from wild_model import Source, flat_model, source
from wild_table import weights

ORBAX = ("orbax.checkpoint",)


def flax_tree(flat) -> dict:
    """The params of FlaxGPT2Model. FlaxConv1D stores its kernel as (out, in)."""
    tree = {}
    for name, array in flat.items():
        *modules, leaf = name.split("/")
        if leaf in ("wte", "wpe"):
            path, value = (leaf, "embedding"), array
        else:
            modules = ["h", modules[0][1:], *modules[1:]] if modules[0] != "ln_f" else modules
            path, value = (
                (*modules, {"w": "kernel", "g": "scale", "b": "bias"}[leaf]),
                array.T if leaf == "w" else array,
            )
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = np.ascontiguousarray(value)
    return tree


def flatten(tree, separator: str, prefix: str = "") -> dict[str, np.ndarray]:
    found = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= flatten(value, separator, path + separator) if isinstance(value, dict) else {path: value}
    return found


def write_config(folder: Path, flat) -> None:
    (folder / "config.json").write_text(json.dumps(wild_model.hf_fields(flat)))


def write_msgpack(folder: Path, flat, tree) -> None:
    import flax.serialization

    write_config(folder, flat)
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))


@weights("FlaxGPT2LMHeadModel", "transformers 4, flax_model.msgpack", transformers=False)
def flax_lm_head_model(folder):
    write_msgpack(folder, source().flat, {"transformer": flax_tree(source().flat)})
    return source()


@weights("FlaxGPT2Model", "transformers 4, flax_model.msgpack without `transformer`", transformers=False)
def flax_model(folder):
    write_msgpack(folder, source().flat, flax_tree(source().flat))
    return source()


@weights("Flax-bfloat16", "transformers 4, flax_model.msgpack in bfloat16", transformers=False)
def flax_bfloat16(folder):
    flat = flat_model(dtype="bfloat16")
    write_msgpack(folder, flat, {"transformer": flax_tree(flat)})
    return Source(flat)


def flax_safetensors(name: str, writer: str, separator: str) -> None:
    @weights(name, writer, transformers=False)
    def make(folder):
        write_config(folder, source().flat)
        tensors = flatten({"transformer": flax_tree(source().flat)}, separator)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "flax"})
        return source()


flax_safetensors("Flax-safetensors", "transformers 4, Flax with `safe_serialization=True`: names with `.kernel`", ".")
flax_safetensors("Flax-safetensors-slashes", "safetensors of a flattened Flax tree: names with `/kernel`", "/")


# ---- Orbax


def orbax(name: str, writer: str, **options):
    """Return a decorator: the function writes a params tree into a folder, and a config is put beside it."""

    def register(save):
        @weights(name, writer, transformers=False, needs=ORBAX, **options)
        def make(folder):
            logging.getLogger("absl").setLevel(logging.ERROR)
            save(folder, forms.nested(source().flat))
            write_config(folder, source().flat)
            return source()

        return save

    return register


@orbax("orbax-PyTreeCheckpointer", "Orbax v0, `PyTreeCheckpointer().save`")
def orbax_pytree(folder, tree):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(folder / "params", tree)


@orbax("orbax-StandardCheckpointer", "Orbax v0, `StandardCheckpointer().save`")
def orbax_standard(folder, tree):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", tree)


@orbax("orbax-CheckpointManager", "Orbax v0, one step of a `CheckpointManager`: `default/`", path="100")
def orbax_manager(folder, tree):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder) as manager:
        manager.save(100, args=ocp.args.StandardSave(tree))
    write_config(folder / "100", source().flat)


@orbax("orbax-TrainState", "Flax training code, a TrainState of params and optimizer state")
def orbax_train_state(folder, tree):
    import optax
    import orbax.checkpoint as ocp
    from flax.training.train_state import TrainState

    state = TrainState.create(apply_fn=None, params=tree, tx=optax.adam(1e-3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)


@orbax("orbax-v1", "Orbax v1, `save_pytree`")
def orbax_v1(folder, tree):
    from orbax.checkpoint import v1 as ocp

    ocp.save_pytree(folder / "params", tree)


@orbax("orbax-Composite", "Orbax v0, a `CheckpointManager` with several items: `params/`", path="100")
def orbax_composite(folder, tree):
    import orbax.checkpoint as ocp

    items = {"params": ocp.args.StandardSave(tree), "data": ocp.args.JsonSave({"epoch": 3})}
    with ocp.CheckpointManager(folder) as manager:
        manager.save(100, args=ocp.args.Composite(**items))
    write_config(folder / "100", source().flat)


@weights("orbax-hparams", "Orbax v1 with OpenAI's hparams.json beside it", transformers=False, needs=ORBAX)
def orbax_hparams(folder):
    orbax_v1(folder, forms.nested(source().flat))
    (folder / "hparams.json").write_text(json.dumps(wild_model.CONFIG.to_hparams()))
    return source()


def ours(format: str, transformers: bool, needs: tuple[str, ...] = ()) -> None:
    @weights(f"save-{format}", f'`gpt2_jax.save(format="{format}")`', transformers=transformers, needs=needs)
    def make(folder):
        import gpt2_jax

        gpt2_jax.save(folder, wild_model.CONFIG, forms.nested(source().flat), format=format)
        return source()


ours("huggingface", transformers=True)
ours("orbax", transformers=False, needs=ORBAX)
ours("tensorflow", transformers=False)
