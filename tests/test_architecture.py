"""The packages of gpt2_jax ("rooms"), and the one direction of their imports."""

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import strength

import gpt2_jax

PACKAGE = Path(gpt2_jax.__file__).parent
ROOT = Path(__file__).parents[1]

# A module imports only modules of lower levels or of its own room.
LEVELS = [
    {"explicit_axes"},
    {"_lazy", "checks", "files", "jax_defaults", "processes", "progress"},
    {"config", "params", "dropout", "sampling", "tokenizer", "attention", "products"},
    {"sharding"},
    {"kv_cache", "fused_attention", "tensor_parallel", "lora", "activations", "recipe", "release", "figures"},
    {"branches"},
    {"model"},
    {"edits", "added_tokens"},
    {"edit_checks"},
    {"changes"},
    {"checkpoints", "data"},
    {"generation"},
    {"evaluate", "inspection"},
    {"training"},
    {"research"},
    {"commands"},
    {"scripts", "benchmarks", "examples"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LAZY = {
    *("tensorflow", "torch", "transformers", "orbax", "safetensors", "huggingface_hub", "matplotlib", "rich", "tyro"),
    *("grain", "tensorboardX", "tokenizers", "lm_eval", "transformer_lens", "datasets"),
}


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).with_suffix("").parts[0]
    for room in LEVELS[-1]:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path, room


def imported(tree):
    """Yield the dotted name of everything a syntax tree imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_go_one_way():
    wrong = []
    for path, room in sources():
        assert room in LEVEL or room == "__init__", f"{path} is in no room: add it to LEVELS"
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            assert name.split(".")[0] not in LEVELS[-1], f"{path} imports {name}: nothing imports the scripts"
            if name.split(".")[0] == "gpt2_jax" and not may_import(room, name):
                wrong.append(f"{path.name} imports {name}")
    assert wrong == []


def may_import(room, name):
    """Say whether a module of this room may import this name of the package."""
    _, *rest = name.split(".")
    target = rest[0] if rest and rest[0] in LEVEL else None
    if target is None:  # the package itself, which gives access to everything: only for rooms above it
        return room == "commands" or room in LEVELS[-1]
    if room == "model" and target == "tokenizer":
        return False
    if room == "__init__":
        return target != "commands"
    return target == room or LEVEL[target] < LEVEL[room]


def test_the_arrows_can_tell_wrong_from_right():
    assert may_import("model", "gpt2_jax.kv_cache.KVCache")
    assert may_import("checkpoints", "gpt2_jax.checkpoints.tensorflow")
    assert may_import("scripts", "gpt2_jax")
    assert may_import("scripts", "gpt2_jax.commands.train.main")
    assert may_import("commands", "gpt2_jax.load")
    assert not may_import("research", "gpt2_jax.commands.train.main")
    assert not may_import("__init__", "gpt2_jax.commands.train.main")
    assert not may_import("model", "gpt2_jax.tokenizer.Tokenizer")
    assert not may_import("sampling", "gpt2_jax.config.GPT2Config")
    assert not may_import("checkpoints", "gpt2_jax.generation.generate")
    assert not may_import("model", "gpt2_jax.GPT2Config")


def test_the_model_sees_no_file_and_no_optimizer():
    names = imported(ast.parse((PACKAGE / "model.py").read_text(encoding="utf-8")))
    allowed = {"__future__", "collections", "functools", "typing", "flax", "jax", "numpy", "gpt2_jax"}
    assert {name.split(".")[0] for name in names} <= allowed


def test_heavy_libraries_are_imported_inside_functions_alone():
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {name for node in ast.walk(tree) if runs_later(node) for name in imported(node)}
        is_command = path.parent == PACKAGE / "commands"
        heavy = LAZY - {"tyro"} | {"jax", "flax", "optax"} if is_command else LAZY  # --help needs only tyro
        for name in set(imported(tree)) - inside:
            assert name.split(".")[0] not in heavy, f"{path} imports {name} on being imported"


def runs_later(node):
    """Say whether the imports below a node do not run when the file is imported: in a function, or only for types."""
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


def modules_after(code):
    """Return the names of all modules that a process has imported after it ran the code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(ast.literal_eval(done.stdout))


def test_importing_the_package_imports_no_other_framework():
    modules = modules_after("import gpt2_jax; [getattr(gpt2_jax, name) for name in gpt2_jax.__all__]")
    assert "jax" in modules
    assert not LAZY - {"rich"} & modules  # Flax imports rich


def test_importing_the_package_imports_nothing_of_it():
    """Names are imported when they are used. Code that does not need JAX does not import it."""
    modules = modules_after("import gpt2_jax; import gpt2_jax.recipe, gpt2_jax.files; dir(gpt2_jax)")
    assert not modules & {"jax", "flax", "numpy", "gpt2_jax.model", "gpt2_jax.checkpoints"}
    modules = modules_after("from gpt2_jax import GPT2Config")
    assert "gpt2_jax.config" in modules
    assert not modules & {"flax", "gpt2_jax.model", "gpt2_jax.checkpoints"}


def test_the_public_names_are_few_and_there():
    assert len(gpt2_jax.__all__) <= 21  # one for each thing that is done with a model
    assert set(gpt2_jax.__all__) <= set(dir(gpt2_jax))
    with pytest.raises(AttributeError, match="module 'gpt2_jax' has no attribute 'nothing'"):
        _ = gpt2_jax.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from gpt2_jax import nothing  # noqa: F401


@pytest.mark.parametrize("package", [gpt2_jax, gpt2_jax.generation])
def test_type_checkers_see_what_is_there(package):
    """The imports for type checkers are the public names, and each is the object that is imported on use."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and runs_later(node)]
    names = {alias.name: node.module for node in block.body for alias in node.names}
    assert names.keys() == set(package.__all__)
    for name, module in names.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_no_name_of_a_package_hides_one_of_its_modules():
    """`import gpt2_jax.evaluate.files` gives the module, in any order of imports."""
    modules = [module.name for module in pkgutil.walk_packages([PACKAGE], "gpt2_jax.")]
    assert "gpt2_jax.evaluate._perplexity" in modules
    for name in modules:
        importlib.import_module(name)
    for package, _, name in (module.rpartition(".") for module in modules):
        is_public = not name.startswith("_")
        hides = getattr(sys.modules[package], name, None) not in (None, sys.modules[f"{package}.{name}"])
        assert not (is_public and hides), f"{package} has a module {name}, and something else of this name"


def test_modules_are_attributes_and_no_public_name_hides_one():
    """`import gpt2_jax` is enough for `gpt2_jax.research.forward`. `gpt2_jax.generate` is always a function."""
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    rooms -= {"__init__"}
    assert not rooms & set(gpt2_jax.__all__)
    assert rooms <= set(dir(gpt2_jax))
    code = f"import gpt2_jax; assert all(getattr(gpt2_jax, n).__name__ == 'gpt2_jax.' + n for n in {sorted(rooms)})"
    modules_after(f"{code}; assert callable(gpt2_jax.generate)")
    modules_after("from gpt2_jax import research, training; research.forward, training.fit")


def test_the_wheel_has_every_package():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert {name for name in listed if ".models." not in name} == found


def test_what_runs_with_optimizations_is_there():
    tests = Path(__file__).parent
    there = {path.stem for path in tests.rglob("test_*.py")} | {path.name for path in tests.iterdir()}
    assert there >= strength.OPTIMIZED
