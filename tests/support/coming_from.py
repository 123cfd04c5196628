"""The tables of docs/coming_from: their rows, the code in them, and the registry of checks.

A test file has a check for each row of its part, under the row's "theirs" cell. The check runs the code of "ours".
"""

import ast
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import gpt2_jax
from gpt2_jax import research, training
from gpt2_jax.checkpoints import loading
from gpt2_jax.data import Prepared
from gpt2_jax.research import surgery

FOLDER = commands.ROOT / "docs" / "coming_from"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}
HEAD = "| theirs | ours | note |"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARTS = {  # the test file test_coming_from_PART.py: the page, and the headings of the tables that it checks
    "flax": ("flax", ("Load and save", "Parameter names", "Forward pass")),
    "flax_runs": ("flax", ("Generate", "Dtype and devices", "Fine-tune")),
    "transformer_lens": ("transformer_lens", ("Load, tokenize, run", "Activation names", "Hooks become edits")),
    "transformer_lens_analyses": ("transformer_lens", ("Weights", "Analyses", "Activation patching")),
    "nanogpt": ("nanogpt", ("Data", "Config")),
    "nanogpt_runs": ("nanogpt", ("Training", "Model")),
    "books": ("books", ("Download and load", "Config words", "Parameter names")),
    "books_runs": ("books", ("Text in, text out", "Train and evaluate")),
    "books_classify": ("books", ("Classify texts",)),
    "books_instruct": ("books", ("Follow instructions",)),
}
MODULES = {"gpt2_jax": gpt2_jax, "research": research, "surgery": surgery, "training": training}
NAMES = MODULES | {"jax": jax, "jnp": jnp, "np": np}
PATCHING = "config, params, tokens, clean_tokens, metric"  # what "..." means in activation_patching(...)


class Row(NamedTuple):
    """One row of a table. Cells have no backticks, except `ours`, whose code spans are kept apart."""

    page: str
    theirs: str
    code: tuple[str, ...]
    note: str

    def __str__(self):
        return self.theirs

    def run(self, **names) -> Any:
        """Run the code of "ours". Return its value (a tuple if there are several), or the names that it sets."""
        known, values = NAMES | names, []
        for code in self.code:
            code = code.replace("(...,", f"({PATCHING},")
            try:
                tree: Any = ast.parse(code, mode="eval")
            except SyntaxError:
                exec(code, known)
                return known
            values.append(eval(compile(tree, code, "eval"), known))
        return values[0] if len(values) == 1 else tuple(values)

    def compiled(self, result: str = "", **names) -> Any:
        """Run the code as one program, which compiles faster than single operations. It sets the name `result`."""
        return jax.jit(lambda: self.run(**names)[result] if result else self.run(**names))()

    def parse(self) -> Any:
        """Parse "ours", a command or options of gpt2-train, with the real parser."""
        return parse(self.code[0])


def parse(line: str) -> Any:
    """Return the parsed arguments of one of our command lines, or of options of gpt2-train."""
    words = shlex.split(line if line.startswith("gpt2-") else f"gpt2-train {line}")
    return commands.parse(*words)


def tables(page: str) -> dict[str, list[str]]:
    """The lines of the table under each heading of a page that has one."""
    found, heading = {}, ""
    for line in FENCE.sub("", PAGES[page]).splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        if line.startswith("|"):
            found.setdefault(heading, []).append(line)
    return found


def rows(page: str, *headings: str) -> list[Row]:
    """The rows of the tables under some headings of a page. Without headings: all rows."""
    found = []
    for heading, table in tables(page).items():
        for line in table[2:] if heading in headings or not headings else []:
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            theirs, ours, note = cells
            found.append(Row(page, theirs.replace("`", ""), tuple(re.findall(r"`([^`]+)`", ours)), note))
    return found


def functions(page: str) -> dict[str, Any]:
    """The names that the function-defining Python blocks of a page define."""
    known = dict(NAMES)
    for tag, body in FENCE.findall(PAGES[page]):
        if tag == "python" and re.search(r"^def ", body, re.MULTILINE):
            exec(body, known)
    return known


class Checks(dict):
    """The checks of some rows: `@CHECKS("their call", ...)` registers one. Its parameters are `row` and fixtures."""

    def __init__(self, rows: list[Row]):
        super().__init__()
        self.rows = rows

    def __call__(self, *theirs):
        def register(check):
            for one in theirs:
                assert one not in self, f"two checks of {one}"
                self[one] = check
            return check

        return register

    def run(self, row, request):
        names = [name for name in inspect.signature(self[row.theirs]).parameters if name != "row"]
        self[row.theirs](row, **{name: request.getfixturevalue(name) for name in names})

    def assert_complete(self):
        """Each row has one check, and each check has one row."""
        theirs = [row.theirs for row in self.rows]
        assert len(set(theirs)) == len(theirs)
        assert set(theirs) == set(self)


def part(file: str) -> tuple[Checks, Any, Any]:
    """Return where a test file puts its checks, and its two tests: each row is checked, and each row has a check."""
    page, headings = PARTS[Path(file).stem.removeprefix("test_coming_from_")]
    checks = Checks(rows(page, *headings))

    @pytest.mark.parametrize("row", checks.rows, ids=str)
    def test_row(row, request):
        checks.run(row, request)

    def test_each_row_has_a_check():
        checks.assert_complete()

    return checks, test_row, test_each_row_has_a_check


def assert_is_the_release(row):
    """`load("gpt2")` requests the released 124M in the cache folder. tests/release tests the fetch from a server."""
    found = ("the config", "the params")
    with mock.patch.object(loading, "use_release", return_value=found) as use_release:
        loaded = row.run()
    assert use_release.call_args.args[:2] == ("124M", None)
    assert (loaded["config"], loaded["params"]) == found


# ---- names


def check_code(code: str) -> None:
    """Check that the names and arguments in one of our code spans exist."""
    if code.startswith(("gpt2-", "--")):
        parse(code)
    elif re.fullmatch(r"[\w/]+", code):
        assert code.replace("hL/", "h0/") in research.activation_names(tiny_models.CONFIG), code
    else:
        for node in ast.walk(ast.parse(code.replace("(...,", f"({PATCHING},"))):
            if isinstance(node, ast.Attribute):
                resolve(node)
            if isinstance(node, ast.Call):
                check_call(node)


def resolve(node: ast.expr) -> Any:
    """Return the object of a name like `research.forward`, or None if the root is not one of our names."""
    if isinstance(node, ast.Name):
        return MODULES.get(node.id) or {"config": tiny_models.CONFIG}.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    if isinstance(node.value, ast.Name) and node.value.id in ("tokenizer", "data"):
        owner = {"tokenizer": gpt2_jax.Tokenizer, "data": Prepared}[node.value.id]
        assert hasattr(owner, node.attr) or node.attr in owner.__annotations__, node.attr
    owner = resolve(node.value)
    if owner is None:
        return None
    if inspect.ismodule(owner):
        public = node.attr in owner.__all__ or f"{owner.__name__}.{node.attr}" in sys.modules
        assert public, f"{owner.__name__}.{node.attr} is not public"
    return getattr(owner, node.attr)


def check_call(node: ast.Call) -> None:
    """Check a call's arguments against the signature."""
    keywords = {keyword.arg for keyword in node.keywords}
    if isinstance(node.func, ast.Attribute) and node.func.attr == "apply":
        assert keywords <= {*inspect.signature(gpt2_jax.GPT2.__call__).parameters, "method", "rngs"}
    elif callable(called := resolve(node.func)):
        inspect.signature(called).bind(*node.args, **dict.fromkeys(keywords))
